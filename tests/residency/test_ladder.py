"""Models under a memory budget: which move, what is refused, and what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given, settings, strategies as st

from tests.conftest import MakeServer
from tests.helpers.depth import examples
from tests.helpers.support import Recorder, Server, lease as lease_of, settled
from vllm_hotswap.errors import ConfigError, HotswapError
from vllm_hotswap.events import ModelMoved, PhaseChanged, PinChanged
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.models.registry import ModelSettings
from vllm_hotswap.switching.coordinator import Coordinator
from vllm_hotswap.testing.fake_engine import UNLIMITED, FakeHost, FakeSettings

MIB = 1 << 20
ALIASES = ("llama", "qwen", "mistral")
SIZE = FakeSettings(weights_bytes=2 * MIB, kv_bytes=2 * MIB)
ONE_AND_A_HALF = Usage(6 * MIB, 100 * MIB)
"""One loaded model, and the weights of another one."""


def sized(**others: Any) -> dict[str, FakeSettings]:
    """Every model holds 2 MiB of weights and 2 MiB of KV memory."""
    return {alias: others.get(alias, SIZE) for alias in ALIASES}


@pytest.fixture
async def tight(make_server: MakeServer) -> Server:
    """llama is active, the others are cold; there is memory for one and a half."""
    return await make_server(load=("llama",), settings=sized(), budget=ONE_AND_A_HALF)


@contextmanager
def request_of(server: Server, alias: str) -> Iterator[None]:
    """Send a request that continues although its model is not active."""
    leases = server.coordinator.registry.resolve(alias).leases
    leases[lease_of(alias, 1)] = None
    yield
    leases.clear()


async def code(call: asyncio.Task[httpx.Response]) -> tuple[int, str]:
    response = await call
    return response.status_code, response.json()["error"]["code"]


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


async def test_switch_that_can_never_have_room_is_refused_before_the_drain(
    make_server: MakeServer,
) -> None:
    """A switch that can never have room is refused before the drain; the source is undisturbed."""
    server = await make_server(load=("llama",), settings=sized(), budget=ONE_AND_A_HALF)
    await server.operate("llama", "pin")
    stream = await server.start_stream("llama")

    response = await server.switch("qwen", 0)

    message = response.json()["error"]["message"]
    assert (503, "switch_failed") == (response.status_code, response.json()["error"]["code"])
    assert "failed in phase validate: no room: 'qwen' needs 4.0 MiB; 'llama' keeps 4.0" in message
    assert "'llama' is still active" in message
    assert (await stream.finish()).is_whole


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


async def test_switch_to_a_cold_model_reads_ahead_while_it_drains(tight: Server) -> None:
    """While the source drains, a cold target's files are read ahead; a sleeping one needs none."""
    stream = await tight.start_stream("llama")
    switch = tight.switch("qwen")
    await tight.settled()
    assert [("prefetch", "qwen")] == tight.host.operations

    await stream.finish()
    await switch
    tight.host.operations.clear()
    await tight.switch("llama")

    assert ("prefetch", "llama") not in tight.host.operations


async def test_load_of_a_switch_reads_on_where_the_prefetch_was(tight: Server) -> None:
    """The load continues the prefetch and reads no file twice; its callers are answered."""
    tight.host.hold("prefetch", "qwen")
    stream = await tight.start_stream("llama")
    switch = tight.switch("qwen")
    await tight.settled()
    joined = tight.operate("qwen", "prefetch")
    await tight.settled()

    await stream.finish()

    assert 200 == (await switch).status_code
    assert (200, 0) == ((await joined).status_code, (await joined).json()["prefetched_bytes"])


async def test_switch_survives_files_that_cannot_be_read_ahead(tight: Server) -> None:
    """A switch survives files that cannot be read ahead; the load reports them."""
    tight.host.fail_next("prefetch", "qwen")

    assert 200 == (await tight.switch("qwen")).status_code


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


# --- start ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("budget", "pinned", "message"),
    [
        (3, (), "no room: 'llama' needs 4.0 MiB; the budget for models is 3.0 MiB; raise"),
        (
            7,
            ("qwen",),
            "no room: 'llama' needs 4.0 MiB; 'qwen' keeps 4.0 MiB (pinned); the budget for models",
        ),
    ],
)
async def test_configuration_that_can_never_fit_is_refused_at_the_start(
    budget: int, pinned: tuple[str, ...], message: str
) -> None:
    """A configuration that can never fit is refused before loading, models on demand included."""
    policies = {alias: ModelSettings(pinned=True) for alias in pinned}
    server = Server(
        load=("llama",), settings=sized(), budget=Usage(budget * MIB), model_settings=policies
    )

    with pytest.raises(ConfigError) as caught:
        await server.start()

    assert message in caught.value.message
    assert [] == server.host.operations
    await server.stop()


