"""What switching promises, on the real vLLM."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from tests.integration.conftest import events
from tests.integration.processes import ServerProcess

PROMPTS = ["Hello", "Who are you?", "What is the weather in Paris?", "The quick brown fox"]

CAT = "a cat sits on the mat"

DRAIN_S = 60

LONG = {"temperature": 0, "ignore_eos": True, "max_tokens": 1500}


def completions_of(alias: str) -> Callable[[ServerProcess], list[str]]:
    return lambda server: [server.complete(alias, prompt) for prompt in PROMPTS]


@contextmanager
def long_stream(server: ServerProcess, alias: str) -> Iterator[Iterator[object]]:
    """Run a stream of 1,500 tokens, entered when its first token has arrived."""
    body = {"model": alias, "prompt": "Hello", "stream": True, **LONG}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        stream = events(response.iter_lines())
        next(stream)
        yield stream


def test_fifty_switches_keep_both_processes_and_every_answer(
    server: ServerProcess,
) -> None:
    """Fifty switches restart neither process, and each model answers as before."""
    pids = server.process.pid, server.status()["host"]["pid"]  # type: ignore[index]
    before = answers_of_both(server)
    for _ in range(25):
        server.switch("qwen")
        server.complete("qwen", "Hello", max_tokens=2)
        server.switch("llama")

    assert before == answers_of_both(server)
    assert pids == (server.process.pid, server.status()["host"]["pid"])  # type: ignore[index]
    assert server.process.poll() is None


def answers_of_both(server: ServerProcess) -> list[list[str]]:
    answers = []
    for alias in ("llama", "qwen"):
        server.switch(alias)
        answers.append(completions_of(alias)(server))
    return answers


@pytest.mark.wide
def test_each_model_answers_as_a_plain_server_of_it_alone(
    server: ServerProcess, plain_answer: Callable[..., object]
) -> None:
    """Each generating model answers as a plain server of it alone, to the letter."""
    with ThreadPoolExecutor() as pool:  # a start takes most of its time on one core
        plain = [
            pool.submit(plain_answer, alias, completions_of(alias)) for alias in ("llama", "qwen")
        ]
    assert [one.result() for one in plain] == answers_of_both(server)


def test_switching_reaches_an_embedding_model_and_goes_on(
    server: ServerProcess,
) -> None:
    """Switches mix tasks in one server: generate, embed, generate."""
    before = server.complete("llama", "Hello")
    server.switch("embed")
    vector = server.embed("embed", CAT)
    server.switch("qwen")
    after = server.complete("qwen", "Hello")
    server.switch("embed")

    assert vector == pytest.approx(server.embed("embed", CAT), abs=1e-6)
    assert "llama" in before
    assert "qwen" in after


@pytest.mark.wide
def test_an_embedding_model_answers_as_a_plain_server_of_it_alone(
    server: ServerProcess, plain_answer: Callable[..., object]
) -> None:
    """An embedding model answers as a plain server of it alone, except for the order of sums."""
    expected = plain_answer("embed", lambda plain: plain.embed("embed", CAT))
    server.switch("embed")

    assert server.embed("embed", CAT) == pytest.approx(expected, abs=1e-3)


def test_a_stream_that_ends_in_time_is_whole(server: ServerProcess) -> None:
    """A switch waits for a running stream, which ends with its last token and [DONE]."""
    with ThreadPoolExecutor() as pool, long_stream(server, "llama") as stream:
        switch = pool.submit(server.switch, "qwen", drain_timeout=120)
        rest = list(stream)
        result = switch.result()

    assert "[DONE]" == rest[-1]
    assert "length" == rest[-2]["choices"][0]["finish_reason"]  # type: ignore[index]
    assert 0 == result["requests_cut"]


def test_a_stream_past_the_deadline_ends_with_an_explicit_error(server: ServerProcess) -> None:
    """Past the deadline a stream ends with an error event, no [DONE]; the switch continues."""
    with ThreadPoolExecutor() as pool, long_stream(server, "llama") as stream:
        switch = pool.submit(server.switch, "qwen", drain_timeout=0.2)
        rest = list(stream)
        result = switch.result()

    assert "drain_timeout" == rest[-1]["error"]["code"]  # type: ignore[index]
    assert "[DONE]" not in rest
    assert 1 == result["requests_cut"]
    assert 0 == running_requests(server, "llama")


def test_an_answer_past_the_deadline_is_an_error_not_a_short_answer(server: ServerProcess) -> None:
    """A request without an answer at the deadline gets 503, never a shortened 200."""
    body = {"model": "llama", "prompt": "Hello", **LONG}
    with ThreadPoolExecutor() as pool:
        request = pool.submit(server.post, "/v1/completions", body)
        wait_until(lambda: in_flight(server, "llama") == 1)
        server.switch("qwen", drain_timeout=0.2)
        response = request.result()

    assert (503, "drain_timeout") == (response.status_code, response.json()["error"]["code"])


def test_requests_during_a_switch_reach_the_right_model(server: ServerProcess) -> None:
    """In a switch, the target's requests wait for it; the source's get a time to retry."""
    with ThreadPoolExecutor() as pool, long_stream(server, "llama") as stream:
        switch = pool.submit(server.switch, "qwen", drain_timeout=120)
        wait_until(lambda: server.status()["phase"] == "drain")
        held = pool.submit(server.complete, "qwen", "Hello")
        source = server.post("/v1/completions", {"model": "llama", "prompt": "Hello"})
        other = server.post("/v1/models/switch", {"model": "embed"})
        same = pool.submit(server.switch, "qwen")
        wait_until(lambda: server.status()["waiting"] == 1)
        was_held = not held.done()
        list(stream)

    assert was_held
    assert "qwen" in held.result()
    assert (503, "model_switching") == (source.status_code, source.json()["error"]["code"])
    assert int(source.headers["retry-after"]) >= 1
    assert (409, "switch_in_progress") == (other.status_code, other.json()["error"]["code"])
    assert switch.result()["operation_id"] == same.result()["operation_id"]


def test_a_client_that_leaves_frees_its_engine_even_if_it_is_parked_next(
    server: ServerProcess,
) -> None:
    """A disconnected stream delays no drain and leaves its engine, even if parked next."""
    with long_stream(server, "llama"):
        pass
    started = time.monotonic()
    server.switch("qwen", drain_timeout=DRAIN_S)
    server.switch("llama")

    assert time.monotonic() - started < DRAIN_S
    assert 0 == running_requests(server, "llama")


def test_a_model_that_is_not_loaded_is_loaded_by_its_first_switch(server: ServerProcess) -> None:
    """An unloaded model is loaded by its first switch in the warm host, then switches normally."""
    host = server.status()["host"]["pid"]  # type: ignore[index]
    server.switch("late")
    text = server.complete("late", "Hello")
    server.switch("llama")

    assert text == server.complete("llama", "Hello")
    assert host == server.status()["host"]["pid"]  # type: ignore[index]
    assert "parked" == server.status()["models"]["late"]["residency"]  # type: ignore[index]


def test_a_target_that_cannot_be_loaded_leaves_the_source_serving(server: ServerProcess) -> None:
    """A target that cannot be loaded gives the caller the cause; the source answers as before."""
    before = server.complete("llama", "Hello")
    response = server.post("/v1/models/switch", {"model": "broken"})

    error = response.json()["error"]
    assert (503, "switch_failed") == (response.status_code, error["code"])
    assert "'llama' is still active" in error["message"]
    assert before == server.complete("llama", "Hello")
    assert "cold" == server.status()["models"]["broken"]["residency"]  # type: ignore[index]


def test_sixteen_clients_lose_nothing_over_twenty_switches(server: ServerProcess) -> None:
    """Over twenty switches, sixteen clients get right answers or explicit, retryable errors."""
    golden = {}
    for alias in ("qwen", "llama"):
        server.switch(alias)
        golden[alias] = server.complete(alias, "Hello", max_tokens=16)
    stop = threading.Event()
    with ThreadPoolExecutor(16) as pool:
        clients = [
            pool.submit(keep_asking, server, ("llama", "qwen")[n % 2], stop) for n in range(16)
        ]
        for _ in range(10):
            server.switch("qwen", drain_timeout=30)
            server.switch("llama", drain_timeout=30)
        stop.set()
        outcomes = [outcome for client in clients for outcome in client.result()]

    answers = [o for o in outcomes if o[1] == 200]
    refusals = {o[2] for o in outcomes if o[1] != 200}
    assert {(alias, 200, golden[alias]) for alias, _, _ in answers} == set(answers)
    assert {"llama", "qwen"} == {alias for alias, _, _ in answers}
    assert refusals <= {"model_not_active", "model_switching"}


def keep_asking(
    server: ServerProcess, alias: str, stop: threading.Event
) -> list[tuple[str, int, str]]:
    """Send requests until stopped. Return (alias, status, text or error code) of each request."""
    outcomes = []
    body = {"model": alias, "prompt": "Hello", "max_tokens": 16, "temperature": 0}
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        while not stop.is_set():
            response = client.post("/v1/completions", json=body)
            answer = response.json()
            ok = response.status_code == 200
            said = answer["choices"][0]["text"] if ok else answer["error"]["code"]
            outcomes.append((alias, response.status_code, said))
    return outcomes


def in_flight(server: ServerProcess, alias: str) -> int:
    return int(server.status()["models"][alias]["in_flight"])  # type: ignore[index]


def running_requests(server: ServerProcess, alias: str) -> float:
    """Return the requests that the alias's engine still has, once it has reported after a step."""
    server.switch(alias)
    server.complete(alias, "Hello", max_tokens=1)
    name = f'vllm:num_requests_running{{engine="0",model_name="{alias}"}}'
    metrics = server.client.get("/metrics").text
    return next(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(name))


def wait_until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition was never fulfilled"
