"""A sleeping model that is next wakes in slices, before a request, beside the active model."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import MakeServer, Play
from tests.helpers.support import Server
from tests.residency import test_shared_device
from tests.residency.test_shared_device import ALIASES, MIB
from vllm_hotswap.config.settings import RecoveryConfig
from vllm_hotswap.errors import HotswapError, NoRoom
from vllm_hotswap.events import WakeChanged
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.models.registry import Model, ModelSettings
from vllm_hotswap.states import Residency, WakeProgress
from vllm_hotswap.testing.fake_settings import FakeSettings

GPU = replace(test_shared_device.GPU, slices=5)
"""6 MiB awake, 1 MiB asleep: a slice is 1 MiB."""


def settings(**changes: Any) -> dict[str, FakeSettings]:
    return dict.fromkeys(ALIASES, replace(GPU, **changes))


async def make(make_server: MakeServer, mib: int = 18, **kwargs: Any) -> Server:
    """Start a server: llama is active, the others sleep; the device holds `mib` MiB."""
    server = await make_server(
        load=ALIASES, settings=settings(), budget=Usage(mib * MIB, 100 * MIB), **kwargs
    )
    await asleep(server, "qwen", "mistral")
    return server


async def asleep(server: Server, *aliases: str) -> None:
    for alias in aliases:
        if server.residencies[alias] == "parked":
            assert 200 == (await server.operate(alias, "sleep")).status_code
    server.host.operations.clear()


@pytest.fixture
async def gpu(make_server: MakeServer) -> Server:
    """A server on a device that has room for all."""
    return await make(make_server)


async def announce(server: Server, alias: str) -> str:
    """Announce a model and return the result for its wake."""
    answer = (await server.post("/admin/next", json={"model": alias})).json()
    return str(answer["wake"])


async def waking(server: Server, alias: str = "qwen") -> tuple[int, int] | None:
    """Return the MiB that the wake has taken, and will take."""
    told = (await server.get("/admin/status")).json()["models"][alias]["waking"]
    return told and (told["done_bytes"] // MIB, told["total_bytes"] // MIB)


def changes(server: Server, alias: str = "qwen") -> list[tuple[str, int]]:
    """Return the reported changes, each with the MiB that the wake had taken by then."""
    told = server.events.of(WakeChanged)
    return [(each.change, each.done_bytes // MIB) for each in told if each.model == alias]


def held(server: Server, alias: str = "qwen") -> int:
    """Return the MiB that the engine really holds."""
    return server.host.engines[alias].held_bytes // MIB


# --- a useful wake ----------------------------------------------------------------------------


async def test_an_announced_model_that_sleeps_wakes_before_it_is_asked_for(gpu: Server) -> None:
    """An announced model that sleeps wakes in slices; status, events and metrics show it."""
    gpu.host.hold("wake_some", "qwen")
    assert "begun" == await announce(gpu, "qwen")
    assert (0, 5) == await waking(gpu)

    gpu.host.release("wake_some", "qwen")
    await gpu.settled()

    assert [("wake_some", "qwen")] * 5 == gpu.host.operations
    assert (5, 5) == await waking(gpu)
    assert {"llama": "active", "qwen": "asleep", "mistral": "asleep"} == gpu.residencies
    assert [("begun", 0), ("done", 5)] == changes(gpu)
    assert 'waking_bytes{model="qwen"} 5.24288e+06' in (await gpu.get("/metrics")).text

    assert 200 == (await gpu.switch("qwen")).status_code
    assert [("wake", "qwen"), ("activate", "qwen")] == gpu.host.operations[5:]
    assert await waking(gpu) is None
    assert ("used", 5) == changes(gpu)[-1]
    text = (await gpu.get("/metrics")).text
    assert 'hotswap_woken_bytes_total{result="used"} 5.24288e+06' in text
    assert 'hotswap_model_waking_bytes{model="qwen"} 0.0' in text


def test_a_switch_waits_only_for_what_is_left(play: Play) -> None:
    """A switch waits only for what is left of a wake: of ten seconds, four had passed."""
    took: list[float] = []

    async def story(server: Server) -> None:
        now_s = asyncio.get_running_loop().time
        for ahead_s in (0.0, 4.5):
            await asleep(server, "qwen")
            if ahead_s:
                await announce(server, "qwen")
                await asyncio.sleep(ahead_s)
            began_s = now_s()
            assert 200 == (await server.switch("qwen")).status_code
            took.append(now_s() - began_s)
            await server.switch("llama")

    play(story, load=ALIASES, settings=settings(wake_s=10), budget=Usage(18 * MIB, 100 * MIB))
    assert [10, 6] == pytest.approx(took)


def test_a_wake_that_was_begun_before_says_nothing_of_the_next_one(play: Play) -> None:
    """What was left of an early wake counts neither as a wake's cost nor as a switch's."""

    async def story(server: Server) -> None:
        model = server.coordinator.registry.model("qwen")
        await asleep(server, "qwen")
        await server.switch("qwen")
        measured = server.auto.costs.version
        await server.switch("llama")
        await asleep(server, "qwen")
        await announce(server, "qwen")
        await asyncio.sleep(5)
        status = (await server.get("/admin/status")).json()["models"]["qwen"]
        assert 6 == pytest.approx(status["switch_cost_s"])

        await server.switch("qwen")

        assert 10 == pytest.approx(model.measured_up_s(Residency.ASLEEP))
        assert measured + 1 == server.auto.costs.version  # of the switch to llama

    play(
        story,
        load=ALIASES,
        settings=settings(wake_s=10),
        budget=Usage(18 * MIB, 100 * MIB),
        mode="auto",
    )


async def expect_qwen(server: Server) -> None:
    """Make qwen, which sleeps, the predicted model: it has followed llama often."""
    for alias in ("qwen", "llama") * 8:
        await server.switch(alias)
    await server.switch("mistral")
    await server.operate("qwen", "sleep")
    await server.switch("llama")
    await server.settled()


async def test_a_predicted_model_that_sleeps_wakes(gpu: Server) -> None:
    """A predicted model that sleeps wakes early, and its wake counts as used if that was right."""
    await expect_qwen(gpu)
    assert (5, 5) == await waking(gpu)

    await gpu.switch("qwen")

    assert ("used", 5) == changes(gpu)[-1]


async def test_who_is_served_does_not_wait_for_a_slice(gpu: Server) -> None:
    """Requests and switches do not wait for a slice that is under way."""
    gpu.host.hold("wake_some", "qwen")
    await announce(gpu, "qwen")
    await gpu.settled()

    stream = await gpu.start_stream("llama", words=8)
    assert (await stream.finish()).is_whole
    assert 200 == (await gpu.switch("mistral")).status_code
    assert "mistral" == gpu.coordinator.active

    gpu.host.release("wake_some", "qwen")
    await gpu.settled()
    assert (5, 5) == await waking(gpu)


async def test_a_switch_to_the_model_does_not_wait_for_a_slice(gpu: Server) -> None:
    """A switch to the model orders the rest of its wake at once, after the slice under way."""
    gpu.host.hold("wake_some", "qwen")
    await announce(gpu, "qwen")
    await gpu.settled()

    assert 200 == (await gpu.switch("qwen")).status_code

    assert 6 == held(gpu)
    assert [("begun", 0), ("used", 0)] == changes(gpu)


async def test_slices_wait_for_who_moves_models(gpu: Server) -> None:
    """No slice starts while a switch is under way."""
    gpu.host.hold("wake", "mistral")
    switching = gpu.switch("mistral")
    await gpu.settled()

    await announce(gpu, "qwen")
    await gpu.settled()
    assert ("wake_some", "qwen") not in gpu.host.operations

    gpu.host.release("wake", "mistral")
    await switching
    await gpu.settled()
    assert (5, 5) == await waking(gpu)


async def test_a_wake_that_begins_while_models_move_finds_the_room_that_they_leave(
    make_server: MakeServer,
) -> None:
    """A wake announced while models move is given up if those moves need the room."""
    server = await make(make_server, mib=13)
    server.host.hold("wake", "mistral")
    switching = server.switch("mistral")
    await server.settled()

    assert "begun" == await announce(server, "qwen")
    server.host.release("wake", "mistral")
    await switching
    await server.settled()

    assert (await waking(server), held(server)) == (None, 1)
    assert 13 * MIB == server.host.most_held_bytes


async def test_an_announcement_is_repeated_without_effect(gpu: Server) -> None:
    """A repeated announcement has no effect; the answer says how far the wake has come."""
    gpu.host.hold("wake_some", "qwen")
    told = [await announce(gpu, "qwen"), await announce(gpu, "qwen")]
    gpu.host.release("wake_some", "qwen")
    await gpu.settled()

    assert ["begun", "under_way", "done"] == [*told, await announce(gpu, "qwen")]
    assert 5 == len(gpu.host.operations)


async def test_a_device_that_wakes_in_one_go_does_so_when_asked(make_server: MakeServer) -> None:
    """A device that cannot wake in slices wakes only on a switch, and nothing starts before."""
    server = await make_server(load=ALIASES, settings=settings(slices=0))
    await asleep(server, "qwen")

    assert "not_needed" == await announce(server, "qwen")
    await server.settled()

    assert [] == server.host.operations
    assert "not_needed" == await announce(server, "llama")


# --- a wake that is given up ------------------------------------------------------------------


async def test_a_wake_is_given_up_when_another_model_is_announced(gpu: Server) -> None:
    """A wake is given up and its memory freed when another model is announced, which then wakes."""
    await announce(gpu, "qwen")
    await gpu.settled()

    await announce(gpu, "mistral")
    await gpu.settled()

    assert (1, 6) == (held(gpu), held(gpu, "mistral"))
    assert [None, (5, 5)] == [await waking(gpu), await waking(gpu, "mistral")]
    assert [("begun", 0), ("done", 5), ("given_up", 5)] == changes(gpu)
    text = (await gpu.get("/metrics")).text
    assert 'hotswap_woken_bytes_total{result="wasted"} 5.24288e+06' in text


async def test_who_is_announced_next_has_the_memory_of_who_was_before(
    make_server: MakeServer,
) -> None:
    """The memory of one wake is freed before the next, on a device with room for one of them."""
    server = await make(make_server, mib=13)
    await announce(server, "qwen")
    await server.settled()

    assert "begun" == await announce(server, "mistral")
    await server.settled()
    assert "begun" == await announce(server, "qwen")
    assert "begun" == await announce(server, "mistral")
    await server.settled()

    assert (1, 6) == (held(server), held(server, "mistral"))
    assert 13 * MIB == server.host.most_held_bytes


async def test_a_wake_for_a_prediction_ends_when_a_switch_goes_elsewhere(gpu: Server) -> None:
    """A wake for a prediction ends when a switch to another model starts, as prefetching does."""
    await expect_qwen(gpu)
    gpu.host.hold("activate", "mistral")

    switching = gpu.switch("mistral")
    await gpu.settled()

    assert (1, ("given_up", 5)) == (held(gpu), changes(gpu)[-1])
    gpu.host.release("activate", "mistral")
    assert 200 == (await switching).status_code


async def test_an_announcement_outlives_the_prediction_of_the_same_model(gpu: Server) -> None:
    """An announcement keeps the memory that a prediction of the same model has already taken."""
    await expect_qwen(gpu)
    assert "done" == await announce(gpu, "qwen")

    await gpu.switch("mistral")

    assert (5, 5) == await waking(gpu)


async def test_a_wake_is_given_up_before_anybody_is_evicted(make_server: MakeServer) -> None:
    """Early wakes are given up before evictions, the plan lists them, and the budget holds."""
    server = await make(make_server, mib=13)
    await announce(server, "qwen")
    await server.settled()
    plan = (await server.get("/admin/plan?model=mistral")).json()
    assert (["qwen"], []) == (plan["give_up_wake"], plan["evict"])
    assert {"before": 13, "peak": 13, "after": 13} == {
        name: plan["memory"][name]["device_bytes"] // MIB for name in ("before", "peak", "after")
    }
    server.host.operations.clear()

    assert 200 == (await server.switch("mistral")).status_code

    told = [("give_up_wake", "qwen"), ("wake", "mistral"), ("activate", "mistral")]
    assert told == server.host.operations[:3]
    assert {"llama": "parked", "qwen": "asleep", "mistral": "active"} == server.residencies
    assert 13 * MIB == server.host.most_held_bytes


async def test_a_wake_stays_where_there_is_room_for_all(gpu: Server) -> None:
    """An announced wake survives a switch to another model where there is room for all."""
    await announce(gpu, "qwen")
    await gpu.settled()

    await gpu.switch("mistral")
    await gpu.settled()

    assert (5, 5) == await waking(gpu)


async def test_nothing_is_evicted_for_a_wake(make_server: MakeServer) -> None:
    """An announced wake evicts nothing; it starts once there is room."""
    server = await make(make_server, mib=12)
    assert "no_room" == await announce(server, "qwen")
    await server.settled()
    assert [] == server.host.operations

    await server.operate("mistral", "unload")
    await server.operate("llama", "pin")
    assert "begun" == await announce(server, "qwen")
    await server.settled()

    assert (5, 5) == await waking(server)
    assert 12 * MIB == server.host.most_held_bytes


async def test_an_announced_model_wakes_after_a_switch_if_there_is_room_then(
    make_server: MakeServer,
) -> None:
    """An announced model wakes after a switch made room, without a second announcement."""
    server = await make(make_server, mib=17)
    await server.operate("mistral", "wake")
    assert "no_room" == await announce(server, "qwen")
    server.host.budget = replace(server.host.budget, device=18 * MIB)

    await server.switch("mistral")
    await server.settled()

    assert (5, 5) == await waking(server)


async def test_a_wake_is_given_up_when_others_take_memory(gpu: Server) -> None:
    """When other processes take memory, a wake is given up before a requested model moves."""
    gpu.host.is_device_shared = True
    await gpu.operate("mistral", "wake")
    await announce(gpu, "qwen")
    await gpu.settled()
    gpu.host.taken_bytes = 5 * MIB

    assert () == await gpu.coordinator.idle.relief.relieve()

    assert {"llama": "active", "qwen": "asleep", "mistral": "parked"} == gpu.residencies
    assert (1, ("given_up", 5)) == (held(gpu), changes(gpu)[-1])


async def test_what_has_not_been_taken_yet_is_not_counted_as_taken(gpu: Server) -> None:
    """Planning counts all of a wake; the view of other processes only what it has taken so far."""
    gpu.host.hold("wake_some", "qwen")
    await announce(gpu, "qwen")
    await gpu.settled()
    ladder = gpu.coordinator.ladder

    assert (13 * MIB, 8 * MIB) == (ladder.plans.used.device, ladder.device.taken_bytes)


@pytest.mark.parametrize("operation", ["unload", "wake", "load"])
async def test_an_operation_takes_a_wake_over(gpu: Server, operation: str) -> None:
    """An operation in the middle of a slice replaces the wake and leaves its own result."""
    await announce(gpu, "qwen")
    await gpu.settled()
    gpu.host.hold("wake_some", "qwen")

    assert 200 == (await gpu.operate("qwen", operation)).status_code

    assert (0 if operation == "unload" else 6) == held(gpu)
    assert await waking(gpu) is None


# --- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "change"),
    [(NoRoom("no room: waking takes 5 MiB"), "no_room"), (HotswapError("a copy"), "failed")],
)
async def test_a_slice_that_fails_costs_nobody_anything(
    gpu: Server, error: HotswapError, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A failed slice leaves the model asleep; the active one continues, and a switch wakes it."""
    gpu.host.hold("wake_some", "qwen")
    await announce(gpu, "qwen")
    await gpu.settled()
    gpu.host.fail_next("wake_some", "qwen", error)
    gpu.host.release("wake_some", "qwen")
    stream = await gpu.start_stream("llama", words=8)
    await gpu.settled()

    assert (1, "asleep") == (held(gpu), gpu.residencies["qwen"])
    assert change == changes(gpu)[-1][0]
    assert "event=wake_failed model=qwen" in caplog.text
    assert (await stream.finish()).is_whole
    assert 200 == (await gpu.switch("qwen")).status_code