# --- operations -----------------------------------------------------------------------------


async def test_load_brings_a_model_up_beside_the_active_one(server: Server) -> None:
    """A load brings a model up, parked beside the active one; a switch then moves the pointer."""
    body = (await server.operate("mistral", "load")).json()

    assert ("cold", "parked", True) == (body["before"], body["residency"], body["changed"])
    assert "active" == server.residency("llama")
    server.host.operations.clear()
    await server.switch("mistral")
    assert [("activate", "mistral")] == server.host.operations


async def test_load_moves_others_but_never_the_active_one(make_server: MakeServer) -> None:
    """A load may put parked models to sleep; the active model and its requests are untouched."""
    server = await make_server(settings=sized(), budget=Usage(10 * MIB))
    stream = await server.start_stream("llama")

    body = (await server.operate("mistral", "load")).json()

    assert ["qwen"] == [move["model"] for move in body["evicted"]]
    assert {"llama": "active", "qwen": "asleep", "mistral": "parked"} == server.residencies
    assert (await stream.finish()).is_whole


async def test_load_that_only_the_active_model_could_make_room_for_is_refused(
    tight: Server,
) -> None:
    """A load that needs the active model's memory gets 409 with the arithmetic; a switch could."""
    response = await tight.operate("qwen", "load")

    error = response.json()["error"]
    assert (409, "no_room") == (response.status_code, error["code"])
    assert "'llama' keeps 4.0 MiB (active)" in error["message"]
    assert {"llama": "active", "qwen": "cold", "mistral": "cold"} == tight.residencies


@pytest.mark.parametrize(
    ("name", "body", "steps", "residency"),
    [
        ("load", {}, ["load"], "parked"),
        ("sleep", {"level": 1}, ["load", "sleep"], "asleep"),
        ("sleep", {"level": 2}, ["load", "sleep"], "discarded"),
        ("unload", {}, ["load", "unload"], "cold"),
    ],
)
async def test_operations_are_idempotent(
    server: Server, name: str, body: dict[str, Any], steps: list[str], residency: str
) -> None:
    """A repeated operation does nothing, and the response says so."""
    await server.operate("mistral", "load")

    first = (await server.operate("mistral", name, **body)).json()
    again = await server.operate("mistral", name, **body)

    assert residency == first["residency"] == server.residency("mistral")
    assert (200, False) == (again.status_code, again.json()["changed"])
    assert steps == [verb for verb, alias in server.host.operations if alias == "mistral"]


async def test_wake_is_idempotent(server: Server) -> None:
    """A wake leaves a model that is up as it is, the active one included."""
    await server.operate("qwen", "sleep")

    bodies = [(await server.operate("qwen", "wake")).json() for _ in range(2)]

    assert [("asleep", True), ("parked", False)] == [(b["before"], b["changed"]) for b in bodies]
    assert not (await server.operate("llama", "wake")).json()["changed"]
    assert [("sleep", "qwen"), ("wake", "qwen")] == server.host.operations


async def test_sleeping_model_may_go_further_down_but_not_up_by_sleeping(server: Server) -> None:
    """Level 2 after level 1 drops the weights; level 1 after level 2 changes nothing."""
    for level, residency in ((1, "asleep"), (2, "discarded"), (1, "discarded")):
        await server.operate("qwen", "sleep", level=level)
        assert residency == server.residency("qwen")


async def test_wake_of_a_cold_model_is_refused(server: Server) -> None:
    """A wake of a cold model is refused, and the message says what to do."""
    response = await server.operate("mistral", "wake")

    assert 400 == response.status_code
    assert "is cold, so it cannot be woken; load it instead" in response.text


