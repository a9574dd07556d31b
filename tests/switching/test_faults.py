"""Rows of the fault matrix in docs/internals/fault-matrix.md that need no real engine.

Where a signal is part of the fault, the engine host is a process: `tests/helpers/killable.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import resource
import signal
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.helpers.faults import RawClient, wait_until
from tests.helpers.killable import KillableServer
from tests.helpers.support import Server
from tests.helpers.virtual import VirtualLoop
from vllm_hotswap.testing.fake_settings import FakeSettings

pytestmark = pytest.mark.slow

SLOW = {alias: FakeSettings(token_s=1) for alias in ("llama", "qwen")}
"""Eight words, and so eight seconds, for an answer."""


def in_virtual_time(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main)


def test_a_drain_ends_under_steady_arrivals() -> None:
    """Row 7: fifty requests per second, for source and target alike, do not delay it."""

    async def main() -> None:
        server = await Server(load=("llama", "qwen"), settings=SLOW, drain_timeout=5).start()
        loop = asyncio.get_running_loop()
        calls = []
        for number in range(500):
            if number == 250:
                began_s, switch = loop.time(), server.switch("qwen")
                switch.add_done_callback(lambda _: ends_s.append(loop.time()))
            calls.append(server.ask(("llama", "qwen")[number % 2]))
            await asyncio.sleep(0.02)
        answers = await asyncio.gather(*calls)
        told = await switch
        await server.stop()

        codes = [a.json()["error"]["code"] if a.status_code != 200 else "ok" for a in answers]
        assert 200 == told.status_code
        assert ends_s[0] - began_s < 6
        assert {"ok", "drain_timeout", "model_switching", "model_not_active"} >= set(codes)
        assert 125 <= codes[251::2].count("ok")
        assert told.json()["requests_cut"] == codes.count("drain_timeout") > 0

    ends_s: list[float] = []
    in_virtual_time(main())


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_jump_of_the_clock_changes_no_deadline(
    monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """Row 58: setting the wall clock during a drain changes no deadline."""

    async def main() -> None:
        server = await Server(load=("llama", "qwen"), settings=SLOW, drain_timeout=5).start()
        loop = asyncio.get_running_loop()
        running = server.ask("llama")
        await server.settled()
        began_s, switch = loop.time(), server.switch("qwen")
        await asyncio.sleep(2)
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + jump_s)
        answer = await running
        await switch
        await server.stop()

        assert "drain_timeout" == answer.json()["error"]["code"]
        assert 5 <= loop.time() - began_s < 7

    in_virtual_time(main())


# --- outputs ------------------------------------------------------------------------------------


async def test_a_late_output_of_another_epoch_is_never_delivered(server: Server) -> None:
    """Row 60: it is counted, and its request gets an error."""
    stream = await server.start_stream("llama", words=5)
    server.host.engines["llama"].steps.stamp = ("llama", 0)
    answer = await stream.finish()
    metrics = (await server.get("/metrics")).text

    assert 1 == answer.body.decode().count('"content"')
    assert "wrong_stamp" == json.loads(answer.events[-1].removeprefix("data: "))["error"]["code"]
    assert 'hotswap_outputs_refused_total{model="llama"} 1.0' in metrics


async def test_a_wrong_canary_keeps_the_gate_shut(server: Server) -> None:
    """Row 43: the target serves no request; waiting requests get the cause, the source stays."""
    await server.switch("mistral")
    await server.switch("llama")
    await server.post("/admin/models/mistral/unload")
    server.host.corrupt("mistral")
    server.host.hold("load", "mistral")
    switch = server.switch("mistral")
    await server.settled()
    held = server.ask("mistral")
    await server.settled()
    server.host.release("load", "mistral")
    failed, answer = await switch, await held

    assert (503, "switch_failed") == (failed.status_code, failed.json()["error"]["code"])
    assert "verify" in failed.json()["error"]["message"]
    assert (503, "switch_failed") == (answer.status_code, answer.json()["error"]["code"])
    assert 200 == (await server.ask("llama")).status_code


# --- the engine host's process --------------------------------------------------------------------

HANG_S = 2
QUICK = {"hang_timeout": HANG_S, "step_timeout": 2, "load_timeout": 10, "command_timeout": 3}
PATIENT = {**QUICK, "max_restarts": 1000, "max_backoff": 0}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KillableServer]:
    """One server whose host dies repeatedly."""
    with KillableServer(tmp_path_factory.mktemp("killable"), recovery=PATIENT) as server:
        yield server


@pytest.fixture
def killable(shared: KillableServer) -> Iterator[KillableServer]:
    """It serves llama, with qwen parked and mistral cold; at the end it is ready again."""
    for alias in ("qwen", "llama"):
        switched = shared.switch(alias)
        assert 200 == switched.status_code, switched.text
    shared.client.post("/admin/models/mistral/unload", json={})
    yield shared
    shared.faults.clear()
    wait_until(lambda: shared.is_ready)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for clients that run beside the test."""
    with ThreadPoolExecutor(32) as pool:
        yield pool


