"""A device of which other processes take memory, and wakes for which there is too little."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.conftest import MakeServer, Play
from tests.support import Server
from tests.test_parking import park
from vllm_hotswap.errors import HotswapError, NoRoom
from vllm_hotswap.planner import Usage
from vllm_hotswap.testing.fake_engine import FakeSettings

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
    """All three are loaded on a device that has room for them; llama is active."""
    server = await make_server(
        load=ALIASES, settings=dict.fromkeys(ALIASES, GPU), budget=Usage(18 * MIB, 100 * MIB)
    )
    server.host.is_device_shared = True
    return server


async def test_models_move_down_when_others_take_memory(
    gpu: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Before an allocation fails; the least recently used first, and not the active one."""
    await gpu.switch("qwen")
    gpu.host.taken_bytes = 4 * MIB

    moves = await gpu.coordinator.ladder.relieve()

    assert {"llama": "parked", "qwen": "active", "mistral": "asleep"} == gpu.residencies
    assert ["mistral"] == [move.alias for move in moves]
    assert f"event=device_taken others_bytes={4 * MIB}" in caplog.text


async def test_nobody_moves_when_others_take_what_is_free(
    gpu: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing is told."""
    caplog.set_level(logging.WARNING)
    await gpu.operate("mistral", "unload")
    gpu.host.taken_bytes = 6 * MIB

    assert () == await gpu.coordinator.ladder.relieve()
    assert "" == caplog.text


async def test_a_switch_plans_with_what_others_have_left(gpu: Server) -> None:
    """It looks before anything moves, so that the target comes up in what there is."""
    await gpu.operate("mistral", "unload")
    gpu.host.taken_bytes = 6 * MIB  # just what mistral has given up

    await gpu.switch("mistral")

    assert {"llama": "asleep", "qwen": "asleep", "mistral": "active"} == gpu.residencies


async def test_a_load_plans_with_what_others_have_left(gpu: Server) -> None:
    """The active model keeps its place."""
    await gpu.operate("mistral", "unload")
    gpu.host.taken_bytes = 5 * MIB

    await gpu.operate("mistral", "load")

    assert {"llama": "active", "qwen": "asleep", "mistral": "parked"} == gpu.residencies


async def test_a_switch_for_which_others_have_left_no_room_is_refused_at_once(
    gpu: Server,
) -> None:
    """The source's requests are not waited for, and it has given up nothing."""
    await gpu.operate("mistral", "unload")
    gpu.host.taken_bytes = 13 * MIB
    stream = await gpu.start_stream("llama")

    response = await asyncio.wait_for(gpu.switch("mistral"), 10)

    assert 503 == response.status_code
    assert "no room: 'mistral' needs 6.0 MiB" in response.text
    assert {"llama": "active", "qwen": "parked", "mistral": "cold"} == gpu.residencies
    await stream.finish()


async def test_status_shows_what_others_hold(gpu: Server) -> None:
    """As it was last seen; the budget is what they have left."""
    gpu.host.taken_bytes = 5 * MIB
    await gpu.coordinator.ladder.relieve()

    device = (await gpu.get("/admin/status")).json()["memory"]["device"]

    assert {"budget": 13 * MIB, "used": 13 * MIB, "base": 0, "others": 5 * MIB} == device


async def test_a_shared_device_is_looked_at_until_the_server_ends(
    gpu: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that cannot be moved does not end that, nor does a host that has died."""
    monkeypatch.setattr("vllm_hotswap.coordinator.DEVICE_CHECK_S", 0)
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
    """A step may take longer than commands may: that is no reason to end the host."""
    monkeypatch.setattr("vllm_hotswap.ladder.LOOK_S", 0.0)
    never = asyncio.Event()

    async def measure_device(used_bytes: int) -> None:
        await never.wait()

    monkeypatch.setattr(gpu.host, "measure_device", measure_device)
    gpu.host.taken_bytes = 4 * MIB

    assert () == await gpu.coordinator.ladder.relieve()
    assert not gpu.host.died.done()


async def test_what_cannot_be_helped_is_told_once(
    gpu: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """And again when it has been over in the meantime."""
    relieve = gpu.coordinator.ladder.relieve
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
    """What the others give is given all the same."""
    await gpu.switch("qwen")
    gpu.host.taken_bytes = 9 * MIB
    gpu.host.fail_next("sleep", "mistral", NoRoom("no host memory"))

    await gpu.coordinator.ladder.relieve()

    assert {"llama": "asleep", "qwen": "active", "mistral": "cold"} == gpu.residencies


async def test_a_device_that_is_not_shared_is_not_looked_at(gpu: Server) -> None:
    """There is nothing to see."""
    gpu.host.is_device_shared = False
    gpu.host.taken_bytes = 18 * MIB

    await asyncio.wait_for(gpu.coordinator.watch_device(), 1)
    await gpu.coordinator.ladder.measure_device()

    assert 18 * MIB == gpu.coordinator.ladder.budget.device


async def test_a_sleep_without_host_memory_is_refused(gpu: Server) -> None:
    """Nothing has changed: the model is parked, and sleeps once there is some."""
    gpu.host.fail_next("sleep", "qwen", NoRoom("no host memory for 4.0 MiB of weights asleep"))

    response = await gpu.operate("qwen", "sleep")

    assert (409, "no_room") == (response.status_code, response.json()["error"]["code"])
    assert "parked" == gpu.residencies["qwen"]
    assert 200 == (await gpu.operate("qwen", "sleep")).status_code


async def test_a_model_that_is_half_asleep_is_given_up(gpu: Server) -> None:
    """Its engine has died before the answer comes; it is loaded anew when it is asked for."""
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


# --- an engine that nobody can use any more -----------------------------------------------------


@pytest.fixture
async def room_for_two(make_server: MakeServer) -> Server:
    """Of three models; llama is active, qwen is parked."""
    size = dict.fromkeys(ALIASES, GPU)
    budget = Usage(12 * MIB, 100 * MIB)
    return await make_server(load=ALIASES[:2], settings=size, budget=budget)


async def test_what_a_broken_frontend_leaves_is_given_back_before_another_model_comes(
    room_for_two: Server,
) -> None:
    """Its engine counts as cold, and is planned over."""
    server = room_for_two
    server.host.break_frontend("qwen")

    assert 200 == (await server.switch("mistral")).status_code

    assert {"llama": "parked", "qwen": "failed", "mistral": "active"} == server.residencies
    assert [("clean_up", "qwen"), ("load", "mistral")] == server.host.operations[:2]
    assert 12 * MIB == server.host.most_held_bytes


async def test_what_a_broken_frontend_leaves_is_given_back_at_once(room_for_two: Server) -> None:
    """Without anybody asking for something."""
    server = room_for_two
    server.host.break_frontend("qwen")
    await server.settled()

    assert [("clean_up", "qwen")] == server.host.operations
    assert server.host.engines["qwen"].level is None


async def test_whoever_moves_models_meanwhile_finds_the_room(room_for_two: Server) -> None:
    """It does not wait for somebody else's turn."""
    server = room_for_two
    ladder = server.coordinator.ladder
    async with ladder.move_lock():
        server.host.break_frontend("qwen")
        await ladder.make_room(server.coordinator.registry.model("mistral"))

        assert [("clean_up", "qwen")] == server.host.operations


# --- a wake without room -------------------------------------------------------------------------


async def test_a_model_for_whose_wake_there_is_no_room_is_still_asleep(gpu: Server) -> None:
    """Nothing of it is lost: it wakes once there is."""
    await gpu.operate("qwen", "sleep")
    gpu.host.fail_next("wake", "qwen", NoRoom("no room: waking takes 5 MiB"))

    response = await gpu.operate("qwen", "wake")
    assert (409, "no_room") == (response.status_code, response.json()["error"]["code"])
    assert "asleep" == gpu.residencies["qwen"]

    await gpu.operate("qwen", "wake")
    assert "parked" == gpu.residencies["qwen"]
    assert 1 == gpu.host.engines["qwen"].loads


async def test_a_model_that_cannot_be_woken_for_another_reason_is_cold(gpu: Server) -> None:
    """Its engine is gone."""
    await gpu.operate("qwen", "sleep")
    gpu.host.fail_next("wake", "qwen", HotswapError("a copy has failed"))

    await gpu.operate("qwen", "wake")

    assert "cold" == gpu.residencies["qwen"]


async def test_a_switch_to_a_model_without_room_leaves_the_source_active(gpu: Server) -> None:
    """And the target asleep."""
    await gpu.operate("qwen", "sleep")
    gpu.host.fail_next("wake", "qwen", NoRoom("no room: waking takes 5 MiB"))

    response = await gpu.switch("qwen")

    assert 503 == response.status_code
    assert "no room: waking takes 5 MiB" in response.text
    assert {"llama": "active", "qwen": "asleep", "mistral": "parked"} == gpu.residencies
    assert 200 == (await gpu.switch("qwen")).status_code


def test_parked_requests_go_on_after_a_wake_without_room(play: Play) -> None:
    """They are kept with their model, and are told the rest once it is active."""

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