async def test_level_that_the_device_does_not_know_is_refused(make_server: MakeServer) -> None:
    """A sleep level that the device does not support is refused, naming the supported ones."""
    one = FakeSettings(levels=frozenset([1]))
    none = FakeSettings(levels=frozenset())
    server = await make_server(load=ALIASES, settings={"qwen": one, "mistral": none})

    first = (await server.operate("qwen", "sleep", level=2)).json()["error"]
    second = (await server.operate("mistral", "sleep", level=1)).json()["error"]

    assert ("level", "level") == (first["param"], second["param"])
    assert "has no sleep level 2 on this platform; levels: 1" in first["message"]
    assert "levels: none (it can be unloaded)" in second["message"]


@pytest.mark.parametrize(("name", "body"), [("sleep", {}), ("sleep", {"level": 2}), ("unload", {})])
async def test_active_model_is_not_taken_down(
    server: Server, name: str, body: dict[str, Any]
) -> None:
    """Taking the active model down gets 409, and the message says what to do first."""
    response = await server.operate("llama", name, **body)

    error = response.json()["error"]
    assert (409, "model_in_use") == (response.status_code, error["code"])
    assert "it is active; switch to another model first" in error["message"]
    assert [] == server.host.operations


@pytest.mark.parametrize(("name", "body"), [("sleep", {}), ("unload", {})])
async def test_pinned_model_is_not_taken_down(
    server: Server, name: str, body: dict[str, Any]
) -> None:
    """A pinned model is not taken down until it is unpinned, as the message says."""
    await server.operate("qwen", "pin")
    response = await server.operate("qwen", name, **body)

    assert (409, "model_in_use") == (response.status_code, response.json()["error"]["code"])
    assert (
        'POST /admin/models/qwen/pin {"pinned": false} first' in response.json()["error"]["message"]
    )

    await server.operate("qwen", "pin", pinned=False)
    assert 200 == (await server.operate("qwen", name, **body)).status_code


async def test_pin_is_told_of_once(server: Server) -> None:
    """A repeated pin changes nothing and makes no event; a model can be pinned anywhere."""
    for pinned in (True, True, False):
        await server.operate("mistral", "pin", pinned=pinned)

    assert [("mistral", True), ("mistral", False)] == [
        (event.model, event.pinned) for event in server.events.of(PinChanged)
    ]


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


async def test_requests_of_a_parked_model_keep_it_from_losing_its_weights(server: Server) -> None:
    """A parked model with requests may sleep, because they survive that, but keeps its weights."""
    with request_of(server, "qwen"):
        dropping = await code(server.operate("qwen", "sleep", level=2))
        unloading = await server.operate("qwen", "unload")
        sleeping = await server.operate("qwen", "sleep", level=1)

    assert (409, "model_in_use") == dropping
    assert "1 requests are in flight; retry later" in unloading.json()["error"]["message"]
    assert 200 == sleeping.status_code


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


async def test_operation_that_fails_is_told_and_changes_nothing(server: Server) -> None:
    """A failed operation reports an error and leaves the model where it was; a retry works."""
    server.host.fail_next("sleep", "qwen", HotswapError("worker is stuck"))

    response = await server.operate("qwen", "sleep")

    message = "sleep of model 'qwen' failed: worker is stuck; fix the cause and retry"
    assert (503, "load_failed") == (response.status_code, response.json()["error"]["code"])
    assert message == response.json()["error"]["message"]
    assert "parked" == server.residency("qwen")
    assert 200 == (await server.operate("qwen", "sleep")).status_code


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


async def test_failed_model_is_planned_for_like_a_cold_one(server: Server) -> None:
    """A switch to a failed model loads it, like a cold one."""
    server.host.kill_engine("qwen", "RuntimeError: boom")

    response = await server.get("/admin/plan", params={"model": "qwen"})

    move = response.json()["bring_up"]
    assert ("cold", "parked") == (move["before"], move["after"])


async def test_dead_model_can_be_loaded_again(server: Server) -> None:
    """A dead model can be loaded again; until then the status gives the cause of death."""
    server.host.kill_engine("qwen", "RuntimeError: boom")
    status = (await server.get("/admin/status")).json()["models"]["qwen"]
    assert ("failed", "RuntimeError: boom") == (status["residency"], status["failed"])

    body = (await server.operate("qwen", "load")).json()

    assert ("cold", "parked") == (body["before"], body["residency"])
    assert None is (await server.get("/admin/status")).json()["models"]["qwen"]["failed"]


async def test_dead_host_takes_no_operation(server: Server) -> None:
    """While the host is dead, operations are refused for every model."""
    server.host.kill("the engine host was killed by signal 9")

    response = await server.operate("mistral", "load")

    assert 503 == response.status_code
    assert "killed by signal 9" in response.text


