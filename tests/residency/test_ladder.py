"""Moves under a memory budget: what switches give up, and what comes back."""

from __future__ import annotations

import pytest

from tests.conftest import MakeServer
from tests.helpers.support import Server
from tests.residency.models import ALIASES, MIB, ONE_AND_A_HALF, code, request_of, sized
from vllm_hotswap.errors import HotswapError
from vllm_hotswap.events import ModelMoved, PhaseChanged
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.models.registry import ModelSettings
from vllm_hotswap.testing.fake_settings import FakeSettings

# --- switches -------------------------------------------------------------------------------


async def test_source_sleeps_where_there_is_no_room_for_two(tight: Server) -> None:
    """Without room for two, the source sleeps with its weights; the way back is only a wake."""
    assert 200 == (await tight.switch("qwen")).status_code
    assert {"llama": "asleep", "qwen": "active", "mistral": "cold"} == tight.residencies

    assert 200 == (await tight.switch("llama")).status_code
    assert {"llama": "active", "qwen": "asleep", "mistral": "cold"} == tight.residencies
    assert [
        *[("sleep", "llama"), ("load", "qwen"), ("activate", "qwen")],
        *[("sleep", "qwen"), ("wake", "llama"), ("activate", "llama")],
    ] == tight.host.operations


async def test_third_model_takes_the_weights_of_the_one_that_was_used_last(tight: Server) -> None:
    """A third model evicts the least recently used one furthest down."""
    await tight.switch("qwen")
    await tight.switch("mistral")

    assert {"llama": "discarded", "qwen": "asleep", "mistral": "active"} == tight.residencies
    assert 6 * MIB == tight.host.most_held_bytes


@pytest.mark.parametrize(("levels", "where"), [({1, 2}, "discarded"), ({1}, "cold"), ((), "cold")])
async def test_model_goes_where_its_device_can_take_it(
    make_server: MakeServer, levels: set[int], where: str
) -> None:
    """Levels that the device does not support are skipped; unloading is always possible."""
    size = FakeSettings(weights_bytes=3 * MIB, kv_bytes=MIB, levels=frozenset(levels))
    server = await make_server(load=("llama",), settings=sized(llama=size), budget=ONE_AND_A_HALF)

    await server.switch("qwen")

    assert {"llama": where, "qwen": "active", "mistral": "cold"} == server.residencies


async def test_source_gives_nothing_up_before_the_target_is_validated(tight: Server) -> None:
    """A switch that cannot work fails before the source gives anything up."""
    tight.host.engines["qwen"].missing_files = True

    assert (503, "switch_failed") == await code(tight.switch("qwen"))

    assert {"llama": "active", "qwen": "cold", "mistral": "cold"} == tight.residencies
    assert [] == tight.events.of(ModelMoved)


async def test_source_gives_nothing_up_while_it_is_drained(tight: Server) -> None:
    """The source is put to sleep only after its last request."""
    stream = await tight.start_stream("llama")
    switch = tight.switch("qwen")
    await tight.settled()
    assert ("drain", "active") == (tight.coordinator.serving().phase, tight.residency("llama"))

    answer = await stream.finish()

    assert answer.is_whole
    assert 200 == (await switch).status_code


async def test_requests_for_a_target_that_is_loaded_are_answered(tight: Server) -> None:
    """Requests for the target wait for the source's sleep and the load, and are then answered."""
    tight.host.hold("sleep", "llama")
    tight.host.hold("load", "qwen")
    switch = tight.switch("qwen")
    await tight.settled()
    first = tight.ask("qwen")
    tight.host.release("sleep", "llama")
    await tight.settled()
    second = tight.ask("qwen")
    await tight.settled()
    assert ("bring_up", 2) == (
        tight.coordinator.serving().phase,
        tight.coordinator.snapshot().waiting,
    )

    tight.host.release("load", "qwen")

    assert ["qwen", "qwen"] == [(await call).json()["model"] for call in (first, second)]
    assert (await switch).json()["switched"]


async def test_phases_tell_of_making_room(tight: Server) -> None:
    """Making room is a timed phase, and each moved model is reported with the time it took."""
    body = (await tight.switch("qwen")).json()

    assert ["make_room"] * 2 == [
        event.phase.value
        for event in tight.events.of(PhaseChanged)
        if event.phase.value == "make_room"
    ]
    assert body["phases"]["make_room"] >= 0
    assert [("llama", "parked", "asleep")] == [
        (event.model, event.before.value, event.after.value)
        for event in tight.events.of(ModelMoved)
    ]


# --- models that stay -----------------------------------------------------------------------