async def test_a_wake_that_cannot_be_finished_leaves_the_model_asleep(gpu: Server) -> None:
    """A wake without memory left to finish leaves the source active; a later switch succeeds."""
    await announce(gpu, "qwen")
    await gpu.settled()
    gpu.host.fail_next("wake", "qwen", NoRoom("no room"))

    assert 503 == (await gpu.switch("qwen")).status_code

    assert {"llama": "active", "qwen": "asleep", "mistral": "asleep"} == gpu.residencies
    assert ("no_room", 5) in changes(gpu)
    assert 200 == (await gpu.switch("qwen")).status_code


async def test_what_a_failed_operation_leaves_of_a_wake_is_given_back(gpu: Server) -> None:
    """After a failed operation the wake's memory is freed: no task takes slices any longer."""
    await announce(gpu, "qwen")
    await gpu.settled()
    gpu.host.fail_next("unload", "qwen")

    assert 200 != (await gpu.operate("qwen", "unload")).status_code
    await gpu.settled()

    assert (1, "asleep") == (held(gpu), gpu.residencies["qwen"])
    assert await waking(gpu) is None


async def test_what_cannot_be_given_back_stays_in_the_books(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory that cannot be freed still counts: a switch is refused, and the next one works."""
    server = await make(make_server, mib=13)
    await announce(server, "qwen")
    await server.settled()
    server.host.fail_next("give_up_wake", "qwen")

    response = await server.switch("mistral")
    assert 503 == response.status_code
    assert "no room: giving back the early wake of 'qwen' has failed" in response.text
    assert "event=wake_kept model=qwen" in caplog.text
    assert ((5, 5), "llama") == (await waking(server), server.coordinator.active)

    assert 200 == (await server.switch("mistral")).status_code
    assert (1, 13 * MIB) == (held(server), server.host.most_held_bytes)


async def test_a_host_that_dies_in_the_middle_of_a_wake_comes_back(gpu: Server) -> None:
    """A host that dies during a wake comes back with its active model; the wake is gone."""
    gpu.host.hold("wake_some", "qwen")
    await announce(gpu, "qwen")
    await gpu.settled()

    gpu.host.kill()
    await gpu.settled()

    assert "llama" == gpu.coordinator.active
    assert await waking(gpu) is None
    assert "failed" == changes(gpu)[-1][0]
    assert 200 == (await gpu.switch("qwen")).status_code


async def test_a_wake_is_given_up_when_the_engine_dies_that_is_served(gpu: Server) -> None:
    """A wake is given up when the active engine dies: recovery comes first."""
    await announce(gpu, "qwen")
    await gpu.settled()

    gpu.host.kill_engine("llama")
    await gpu.settled()

    assert ("give_up_wake", "qwen") in gpu.host.operations
    assert "llama" == gpu.coordinator.active


def test_a_slice_that_never_ends_is_ended_like_a_step(play: Play) -> None:
    """A slice without an end gets the limits of a step and of a command; then the host restarts."""

    async def story(server: Server) -> None:
        await asleep(server, "qwen")
        server.host.hold("wake_some", "qwen")
        await announce(server, "qwen")

        await asyncio.sleep(29)
        assert not server.host.died.done()
        await asyncio.sleep(2)
        await server.settled()

        assert (1, "llama") == (server.host.restarts, server.coordinator.active)

    play(
        story,
        load=ALIASES,
        settings=settings(),
        recovery=RecoveryConfig(step_timeout=20, command_timeout=10),
    )


async def test_a_server_stops_in_the_middle_of_a_wake(gpu: Server) -> None:
    """A stop does not wait for a wake."""
    gpu.host.hold("wake_some", "qwen")
    await announce(gpu, "qwen")
    await gpu.settled()

    await asyncio.wait_for(gpu.coordinator.shut_down(0), 10)

    assert gpu.coordinator.registry.model("qwen").waking.task.cancelled()  # type: ignore[union-attr]


async def test_an_idle_model_is_unloaded_with_what_it_has_taken(make_server: MakeServer) -> None:
    """An idle model's policy unloads it with its early wake, even if it was announced."""
    now = [0.0]
    server = await make(
        make_server,
        model_settings={"qwen": ModelSettings(idle_unload_s=60)},
        clock=lambda: now[0],
    )
    await announce(server, "qwen")
    await server.settled()
    now[0] = 61

    await server.coordinator.idle.rest()

    assert (0, "cold") == (held(server), server.residencies["qwen"])
    assert await waking(server) is None


# --- moves that meet a wake waiting for them --------------------------------------------------


def tight(play: Play, story: Any, mib: int = 13) -> None:
    """Play a story in which a wait without an end makes the host restart, after ten seconds."""
    recovery = RecoveryConfig(step_timeout=10, command_timeout=10)
    budget = Usage(mib * MIB, 100 * MIB)
    play(story, load=ALIASES, settings=settings(), budget=budget, recovery=recovery)


async def between_slices(server: Server, *others: str) -> None:
    """End qwen's first slice while models move; others' wakes queue behind it."""
    server.host.hold("wake_some", "qwen")
    for alias in ("qwen", *others):
        model = server.coordinator.registry.model(alias)
        assert server.coordinator.ladder.wakes.begin(model) is not None
    await server.settled()


def test_a_switch_that_has_drained_ends_a_wake_between_two_slices(play: Play) -> None:
    """A drained switch that needs a wake's room ends it: neither waits for the other for ever."""

    async def story(server: Server) -> None:
        await asleep(server, "qwen", "mistral")
        stream = await server.start_stream("llama", words=8)
        server.host.hold("step", "llama")
        await between_slices(server)
        switching = server.switch("mistral", drain_timeout=60)
        await server.settled()
        server.host.release("wake_some", "qwen")
        await server.settled()
        assert (server.coordinator.serving().phase, await waking(server)) == ("drain", (1, 5))

        server.host.release("step", "llama")
        assert (await stream.finish()).is_whole
        assert 200 == (await switching).status_code

        assert 0 == server.host.restarts
        assert (1, "asleep") == (held(server), server.residencies["qwen"])
        assert 13 * MIB == server.host.most_held_bytes

    tight(play, story)


@pytest.mark.parametrize("way", ["relieve", "evict_all_but", "load", "wake"])
def test_who_moves_models_ends_a_wake_between_two_slices(play: Play, way: str) -> None:
    """Each way to make room ends a wake that waits for its next slice."""

    async def story(server: Server) -> None:
        await asleep(server, "qwen", "mistral")
        if way == "load":
            await server.operate("mistral", "unload")
        coordinator = server.coordinator
        await between_slices(server)
        async with coordinator.ladder.move_lock():
            moving = {
                "relieve": coordinator.idle.relief.relieve,
                "evict_all_but": lambda: in_turn(server, coordinator.registry.model("llama")),
                "load": lambda: coordinator.operations.load("mistral"),
                "wake": lambda: coordinator.operations.wake("mistral"),
            }[way]
            task = asyncio.create_task(moving())  # is next, before the next slice
            await server.settled()
            server.host.release("wake_some", "qwen")
            await server.settled()
            if way == "relieve":
                server.host.is_device_shared = True
                server.host.taken_bytes = 5 * MIB
        await task

        assert 0 == server.host.restarts
        assert (0 if way == "evict_all_but" else 1) == held(server)
        assert await waking(server) is None

    tight(play, story)


async def in_turn(server: Server, target: Model) -> None:
    async with server.coordinator.ladder.move_lock():
        await server.coordinator.ladder.evict_all_but(target)


def test_two_wakes_end_while_one_waits_for_the_other(play: Play) -> None:
    """Two wakes end although one waits for the lock and the other for the first one's slice."""

    async def story(server: Server) -> None:
        await asleep(server, "qwen", "mistral")
        await between_slices(server, "mistral")
        async with server.coordinator.ladder.move_lock():
            server.host.release("wake_some", "qwen")
            await server.settled()
            for alias in ("mistral", "qwen"):
                model = server.coordinator.registry.model(alias)
                await server.coordinator.ladder.wakes.give_up_and_wait(model)

        assert 0 == server.host.restarts
        assert (1, 1) == (held(server), held(server, "mistral"))
        assert [("begun", 0), ("given_up", 1)] == changes(server)
        assert [("begun", 0), ("given_up", 0)] == changes(server, "mistral")

    tight(play, story, mib=18)


# --- freeing memory ---------------------------------------------------------------------------


def test_giving_back_may_wait_for_a_load(play: Play) -> None:
    """Freeing a wake may wait for a load in the host; only beyond that is the host restarted."""

    async def story(server: Server) -> None:
        await asleep(server, "qwen")
        await announce(server, "qwen")
        await server.settled()
        server.host.hold("give_up_wake", "qwen")
        server.coordinator.ladder.wakes.give_up(server.coordinator.registry.model("qwen"))

        await asyncio.sleep(88)
        assert 0 == server.host.restarts
        await asyncio.sleep(4)
        await server.settled()

        assert 1 == server.host.restarts

    play(
        story,
        load=ALIASES,
        settings=settings(),
        recovery=RecoveryConfig(step_timeout=20, command_timeout=10, load_timeout=60),
    )


async def test_what_is_taken_is_told_of_one_device(gpu: Server) -> None:
    """A model on two devices reports the memory of both; the books count that of one."""
    gpu.host.hold("wake_some", "qwen")
    gpu.host.hold("give_up_wake", "qwen")
    await announce(gpu, "qwen")
    await gpu.settled()
    ladder = gpu.coordinator.ladder
    model = gpu.coordinator.registry.model("qwen")
    assert model.waking is not None
    model.waking.progress = WakeProgress(4 * MIB, 10 * MIB)
    assert 10 * MIB == ladder.device.taken_bytes

    ladder.wakes.give_up(model)

    assert 8 * MIB == ladder.device.taken_bytes
    gpu.host.release("give_up_wake", "qwen")
    await gpu.settled()
    assert 8 * MIB == ladder.device.taken_bytes == ladder.plans.used.device


async def test_who_stops_waiting_for_a_slice_leaves_nothing_behind(gpu: Server) -> None:
    """A task cancelled while it waits for a slice to end leaves nothing of the wake behind."""
    await announce(gpu, "qwen")
    await gpu.settled()
    model = gpu.coordinator.registry.model("qwen")

    async def take_over() -> None:
        async with gpu.coordinator.ladder.wakes.take_over(model):
            raise AssertionError("it was to be cancelled before")

    task = asyncio.create_task(take_over())
    await asyncio.sleep(0)
    task.cancel()
    await gpu.settled()

    assert task.cancelled()
    assert (1, None) == (held(gpu), await waking(gpu))


async def test_no_wake_begins_once_the_server_ends(gpu: Server) -> None:
    """No wake starts once the server stops, because nothing would end it."""
    wakes = gpu.coordinator.ladder.wakes
    wakes.close()

    assert wakes.begin(gpu.coordinator.registry.model("qwen")) is None
    await gpu.settled()
    assert [] == gpu.host.operations


async def test_room_for_all_is_made_although_a_wake_cannot_be_given_back(gpu: Server) -> None:
    """Making room for all unloads a model whose wake cannot be freed, and the later ones too."""
    await announce(gpu, "qwen")
    await gpu.settled()
    gpu.host.fail_next("give_up_wake", "qwen")

    await in_turn(gpu, gpu.coordinator.registry.model("llama"))

    assert (0, 0) == (held(gpu), held(gpu, "mistral"))
    assert await waking(gpu) is None
