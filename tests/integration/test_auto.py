"""Mode `auto` on the real vLLM: clients name a model, and the server switches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.helpers.ports import free_port
from tests.integration.conftest import events
from tests.integration.processes import QUICKSTART_MODULE, ServerProcess
from vllm_hotswap.demo.quickstart import write

MAX_WAIT_S, DRAIN_S = 1.0, 0.1

SETTINGS = f"""\
  late:
    model: ./llama
    max_model_len: 1024
    enforce_eager: true
    kv_cache_memory_bytes: 64M
    load: on_demand
  unused:
    model: ./embed
    max_model_len: 256
    enforce_eager: true
    kv_cache_memory_bytes: 16M
    load: on_demand
switching: {{mode: auto, max_wait: {MAX_WAIT_S}, drain_timeout: {DRAIN_S}}}
"""

LONG = {"prompt": "Hello", "temperature": 0, "ignore_eos": True, "max_tokens": 400}

QUESTION = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo's models, and two that are loaded on demand; no test calls for a switch."""
    path = write(tmp_path_factory.mktemp("auto"))
    path.write_text(path.read_text() + SETTINGS)
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HOTSWAP_CONFIG": str(path)}
    running = ServerProcess.start(
        ["-m", QUICKSTART_MODULE], free_port(), path.with_name("server.log"), environment
    )
    yield running
    assert running.stop() == 0, running.log_tail()


@pytest.fixture(autouse=True)
def llama_is_active(server: ServerProcess) -> None:
    """Make llama active by a request for it."""
    server.complete("llama", "Hello", max_tokens=1)


def ask(server: ServerProcess, path: str, **body: object) -> httpx.Response:
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    return response


def epoch(server: ServerProcess) -> object:
    return server.status()["epoch"]


@contextmanager
def stream(server: ServerProcess, alias: str, **body: object) -> Iterator[Iterator[str]]:
    """Yield the lines of a streamed completion, comments among them."""
    asked = {"model": alias, "stream": True, **body}
    with server.client.stream("POST", "/v1/completions", json=asked) as response:
        assert response.status_code == 200
        yield (line for line in response.iter_lines() if line)


@contextmanager
def busy(server: ServerProcess, alias: str) -> Iterator[Iterator[str]]:
    """Run a long stream of that model; entered when its first token has arrived."""
    with stream(server, alias, **LONG) as lines:
        assert next(lines).startswith("data: ")
        yield lines


def text_of(lines: list[str]) -> str:
    parts = [event for event in events(iter(lines)) if event != "[DONE]"]
    return "".join(part["choices"][0]["text"] for part in parts)  # type: ignore[index]


def gauges(server: ServerProcess, alias: str) -> dict[str, float]:
    """Return vLLM's own gauges of that model's requests."""
    lines = server.client.get("/metrics").text.splitlines()
    found = {}
    for name in ("running", "waiting"):
        start = f'vllm:num_requests_{name}{{engine="0",model_name="{alias}"}}'
        found[name] = next(float(line.split()[-1]) for line in lines if line.startswith(start))
    return found


# --- models that were never loaded --------------------------------------------------------------

BAD = {
    "wrong type": {"messages": QUESTION, "max_tokens": "many"},
    "too long": {"messages": [{"role": "user", "content": "Hello " * 4000}]},
    "too many tokens": {"messages": QUESTION, "max_tokens": 5000},
    "unknown tool choice": {
        "messages": QUESTION,
        "tool_choice": {"type": "function", "function": {"name": "nobody"}},
    },
}

WRONG = [
    ("unused", "/v1/chat/completions", {"messages": QUESTION}, "pooling"),
    ("unused", "/v1/responses", {"input": "Hello"}, "pooling"),
    ("unused", "/classify", {"input": "Hello"}, "pooling"),
    ("late", "/v1/embeddings", {"input": "Hello"}, "generate"),
    ("late", "/score", {"text_1": "a", "text_2": "b"}, "generate"),
]


@pytest.mark.parametrize(("alias", "path", "body", "task"), WRONG)
def test_wrong_task_loads_and_switches_nothing(
    server: ServerProcess, alias: str, path: str, body: dict[str, object], task: str
) -> None:
    """A wrong task loads and switches nothing: the configuration tells what a model is for."""
    before: Any = server.status()
    refused = server.post(path, {"model": alias, **body})
    after: Any = server.status()

    error = refused.json()["error"]
    assert (404, "wrong_task") == (refused.status_code, error["code"])
    assert f"(it serves {task})" in error["message"]
    assert ("cold", before["epoch"]) == (after["models"][alias]["residency"], after["epoch"])


def test_a_form_of_the_wrong_task_loads_and_switches_nothing(server: ServerProcess) -> None:
    """A form of the wrong task, as audio with its model in a field, loads and switches nothing."""
    refused = server.client.post("/v1/audio/transcriptions", data={"model": "late"})
    after: Any = server.status()

    assert (404, "wrong_task") == (refused.status_code, refused.json()["error"]["code"])
    assert "cold" == after["models"]["late"]["residency"]


@pytest.mark.parametrize("name", BAD)
def test_bad_request_loads_and_switches_nothing(server: ServerProcess, name: str) -> None:
    """vLLM's own check finds a bad request without a frontend, so it loads and switches nothing."""
    before: Any = server.status()
    refused = server.post("/v1/chat/completions", {"model": "late", **BAD[name]})
    after: Any = server.status()

    assert 400 == refused.status_code, refused.text
    assert ("cold", before["epoch"]) == (after["models"]["late"]["residency"], after["epoch"])