async def test_pinned_model_is_never_evicted(make_server: MakeServer) -> None:
    """A pinned model is never evicted, although it was used least recently."""
    server = await make_server(
        load=("llama", "qwen"),
        settings=sized(),
        budget=Usage(10 * MIB),
        model_settings={"qwen": ModelSettings(pinned=True)},
    )

    await server.switch("mistral")

    assert {"llama": "asleep", "qwen": "parked", "mistral": "active"} == server.residencies


async def test_target_that_is_pinned_meanwhile_leaves_its_memory_to_the_source(
    make_server: MakeServer,
) -> None:
    """A target pinned during a failed switch gives its memory back; it never served."""
    server = await make_server(load=("llama",), settings=sized(), budget=Usage(4 * MIB))
    server.host.hold("load", "mistral")
    server.host.fail_next("activate", "mistral")
    switching = server.switch("mistral")
    await server.settled()
    await server.operate("mistral", "pin", pinned=True)

    server.host.release("load", "mistral")

    assert (503, "switch_failed") == await code(switching)
    assert {"llama": "active", "qwen": "cold", "mistral": "cold"} == server.residencies
    assert 4 * MIB == server.host.most_held_bytes


async def test_requests_of_a_parked_model_keep_it_from_being_unloaded_for_another(
    make_server: MakeServer,
) -> None:
    """A parked model with requests only sleeps; a more recently used one goes further down."""
    server = await make_server(settings=sized(), budget=Usage(8 * MIB))
    assert {"llama": "active", "qwen": "parked", "mistral": "cold"} == server.residencies

    with request_of(server, "qwen"):
        await server.switch("mistral")
        assert {"llama": "asleep", "qwen": "asleep", "mistral": "active"} == server.residencies
        await server.operate("llama", "unload")


# --- switches that fail ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "where", "back"),
    [(6, "asleep", "wake"), (5, "discarded", "wake"), (4, "discarded", "wake")],
)
async def test_source_that_was_moved_comes_back_if_the_target_fails(
    make_server: MakeServer, budget: int, where: str, back: str
) -> None:
    """If the target fails, the source serves again, the caller gets the cause; a retry works."""
    server = await make_server(load=("llama",), settings=sized(), budget=Usage(budget * MIB))
    server.host.hold("load", "qwen")
    server.host.fail_next("load", "qwen", HotswapError("out of memory"))
    switch = server.switch("qwen")
    await server.settled()
    held = server.ask("qwen")
    await server.settled()
    assert where == server.residency("llama")

    server.host.release("load", "qwen")

    expected = "switch to 'qwen' failed in phase bring_up: out of memory; 'llama' is still active"
    assert expected == (await switch).json()["error"]["message"]
    assert expected == (await held).json()["error"]["message"]
    assert [(back, "llama"), ("activate", "llama")] == server.host.operations[-2:]
    assert {"llama": "active", "qwen": "cold", "mistral": "cold"} == server.residencies
    assert "llama" == (await server.ask("llama")).json()["model"]
    assert (await server.switch("qwen")).json()["switched"]


async def test_source_that_was_unloaded_is_loaded_again_if_the_target_fails(
    make_server: MakeServer,
) -> None:
    """Without sleep on its device, the source is loaded again if the target fails."""
    never = FakeSettings(weights_bytes=2 * MIB, kv_bytes=2 * MIB, levels=frozenset())
    server = await make_server(load=("llama",), settings=sized(llama=never), budget=ONE_AND_A_HALF)
    server.host.fail_next("load", "qwen")

    assert (503, "switch_failed") == await code(server.switch("qwen"))

    assert [("load", "llama"), ("activate", "llama")] == server.host.operations[-2:]
    assert "llama" == (await server.ask("llama")).json()["model"]


async def test_target_that_cannot_be_activated_makes_room_for_the_source(tight: Server) -> None:
    """A loaded target that cannot be activated moves down again, because both have no room."""
    tight.host.fail_next("activate", "qwen")

    assert (503, "switch_failed") == await code(tight.switch("qwen"))

    assert {"llama": "active", "qwen": "asleep", "mistral": "cold"} == tight.residencies
    assert 6 * MIB == tight.host.most_held_bytes


async def test_source_that_cannot_be_put_to_sleep_serves_on(tight: Server) -> None:
    """If the source cannot be put to sleep, it stays active; the switch fails in that phase."""
    tight.host.fail_next("sleep", "llama", HotswapError("worker is stuck"))

    message = (await tight.switch("qwen")).json()["error"]["message"]

    assert "failed in phase make_room: worker is stuck; 'llama' is still active" in message
    assert "llama" == (await tight.ask("llama")).json()["model"]


