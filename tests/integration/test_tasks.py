"""Models of four tasks behind one server: who answers what, and what outlives a request."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
import torch
import websockets.sync.client
from safetensors.torch import load_file, save_file

from tests.helpers.ports import free_port
from tests.integration.conftest import events
from tests.integration.processes import ServerProcess
from vllm_hotswap.api.vllm_routes import VLLM_USER_ROUTES
from vllm_hotswap.demo.quickstart import CONFIGURATION, MODELS

CLASSES = ("no", "maybe", "yes")

CLASSIFY = """\
  classify:
    model: ./classify
    max_model_len: 512
    enforce_eager: true
    kv_cache_memory_bytes: 64M
"""

TELLS = "    enable_tokenizer_info_endpoint: true\n"

LONG = {"max_output_tokens": 1900, "ignore_eos": True}
"""A response that takes seconds."""


def write_classifier(folder: Path) -> None:
    """Write a model with random weights above the tiny encoder."""
    folder.mkdir()
    shutil.copy(MODELS / "embed" / "tokenizer.json", folder)
    shutil.copy(MODELS / "embed" / "tokenizer_config.json", folder)
    config = json.loads((MODELS / "embed" / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    config["id2label"] = dict(enumerate(CLASSES))
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(MODELS / "embed" / "model.safetensors")
    weights = {f"bert.{name}": tensor for name, tensor in weights.items()}
    size, random = config["hidden_size"], torch.Generator().manual_seed(0)
    for name, rows in (("bert.pooler.dense", size), ("classifier", len(CLASSES))):
        weights[f"{name}.weight"] = torch.randn(rows, size, generator=random).bfloat16()
        weights[f"{name}.bias"] = torch.zeros(rows).bfloat16()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of four tasks that keeps responses."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("llama", "qwen", "embed"):
        shutil.copytree(MODELS / name, folder / name)
    write_classifier(folder / "classify")
    path = folder / "models.yaml"
    llama_tells = CONFIGURATION.replace("choice: false\n", "choice: false\n" + TELLS, 1)
    path.write_text(llama_tells + CLASSIFY)
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    command = ["-m", "vllm_hotswap", "serve", str(path)]
    running = ServerProcess.start(command, free_port(), folder / "server.log", environment)
    yield running
    assert running.stop() == 0, running.log_tail()


def error(response: httpx.Response) -> dict[str, Any]:
    return dict(response.json()["error"])


# --- tasks ----------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "Who are you?"}]
GENERATE: Mapping[str, object] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 4},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 4},
    "/generative_scoring": {"query": "a", "items": ["b"], "label_token_ids": [1, 2]},
}
PAIRS = {"query": "a cat", "documents": ["a dog", "a stock"]}
EMBED: Mapping[str, object] = {
    "/v1/embeddings": {"input": "a cat"},
    "/v2/embed": {"texts": ["a cat"]},
    "/score": {"text_1": "a cat", "text_2": ["a dog"]},
    "/v1/score": {"text_1": "a cat", "text_2": ["a dog"]},
    "/rerank": PAIRS,
    "/v1/rerank": PAIRS,
    "/v2/rerank": PAIRS,
}
CLASSIFYING: Mapping[str, object] = {"/classify": {"input": "a cat"}}
OF_TASK = {"llama": GENERATE, "qwen": GENERATE, "embed": EMBED, "classify": CLASSIFYING}
POOLING = {"/pooling": {"input": "a cat"}}
ALIASES = tuple(OF_TASK)


@pytest.mark.parametrize("alias", ALIASES)
def test_each_alias_has_exactly_its_own_routes(server: ServerProcess, alias: str) -> None:
    """Each alias answers exactly its task's routes; others name the aliases that have them."""
    server.switch(alias)
    for path, body in {**GENERATE, **EMBED, **CLASSIFYING}.items():
        response = server.post(path, {"model": alias, **body})  # type: ignore[dict-item]
        if path in OF_TASK[alias]:
            assert 200 == response.status_code, (path, response.text)
            continue
        others = [other for other in ALIASES if path in OF_TASK[other]]
        assert (404, "wrong_task") == (response.status_code, error(response)["code"]), path
        assert error(response)["message"].endswith(f"use {' or '.join(others)}")