async def test_ladder_tells_its_state(server: Server) -> None:
    """The ladder's state is readable in logs and failing tests."""
    ladder = server.coordinator.ladder
    where = "{'llama': 'active', 'qwen': 'parked', 'mistral': 'cold'}"
    assert f"<Ladder {where} moving=False>" == repr(ladder)

    async with ladder.move_lock():
        assert f"<Ladder {where} moving=True>" == repr(ladder)


# --- one at a time --------------------------------------------------------------------------


async def test_operation_waits_for_the_switch_under_way(server: Server) -> None:
    """An operation waits for the switch under way; it is refused if its model is then active."""
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()
    sleeping, unloading = server.operate("qwen", "sleep"), server.operate("llama", "unload")
    await server.settled()
    assert [False, False] == [sleeping.done(), unloading.done()]

    server.host.release("activate", "qwen")

    assert (409, "model_in_use") == await code(sleeping)
    assert "cold" == (await unloading).json()["residency"]
    assert 200 == (await switch).status_code


async def test_load_that_waited_for_a_switch_keeps_the_model_that_is_active_then(
    make_server: MakeServer,
) -> None:
    """A load that waited for a switch keeps the model that is active after it, not before."""
    server = await make_server(settings=sized(), budget=Usage(10 * MIB))
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()
    loading = server.operate("mistral", "load")
    await server.settled()

    server.host.release("activate", "qwen")

    await switch
    assert ["llama"] == [move["model"] for move in (await loading).json()["evicted"]]
    assert {"llama": "asleep", "qwen": "active", "mistral": "parked"} == server.residencies
    assert "qwen" == (await server.ask(None)).json()["model"]


async def test_switch_waits_for_the_operation_under_way(server: Server) -> None:
    """A switch waits for the operation under way, then starts from wherever the target is."""
    server.host.hold("sleep", "qwen")
    sleeping = server.operate("qwen", "sleep")
    await server.settled()
    switch = server.switch("qwen")
    await server.settled()
    assert "validate" == server.coordinator.serving().phase
    assert "llama" == (await server.ask("llama")).json()["model"]

    server.host.release("sleep", "qwen")

    assert 200 == (await switch).status_code
    assert "asleep" == (await sleeping).json()["residency"]
    assert [("sleep", "qwen"), ("wake", "qwen"), ("activate", "qwen")] == server.host.operations


async def test_operations_are_made_one_after_the_other(server: Server) -> None:
    """Operations run one after the other: memory is only counted between two moves."""
    server.host.hold("sleep", "qwen")
    sleeping = server.operate("qwen", "sleep")
    await server.settled()
    loading = server.operate("mistral", "load")
    await server.settled()
    assert [("sleep", "qwen")] == server.host.operations

    server.host.release("sleep", "qwen")
    await asyncio.gather(sleeping, loading)

    assert [("sleep", "qwen"), ("load", "mistral")] == server.host.operations


# --- prefetch -------------------------------------------------------------------------------


async def test_prefetch_says_how_much_it_read(server: Server) -> None:
    """A prefetch reports how much it read; a model that has its weights needs none."""
    cold = (await server.operate("mistral", "prefetch")).json()
    parked = (await server.operate("qwen", "prefetch")).json()

    assert (MIB, 0) == (cold["prefetched_bytes"], parked["prefetched_bytes"])
    assert ["cold", False] == [cold["residency"], cold["changed"]]


async def test_calls_for_a_prefetch_under_way_join_it(server: Server) -> None:
    """Calls for a prefetch under way join it, and the files are read once."""
    server.host.hold("prefetch", "mistral")
    calls = [server.operate("mistral", "prefetch") for _ in range(2)]
    await server.settled()

    server.host.release("prefetch", "mistral")

    assert [MIB, MIB] == [(await call).json()["prefetched_bytes"] for call in calls]
    assert [("prefetch", "mistral")] == server.host.operations


async def test_prefetch_waits_for_nobody(server: Server) -> None:
    """A prefetch waits for no other operation: reading files moves no model."""
    server.host.hold("sleep", "qwen")
    sleeping = server.operate("qwen", "sleep")
    await server.settled()

    assert 200 == (await server.operate("mistral", "prefetch")).status_code

    server.host.release("sleep", "qwen")
    await sleeping