DEATHS = {
    "a step of the source": "host.step@llama",
    "making room": "host.sleep",
    "load": "host.load@mistral",
    "weights": "host.load.weights@mistral",
    "kv_cache": "host.load.kv_cache@mistral",
    "warm_up": "host.load.warm_up@mistral",
    "activate": "host.activate@mistral",
    "verify": "host.step@mistral",
}


@pytest.mark.parametrize(
    ("phase", "action"),
    [
        *((phase, "kill") for phase in DEATHS),
        ("weights", "segv"),
        ("a step of the source", "stop"),
        ("weights", "stop"),
        ("activate", "stop"),
    ],
)
def test_the_hosts_end_in_any_phase_fails_everything_at_once_and_is_repaired(
    killable: KillableServer, pool: ThreadPoolExecutor, phase: str, action: str
) -> None:
    """Rows 22 to 27 and 37: no request hangs or gets half an answer; all models come back."""
    restarts = killable.restarts
    killable.faults.inject(f"switch.drain@mistral=1*sleep(0.2);{DEATHS[phase]}=1*{action}")
    running = pool.submit(killable.ask, "llama", 30)
    wait_until(lambda: running.done() or killable.status["models"]["llama"]["in_flight"] == 1)
    switch = pool.submit(killable.switch, "mistral")
    held = pool.submit(killable.ask, "mistral")
    answers = [call.result(timeout=10) for call in (running, switch, held)]
    wait_until(lambda: killable.restarts > restarts and killable.is_ready)

    assert {200, 503, 404} >= {answer.status_code for answer in answers}
    assert all(answer.status_code == 200 or answer.json()["error"]["code"] for answer in answers)
    assert killable.serves_all()


@pytest.mark.parametrize("fault", ["kill", "raise", "hang"])
def test_a_fault_in_a_wake_that_nobody_has_asked_for(tmp_path: Path, fault: str) -> None:
    """In a wake ahead of a request, the host's death is repaired; an error ends only the wake."""
    recovery = {"step_timeout": 1, "command_timeout": 1}
    with KillableServer(tmp_path, slices=4, recovery=recovery) as server:
        assert 200 == server.client.post("/admin/models/qwen/sleep").status_code
        server.faults.inject(f"host.wake_slice=1*sleep(0); host.wake_slice=1*{fault}")

        answer = server.client.post("/admin/next", json={"model": "qwen"}).json()
        assert "begun" == answer["wake"]
        if fault == "raise":
            wait_until(lambda: "event=wake_failed model=qwen" in server.log.read_text())
        else:
            wait_until(lambda: server.restarts == 1 and server.is_ready)

        assert server.status["models"]["qwen"]["waking"] is None
        assert (0 if fault == "raise" else 1) == server.restarts
        assert server.serves_all()


def test_the_host_is_the_first_to_go_when_memory_runs_out(killable: KillableServer) -> None:
    """Row 37: the kernel prefers to kill it rather than the server, which can restart it."""

    def score(process: psutil.Process) -> int:
        return int(Path(f"/proc/{process.pid}/oom_score_adj").read_text())

    assert score(killable.host) > score(killable.process)