@pytest.mark.parametrize("alias", ALIASES)
def test_no_route_of_vllm_answers_another_task_in_a_form_of_its_own(
    server: ServerProcess, alias: str
) -> None:
    """No route answers another task with a bare 404 or a 5xx, whatever is in the body."""
    server.switch(alias)
    body = {"model": alias, "state": "s", "questions": {"q": {"type": "boolean"}}}
    paths = [line.removeprefix("POST ") for line in VLLM_USER_ROUTES if line.startswith("POST ")]
    assert "/v1/systemone" in paths  # vLLM mounts it for every model, and answers 501
    for path in paths:
        response = server.post(path.replace("{response_id}", "resp_nobody"), body)
        assert response.status_code in (400, 403, 404, 415), (path, response.text)
        assert {"message", "type", "param", "code"} <= set(error(response)), path


def test_a_route_of_one_models_flag_is_that_models_alone(server: ServerProcess) -> None:
    """A route of one model's flag is that model's alone; vLLM would give it to later ones."""
    server.switch("llama")
    told = server.client.get("/tokenizer_info")
    server.switch("qwen")
    refused = server.client.get("/tokenizer_info")

    assert 200 == told.status_code
    assert (404, "wrong_task") == (refused.status_code, error(refused)["code"])
    assert error(refused)["message"].endswith("use llama")


MANY = 200
WORDS = [f"word {n}" for n in range(MANY)]
LARGE: Mapping[tuple[str, str], tuple[Mapping[str, object], str]] = {
    ("llama", "/v1/completions"): ({"prompt": WORDS, "max_tokens": 1}, "choices"),
    ("llama", "/v1/chat/completions"): (
        {"messages": MESSAGES, "n": MANY, "temperature": 1, "max_tokens": 1},
        "choices",
    ),
    ("llama", "/v1/chat/completions/batch"): (
        {"messages": [MESSAGES] * MANY, "max_tokens": 1},
        "choices",
    ),
    ("llama", "/generative_scoring"): (
        {"query": "a", "items": WORDS, "label_token_ids": [1]},
        "data",
    ),
    ("embed", "/v1/embeddings"): ({"input": WORDS}, "data"),
    ("embed", "/score"): ({"text_1": "a cat", "text_2": WORDS}, "data"),
}


@pytest.mark.parametrize(("alias", "path"), LARGE)
def test_a_call_for_many_things_is_answered_whole(
    server: ServerProcess, alias: str, path: str
) -> None:
    """Many inputs are answered in order, although spread over turns; too many are refused."""
    server.switch(alias)
    body, field = LARGE[alias, path]
    answer = server.post(path, {"model": alias, **body})
    assert 200 == answer.status_code, answer.text
    assert [*range(MANY)] == [one["index"] for one in answer.json()[field]]

    name, value = next((n, v) for n, v in body.items() if v in (WORDS, MANY, [MESSAGES] * MANY))
    more = value * 20 if isinstance(value, list) else 4000
    refused = server.post(path, {"model": alias, **body, name: more})
    assert (413, "call_too_large") == (refused.status_code, error(refused)["code"])


def test_a_classifier_tells_its_classes(server: ServerProcess) -> None:
    """A classifier answers with class names and probabilities."""
    server.switch("classify")
    response = server.post("/classify", {"model": "classify", "input": ["a cat", "a dog"]})

    for answer in response.json()["data"]:
        assert answer["label"] in CLASSES
        assert sum(answer["probs"]) == pytest.approx(1, abs=0.01)


