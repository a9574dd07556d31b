"""What a server does on its own after a while without requests."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.conftest import Play
from tests.helpers.support import Server
from vllm_hotswap.events import SwitchEnded
from vllm_hotswap.models.registry import ModelSettings
from vllm_hotswap.testing.fake_settings import FakeSettings

REST = {"llama": ModelSettings(idle_sleep_s=10, idle_unload_s=60)}


async def idle(server: Server, seconds: float) -> None:
    """Let time pass while the server looks for idle models every second."""
    looking = asyncio.create_task(server.coordinator.rest_idle_models())
    await asyncio.sleep(seconds)
    looking.cancel()


def ended(server: Server) -> list[tuple[str, bool]]:
    return [(event.target, event.automatic) for event in server.events.of(SwitchEnded)]


async def state(server: Server) -> tuple[str, str | None, int, int]:
    """The server's state and active model, and what `/health` and `/ready` answer."""
    status = (await server.get("/admin/status")).json()
    probes = [(await server.get(path)).status_code for path in ("/health", "/ready")]
    return status["state"], status["active"], probes[0], probes[1]


# --- back to the default model ----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["manual", "auto"])
def test_default_model_is_switched_back_to(play: Play, mode: str) -> None:
    """After a set time without a request, the server returns to the default model by itself."""

    async def story(server: Server) -> None:
        await server.switch("qwen")
        await idle(server, 29)
        assert "qwen" == server.coordinator.active

        await idle(server, 2)
        assert "llama" == server.coordinator.active
        assert [("qwen", False), ("llama", True)] == ended(server)
        await idle(server, 100)
        assert 2 == len(ended(server))

    play(story, mode=mode, return_to_default=30)


@pytest.mark.parametrize("mode", ["manual", "auto"])
def test_request_keeps_its_model_active(play: Play, mode: str) -> None:
    """The default model stays away while a request runs, and for the whole time after its end."""

    async def story(server: Server) -> None:
        await server.switch("qwen")
        running = await server.start_stream("qwen")
        await idle(server, 100)
        await running.finish()
        await idle(server, 29)
        assert "qwen" == server.coordinator.active

        await idle(server, 2)
        assert "llama" == server.coordinator.active

    play(story, mode=mode, return_to_default=30)


def test_job_lease_keeps_its_model_active(play: Play) -> None:
    """A job lease keeps its model active even without requests; the time starts when it ends."""

    async def story(server: Server) -> None:
        await server.post("/admin/leases", json={"model": "qwen", "owner": "ann", "ttl": 100})
        await idle(server, 129)
        assert "qwen" == server.coordinator.active

        await idle(server, 2)
        assert "llama" == server.coordinator.active

    play(story, mode="auto", return_to_default=30)


def test_default_model_that_cannot_be_activated_is_tried_again_later(play: Play) -> None:
    """A failed return to the default model counts as use, so it is not retried every second."""

    async def story(server: Server) -> None:
        await server.switch("qwen")
        server.host.fail_next("activate", "llama")

        await idle(server, 59)
        assert ("qwen", 2) == (server.coordinator.active, len(ended(server)))

        await idle(server, 3)
        assert "llama" == server.coordinator.active

    play(story, return_to_default=30)


# --- the active model rests -------------------------------------------------------------------


def test_active_model_rests_when_nobody_asks(play: Play) -> None:
    """An unused active model sleeps, then is unloaded; the idle server stays healthy and ready."""

    async def story(server: Server) -> None:
        assert ("serving", "llama", 200, 200) == await state(server)
        await idle(server, 11)
        assert ("asleep", "idle") == (server.residency("llama"), (await state(server))[0])
        await idle(server, 48)
        assert "asleep" == server.residency("llama")
        await idle(server, 3)
        assert "cold" == server.residency("llama")

        assert ("idle", None, 200, 200) == await state(server)
        assert {"ready": True, "active": None, "epoch": 1} == (await server.get("/ready")).json()
        assert [] == ended(server)

    play(story, mode="auto", model_settings=REST)


@pytest.mark.parametrize("alias", ["llama", "qwen", "mistral", None])
def test_next_request_brings_a_model_up(play: Play, alias: str | None) -> None:
    """A request wakes the model that it names; without a name, the one that was active last."""

    async def story(server: Server) -> None:
        await idle(server, 70)

        answer = await server.ask(alias)

        assert (200, alias or "llama") == (answer.status_code, answer.json()["model"])
        assert ("serving", alias or "llama", 200, 200) == await state(server)

    play(story, mode="auto", model_settings=REST)


