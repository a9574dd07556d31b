"""Faults of the engine host, of files and of clients, on the real vLLM: one server for all.

`docs/internals/fault-matrix.md` has the whole matrix; what needs no real engine is in
`tests/switching/test_faults.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.helpers.faults import Faults, RawClient, wait_until
from tests.helpers.ports import free_port
from tests.integration.conftest import events
from tests.integration.processes import QUICKSTART_MODULE, ServerProcess, still_there
from vllm_hotswap.demo.quickstart import MODELS

HANG_S = 6

MODELS_YAML = f"""\
default_model: llama
switching: {{drain_timeout: 2}}
recovery:
  hang_timeout: {HANG_S}
  command_timeout: 20
  load_timeout: 240
  max_restarts: 100
  max_backoff: 1
defaults:
  max_model_len: 2048
  enforce_eager: true
  kv_cache_memory_bytes: 64M
  enable_prompt_tokens_details: true
models:
  llama: {{model: {MODELS / "llama"}}}
  qwen: {{model: {MODELS / "qwen"}}}
  frail: {{model: ./frail, load: on_demand}}
  untouched: {{model: ./untouched, load: on_demand}}
"""


class Faulty:
    """The server, the failpoints in it, and what its models answer when all is well."""

    def __init__(self, server: ServerProcess, faults: Faults, folder: Path) -> None:
        self.server = server
        self.faults = faults
        self.frail = folder / "frail"
        self.untouched = folder / "untouched"
        self.port = int(server.url.rsplit(":", 1)[1])
        self.golden = {alias: self.say(alias) for alias in ("qwen", "llama")}

    def say(self, alias: str) -> str:
        self.server.switch(alias)
        return self.server.complete(alias, "Who are you?")

    @property
    def status(self) -> Any:
        return self.server.status()

    @property
    def host(self) -> psutil.Process:
        return psutil.Process(self.status["host"]["pid"])

    @property
    def restarts(self) -> int:
        return int(self.status["host"]["restarts"])

    @property
    def is_ready(self) -> bool:
        return self.server.client.get("/ready").status_code == 200

    def post(self, path: str, body: object) -> httpx.Response:
        return self.server.post(path, body)

    def switch(self, alias: str) -> httpx.Response:
        return self.post("/v1/models/switch", {"model": alias})

    @contextmanager
    def stream(self, alias: str) -> Iterator[Iterator[Any]]:
        """Run a long stream, entered after its first token."""
        body = {"model": alias, "prompt": "Hello", "stream": True, "max_tokens": 1500}
        body |= {"temperature": 0, "ignore_eos": True}
        with self.server.client.stream("POST", "/v1/completions", json=body) as response:
            stream = events(response.iter_lines())
            next(stream)
            yield stream

    def serves_as_ever(self) -> bool:
        """Check that each model answers, word for word, as it did before any fault."""
        return self.golden == {alias: self.say(alias) for alias in self.golden}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """One server for all tests; the last one ends it."""
    folder = tmp_path_factory.mktemp("faulty")
    shutil.copytree(MODELS / "llama", folder / "frail")
    shutil.copytree(MODELS / "qwen", folder / "untouched")
    (folder / "models.yaml").write_text(MODELS_YAML)
    faults = Faults(folder / "failpoints")
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HOTSWAP_CONFIG": str(folder / "models.yaml"),
        "VLLM_HOTSWAP_FAILPOINTS": faults.variable,
        "TMPDIR": str(folder),
    }
    command = ["-m", QUICKSTART_MODULE]
    server = ServerProcess.start(command, free_port(), folder / "server.log", environment)
    try:
        yield Faulty(server, faults, folder)
    finally:
        server.client.close()
        if server.process.poll() is None:
            server.stop()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Clients that send requests beside the test."""
    with ThreadPoolExecutor(32) as pool:
        yield pool


@pytest.fixture(autouse=True)
def recovered(faulty: Faulty) -> Iterator[None]:
    """Start and end every test with a server that serves; the last one has ended it."""
    yield
    faulty.faults.clear()
    if faulty.server.process.poll() is None:
        wait_until(lambda: faulty.is_ready, timeout_s=240)


