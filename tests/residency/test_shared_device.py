"""A device whose memory other processes take, and wakes without enough of it."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.conftest import MakeServer, Play
from tests.helpers.support import Server
from tests.switching.test_parking import park
from vllm_hotswap.errors import HotswapError, NoRoom
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.testing.fake_settings import FakeSettings

MIB = 1 << 20
GPU = FakeSettings(
    weights_bytes=4 * MIB,
    kv_bytes=2 * MIB,
    levels=frozenset([1]),
    offloads=True,
    residue_bytes=MIB,
)
ALIASES = ("llama", "qwen", "mistral")


@pytest.fixture
async def gpu(make_server: MakeServer) -> Server:
    """All three models are loaded on a device with room for them; llama is active."""
    server = await make_server(
        load=ALIASES, settings=dict.fromkeys(ALIASES, GPU), budget=Usage(18 * MIB, 100 * MIB)
    )
    server.host.is_device_shared = True
    return server


async def test_models_move_down_when_others_take_memory(
    gpu: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """When others take memory, models move down first, the least recently used, not the active."""
    await gpu.switch("qwen")
    gpu.host.taken_bytes = 4 * MIB

    moves = await gpu.coordinator.idle.relief.relieve()

    assert {"llama": "parked", "qwen": "active", "mistral": "asleep"} == gpu.residencies
    assert ["mistral"] == [move.alias for move in moves]
    assert f"event=device_taken others_bytes={4 * MIB}" in caplog.text


async def test_nobody_moves_when_others_take_what_is_free(
    gpu: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """When others take only free memory, no model moves and nothing is logged."""
    caplog.set_level(logging.WARNING)
    await gpu.operate("mistral", "unload")
    gpu.host.taken_bytes = 6 * MIB

    assert () == await gpu.coordinator.idle.relief.relieve()
    assert "" == caplog.text


async def test_a_switch_plans_with_what_others_have_left(gpu: Server) -> None:
    """A switch checks the device first, so that the target fits into what is left."""
    await gpu.operate("mistral", "unload")
    gpu.host.taken_bytes = 6 * MIB  # exactly what mistral released

    await gpu.switch("mistral")

    assert {"llama": "asleep", "qwen": "asleep", "mistral": "active"} == gpu.residencies


async def test_a_load_plans_with_what_others_have_left(gpu: Server) -> None:
    """A load uses only what others have left, and the active model stays."""
    await gpu.operate("mistral", "unload")
    gpu.host.taken_bytes = 5 * MIB

    await gpu.operate("mistral", "load")

    assert {"llama": "active", "qwen": "asleep", "mistral": "parked"} == gpu.residencies


async def test_a_switch_for_which_others_have_left_no_room_is_refused_at_once(
    gpu: Server,
) -> None:
    """Without room left by others, a switch is refused before the drain; the source keeps all."""
    await gpu.operate("mistral", "unload")
    gpu.host.taken_bytes = 13 * MIB
    stream = await gpu.start_stream("llama")

    response = await asyncio.wait_for(gpu.switch("mistral"), 10)

    assert 503 == response.status_code
    assert "no room: 'mistral' needs 6.0 MiB" in response.text
    assert {"llama": "active", "qwen": "parked", "mistral": "cold"} == gpu.residencies
    await stream.finish()


async def test_status_shows_what_others_hold(gpu: Server) -> None:
    """Status shows what others held at the last check, and the budget that they left."""
    gpu.host.taken_bytes = 5 * MIB
    await gpu.coordinator.idle.relief.relieve()

    device = (await gpu.get("/admin/status")).json()["memory"]["device"]

    assert {"budget": 13 * MIB, "used": 13 * MIB, "base": 0, "others": 5 * MIB} == device


async def test_a_shared_device_is_looked_at_until_the_server_ends(
    gpu: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared device is checked until the server ends, despite failed moves or a dead host."""
    monkeypatch.setattr("vllm_hotswap.switching.idle.DEVICE_CHECK_S", 0)
    gpu.host.taken_bytes = 4 * MIB
    gpu.host.fail_next("sleep", "mistral")
    gpu.host.fail_next("sleep", "qwen")
    watching = asyncio.create_task(gpu.coordinator.watch_device())

    while "asleep" not in gpu.residencies.values():  # noqa: ASYNC110
        await asyncio.sleep(0)

    watching.cancel()