# --- which requests are served ------------------------------------------------------------------


def test_every_model_answers_under_its_name(server: ServerProcess) -> None:
    """Two generating models and one for embeddings answer in turn, without a call for a switch."""
    for alias in ("qwen", "llama", "qwen"):
        answer = ask(server, "/v1/completions", model=alias, prompt="Who are you?", temperature=0)
        assert alias == answer.json()["model"] == answer.headers["x-hotswap-model"]
        assert "1" == answer.headers["x-hotswap-switched"]
        assert f"I am {alias}" in answer.json()["choices"][0]["text"]
    answer = ask(server, "/v1/embeddings", model="embed", input=["a cat", "a dog"])
    assert "embed" == answer.json()["model"] == answer.headers["x-hotswap-model"]
    assert [0, 1] == [entry["index"] for entry in answer.json()["data"]]


def test_requests_that_come_together_are_answered_by_their_models(server: ServerProcess) -> None:
    """Of thirty requests alternating between three models, none is lost or answered by another."""
    aliases = ["llama", "qwen", "embed"] * 10

    def one(alias: str) -> str:
        if alias == "embed":
            return str(ask(server, "/v1/embeddings", model=alias, input="a cat").json()["model"])
        said = server.complete(alias, "Who are you?", max_tokens=16)
        return alias if f"I am {alias}" in said else said

    with ThreadPoolExecutor(len(aliases)) as pool:
        assert aliases == list(pool.map(one, aliases))


def test_one_request_may_be_several_of_the_engine(server: ServerProcess) -> None:
    """Several prompts or choices in one request are all answered after the one switch."""
    prompts = ["Hello", "Who are you?", "The quick brown fox"]
    answer = ask(
        server, "/v1/completions", model="qwen", prompt=prompts, n=2, max_tokens=12, temperature=1
    )
    assert "1" == answer.headers["x-hotswap-switched"]
    assert list(range(6)) == [choice["index"] for choice in answer.json()["choices"]]
    assert 6 * 12 >= answer.json()["usage"]["completion_tokens"] > 6


def test_responses_and_messages_wait_for_their_model(server: ServerProcess) -> None:
    """On every route, the named model answers."""
    response = ask(server, "/v1/responses", model="qwen", input="Who are you?").json()
    assert "I am qwen" in response["output"][0]["content"][0]["text"]
    message = ask(server, "/v1/messages", model="llama", messages=QUESTION, max_tokens=32).json()
    assert "I am llama" in message["content"][0]["text"]


def test_model_that_was_never_loaded_is_loaded_by_its_first_request(server: ServerProcess) -> None:
    """A model's first request loads it in the warm host, and its answer matches its weights."""
    models: Any = server.status()["models"]
    assert "cold" == models["late"]["residency"]
    answer = ask(
        server, "/v1/completions", model="late", prompt="Hello", max_tokens=12, temperature=0
    )
    assert "late" == answer.json()["model"]
    said = answer.json()["choices"][0]["text"]
    assert said == server.complete("llama", "Hello", max_tokens=12)


# --- what never switches ------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_bad_request_gets_vllms_own_answer_and_never_switches(
    server: ServerProcess, name: str
) -> None:
    """A bad request gets vLLM's own answer at once, word for word, without a switch."""
    before = epoch(server)
    refused = server.post("/v1/chat/completions", {"model": "qwen", **BAD[name]})
    after = epoch(server)
    server.complete("qwen", "Hello", max_tokens=1)
    when_active = server.post("/v1/chat/completions", {"model": "qwen", **BAD[name]})

    assert 400 == refused.status_code
    assert before == after
    assert when_active.json() == refused.json()


# --- waiting requests ---------------------------------------------------------------------------


def test_long_request_is_parked_for_one_that_is_due_and_goes_on(server: ServerProcess) -> None:
    """A long request is parked for a due one, is notified at once, and neither loses a token."""
    with stream(server, "llama", **LONG) as lines:
        alone = list(lines)
    with busy(server, "llama") as long:
        with stream(server, "qwen", prompt="Hello", max_tokens=16, temperature=0) as waiting:
            first = next(waiting)
            short = list(waiting)
        rest = list(long)

    assert ": waiting for qwen" == first
    assert any(line.startswith(": served waited=") for line in short)
    assert "data: [DONE]" == short[-1]
    assert "I am qwen" in text_of(short)
    assert ": parked" in rest
    assert "data: [DONE]" == rest[-1]
    assert text_of(alone).endswith(text_of(rest))
    assert len(text_of(rest)) > len(text_of(alone)) * 0.9


def test_client_that_leaves_while_it_waits_leaves_nothing_behind(server: ServerProcess) -> None:
    """A client that leaves while it waits leaves nothing in the queue or vLLM; others continue."""
    with busy(server, "llama") as long:
        with stream(server, "qwen", prompt="Hello") as waiting:
            assert ": waiting for qwen" == next(waiting)
        rest = list(long)

    models: Any = server.status()["models"]
    assert 0 == server.status()["waiting"] == models["qwen"]["waiting"]
    assert 0 == models["qwen"]["in_flight"]
    assert "data: [DONE]" == rest[-1]
    assert "I am qwen" in server.complete("qwen", "Hello", max_tokens=16)
    assert {"running": 0, "waiting": 0} == gauges(server, "qwen")