def code(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


# --- the engine host ------------------------------------------------------------------------


def test_a_killed_host_fails_every_request_and_comes_back(
    faulty: Faulty, pool: ThreadPoolExecutor
) -> None:
    """A killed host fails open requests at once; the active model then serves again by itself."""
    assert faulty.serves_as_ever()
    restarts, old = faulty.restarts, faulty.host
    body = {"model": "llama", "prompt": "Hello", "max_tokens": 1500, "ignore_eos": True}
    with faulty.stream("llama") as stream:
        waiting = pool.submit(faulty.post, "/v1/completions", body)
        wait_until(lambda: faulty.status["models"]["llama"]["in_flight"] == 2)
        old.kill()
        rest = list(stream)
        answer = waiting.result()
    live = faulty.server.client.get("/health").status_code
    ready = faulty.server.client.get("/ready")
    wait_until(lambda: faulty.is_ready, timeout_s=240)

    assert "engine_unavailable" == rest[-1]["error"]["code"]
    assert "[DONE]" not in rest
    assert (503, "engine_unavailable") == (answer.status_code, code(answer))
    # The errors came before there was another host.
    assert (200, 503, "not_ready") == (live, ready.status_code, code(ready))
    assert restarts + 1 == faulty.restarts
    assert old.pid != faulty.host.pid
    assert "llama" == faulty.status["active"]
    assert faulty.serves_as_ever()


@pytest.mark.wide
def test_a_host_that_crashes_in_a_load_fails_the_switch(faulty: Faulty) -> None:
    """A host crash (SIGSEGV) in a load fails the switch with the cause, and the source returns."""
    assert faulty.serves_as_ever()
    faulty.faults.inject("host.load.weights@frail=1*segv")

    failed = faulty.switch("frail")

    assert 503 == failed.status_code
    assert "signal 11" in failed.json()["error"]["message"]
    wait_until(lambda: faulty.is_ready, timeout_s=240)
    assert "llama" == faulty.status["active"]
    assert faulty.serves_as_ever()


def test_a_host_that_dies_as_it_activates_fails_the_switch(faulty: Faulty) -> None:
    """A host that dies in an activation fails the switch; frontends answer for no wrong engine."""
    faulty.server.switch("llama")
    faulty.faults.inject("host.activate@qwen=1*kill")

    failed = faulty.switch("qwen")

    assert 503 == failed.status_code
    wait_until(lambda: faulty.is_ready, timeout_s=240)
    assert faulty.serves_as_ever()


@pytest.mark.wide
def test_a_host_that_is_stopped_is_replaced(faulty: Faulty) -> None:
    """A stopped host (SIGSTOP) is silent: its requests get errors, and another host serves."""
    faulty.server.switch("llama")
    old = faulty.host
    with faulty.stream("llama") as stream:
        old.send_signal(signal.SIGSTOP)
        rest = list(stream)

    assert "engine_unavailable" == rest[-1]["error"]["code"]
    wait_until(lambda: faulty.is_ready, timeout_s=240)
    assert not old.is_running()
    assert faulty.serves_as_ever()


@pytest.mark.wide
def test_a_load_that_never_ends_is_ended(faulty: Faulty) -> None:
    """A load that never ends, on a pipe in place of the weights, ends with its host.

    It reads in native code, and keeps the whole process from giving a sign of life.
    """
    faulty.server.switch("llama")
    weights = faulty.frail / "model.safetensors"
    weights.rename(faulty.frail / "away")
    os.mkfifo(weights)
    failed = faulty.switch("frail")
    weights.unlink()
    (faulty.frail / "away").rename(weights)

    assert (503, "engine_unavailable") == (failed.status_code, code(failed))
    assert "no sign of life" in failed.json()["error"]["message"]
    wait_until(lambda: faulty.is_ready, timeout_s=240)
    assert faulty.serves_as_ever()
    assert 200 == faulty.switch("frail").status_code


def test_an_engine_that_fails_in_a_step_is_loaded_again(faulty: Faulty) -> None:
    """A failed step ends its engine's requests and reloads it; host and other engine stay."""
    faulty.server.switch("llama")
    host = faulty.host
    with faulty.stream("llama") as stream:
        faulty.faults.inject("host.step@llama=1*raise(a bad kernel)")
        rest = list(stream)

    assert "engine_unavailable" == rest[-1]["error"]["code"]
    wait_until(lambda: faulty.is_ready, timeout_s=240)
    assert host.pid == faulty.host.pid
    assert faulty.serves_as_ever()


# --- files ----------------------------------------------------------------------------------


def test_weights_that_became_no_numbers_are_found_by_the_canary(faulty: Faulty) -> None:
    """The canary finds NaN weights, which load without an error; repaired, a retry works."""
    assert 200 == faulty.switch("frail").status_code
    faulty.server.switch("llama")
    assert 200 == faulty.post("/admin/models/frail/unload", {}).status_code
    weights = faulty.frail / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(with_nan(whole, "model.norm.weight"))
    failed = faulty.switch("frail")
    active = faulty.status["active"]
    weights.write_bytes(whole)

    assert (503, "switch_failed") == (failed.status_code, code(failed))
    assert "verify" in failed.json()["error"]["message"]
    assert "llama" == active
    assert faulty.serves_as_ever()
    assert 200 == faulty.switch("frail").status_code


def with_nan(file: bytes, tensor: str) -> bytes:
    """Make a safetensors file in which one tensor is all ones in binary, which is NaN."""
    length = int.from_bytes(file[:8], "little")
    begin, end = json.loads(file[8 : 8 + length])[tensor]["data_offsets"]
    start = 8 + length + begin
    return file[:start] + b"\xff" * (end - begin) + file[start + end - begin :]


@pytest.mark.parametrize(
    ("file", "broken", "says"),
    [
        ("tokenizer.json", b'{"version"', "tokenizer"),
        ("chat_template.jinja", b"{% for message in messages %}", "chat template"),
    ],
)
def test_what_a_frontend_needs_is_checked_before_the_drain(
    faulty: Faulty, file: str, broken: bytes, says: str
) -> None:
    """Before a drain, a new model's frontend files are checked; the source's stream continues."""
    faulty.server.switch("llama")
    path = faulty.untouched / file
    whole = path.read_bytes() if path.exists() else None
    path.write_bytes(broken)
    with faulty.stream("llama") as stream:
        failed = faulty.switch("untouched")
        next(stream)
    path.unlink()
    if whole is not None:
        path.write_bytes(whole)

    assert (503, "switch_failed") == (failed.status_code, code(failed))
    assert "phase validate" in failed.json()["error"]["message"]
    assert says in failed.json()["error"]["message"]
    assert faulty.serves_as_ever()


def test_a_frontend_that_cannot_be_built_brings_the_source_back(faulty: Faulty) -> None:
    """If a frontend cannot be built, its engine is unloaded, the source returns, a retry works."""
    faulty.server.switch("llama")
    faulty.faults.inject("frontend.build@untouched=1*raise(no template)")

    failed = faulty.switch("untouched")

    assert (503, "switch_failed") == (failed.status_code, code(failed))
    assert "no template" in failed.json()["error"]["message"]
    assert "cold" == faulty.status["models"]["untouched"]["residency"]
    assert faulty.serves_as_ever()
    assert 200 == faulty.switch("untouched").status_code


# --- a switch that fails, and its way back ------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        "switch.drain@qwen=1*raise",
        "switch.make_room@qwen=1*raise",
        "switch.bring_up@qwen=1*raise",
        "switch.activate@qwen=1*raise",
        "host.activate@qwen=1*raise",
    ],
)
def test_a_switch_that_fails_in_any_phase_leaves_the_source_serving(
    faulty: Faulty, rule: str
) -> None:
    """A switch that fails in any phase reports it; the source stays active without a reload."""
    faulty.server.switch("llama")
    host = faulty.host
    faulty.faults.inject(rule)

    failed = faulty.switch("qwen")

    assert (503, "switch_failed") == (failed.status_code, code(failed))
    assert "llama" == faulty.status["active"]
    assert host.pid == faulty.host.pid
    assert faulty.serves_as_ever()