def test_a_request_without_a_model_is_for_the_active_ones_task(server: ServerProcess) -> None:
    """A request without a model is answered or refused as the active model's task allows."""
    server.switch("embed")
    embedded = server.post("/v1/embeddings", {"input": "a cat"})
    chat = server.post("/v1/chat/completions", {"messages": MESSAGES})
    server.switch("llama")
    refused = server.post("/v1/embeddings", {"input": "a cat"})

    assert (200, "embed") == (embedded.status_code, embedded.json()["model"])
    assert [404, 404] == [chat.status_code, refused.status_code]
    assert "model 'embed' does not support" in error(chat)["message"]
    assert "use embed" in error(refused)["message"]


def test_sagemakers_route_answers_for_each_models_own_task(server: ServerProcess) -> None:
    """vLLM's `/invocations` does each model's own task."""
    objects = []
    for alias, body in (
        ("llama", {"prompt": "Hello", "max_tokens": 4}),
        ("embed", {"input": "a cat"}),
        ("classify", {"input": "a cat"}),
        ("qwen", {"prompt": "Hello", "max_tokens": 4}),
    ):
        server.switch(alias)
        answer = server.post("/invocations", {"model": alias, **body}).json()
        objects.append((answer["model"], answer["object"], answer["id"].split("-")[0]))

    assert [
        ("llama", "text_completion", "cmpl"),
        ("embed", "list", "embd"),
        ("classify", "list", "classify"),
        ("qwen", "text_completion", "cmpl"),
    ] == objects


def test_anthropics_client_reads_the_error(server: ServerProcess) -> None:
    """Anthropic's client reads our errors with its own classes, message and type."""
    server.switch("embed")
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)

    with pytest.raises(anthropic.NotFoundError) as refused:
        client.messages.create(model="embed", max_tokens=4, messages=MESSAGES)  # type: ignore[arg-type]

    assert "model 'embed' does not support POST /v1/messages" in str(refused.value)
    assert isinstance(refused.value.body, dict)
    assert "invalid_request_error" == refused.value.body["error"]["type"]


# --- responses that are kept ----------------------------------------------------------------