@pytest.mark.parametrize("place", ["host.load@mistral", "host.activate@mistral", "host.step@llama"])
def test_what_hangs_is_ended_at_its_deadline(
    killable: KillableServer, pool: ThreadPoolExecutor, place: str
) -> None:
    """Rows 19 and 33: a host whose thread hangs is restarted, although it answers probes."""
    restarts, before = killable.restarts, killable.faults.hits(place)
    killable.faults.inject(f"{place}=1*hang")
    running = pool.submit(killable.ask, "llama", 30)
    wait_until(lambda: running.done() or killable.status["models"]["llama"]["in_flight"] == 1)
    answer = killable.switch("mistral", drain_timeout=1)
    running.result(timeout=10)

    wait_until(lambda: killable.restarts > restarts and killable.is_ready)
    assert before + 1 == killable.faults.hits(place)
    assert answer.status_code in (200, 503)
    assert killable.serves_all()


def test_a_target_that_kills_the_host_is_not_brought_back(killable: KillableServer) -> None:
    """Row 25: it was never verified, and the source was healthy."""
    killable.faults.inject("host.step@mistral=kill")

    failed = killable.switch("mistral")

    assert 503 == failed.status_code
    wait_until(lambda: killable.is_ready)
    assert "llama" == killable.status["active"]
    assert 200 == killable.ask("llama").status_code


def test_an_engine_that_dies_in_a_drain_ends_its_requests_alone(
    killable: KillableServer, pool: ThreadPoolExecutor
) -> None:
    """Row 18: an exception in a step does not kill the host."""
    host = killable.host
    running = pool.submit(killable.ask, "llama", 300)
    wait_until(lambda: killable.status["models"]["llama"]["in_flight"] == 1)
    switch = pool.submit(killable.switch, "qwen")
    wait_until(lambda: killable.status["phase"] == "drain")
    killable.faults.inject("host.step@llama=1*raise(a bad kernel)")

    assert (503, "engine_unavailable") == (
        running.result().status_code,
        running.result().json()["error"]["code"],
    )
    assert 200 == switch.result().status_code
    assert host == killable.host
    assert killable.serves_all()


def test_a_host_that_dies_on_the_way_back_too_is_repaired(killable: KillableServer) -> None:
    """Row 45: a death of the host during the rollback is repaired, too."""
    killable.faults.inject("host.activate@qwen=1*raise;host.activate@llama=1*kill")

    failed = killable.switch("qwen")

    assert 503 == failed.status_code
    wait_until(lambda: killable.is_ready)
    assert killable.serves_all()


def test_a_server_without_any_model_is_repaired_when_its_files_are(
    killable: KillableServer,
) -> None:
    """Rows 44 and 46: the server is live, not ready, gives the reason, and needs no restart."""
    killable.faults.inject("host.activate=raise(no device)")
    failed = killable.switch("qwen")
    wait_until(lambda: "no device" in killable.client.get("/ready").text)
    ready = killable.client.get("/ready")
    live = killable.client.get("/health")
    wait_until(lambda: killable.status["state"] == "degraded")  # between two recovery attempts
    asked = killable.ask("llama")
    killable.faults.clear()

    assert 503 == failed.status_code
    assert (503, "not_ready") == (ready.status_code, ready.json()["error"]["code"])
    assert 200 == live.status_code
    assert 503 == asked.status_code
    wait_until(lambda: killable.is_ready)
    assert killable.serves_all()


def test_a_host_that_cannot_live_is_given_up(tmp_path: Path) -> None:
    """Row 45: after a bounded number of restarts, the server exits with 1 and leaves no process."""
    recovery = {"max_restarts": 3, "max_backoff": 0}
    with KillableServer(tmp_path, recovery=recovery) as server:
        server.faults.inject("host.load=kill;host.step=kill")
        asked = server.ask("llama")
        status = server.process.wait(timeout=30)

        assert 503 == asked.status_code
        assert 1 == status
        assert 4 == server.log.read_text().count("event=host_died")
        assert 1 == server.log.read_text().count("event=given_up")


def test_a_server_that_was_stopped_does_not_take_its_host_for_dead(
    killable: KillableServer,
) -> None:
    """Row 42: it was stopped longer than the host may be silent, as when its loop is blocked."""
    host = killable.host
    killable.process.suspend()
    time.sleep(HANG_S + 1.5)
    killable.process.resume()

    assert 200 == killable.ask("llama").status_code
    time.sleep(HANG_S + 0.5)
    assert host == killable.host


# --- the process of the server --------------------------------------------------------------------