@pytest.mark.parametrize("stage", ["weights", "kv_cache", "warm_up"])
def test_a_load_that_fails_on_its_way_leaves_nothing_behind(faulty: Faulty, stage: str) -> None:
    """A load that fails in the middle, as without memory, leaves nothing; a retry works."""
    faulty.server.switch("llama")
    assert 200 == faulty.post("/admin/models/frail/unload", {}).status_code
    faulty.faults.inject(f"host.load.{stage}@frail=1*raise(out of memory)")

    failed = faulty.switch("frail")

    assert (503, "switch_failed") == (failed.status_code, code(failed))
    assert "out of memory" in failed.json()["error"]["message"]
    assert faulty.serves_as_ever()
    assert 200 == faulty.switch("frail").status_code


def test_a_model_that_cannot_be_unloaded_stays_as_it_is(faulty: Faulty) -> None:
    """If an unload fails, the operation fails and the model stays whole."""
    text = faulty.say("qwen")
    faulty.server.switch("llama")
    faulty.faults.inject("host.unload@qwen=1*raise(busy)")
    failed = faulty.post("/admin/models/qwen/unload", {})

    assert (503, "load_failed") == (failed.status_code, code(failed))
    assert text == faulty.say("qwen")


def test_a_switch_that_is_no_switch_touches_nothing(faulty: Faulty) -> None:
    """A switch to the active model, an unknown one or none drains nothing and uses no epoch."""
    faulty.server.switch("llama")
    epoch = faulty.status["epoch"]
    with faulty.stream("llama") as stream:
        same = faulty.switch("llama")
        unknown = faulty.switch("../llama")
        malformed = faulty.post("/v1/models/switch", {"model": ["llama"]})
        next(stream)

    assert (200, False) == (same.status_code, same.json()["switched"])
    assert (404, 400) == (unknown.status_code, malformed.status_code)
    assert epoch == faulty.status["epoch"]


