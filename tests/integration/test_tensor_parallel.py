"""A tensor-parallel model beside another one: vLLM's worker processes behind the same host."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from tests.helpers.faults import wait_until
from tests.helpers.ports import free_port
from tests.integration.conftest import events
from tests.integration.processes import (
    QUICKSTART_MODULE,
    ServerProcess,
    still_there,
    without_compilers,
)
from vllm_hotswap.demo.quickstart import MODELS
from vllm_hotswap.host.devices import anonymous_bytes

pytestmark = [pytest.mark.all_cores, pytest.mark.wide]

PROMPTS = ["Hello", "Who are you?"]
MODELS_YAML = f"""\
default_model: llama
models:
  llama:
    model: {MODELS / "llama"}
    max_model_len: 512
    enforce_eager: true
    kv_cache_memory_bytes: 33554432
  wide:
    model: {MODELS / "llama"}
    max_model_len: 512
    enforce_eager: true
    kv_cache_memory_bytes: 33554432
    tensor_parallel_size: 2
    load: on_demand
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of one model twice, once divided among two workers; there is no compiler."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "models.yaml").write_text(MODELS_YAML)
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HOTSWAP_CONFIG": str(folder / "models.yaml"),
        **without_compilers(folder),
    }
    running = ServerProcess.start(
        ["-m", QUICKSTART_MODULE], free_port(), folder / "server.log", environment
    )
    yield running
    children = running.descendants()
    assert running.stop() == 0, running.log_tail()
    assert still_there(children) == []


@pytest.fixture(autouse=True)
def llama_is_active() -> None:
    """Do nothing: tests of this module continue where the one before ended."""


def host(server: ServerProcess) -> psutil.Process:
    status: Any = server.status()["host"]
    return psutil.Process(status["pid"])


def workers(server: ServerProcess) -> list[psutil.Process]:
    return [child for child in host(server).children() if child.name().startswith("VLLM::Worker")]


def operate(server: ServerProcess, alias: str, name: str, **body: object) -> str:
    response = server.post(f"/admin/models/{alias}/{name}", body)
    assert response.status_code == 200, response.text
    return str(response.json()["residency"])


def test_a_model_of_two_workers_answers_like_one_of_one(server: ServerProcess) -> None:
    """A model of two workers, loaded in the running host, answers like one of one worker."""
    expected = [server.complete("llama", prompt) for prompt in PROMPTS]
    server.switch("wide")
    wide = [server.complete("wide", prompt) for prompt in PROMPTS]
    divided_among = len(workers(server))
    server.switch("llama")

    assert expected == wide
    assert 2 == divided_among
    assert expected == [server.complete("llama", prompt) for prompt in PROMPTS]


def test_nothing_listens_but_the_api(server: ServerProcess) -> None:
    """Only the API listens, although host and workers met over TCP; so after a reload."""
    asked_for = (server.process.pid, "127.0.0.1", httpx.URL(server.url).port)
    server.switch("wide")
    processes = len(server.all_processes())
    first = server.listening()
    server.switch("llama")
    operate(server, "wide", "unload")
    operate(server, "wide", "load")
    again = server.listening()

    assert processes >= 4
    assert {asked_for} == first == again


def test_its_workers_compile_nothing(server: ServerProcess) -> None:
    """Its workers compile nothing, neither for the vocabulary nor for ranks."""
    server.switch("wide")
    body = {"model": "wide", "prompt": PROMPTS[0], "max_tokens": 2, "logprobs": 2}
    answer = server.post("/v1/completions", body)

    assert answer.status_code == 200, answer.text
    assert 2 == len(answer.json()["choices"][0]["logprobs"]["top_logprobs"])


@pytest.mark.parametrize("level", [1, 2])
def test_its_workers_sleep_and_wake(server: ServerProcess, level: int) -> None:
    """Its workers sleep and wake: no process ends or starts, and the answers stay."""
    server.switch("wide")
    expected = server.complete("wide", PROMPTS[0])
    server.switch("llama")
    before = workers(server)
    slept = operate(server, "wide", "sleep", level=level)
    server.switch("wide")

    assert {1: "asleep", 2: "discarded"}[level] == slept
    assert before == workers(server)
    assert expected == server.complete("wide", PROMPTS[0])


def test_its_workers_end_with_an_unload(server: ServerProcess) -> None:
    """Its workers end with an unload and free their memory; the other model stays; a load works."""
    server.switch("llama")
    before: Any = server.status()["host"]
    theirs = sum(anonymous_bytes(worker.pid) for worker in workers(server))
    assert "cold" == operate(server, "wide", "unload")
    left = workers(server)
    after: Any = server.status()["host"]
    text = server.complete("llama", PROMPTS[0])
    server.switch("wide")

    assert left == []
    assert theirs > 0
    assert after["used_bytes"] < before["used_bytes"] - theirs // 2
    assert text == server.complete("wide", PROMPTS[0])


def test_an_executor_waits_for_workers_that_were_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor waits for killed workers, unlike vLLM, as on a busy machine."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    from vllm_hotswap.host.executor import HostedMultiprocExecutor

    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(3600,))
    process.start()
    monkeypatch.setattr(MultiprocExecutor, "shutdown", lambda _: process.kill())
    executor = object.__new__(HostedMultiprocExecutor)
    executor.workers = [SimpleNamespace(proc=process)]

    executor.shutdown()

    assert -signal.SIGKILL == process.exitcode


def test_the_death_of_a_worker_is_the_death_of_its_engine_alone(server: ServerProcess) -> None:
    """A worker's death fails its request at once and reloads its engine, in the same host."""
    server.switch("wide")
    expected, before = server.complete("wide", PROMPTS[0]), host(server)
    body = {"model": "wide", "prompt": "Hello", "stream": True, "max_tokens": 400}
    body |= {"ignore_eos": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        stream = events(response.iter_lines())
        next(stream)
        workers(server)[0].kill()
        rest: list[Any] = list(stream)

    assert "engine_unavailable" == rest[-1]["error"]["code"]
    wait_until(lambda: server.client.get("/ready").status_code == 200, timeout_s=240)
    assert expected == server.complete("wide", PROMPTS[0])
    assert before == host(server)
    server.switch("llama")
    assert "llama" in server.complete("llama", "Who are you?")