def created(server: ServerProcess, alias: str, **body: object) -> dict[str, Any]:
    fields = {"model": alias, "input": "Who are you?", "temperature": 0, **body}
    response = server.post("/v1/responses", fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


def kept(server: ServerProcess, response: Mapping[str, Any]) -> dict[str, Any]:
    answer = server.client.get(f"/v1/responses/{response['id']}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_kept_responses_are_found_whoever_is_active(server: ServerProcess) -> None:
    """A kept response is found by its id alone: of an active, parked or unloaded model."""
    server.switch("llama")
    of_llama = created(server, "llama")
    server.switch("qwen")
    of_qwen = created(server, "qwen")
    server.switch("embed")
    assert 200 == server.post("/admin/models/qwen/unload", {}).status_code

    for response in (of_llama, of_qwen):
        assert response["output"] == kept(server, response)["output"]
    assert "embed" == server.status()["active"]
    missing = server.client.get("/v1/responses/resp_nobody")
    assert (404, "response_not_found") == (missing.status_code, error(missing)["code"])


def test_a_conversation_goes_on_with_its_own_model_alone(server: ServerProcess) -> None:
    """A conversation continues with its own model, named or not; others name that model."""
    server.switch("llama")
    first = created(server, "llama")
    more = {"input": "Who else?", "previous_response_id": first["id"], "max_output_tokens": 4}

    unnamed = server.post("/v1/responses", more)
    server.switch("qwen")
    other = server.post("/v1/responses", {"model": "qwen", **more})

    assert (200, "llama") == (unnamed.status_code, unnamed.json()["model"])
    assert (400, "previous_response_id") == (other.status_code, error(other)["param"])
    assert "belongs to model 'llama'" in error(other)["message"]


def test_a_drain_waits_for_work_in_the_background(server: ServerProcess) -> None:
    """A drain waits for background work, accepted when answered, up to its last token."""
    server.switch("llama")
    response = created(server, "llama", background=True, max_output_tokens=200, ignore_eos=True)
    assert "queued" == response["status"]

    switch = server.switch("qwen", drain_timeout=60)

    assert 0 == switch["requests_cut"]
    done = kept(server, response)
    assert ("incomplete", 200) == (done["status"], done["usage"]["output_tokens"])


@pytest.mark.parametrize("stream", [False, True])
def test_work_in_the_background_that_is_cut_says_so(server: ServerProcess, stream: bool) -> None:
    """Aborted background work has failed with the reason, not `queued`, and leaves its engine."""
    server.switch("llama")
    if stream:
        body = {"model": "llama", "input": "x", "background": True, "stream": True, **LONG}
        with server.client.stream("POST", "/v1/responses", json=body) as answer:
            first: Any = next(events(answer.iter_lines()))
        response = first["response"]
    else:
        response = created(server, "llama", background=True, **LONG)

    switch = server.switch("qwen", drain_timeout=0)

    assert 1 == switch["requests_cut"]
    cut = kept(server, response)
    assert "failed" == cut["status"]
    assert "still running 0 s after a switch to 'qwen'" in cut["error"]["message"]
    server.switch("llama")
    assert 0 == server.status()["models"]["llama"]["in_flight"]  # type: ignore[index]


def test_work_in_the_background_is_cancelled_by_its_id(server: ServerProcess) -> None:
    """Background work is cancelled by its id, and its stream ends with an error, unlike vLLM's."""
    server.switch("llama")
    body = {"model": "llama", "input": "x", "background": True, "stream": True, **LONG}
    with server.client.stream("POST", "/v1/responses", json=body) as answer:
        received = events(answer.iter_lines())
        first: Any = next(received)
        path = f"/v1/responses/{first['response']['id']}"
        cancelled = httpx.post(f"{server.url}{path}/cancel", trust_env=False, timeout=60)
        last: Any = list(received)[-1]

    assert "cancelled" == cancelled.json()["status"]
    assert ("error", "response_ended") == (last["type"], last["code"])
    assert "cancelled" == kept(server, first["response"])["status"]
    assert 0 == server.switch("qwen", drain_timeout=30)["requests_cut"]


# --- aborts and websockets ------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_a_stream_that_is_cut_ends_soon(server: ServerProcess, path: str) -> None:
    """An aborted stream ends soon: vLLM sees a disconnect before its task is cancelled."""
    server.switch("llama")
    body = {"messages": MESSAGES, "max_tokens": 1900} if "chat" in path else {"input": "x", **LONG}
    fields = {"model": "llama", "stream": True, "ignore_eos": True, **body}
    received: list[object] = []
    begun = threading.Event()

    def read() -> None:
        url = f"{server.url}{path}"
        with httpx.stream("POST", url, json=fields, trust_env=False, timeout=60) as answer:
            for event in events(answer.iter_lines()):
                received.append(event)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    switch: Any = server.switch("qwen", drain_timeout=0)
    reader.join()

    assert 1 == switch["requests_cut"]
    assert "drain_timeout" in json.dumps(received[-1])
    assert switch["phases"]["drain"] < 3000


@pytest.mark.parametrize(
    ("query", "code"), [("model=llama", "wrong_task"), ("model=nobody", "model_not_found")]
)
def test_a_websocket_is_refused_in_the_handshake(
    server: ServerProcess, query: str, code: str
) -> None:
    """A WebSocket that no model takes is refused with an HTTP error in the handshake."""
    server.switch("llama")
    url = f"{server.url.replace('http', 'ws', 1)}/v1/realtime?{query}"
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        websockets.sync.client.connect(url, proxy=None)

    answer = refused.value.response
    assert 404 == answer.status_code
    assert code == json.loads(answer.body or b"")["error"]["code"]