def test_a_slow_load_leaves_the_server_alive_and_not_ready(
    faulty: Faulty, pool: ThreadPoolExecutor
) -> None:
    """During a slow load the server is alive and not ready; requests for the target are served."""
    faulty.server.switch("llama")
    faulty.post("/admin/models/frail/unload", {})
    faulty.faults.inject("host.load.weights@frail=1*sleep(2)")
    switch = pool.submit(faulty.switch, "frail")
    wait_until(lambda: faulty.status["phase"] == "bring_up")
    held = pool.submit(faulty.server.complete, "frail", "Who are you?")
    wait_until(lambda: faulty.status["waiting"] == 1)
    live = faulty.server.client.get("/health").status_code
    ready = faulty.server.client.get("/ready").status_code

    assert (200, 503) == (live, ready)
    assert faulty.golden["llama"] == held.result()  # it is a copy of that model
    assert 200 == switch.result().status_code


def test_a_structured_answer_survives_being_parked(faulty: Faulty) -> None:
    """A parked structured answer resumes with its engine's grammar, and fits the schema."""
    faulty.server.switch("llama")
    faulty.faults.inject("host.step@llama=sleep(0.05)")
    schema = {
        "type": "object",
        "properties": {"model": {"type": "string"}, "answer": {"type": "string"}},
        "required": ["model", "answer"],
        "additionalProperties": False,
    }
    body = {
        "model": "llama",
        "messages": [{"role": "user", "content": "Who are you?"}],
        "stream": True,
        "temperature": 0,
        "max_tokens": 100,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema},
        },
    }
    with faulty.server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        stream: Iterator[Any] = events(response.iter_lines())
        began = [next(stream), next(stream)]
        parked = faulty.post(
            "/v1/models/switch",
            {"model": "qwen", "drain_timeout": 0, "on_drain_timeout": "park"},
        )
        faulty.faults.clear()
        other = faulty.server.complete("qwen", "Who are you?")
        faulty.server.switch("llama")
        rest = list(stream)
    parts = [event["choices"][0]["delta"].get("content") or "" for event in [*began, *rest[:-1]]]

    assert 1 == parked.json()["requests_parked"]
    assert faulty.golden["qwen"] == other
    assert "[DONE]" == rest[-1]
    assert {"model", "answer"} == set(json.loads("".join(parts)))


def test_a_server_without_any_model_says_so_until_one_is_back(faulty: Faulty) -> None:
    """If neither target nor source comes up, the server is degraded, alive, and repairs itself."""
    faulty.server.switch("llama")
    faulty.faults.inject("host.activate=raise(no device)")
    failed = faulty.switch("qwen")
    ready = faulty.server.client.get("/ready")
    live = faulty.server.client.get("/health").status_code
    state = faulty.status["state"]
    refused = faulty.post("/v1/completions", {"model": "qwen", "prompt": "Hello"})
    faulty.faults.clear()

    assert 503 == failed.status_code
    assert (200, 503, "not_ready") == (live, ready.status_code, code(ready))
    assert state in ("degraded", "recovering")
    assert refused.status_code in (404, 503)
    wait_until(lambda: faulty.is_ready, timeout_s=240)
    assert faulty.serves_as_ever()


# --- clients --------------------------------------------------------------------------------