PLACES = {
    "serving": "host.step@llama",
    "drain": "switch.drain",
    "make_room": "host.sleep",
    "bring_up": "host.load@mistral",
    "activate": "host.activate@mistral",
    "verify": "host.step@mistral",
    "rollback": "switch.rollback",
}


def led_to(server: KillableServer, pool: ThreadPoolExecutor, place: str) -> list[Any]:
    """Return calls to a server that is stuck at the place."""
    before = server.faults.hits(place)
    fails = "switch.activate=raise;" if place == "switch.rollback" else ""
    server.faults.inject(f"{fails}{place}=hang")
    calls = [pool.submit(server.ask, "llama", 3)]
    if place != "host.step@llama":
        calls.append(pool.submit(server.switch, "mistral", drain_timeout=0.1))
    wait_until(lambda: server.faults.hits(place) > before)
    return calls


@dataclass
class Ended:
    """How a server exited that was asked to stop while it was stuck."""

    status: int
    alive: list[psutil.Process]
    answers: list[int]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Return exits by phase. Servers run at the same time, because each spends its time waiting."""
    with ThreadPoolExecutor() as pool:
        folders = [tmp_path_factory.mktemp(phase) for phase in PLACES]
        return dict(zip(PLACES, pool.map(end, folders, PLACES.values()), strict=True))


def end(folder: Path, place: str) -> Ended:
    recovery = {"command_timeout": 60}
    with KillableServer(folder, recovery=recovery) as server, ThreadPoolExecutor() as pool:
        calls = led_to(server, pool, place)
        everybody = [server.process, *server.children()]
        server.process.terminate()
        status = server.process.wait(timeout=30)
        _, alive = psutil.wait_procs(everybody, timeout=5)
        return Ended(status, alive, [call.result(timeout=5).status_code for call in calls])


@pytest.mark.parametrize("phase", PLACES)
def test_a_server_that_is_told_to_stop_stops_in_any_phase(
    ended: dict[str, Ended], phase: str
) -> None:
    """Row 53: every client gets an answer, and no process is left."""
    assert 0 == ended[phase].status
    assert [] == ended[phase].alive
    assert {200, 503} >= set(ended[phase].answers)


def test_a_server_that_is_told_twice_stops_at_once(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """Row 54: this holds although its requests have a minute, and its host is stuck."""
    with KillableServer(tmp_path, shutdown_timeout=60) as server:
        led_to(server, pool, "host.load@mistral")
        everybody = [server.process, *server.children()]
        server.process.terminate()
        wait_until(lambda: "event=shutdown" in server.log.read_text())
        server.process.terminate()
        _, alive = psutil.wait_procs(everybody, timeout=10)

        assert [] == alive
        assert -signal.SIGTERM == server.process.wait()


@pytest.mark.parametrize("place", ["host.step@llama", "host.load@mistral", "switch.drain"])
def test_the_death_of_the_server_takes_its_host_with_it(
    tmp_path: Path, pool: ThreadPoolExecutor, place: str
) -> None:
    """Row 55: SIGKILL does so, whatever the host's compute thread is stuck in."""
    with KillableServer(tmp_path) as server:
        calls = led_to(server, pool, place)
        children = server.children()
        server.process.kill()
        _, alive = psutil.wait_procs(children, timeout=10)

        assert [] == alive
        assert isinstance(calls[-1].exception(timeout=5), httpx.TransportError)


def test_a_server_without_descriptors_serves_who_is_connected(killable: KillableServer) -> None:
    """Row 56: new connections fail; a switch over an open one works, and later all do."""
    pid = killable.process.pid
    assert 200 == killable.ask("llama").status_code  # this connection stays open
    with without_descriptors(pid), RawClient(killable.port) as outside:
        outside.post("/v1/completions", {"model": "qwen"})
        switched, answer = killable.switch("qwen"), killable.ask("qwen")
        assert b"" == outside.read()

    assert 200 == switched.status_code, switched.text
    assert 200 == answer.status_code, answer.text
    assert 200 == httpx.get(f"http://127.0.0.1:{killable.port}/health", timeout=10).status_code


def test_connections_that_cannot_be_accepted_make_no_lines(killable: KillableServer) -> None:
    """Row 56: they are closed; a client that keeps trying cannot fill the disk."""
    assert 200 == killable.ask("llama").status_code
    before = killable.log.read_text()
    with without_descriptors(killable.process.pid):
        for _ in range(300):
            with RawClient(killable.port) as outside:
                assert b"" == outside.read()
    after = killable.log.read_text()

    assert 200 == httpx.get(f"http://127.0.0.1:{killable.port}/health", timeout=10).status_code
    assert len(after.splitlines()) - len(before.splitlines()) <= 3, after


