"""Recovery: when a host counts as hung, how attempts are spaced, when the server gives up.

Under virtual time, on a whole server with fake engines.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.conftest import Play, Story
from tests.helpers.support import Recorder, Server
from vllm_hotswap.config.settings import RecoveryConfig
from vllm_hotswap.errors import ConfigError, EngineUnavailable
from vllm_hotswap.events import HostDied, HostRestarted, ServiceDegraded

pytestmark = pytest.mark.slow


@pytest.fixture
def play(play: Play) -> Play:
    """Run a story on a server that is watched, under virtual time."""

    def run(story: Story, **recovery: Any) -> None:
        async def watched(server: Server) -> None:
            watching = asyncio.create_task(server.coordinator.recovery.watch())
            try:
                await story(server)
            finally:
                watching.cancel()

        play(watched, recovery=RecoveryConfig(**recovery))

    return run


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def is_ready(server: Server) -> bool:
    return (await server.get("/ready")).status_code == 200


async def status(server: Server) -> dict[str, Any]:
    return dict((await server.get("/admin/status")).json())


def causes(events: Recorder, kind: type[Any]) -> list[str]:
    return [event.cause for event in events.of(kind)]


def test_the_last_active_model_comes_back_after_a_death(play: Play) -> None:
    """After a death, a new host has the last active model; others are cold until switched to."""

    async def story(server: Server) -> None:
        await server.coordinator.switch("qwen")
        server.host.kill("the engine host was killed by signal 9")

        await server.settled()

        assert "qwen" == (await server.ask(None)).json()["model"]
        assert ("serving", 1) == (
            (await status(server))["state"],
            (await status(server))["host"]["restarts"],
        )
        assert 1 == len(server.events.of(HostRestarted))
        assert (await server.coordinator.switch("llama")).switched

    play(story)


def test_requests_for_the_model_that_comes_back_are_held(play: Play) -> None:
    """While a model is loaded again its requests are held; others get a time to retry."""

    async def story(server: Server) -> None:
        server.host.kill()
        server.host.hold("load", "llama")
        await server.settled()
        held = server.ask("llama")
        await server.settled()
        other = await server.ask("qwen")

        server.host.release("load", "llama")

        assert 200 == (await held).status_code
        assert (503, "5") == (other.status_code, other.headers["retry-after"])

    play(story)


def test_a_target_that_kills_the_host_is_not_brought_back(play: Play) -> None:
    """A target that kills the host was never verified, so the source comes back."""

    async def story(server: Server) -> None:
        server.host.hold("verify", "qwen")
        switch = asyncio.create_task(server.coordinator.switch("qwen"))
        await server.settled()

        server.host.kill()

        with pytest.raises(EngineUnavailable):
            await switch
        await server.settled()
        assert "llama" == server.coordinator.active

    play(story)


def test_a_host_that_hangs_is_ended_and_restarted(play: Play) -> None:
    """A host without a sign of life for `hang_timeout` is restarted; open requests fail then."""

    async def story(server: Server) -> None:
        began_s = now_s()
        stream = await server.start_stream("llama", words=100)
        server.host.hang()

        answer = await stream.finish()

        assert 8 <= now_s() - began_s <= 12
        assert "no sign of life for 10 s" in answer.events[-1]
        await server.settled()
        assert await is_ready(server)

    play(story, hang_timeout=10.0)


def test_a_loop_that_was_blocked_ends_nobody(play: Play) -> None:
    """A blocked loop does not end the host: only missed answers to its questions count."""

    async def story(server: Server) -> None:
        loop: Any = asyncio.get_running_loop()
        await asyncio.sleep(5)
        loop._now_s += 3600  # as if this process had been stopped for an hour
        await asyncio.sleep(30)

        assert [] == server.events.of(HostDied)

    play(story, hang_timeout=5.0)


def test_a_clock_that_is_set_changes_nothing(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting the system's clock changes nothing, because only intervals count."""

    async def story(server: Server) -> None:
        for offset_s in (3600, -7200):
            now = time.time() + offset_s
            monkeypatch.setattr(time, "time", lambda now=now: now)
            await asyncio.sleep(60)
            assert (await server.coordinator.switch("qwen")).duration_s < 1
            await server.coordinator.switch("llama")

        assert [] == server.events.of(HostDied)

    play(story)


def test_a_step_that_never_ends_is_ended(play: Play) -> None:
    """A step that never ends restarts the host, although its other thread answers."""

    async def story(server: Server) -> None:
        server.host.step_s = 601.0
        await asyncio.sleep(60)

        assert [
            "the engine host was stopped: one step took 601 s (recovery.step_timeout)"
        ] == causes(server.events, HostDied)
        assert await is_ready(server)

    play(story)


@pytest.mark.parametrize(
    ("operation", "alias", "limit_s"),
    [("load", "mistral", 50.0), ("activate", "qwen", 5.0), ("verify", "qwen", 5.0)],
)
def test_what_takes_too_long_ends_the_host(
    play: Play, operation: str, alias: str, limit_s: float
) -> None:
    """A command that takes too long ends the host: the switch fails, and the source comes back."""

    async def story(server: Server) -> None:
        began_s = now_s()
        server.host.hold(operation, alias)

        with pytest.raises(EngineUnavailable, match=f"did not finish within {limit_s:g} s"):
            await server.coordinator.switch(alias)

        assert limit_s == pytest.approx(now_s() - began_s, abs=0.1)
        await server.settled()
        assert "llama" == (await server.ask(None)).json()["model"]

    play(story, load_timeout=50.0, command_timeout=5.0)