@pytest.mark.parametrize("fails", ["wake", "activate"])
async def test_source_that_cannot_come_back_leaves_no_model_active(
    tight: Server, fails: str
) -> None:
    """If the source cannot come back, no model is active until recovery; later switches work."""
    tight.host.fail_next("load", "qwen")
    tight.host.fail_next(fails, "llama")

    response = await tight.switch("qwen")

    assert "no model is active" in response.json()["error"]["message"]
    await tight.settled()
    assert ["llama"] == [alias for alias, at in tight.residencies.items() if at == "active"]
    assert (await tight.switch("mistral")).json()["switched"]
    assert (await tight.switch("llama")).json()["switched"]


async def test_target_that_cannot_be_woken_is_cold_and_can_be_loaded(tight: Server) -> None:
    """A target that cannot be woken is cold and can be loaded; the source stays active."""
    await tight.switch("qwen")
    tight.host.fail_next("wake", "llama")

    assert (503, "switch_failed") == await code(tight.switch("llama"))
    assert {"llama": "cold", "qwen": "active", "mistral": "cold"} == tight.residencies

    assert (await tight.switch("llama")).json()["switched"]


async def test_model_that_dies_while_it_is_put_to_sleep_ends_the_switch(tight: Server) -> None:
    """A model that dies while it is put to sleep fails the switch; the next one loads it again."""
    tight.host.hold("sleep", "llama")
    switch = tight.switch("qwen")
    await tight.settled()
    tight.host.kill_engine("llama", "RuntimeError: boom")

    tight.host.release("sleep", "llama")

    assert "the engine of 'llama' died: RuntimeError: boom" in (await switch).text
    await tight.settled()
    assert ("active", "llama") == (tight.residency("llama"), tight.coordinator.active)
    assert (await tight.switch("qwen")).json()["switched"]


# --- start and end --------------------------------------------------------------------------


async def test_start_with_too_little_for_all_loads_in_turn(make_server: MakeServer) -> None:
    """With too little memory for all, models load in turn, the default last; others sleep."""
    server = Server(load=ALIASES, settings=sized(), budget=ONE_AND_A_HALF)
    await server.host.start()
    await server.coordinator.start(ALIASES, "llama")

    assert ["qwen", "mistral", "llama"] == [
        alias for verb, alias in server.host.operations if verb == "load"
    ]
    assert {"llama": "active", "qwen": "discarded", "mistral": "asleep"} == server.residencies
    assert 6 * MIB == server.host.most_held_bytes
    await server.stop()


async def test_start_with_enough_for_all_loads_them_together(make_server: MakeServer) -> None:
    """With memory for all, models load together and none moves down."""
    server = await make_server(load=ALIASES, settings=sized(), budget=Usage(12 * MIB))

    assert {"llama": "active", "qwen": "parked", "mistral": "parked"} == server.residencies


async def test_shutdown_settles_a_switch_that_waits_for_its_turn(server: Server) -> None:
    """A shutdown answers a switch that waits for its turn, and the requests held for its target."""
    server.host.hold("sleep", "qwen")
    server.operate("qwen", "sleep")
    await server.settled()
    switch = server.switch("mistral")
    await server.settled()
    held = server.ask("mistral")
    await server.settled()

    await server.coordinator.shut_down(0)

    assert [503, 503] == [(await switch).status_code, (await held).status_code]
    assert "idle" == server.coordinator.serving().phase
    server.host.release("sleep", "qwen")


async def test_shutdown_settles_a_switch_on_its_way_back(server: Server) -> None:
    """A shutdown answers a switch even while its source is being brought back."""
    server.host.fail_next("activate", "qwen")
    server.host.hold("activate", "llama")
    switch = server.switch("qwen")
    await server.settled()
    held = server.ask("qwen")
    await server.settled()
    assert ("activate", "llama") == server.host.operations[-1]

    await server.coordinator.shut_down(0)

    assert [503, 503] == [(await switch).status_code, (await held).status_code]
    assert "idle" == server.coordinator.serving().phase


async def test_ladder_tells_its_state(server: Server) -> None:
    """The ladder's state is readable in logs and failing tests."""
    ladder = server.coordinator.ladder
    where = "{'llama': 'active', 'qwen': 'parked', 'mistral': 'cold'}"
    assert f"<Ladder {where} moving=False>" == repr(ladder)

    async with ladder.move_lock():
        assert f"<Ladder {where} moving=True>" == repr(ladder)