def test_a_client_that_is_reset_while_it_waits_is_never_served(
    faulty: Faulty, pool: ThreadPoolExecutor
) -> None:
    """A client that is reset while it waits leaves the queue, and the load continues."""
    faulty.server.switch("llama")
    faulty.post("/admin/models/frail/unload", {})
    faulty.faults.inject("host.load@frail=1*sleep(3)")
    switch = pool.submit(faulty.switch, "frail")
    wait_until(lambda: faulty.status["phase"] == "bring_up")
    with RawClient(faulty.port) as client:
        client.post("/v1/completions", {"model": "frail", "prompt": "Hello"})
        wait_until(lambda: faulty.status["waiting"] == 1)
        client.reset()
    wait_until(lambda: faulty.status["waiting"] == 0)
    was_loading = not switch.done()

    assert was_loading
    assert 200 == switch.result().status_code


@pytest.mark.parametrize("phase", ["drain", "make_room", "bring_up", "activate"])
def test_a_switch_goes_on_without_its_caller(faulty: Faulty, phase: str) -> None:
    """A switch continues if its caller is reset as any phase starts; status has the result."""
    faulty.server.switch("llama")
    before = faulty.faults.hits(f"switch.{phase}")
    faulty.faults.inject(f"switch.{phase}=1*sleep(0.3)")
    with RawClient(faulty.port) as caller:
        caller.post("/v1/models/switch", {"model": "qwen"})
        wait_until(lambda: faulty.faults.hits(f"switch.{phase}") > before)
        caller.reset()

    wait_until(lambda: faulty.status["active"] == "qwen")
    assert faulty.serves_as_ever()


def test_many_calls_for_one_target_load_it_once(faulty: Faulty, pool: ThreadPoolExecutor) -> None:
    """Twenty simultaneous calls for one target are one operation with one load."""
    faulty.server.switch("llama")
    faulty.post("/admin/models/frail/unload", {})
    loads = faulty.server.log.read_text().count("event=loaded model=frail")
    faulty.faults.inject("host.load@frail=1*sleep(1)")
    calls: list[Future[httpx.Response]] = [pool.submit(faulty.switch, "frail") for _ in range(20)]
    answers = [call.result() for call in calls]

    assert {200} == {answer.status_code for answer in answers}
    assert 1 == len({answer.json()["operation_id"] for answer in answers})
    assert loads + 1 == faulty.server.log.read_text().count("event=loaded model=frail")


def test_no_cache_outlives_an_unload(faulty: Faulty) -> None:
    """A prompt is cached while its model stays loaded, and never after a reload."""
    prompt = "The quick brown fox jumps over the lazy dog. " * 8
    faulty.server.switch("frail")
    first, again = cached_tokens(faulty, prompt), cached_tokens(faulty, prompt)
    faulty.server.switch("llama")
    faulty.server.switch("frail")
    after_switches = cached_tokens(faulty, prompt)
    faulty.server.switch("llama")
    faulty.post("/admin/models/frail/unload", {})
    faulty.server.switch("frail")

    assert 0 == first
    assert again == after_switches > 0
    assert 0 == cached_tokens(faulty, prompt)


def cached_tokens(faulty: Faulty, prompt: str) -> int:
    body = {"model": "frail", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    usage = faulty.post("/v1/completions", body).json()["usage"]
    return int((usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)


def test_a_file_that_is_rewritten_changes_nothing(faulty: Faulty) -> None:
    """A rewritten YAML file changes nothing, because only a start reads it."""
    path = faulty.frail.parent / "models.yaml"
    before = path.read_text()
    path.write_text("models: {")
    assert faulty.serves_as_ever()
    path.write_text(before)


# --- the end: no server after this test -------------------------------------------------------


def test_the_death_of_the_server_takes_its_host_with_it(
    faulty: Faulty, pool: ThreadPoolExecutor
) -> None:
    """SIGKILL of the server in a load leaves no process and no socket."""
    faulty.server.switch("llama")
    faulty.post("/admin/models/frail/unload", {})
    before = faulty.faults.hits("host.load")
    faulty.faults.inject("host.load@frail=hang")
    call = pool.submit(faulty.switch, "frail")
    wait_until(lambda: faulty.faults.hits("host.load") > before)
    children = faulty.server.descendants()
    faulty.server.process.kill()

    assert [] == still_there(children)
    assert isinstance(call.exception(timeout=10), httpx.TransportError)
    assert [] == list(faulty.frail.parent.glob("vllm-hotswap-*"))