@contextmanager
def without_descriptors(pid: int) -> Iterator[None]:
    """Deny a process new descriptors: the lowest free number is above its limit."""
    taken = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    free = next(number for number in itertools.count() if number not in taken)
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


# --- clients --------------------------------------------------------------------------------------


def test_a_client_that_never_reads_is_let_go(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """Row 8: it delays no drain, and loses its place in the engine."""
    limits = {"client_timeout": 1}
    with KillableServer(tmp_path, limits=limits, token_s=0) as server:
        body = {"model": "llama", "stream": True, "max_tokens": 10**6}
        with RawClient(server.port, receive_bytes=1024) as reader:
            reader.post("/v1/completions", body)
            wait_until(lambda: server.status["models"]["llama"]["in_flight"] == 1)
            wait_until(lambda: server.status["models"]["llama"]["in_flight"] == 0)
        metrics = server.client.get("/metrics").text

        assert re.search(r"hotswap_clients_evicted_total.* 1\.0", metrics)
        assert server.serves_all()


@pytest.mark.parametrize("place", ["switch.drain", "switch.bring_up", "host.load@mistral"])
def test_a_client_that_is_reset_while_it_waits_is_never_served(
    killable: KillableServer, pool: ThreadPoolExecutor, place: str
) -> None:
    """Row 9: a client that resets while it waits leaves the queue within a second."""
    before = killable.faults.hits(place)
    killable.faults.inject(f"{place}=1*sleep(1.5)")
    switch = pool.submit(killable.switch, "mistral")
    wait_until(lambda: killable.faults.hits(place) > before)
    with RawClient(killable.port) as client:
        client.post("/v1/completions", {"model": "mistral"})
        wait_until(lambda: killable.status["waiting"] == 1)
        client.reset()
    took_s = wait_until(lambda: killable.status["waiting"] == 0)

    assert took_s < 1
    assert not switch.done()
    assert 200 == switch.result().status_code


def test_a_client_that_is_reset_frees_its_engine(killable: KillableServer) -> None:
    """Row 10: the client is reset while it streams; a drain does not wait for it."""
    with RawClient(killable.port) as client:
        client.post("/v1/completions", {"model": "llama", "stream": True, "max_tokens": 10**6})
        client.read()
        client.reset()
    switched = killable.switch("qwen", drain_timeout=20)

    assert 200 == switched.status_code
    assert switched.json()["duration_ms"] < 5000
    assert 0 == switched.json()["requests_cut"]


@pytest.mark.parametrize(
    "phase", ["validate", "drain", "make_room", "bring_up", "activate", "verify"]
)
def test_a_switch_goes_on_without_its_caller(killable: KillableServer, phase: str) -> None:
    """Row 11: the client resets while a phase is under way."""
    before = killable.faults.hits(f"switch.{phase}")
    killable.faults.inject(f"switch.{phase}=1*sleep(0.2)")
    with RawClient(killable.port) as caller:
        caller.post("/v1/models/switch", {"model": "mistral"})
        wait_until(lambda: killable.faults.hits(f"switch.{phase}") > before)
        caller.reset()

    wait_until(lambda: killable.status["active"] == "mistral")
    wait_until(lambda: killable.is_ready)
    assert 200 == killable.ask("mistral").status_code


# --- files ----------------------------------------------------------------------------------------


async def test_a_frontend_that_cannot_be_built_is_refused_before_the_drain(server: Server) -> None:
    """Row 38: a stream of the source continues, and repaired files are enough."""
    stream = await server.start_stream("llama", words=3)
    server.host.engines["mistral"].broken_tokenizer = True
    failed = await server.switch("mistral", drain_timeout=0)
    answer = await stream.finish()
    server.host.engines["mistral"].broken_tokenizer = False

    assert (503, "switch_failed") == (failed.status_code, failed.json()["error"]["code"])
    assert "phase validate" in failed.json()["error"]["message"]
    assert answer.is_whole
    assert 200 == (await server.switch("mistral")).status_code