async def test_prefetch_is_cancelled_on_request(server: Server) -> None:
    """A cancelled prefetch answers its waiting callers; a later call starts a new one."""
    server.host.hold("prefetch", "mistral")
    call = server.operate("mistral", "prefetch")
    await server.settled()

    cancelled = await server.operate("mistral", "prefetch", cancel=True)

    assert (200, True) == (cancelled.status_code, cancelled.json()["cancelled"])
    assert (200, 0) == ((await call).status_code, (await call).json()["prefetched_bytes"])
    server.host.release("prefetch", "mistral")
    assert MIB == (await server.operate("mistral", "prefetch")).json()["prefetched_bytes"]


async def test_cancelling_no_prefetch_is_no_mistake(server: Server) -> None:
    """Cancelling where no prefetch runs is not an error."""
    assert 200 == (await server.operate("mistral", "prefetch", cancel=True)).status_code


async def test_client_that_leaves_does_not_stop_a_prefetch(server: Server) -> None:
    """A client that leaves does not stop a prefetch: other callers and the load may need it."""
    server.host.hold("prefetch", "mistral")
    leaving = asyncio.create_task(server.coordinator.operations.prefetch("mistral"))
    await server.settled()
    leaving.cancel()
    await server.settled()

    joining = server.operate("mistral", "prefetch")
    await server.settled()
    server.host.release("prefetch", "mistral")

    assert MIB == (await joining).json()["prefetched_bytes"]
    assert [("prefetch", "mistral")] == server.host.operations