def test_request_that_comes_while_a_model_goes_to_rest_is_served(play: Play) -> None:
    """A request that arrives while its model is put to sleep waits for that, then wakes it."""

    async def story(server: Server) -> None:
        server.host.hold("sleep", "llama")
        looking = asyncio.create_task(server.coordinator.rest_idle_models())
        await asyncio.sleep(11)
        asked = server.ask("llama")
        await server.settled()
        assert not asked.done()

        server.host.release("sleep", "llama")

        assert 200 == (await asked).status_code
        assert [("sleep", "llama"), ("wake", "llama"), ("activate", "llama")] == (
            server.host.operations
        )
        looking.cancel()

    play(story, mode="auto", model_settings=REST)


def test_model_in_use_does_not_rest(play: Play) -> None:
    """A model with a request in flight, a job lease or a pin does not rest."""

    async def story(server: Server) -> None:
        running = await server.start_stream("llama")
        await idle(server, 100)
        assert "active" == server.residency("llama")
        await running.finish()

        lease = {"model": "llama", "owner": "ann", "ttl": 100}
        await server.post("/admin/leases", json=lease)
        await idle(server, 99)
        assert "active" == server.residency("llama")

        await server.operate("llama", "pin")
        await idle(server, 100)
        assert "active" == server.residency("llama")

    play(story, mode="auto", model_settings=REST)


def test_active_model_does_not_rest_in_the_mode_manual(play: Play) -> None:
    """In manual mode the active model never rests, because no request would bring one up again."""

    async def story(server: Server) -> None:
        await idle(server, 100)

        assert ("serving", "llama", 200, 200) == await state(server)

    play(story, model_settings=REST)


def test_model_that_rests_is_not_switched_away_from(play: Play) -> None:
    """A server that is idle stays so, even if the resting model is not the default one."""

    async def story(server: Server) -> None:
        await server.switch("qwen")
        await idle(server, 100)

        assert ("idle", None) == (await state(server))[:2]
        assert [("qwen", False)] == ended(server)

    policies = {"qwen": ModelSettings(idle_unload_s=10)}
    play(story, mode="auto", model_settings=policies, return_to_default=30)


def test_host_that_dies_while_the_model_rests_is_restarted(play: Play) -> None:
    """After the host dies, the model that was active last comes back, and rests again later."""

    async def story(server: Server) -> None:
        await idle(server, 70)

        server.host.kill()
        await asyncio.sleep(5)

        assert ("serving", "llama", 200, 200) == await state(server)
        await idle(server, 70)
        assert ("idle", None, 200, 200) == await state(server)

    play(story, mode="auto", model_settings=REST)


def test_engine_that_dies_at_rest_is_left_until_it_is_asked_for(play: Play) -> None:
    """An engine that dies at rest is not restarted until a request needs it."""

    async def story(server: Server) -> None:
        await idle(server, 11)
        server.host.kill_engine("llama")
        await server.settled()
        assert ("idle", None, 200, 200) == await state(server)

        assert 200 == (await server.ask("llama")).status_code

    play(story, mode="auto", model_settings=REST)


def test_model_that_cannot_be_brought_up_from_rest_is_told(play: Play) -> None:
    """A model that cannot be brought up from rest gives an error; the next request tries again."""

    async def story(server: Server) -> None:
        await idle(server, 70)
        server.host.fail_next("load", "llama")

        refused = await server.ask("llama")
        assert (503, "switch_failed") == (refused.status_code, refused.json()["error"]["code"])
        assert ("idle", None, 200, 200) == await state(server)

        await asyncio.sleep(5)
        assert 200 == (await server.ask("llama")).status_code

    play(story, mode="auto", model_settings=REST)


def test_model_that_cannot_rest_is_active_again_with_the_next_request(play: Play) -> None:
    """If a sleep fails, nothing is lost: the next request makes the model active again."""

    async def story(server: Server) -> None:
        server.host.fail_next("sleep", "llama")
        looking = asyncio.create_task(server.coordinator.rest_idle_models())
        await asyncio.sleep(10.5)
        looking.cancel()

        assert ("parked", "idle") == (server.residency("llama"), (await state(server))[0])
        assert 200 == (await server.ask("llama")).status_code

    play(story, mode="auto", model_settings=REST)


def test_device_without_sleep_unloads(play: Play) -> None:
    """On a device without sleep, the time to sleep has no effect; the model is only unloaded."""

    async def story(server: Server) -> None:
        await idle(server, 20)
        assert "active" == server.residency("llama")
        await idle(server, 41)
        assert "cold" == server.residency("llama")

    settings: dict[str, Any] = {"llama": FakeSettings(levels=frozenset())}
    play(story, mode="auto", model_settings=REST, settings=settings)