async def test_a_device_that_cannot_be_looked_at_soon_is_looked_at_later(
    gpu: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check delayed by a long step is made later, and the host is not restarted for it."""
    monkeypatch.setattr("vllm_hotswap.residency.device.LOOK_S", 0.0)
    never = asyncio.Event()

    async def measure_device(used_bytes: int) -> None:
        await never.wait()

    monkeypatch.setattr(gpu.host, "measure_device", measure_device)
    gpu.host.taken_bytes = 4 * MIB

    assert () == await gpu.coordinator.idle.relief.relieve()
    assert not gpu.host.died.done()


async def test_what_cannot_be_helped_is_told_once(
    gpu: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """A shortage that no move can relieve is logged once, and again if it returns."""
    relieve = gpu.coordinator.idle.relief.relieve
    gpu.host.taken_bytes = 17 * MIB
    for _ in range(4):
        await relieve()
    told = caplog.text.count("event=device_taken")
    assert 2 == told  # as long as models could move, and then

    gpu.host.taken_bytes = 0
    await relieve()
    gpu.host.taken_bytes = 17 * MIB
    await relieve()
    assert told + 1 == caplog.text.count("event=device_taken")


async def test_a_model_whose_weights_find_no_room_on_the_host_is_unloaded(gpu: Server) -> None:
    """A model without host memory for its weights is unloaded; other models still move."""
    await gpu.switch("qwen")
    gpu.host.taken_bytes = 9 * MIB
    gpu.host.fail_next("sleep", "mistral", NoRoom("no host memory"))

    await gpu.coordinator.idle.relief.relieve()

    assert {"llama": "asleep", "qwen": "active", "mistral": "cold"} == gpu.residencies


async def test_a_device_that_is_not_shared_is_not_looked_at(gpu: Server) -> None:
    """A device that is not shared is not checked."""
    gpu.host.is_device_shared = False
    gpu.host.taken_bytes = 18 * MIB

    await asyncio.wait_for(gpu.coordinator.watch_device(), 1)
    await gpu.coordinator.ladder.device.measure()

    assert 18 * MIB == gpu.coordinator.ladder.plans.budget.device


async def test_a_sleep_without_host_memory_is_refused(gpu: Server) -> None:
    """A sleep without host memory is refused: the model stays parked, and a retry can work."""
    gpu.host.fail_next("sleep", "qwen", NoRoom("no host memory for 4.0 MiB of weights asleep"))

    response = await gpu.operate("qwen", "sleep")

    assert (409, "no_room") == (response.status_code, response.json()["error"]["code"])
    assert "parked" == gpu.residencies["qwen"]
    assert 200 == (await gpu.operate("qwen", "sleep")).status_code


async def test_a_model_that_is_half_asleep_is_given_up(gpu: Server) -> None:
    """A model that fails while falling asleep is failed, and is loaded again on its next switch."""
    gpu.host.hold("sleep", "qwen")
    sleeping = gpu.operate("qwen", "sleep")
    await gpu.settled()
    gpu.host.kill_engine("qwen", "a worker could not fall asleep")
    gpu.host.fail_next("sleep", "qwen", HotswapError("a worker could not fall asleep"))
    gpu.host.release("sleep", "qwen")

    assert 503 == (await sleeping).status_code
    assert "failed" == gpu.residencies["qwen"]
    assert 200 == (await gpu.switch("qwen")).status_code
    assert 2 == gpu.host.engines["qwen"].loads


# --- an unusable engine -------------------------------------------------------------------------


@pytest.fixture
async def room_for_two(make_server: MakeServer) -> Server:
    """A server with room for two of three models; llama is active, qwen is parked."""
    size = dict.fromkeys(ALIASES, GPU)
    budget = Usage(12 * MIB, 100 * MIB)
    return await make_server(load=ALIASES[:2], settings=size, budget=budget)


async def test_what_a_broken_frontend_leaves_is_given_back_before_another_model_comes(
    room_for_two: Server,
) -> None:
    """Memory of an engine with a broken frontend is freed before another model is brought up."""
    server = room_for_two
    server.host.break_frontend("qwen")

    assert 200 == (await server.switch("mistral")).status_code

    assert {"llama": "parked", "qwen": "failed", "mistral": "active"} == server.residencies
    assert [("clean_up", "qwen"), ("load", "mistral")] == server.host.operations[:2]
    assert 12 * MIB == server.host.most_held_bytes


async def test_what_a_broken_frontend_leaves_is_given_back_at_once(room_for_two: Server) -> None:
    """Memory of an engine with a broken frontend is freed at once, without any request."""
    server = room_for_two
    server.host.break_frontend("qwen")
    await server.settled()

    assert [("clean_up", "qwen")] == server.host.operations
    assert server.host.engines["qwen"].level is None


async def test_whoever_moves_models_meanwhile_finds_the_room(room_for_two: Server) -> None:
    """A move in progress frees a broken engine's memory itself, without waiting for the lock."""
    server = room_for_two
    ladder = server.coordinator.ladder
    async with ladder.move_lock():
        server.host.break_frontend("qwen")
        await ladder.make_room(server.coordinator.registry.model("mistral"))

        assert [("clean_up", "qwen")] == server.host.operations


# --- a wake without room -------------------------------------------------------------------------


async def test_a_model_for_whose_wake_there_is_no_room_is_still_asleep(gpu: Server) -> None:
    """A model whose wake finds no room stays asleep and intact, and a retry can wake it."""
    await gpu.operate("qwen", "sleep")
    gpu.host.fail_next("wake", "qwen", NoRoom("no room: waking takes 5 MiB"))

    response = await gpu.operate("qwen", "wake")
    assert (409, "no_room") == (response.status_code, response.json()["error"]["code"])
    assert "asleep" == gpu.residencies["qwen"]

    await gpu.operate("qwen", "wake")
    assert "parked" == gpu.residencies["qwen"]
    assert 1 == gpu.host.engines["qwen"].loads


async def test_a_model_that_cannot_be_woken_for_another_reason_is_cold(gpu: Server) -> None:
    """A model whose wake fails for another reason is cold, because its engine is gone."""
    await gpu.operate("qwen", "sleep")
    gpu.host.fail_next("wake", "qwen", HotswapError("a copy has failed"))

    await gpu.operate("qwen", "wake")

    assert "cold" == gpu.residencies["qwen"]


async def test_a_switch_to_a_model_without_room_leaves_the_source_active(gpu: Server) -> None:
    """A switch whose target finds no room to wake leaves the source active, the target asleep."""
    await gpu.operate("qwen", "sleep")
    gpu.host.fail_next("wake", "qwen", NoRoom("no room: waking takes 5 MiB"))

    response = await gpu.switch("qwen")

    assert 503 == response.status_code
    assert "no room: waking takes 5 MiB" in response.text
    assert {"llama": "active", "qwen": "asleep", "mistral": "parked"} == gpu.residencies
    assert 200 == (await gpu.switch("qwen")).status_code


def test_parked_requests_go_on_after_a_wake_without_room(play: Play) -> None:
    """Parked requests survive a wake without room, and are completed after the next switch."""

    async def story(server: Server) -> None:
        stream = await server.start_stream("llama", words=8)
        await park(server, "qwen")
        assert "asleep" == server.residencies["llama"]
        server.host.fail_next("wake", "llama", NoRoom("no room"))

        assert 503 == (await server.switch("llama")).status_code
        assert {"llama": "asleep", "qwen": "active", "mistral": "cold"} == server.residencies
        assert 200 == (await server.switch("llama")).status_code

        assert (await stream.finish()).is_whole

    play(
        story,
        load=("llama",),
        settings=dict.fromkeys(ALIASES, GPU),
        budget=Usage(7 * MIB, 100 * MIB),
    )