@pytest.mark.parametrize(("host_bytes", "read"), [(MIB // 2, MIB // 2), (0, 0), (9 * MIB, MIB)])
async def test_prefetch_is_bounded_by_the_host_budget(
    make_server: MakeServer, host_bytes: int, read: int
) -> None:
    """A prefetch reads no more than the host memory budget allows."""
    server = await make_server(budget=Usage(UNLIMITED.device, host_bytes))

    assert read == (await server.operate("mistral", "prefetch")).json()["prefetched_bytes"]


async def test_weights_asleep_leave_less_to_prefetch(make_server: MakeServer) -> None:
    """Weights asleep in host memory share its budget with a prefetch."""
    asleep = FakeSettings(offloads=True, weights_bytes=MIB)
    server = await make_server(
        settings={"qwen": asleep}, budget=Usage(UNLIMITED.device, MIB + MIB // 4)
    )
    await server.operate("qwen", "sleep")

    body = (await server.operate("mistral", "prefetch")).json()

    assert MIB // 4 == body["prefetched_bytes"]


async def test_prefetch_that_fails_is_told(server: Server) -> None:
    """A failed prefetch reports its cause."""
    server.host.fail_next("prefetch", "mistral", HotswapError("disk is gone"))

    response = await server.operate("mistral", "prefetch")

    assert (500, "disk is gone") == (response.status_code, response.json()["error"]["message"])


# --- idle models ----------------------------------------------------------------------------


class Clocked:
    """A coordinator with a clock set by the test; a is active, b and c rest when idle."""

    def __init__(self, **policies: ModelSettings) -> None:
        self.now = 1000.0
        self.host = FakeHost(("a", "b", "c"))
        self.events = Recorder()
        self.coordinator = Coordinator(
            self.host, self.events, model_settings=policies, clock=lambda: self.now
        )

    async def start(self, *load: str) -> Clocked:
        await self.host.start()
        await self.coordinator.start(load or ("a", "b", "c"), "a")
        return self

    async def after(self, seconds: float) -> dict[str, str]:
        """Return the residencies that much later, once idle models have been moved."""
        self.now += seconds
        await self.coordinator.idle.rest()
        return {model.alias: model.residency.value for model in self.coordinator.registry}


async def test_idle_models_sleep_and_are_unloaded_in_time() -> None:
    """Idle models sleep and are unloaded by their own policies; one without a policy stays."""
    policy = ModelSettings(idle_sleep_s=10, idle_unload_s=60)
    clocked = await Clocked(b=policy).start()

    assert {"a": "active", "b": "parked", "c": "parked"} == await clocked.after(9)
    assert {"a": "active", "b": "asleep", "c": "parked"} == await clocked.after(1)
    assert {"a": "active", "b": "asleep", "c": "parked"} == await clocked.after(49)
    assert {"a": "active", "b": "cold", "c": "parked"} == await clocked.after(1)


async def test_active_model_never_rests() -> None:
    """The active model never rests; its idle time starts when another model becomes active."""
    clocked = await Clocked(a=ModelSettings(idle_unload_s=10)).start()
    assert "active" == (await clocked.after(999))["a"]

    await clocked.coordinator.switch("b")

    assert "parked" == (await clocked.after(9))["a"]
    assert "cold" == (await clocked.after(1))["a"]


async def test_time_begins_when_a_model_comes_up() -> None:
    """The idle time of a model starts when it is loaded or woken."""
    policy = ModelSettings(idle_sleep_s=10)
    clocked = await Clocked(b=policy).start("a")
    await clocked.after(500)

    await clocked.coordinator.operations.load("b")
    assert "parked" == (await clocked.after(9))["b"]
    assert "asleep" == (await clocked.after(1))["b"]

    await clocked.coordinator.operations.wake("b")
    assert "parked" == (await clocked.after(9))["b"]
    assert "asleep" == (await clocked.after(1))["b"]


async def test_pinned_and_busy_models_do_not_rest() -> None:
    """Pinned and busy models neither sleep nor are unloaded."""
    policy = ModelSettings(idle_sleep_s=10, idle_unload_s=20)
    clocked = await Clocked(b=ModelSettings(pinned=True, idle_sleep_s=10), c=policy).start()
    model = clocked.coordinator.registry.resolve("c")
    model.leases[lease_of("c", 1)] = None

    assert {"a": "active", "b": "parked", "c": "parked"} == await clocked.after(99)

    model.leases.clear()
    assert "cold" == (await clocked.after(0))["c"]


async def test_model_whose_device_knows_no_sleep_is_only_unloaded() -> None:
    """A model whose device cannot sleep is only unloaded; its time to sleep has no effect."""
    clocked = Clocked(b=ModelSettings(idle_sleep_s=10, idle_unload_s=20))
    clocked.host.engines["b"].settings = FakeSettings(levels=frozenset())
    await clocked.start()

    assert "parked" == (await clocked.after(15))["b"]
    assert "cold" == (await clocked.after(5))["b"]


async def test_model_that_is_used_while_its_rest_waits_stays_up() -> None:
    """A due rest is not made if a request has woken the model in the meantime."""
    clocked = await Clocked(b=ModelSettings(idle_unload_s=10)).start()
    await clocked.coordinator.operations.sleep("b", 1)
    clocked.host.hold("wake", "b")
    waking = asyncio.create_task(clocked.coordinator.operations.wake("b"))
    await settled()
    resting = asyncio.create_task(clocked.after(10))
    await settled()

    clocked.host.release("wake", "b")
    await waking

    assert "parked" == (await resting)["b"]


async def test_idle_models_are_looked_at_until_the_server_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The idle check runs until the server ends, even if a model cannot be put to sleep."""
    monkeypatch.setattr("vllm_hotswap.switching.idle.IDLE_CHECK_S", 0)
    clocked = await Clocked(b=ModelSettings(idle_sleep_s=10)).start()
    clocked.now += 10
    clocked.host.fail_next("sleep", "b")
    resting = asyncio.create_task(clocked.coordinator.rest_idle_models())

    while clocked.coordinator.registry.resolve("b").residency.value != "asleep":  # noqa: ASYNC110
        await asyncio.sleep(0)

    resting.cancel()
    assert [("sleep", "b")] * 2 == clocked.host.operations[-2:]


async def test_nobody_is_looked_at_where_no_model_ever_rests() -> None:
    """Without a policy for any model, there is no idle check."""
    clocked = await Clocked().start()

    await asyncio.wait_for(clocked.coordinator.rest_idle_models(), 1)


# --- any sequence of operations -------------------------------------------------------------

ALIAS = st.sampled_from(ALIASES)
MOVES = st.one_of(
    st.tuples(st.just("switch"), ALIAS, st.just({})),
    st.tuples(st.sampled_from(["load", "wake", "unload", "prefetch"]), ALIAS, st.just({})),
    st.tuples(st.just("sleep"), ALIAS, st.fixed_dictionaries({"level": st.integers(1, 2)})),
)
PINS = st.tuples(st.just("pin"), st.just("llama"), st.fixed_dictionaries({"pinned": st.booleans()}))
FAILURES = st.tuples(
    st.just("fail"),
    ALIAS,
    st.fixed_dictionaries(
        {"what": st.sampled_from(["load", "wake", "sleep", "unload", "activate"])}
    ),
)
LEVELS = {"active": 0, "parked": 0, "asleep": 1, "discarded": 2, "cold": None}

Action = tuple[str, str, dict[str, Any]]


class Walk:
    """Run the steps that hypothesis chooses, and check the server after every step."""

    def __init__(self, budget: int, levels: list[frozenset[int]]) -> None:
        sizes = {
            alias: FakeSettings(weights_bytes=2, kv_bytes=2, levels=known)
            for alias, known in zip(ALIASES, levels, strict=True)
        }
        self.budget = budget
        self.server = Server(load=("llama",), settings=sizes, budget=Usage(budget, 9))
        self.answers: list[tuple[str, httpx.Response]] = []

    async def run(self, actions: list[tuple[Action, bool]]) -> Walk:
        await self.server.start()
        begun = [await self._do(*action, wait=wait) for action, wait in actions]
        self.answers = [(verb, await task) for verb, task in begun if task is not None]
        return self

    async def end(self) -> None:
        await self.server.stop()
        assert 0 == self.server.host.stepped_while_parked

    async def _do(
        self, verb: str, alias: str, body: dict[str, Any], wait: bool
    ) -> tuple[str, asyncio.Task[httpx.Response] | None]:
        task: asyncio.Task[httpx.Response] | None = None
        if verb == "fail":
            self.server.host.fail_next(body["what"], alias)
        elif verb == "switch":
            task = self.server.switch(alias)
        else:
            task = self.server.operate(alias, verb, **body)
        if wait:
            await self.server.settled()
        assert self.held_bytes <= self.budget
        return verb, task

    @property
    def alive(self) -> dict[str, str]:
        """Return the models that are not dead: one that cannot be stepped after a switch dies."""
        return {a: where for a, where in self.server.residencies.items() if where != "failed"}

    @property
    def held_bytes(self) -> int:
        return sum(self.server.host.engines[alias].held_bytes for alias in self.alive)

    def check(self) -> None:
        """Check what holds whenever nothing is under way."""
        engines, active = self.server.host.engines, self.server.coordinator.active
        assert "idle" == self.server.coordinator.serving().phase
        assert self.server.host.most_held_bytes <= self.budget or len(self.alive) < len(ALIASES)
        assert {alias: LEVELS[where] for alias, where in self.alive.items()} == {
            alias: engines[alias].level for alias in self.alive
        }
        assert [alias for alias, where in self.alive.items() if where == "active"] == [
            alias for alias in ALIASES if alias == active
        ]
        assert active is None or engines[active].is_stepped


levels = st.lists(
    st.sampled_from([frozenset([1, 2]), frozenset([1]), frozenset()]), min_size=3, max_size=3
)


@settings(max_examples=examples(25))
@given(levels, st.lists(MOVES, max_size=12))
def test_no_walk_exceeds_the_budget_and_every_switch_succeeds(
    levels: list[frozenset[int]], actions: list[Action]
) -> None:
    """Any sequence of actions, with memory for one and a half, stays within the budget."""

    async def run() -> None:
        walk = await Walk(6, levels).run([(action, True) for action in actions])
        walk.check()
        assert {200} >= {answer.status_code for verb, answer in walk.answers if verb == "switch"}
        assert {200, 400, 409} >= {answer.status_code for _, answer in walk.answers}
        await walk.end()

    asyncio.run(run())


@settings(max_examples=examples(25))
@given(levels, st.lists(st.tuples(MOVES | PINS | FAILURES, st.booleans()), max_size=12))
def test_no_walk_with_failures_leaves_anything_behind(
    levels: list[frozenset[int]], actions: list[tuple[Action, bool]]
) -> None:
    """After concurrent actions with failures and a pin, every model can be switched to."""

    async def run() -> None:
        walk = await Walk(9, levels).run(actions)
        await walk.server.settled()  # where no model was left, one is brought up again
        walk.check()
        assert {200, 400, 409, 500, 503} >= {answer.status_code for _, answer in walk.answers}
        for alias in ALIASES:
            answers = [await walk.server.switch(alias) for _ in range(len(actions) + 1)]
            died = walk.server.residency(alias) == "failed"
            assert (503 if died else 200) == answers[-1].status_code
        await walk.end()

    asyncio.run(run())