def test_a_model_that_cannot_come_back_is_tried_again_and_again(play: Play) -> None:
    """A model that cannot come back is tried ever more rarely; repairing its file ends that."""

    async def story(server: Server) -> None:
        began_s, engine = now_s(), server.host.engines["llama"]
        engine.missing_files = True
        server.host.kill()
        await asyncio.sleep(100)

        state = await status(server)
        assert ("degraded", None) == (state["state"], state["active"])
        assert "does not exist" in state["failure"]
        tried = server.events.of(ServiceDegraded)
        assert [1, 2, 4, 8, 16, 20, 20] == [event.retry_s for event in tried][:7]
        assert "does not exist" in (await server.get("/ready")).text
        assert 200 == (await server.get("/health")).status_code

        engine.missing_files = False
        await asyncio.sleep(20)
        assert await is_ready(server)
        assert now_s() - began_s < 121

    play(story, max_backoff=20.0)


def test_a_degraded_server_can_be_switched(play: Play) -> None:
    """A degraded server can switch to any loadable model, without waiting for the next attempt."""

    async def story(server: Server) -> None:
        server.host.engines["llama"].missing_files = True
        server.host.kill()
        await asyncio.sleep(30)

        assert (await server.coordinator.switch("qwen")).switched

        assert "serving" == (await status(server))["state"]
        await asyncio.sleep(600)
        assert "qwen" == server.coordinator.active

    play(story)


def test_restarts_are_bounded(play: Play) -> None:
    """Too many deaths in too short a time make the server give up; old ones are forgotten."""

    async def story(server: Server) -> None:
        for _ in range(4):
            server.host.kill()
            await asyncio.sleep(61)
            assert await is_ready(server)

        for _ in range(2):
            server.host.kill()
            await asyncio.sleep(10)
        server.host.kill("the engine host was killed by signal 9")

        assert "this was death 3 within 60 s" in await server.coordinator.given_up
        assert 503 == (await server.get("/health")).status_code

    play(story, max_restarts=2, restart_window=60.0)


def test_a_host_that_does_not_start_is_started_again(play: Play) -> None:
    """A host that does not start is started again, which counts as one more death."""

    async def story(server: Server) -> None:
        server.host.hold("restart", "")
        server.host.kill()
        await asyncio.sleep(51)
        server.host.release("restart", "")
        await asyncio.sleep(5)

        assert await is_ready(server)
        assert 1 == (await status(server))["host"]["restarts"]
        assert 2 == len(server.events.of(HostDied))

    play(story, load_timeout=50.0)


def test_an_engine_that_dies_again_and_again_is_loaded_ever_more_seldom(play: Play) -> None:
    """An engine that dies repeatedly is loaded ever more rarely; its host lives on."""

    async def story(server: Server) -> None:
        for _ in range(6):
            server.host.kill_engine("llama")
            await server.settled()
            assert "recovering" == server.coordinator.serving().state or server.coordinator.active
            await asyncio.sleep(20)
            assert await is_ready(server)

        server.host.kill_engine("llama")
        await asyncio.sleep(20)
        assert not await is_ready(server)
        await asyncio.sleep(20)
        assert await is_ready(server)

    play(story)


def test_what_is_told_of_an_earlier_load_is_dropped(play: Play) -> None:
    """A report about an earlier load is dropped: the engine loaded since then is alive."""

    async def story(server: Server) -> None:
        engine = server.host.engines["qwen"]
        await server.operate("qwen", "unload")
        await server.operate("qwen", "load")
        server.coordinator.recovery.engine_failed("qwen", "RuntimeError: boom", engine.loads - 1)
        assert "parked" == server.residency("qwen")
        server.coordinator.recovery.engine_failed("qwen", "RuntimeError: boom", engine.loads)
        assert "failed" == server.residency("qwen")

    play(story)


def test_a_stop_ends_recovery(play: Play) -> None:
    """A stop ends recovery, whatever it waits for."""

    async def story(server: Server) -> None:
        server.host.fail_next("load", "llama", ConfigError("weights are broken"))
        server.host.kill()
        await server.settled()
        assert server.coordinator._state.is_recovering

        await server.coordinator.shut_down(0)

        assert not server.coordinator._state.is_recovering
        assert "stopping" == server.coordinator.serving().state

    play(story)


def test_attempts_go_on_for_ever(play: Play) -> None:
    """Attempts to bring a model back continue without a limit."""

    async def story(server: Server) -> None:
        server.host.engines["llama"].missing_files = True
        server.host.kill()
        await asyncio.sleep(300)
        assert len(server.events.of(ServiceDegraded)) > 1100

        server.host.engines["llama"].missing_files = False
        await asyncio.sleep(1)
        assert await is_ready(server)

    play(story, max_backoff=0.0, restart_window=3600.0)


def test_a_death_after_a_switch_has_healed_the_server_is_a_new_one(play: Play) -> None:
    """A death after a switch repaired the server starts a new recovery, without old delays."""

    async def story(server: Server) -> None:
        server.host.engines["llama"].missing_files = True
        server.host.kill()
        await asyncio.sleep(200)
        await server.coordinator.switch("qwen")
        assert not server.coordinator._state.is_degraded
        await asyncio.sleep(400)

        server.host.kill_engine("qwen")
        await server.settled()

        assert "qwen" == server.coordinator.active

    play(story, restart_window=300.0)
