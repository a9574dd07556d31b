"""The coordinator's rules: which requests are admitted, held or refused; what a switch does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings, strategies as st

from tests.conftest import MakeServer
from tests.helpers.depth import examples
from tests.helpers.support import Server, settled
from vllm_hotswap.errors import (
    ConfigError,
    EngineUnavailable,
    HotswapError,
    ModelNotActive,
    ModelSwitching,
    QueueFull,
    SwitchFailed,
    SwitchInProgress,
    UnknownModel,
    WaitTimeout,
)
from vllm_hotswap.events import (
    LoadProgress,
    PhaseChanged,
    RequestEnded,
    ResidencyChanged,
    SwitchEnded,
)
from vllm_hotswap.models.registry import Lease

PHASES = ["validate", "drain", "make_room", "bring_up", "activate", "verify"]


class Holder:
    """A request that holds its lease until it is released, and leaves when it is cut."""

    def __init__(self, server: Server, alias: str | None) -> None:
        self.lease: Lease | None = None
        self.go = asyncio.Event()
        self.task = asyncio.create_task(self._run(server, alias))

    async def _run(self, server: Server, alias: str | None) -> str:
        async with server.lease(alias) as self.lease:
            self.lease.on_cut = self.go.set
            if self.lease.cut is None:
                await self.go.wait()
            return "cut" if self.lease.cut else "served"

    async def let_go(self) -> str:
        self.go.set()
        return await self.task


async def hold(server: Server, alias: str | None = None) -> Holder:
    holder = Holder(server, alias)
    await server.settled()
    return holder


async def begin_switch(
    server: Server, alias: str, drain_timeout_s: float = 60
) -> asyncio.Task[object]:
    task = asyncio.create_task(server.coordinator.switch(alias, drain_timeout_s))
    await server.settled()
    return task


# --- start ----------------------------------------------------------------------------------


async def test_start_activates_the_default_and_parks_the_others(server: Server) -> None:
    """Models loaded at start-up are parked, except the default; the rest is cold."""
    assert "llama" == server.coordinator.active
    assert ["active", "parked", "cold"] == [
        server.residency(alias) for alias in ("llama", "qwen", "mistral")
    ]
    assert 1 == server.coordinator.epoch


async def test_start_reports_every_stage_of_every_load(server: Server) -> None:
    """Each load reports its stages in order and ends with `ready`."""
    stages = [e.stage for e in server.events.of(LoadProgress) if e.model == "qwen"]

    assert ["weights", "kv_cache", "warm_up", "frontend", "ready"] == stages


@pytest.mark.parametrize("alias", ["llama", "qwen"])
async def test_start_fails_if_a_model_cannot_be_loaded(alias: str) -> None:
    """A server does not start without a model that it has to load."""
    server = Server()
    server.host.fail_next("load", alias, HotswapError("out of memory"))

    with pytest.raises(HotswapError, match="out of memory"):
        await server.start()

    assert "cold" == server.residency(alias)
    await server.stop()


async def test_start_validates_everything_before_it_loads_anything() -> None:
    """A missing file is found before minutes are spent on loading."""
    server = Server()
    server.host.engines["qwen"].missing_files = True

    with pytest.raises(ConfigError, match="'fake/qwen' does not exist"):
        await server.start()

    assert [] == server.host.operations
    await server.stop()


# --- admission ------------------------------------------------------------------------------


@pytest.mark.parametrize("alias", ["llama", None])
async def test_request_for_the_active_model_is_admitted(server: Server, alias: str | None) -> None:
    """A request for the active model, named or not, is leased at once in the current epoch."""
    async with server.lease(alias) as lease:
        assert ("llama", 1) == (lease.alias, lease.epoch)
        assert 1 == server.in_flight["llama"]

    assert 0 == server.in_flight["llama"]


@pytest.mark.parametrize(
    ("alias", "error", "message"),
    [
        ("gpt", UnknownModel, "configured: llama, qwen, mistral"),
        ("qwen", ModelNotActive, "the active model is 'llama'"),
        ("mistral", ModelNotActive, "the active model is 'llama'"),
    ],
)
async def test_request_for_another_model_is_refused(
    server: Server, alias: str, error: type[HotswapError], message: str
) -> None:
    """A request for another model is refused at once, whether or not that is loaded."""
    with pytest.raises(error, match=message):
        async with server.lease(alias):
            pass


async def test_request_for_a_third_model_is_refused_during_a_switch(server: Server) -> None:
    """During a switch, only requests for the target are held; others are refused."""
    holder = await hold(server)
    switch = await begin_switch(server, "qwen")

    with pytest.raises(ModelNotActive):
        async with server.lease("mistral"):
            pass

    await holder.let_go()
    await switch


async def test_source_is_refused_from_drain_to_the_end(server: Server) -> None:
    """During a switch no request of the source is admitted, from drain to activation."""
    server.host.hold("activate", "qwen")
    holder = await hold(server)
    switch = await begin_switch(server, "qwen")

    assert "drain" == server.coordinator.serving().phase
    with pytest.raises(ModelSwitching, match="'llama' is being drained for a switch to 'qwen'"):
        async with server.lease("llama"):
            pass

    await holder.let_go()
    await server.settled()
    assert "activate" == server.coordinator.serving().phase
    with pytest.raises(ModelSwitching):
        async with server.lease("llama"):
            pass

    server.host.release("activate", "qwen")
    await switch


async def test_source_is_admitted_until_the_target_is_validated(server: Server) -> None:
    """A switch that has only been requested refuses no requests."""
    switch = asyncio.create_task(server.coordinator.switch("qwen"))
    await asyncio.sleep(0)  # the switch was requested, but its task has not run

    async with server.lease("llama") as lease:
        assert "llama" == lease.alias

    await switch


async def test_held_request_gets_the_new_epoch(server: Server) -> None:
    """Requests for the target, and those without a model, are served in the new epoch."""
    server.host.hold("activate", "qwen")
    switch = await begin_switch(server, "qwen")
    named, unnamed = await hold(server, "qwen"), await hold(server, None)
    assert 2 == server.coordinator.snapshot().waiting

    server.host.release("activate", "qwen")
    await switch
    await server.settled()

    assert [("qwen", 2)] * 2 == [
        (h.lease.alias, h.lease.epoch) for h in (named, unnamed) if h.lease
    ]
    assert 0 == server.coordinator.snapshot().waiting
    assert ["served"] * 2 == [await named.let_go(), await unnamed.let_go()]


async def test_queue_has_an_end(make_server: MakeServer) -> None:
    """Requests beyond `max_waiting` are refused with a time to retry."""
    server = await make_server(max_waiting=1)
    server.host.hold("activate", "qwen")
    switch = await begin_switch(server, "qwen")
    holder = await hold(server, "qwen")

    with pytest.raises(QueueFull, match="1 requests are already waiting for 'qwen'") as caught:
        async with server.lease("qwen"):
            pass
    assert 1 <= (caught.value.retry_after_s or 0)

    server.host.release("activate", "qwen")
    await switch
    assert "served" == await holder.let_go()


async def test_wait_has_an_end(make_server: MakeServer) -> None:
    """A request that has waited for `wait_timeout` gets an error and leaves the queue."""
    server = await make_server(wait_timeout=0, verify=False)
    server.host.hold("activate", "qwen")
    switch = await begin_switch(server, "qwen")

    with pytest.raises(WaitTimeout, match="waited 0 s for a switch"):
        async with server.lease("qwen"):
            pass

    assert 0 == server.coordinator.snapshot().waiting
    server.host.release("activate", "qwen")
    await switch
    assert 0 == server.in_flight["qwen"]


async def test_lease_granted_as_the_time_runs_out_is_used(make_server: MakeServer) -> None:
    """If admission and timeout share a turn of the loop, the request is served, no lease lost."""
    server = await make_server(wait_timeout=0, verify=False)
    server.host.hold("activate", "qwen")
    switch = await begin_switch(server, "qwen")

    server.host.release("activate", "qwen")
    async with server.lease("qwen") as lease:
        assert 2 == lease.epoch

    await switch
    assert 0 == server.in_flight["qwen"]


async def test_lease_granted_as_the_client_leaves_is_given_back(server: Server) -> None:
    """If admission and cancellation share a turn of the loop, no lease is lost."""
    server.host.hold("activate", "qwen")
    switch = await begin_switch(server, "qwen")
    holder = await hold(server, "qwen")

    server.host.release("activate", "qwen")
    asyncio.get_running_loop().call_soon(holder.task.cancel)
    await switch

    assert 0 == server.in_flight["qwen"]


@pytest.mark.parametrize("fails", [False, True])
async def test_request_that_leaves_as_the_switch_ends_gets_nothing(
    server: Server, fails: bool
) -> None:
    """If cancellation and the switch's end share a turn of the loop, no lease is granted."""
    failures = [HotswapError("out of memory")] * fails
    server.host.hold("activate", "qwen")
    _ = [server.host.fail_next("activate", "qwen", failure) for failure in failures]
    switch = await begin_switch(server, "qwen")
    holder = await hold(server, "qwen")

    server.host.release("activate", "qwen")
    holder.task.cancel()
    await asyncio.wait([switch, holder.task])

    assert holder.task.cancelled()
    assert 0 == server.in_flight["qwen"]


async def test_held_request_may_leave(server: Server) -> None:
    """A client that leaves while it waits is removed from the queue."""
    server.host.hold("activate", "qwen")
    switch = await begin_switch(server, "qwen")
    holder = await hold(server, "qwen")

    holder.task.cancel()
    await server.settled()

    assert 0 == server.coordinator.snapshot().waiting
    server.host.release("activate", "qwen")
    await switch
    assert 0 == server.in_flight["qwen"]


# --- switching ------------------------------------------------------------------------------


async def test_switch_tells_its_story(server: Server) -> None:
    """Phases start and end in order; residencies change once; the end is reported last."""
    result = await server.coordinator.switch("qwen")

    phases = server.events.of(PhaseChanged)
    assert [(name, status) for name in PHASES for status in ("started", "finished")] == [
        (event.phase.value, event.status) for event in phases
    ]
    assert {result.operation_id} == {event.operation_id for event in phases}
    assert [("llama", "parked"), ("qwen", "active")] == [
        (event.model, event.after.value) for event in server.events.of(ResidencyChanged)[-2:]
    ]
    ended = server.events.events[-1]
    assert isinstance(ended, SwitchEnded)
    assert ("llama", "qwen", "switched", 2, None) == (
        ended.source,
        ended.target,
        ended.status,
        ended.epoch,
        ended.cause,
    )


async def test_switch_result_says_what_happened(server: Server) -> None:
    """The result has models, epoch, phases, and times that add up."""
    result = await server.coordinator.switch("qwen")

    assert ("llama", "qwen", True, 2) == (
        result.previous_model,
        result.current_model,
        result.switched,
        result.epoch,
    )
    assert PHASES == list(result.phases_s)
    assert 0 <= result.reconfigure_s <= result.duration_s
    assert 0 == result.requests_cut


async def test_switch_between_loaded_models_only_moves_the_pointer(server: Server) -> None:
    """A switch between loaded models loads and rebuilds nothing."""
    await server.coordinator.switch("qwen")
    await server.coordinator.switch("llama")

    assert [("activate", "qwen"), ("activate", "llama")] == server.host.operations


async def test_switch_to_the_active_model_does_nothing(server: Server) -> None:
    """A switch to the active model has an id, but no operation, event or new epoch."""
    before = len(server.events.events)

    result = await server.coordinator.switch("llama")

    assert (False, "llama", "llama", 1) == (
        result.switched,
        result.previous_model,
        result.current_model,
        result.epoch,
    )
    assert [] == server.host.operations
    assert before == len(server.events.events)


async def test_every_activation_raises_the_epoch_by_one(server: Server) -> None:
    """The epoch counts activations and nothing else."""
    epochs = [
        (await server.coordinator.switch(alias)).epoch for alias in ("qwen", "mistral", "mistral")
    ]

    assert [2, 3, 3] == epochs


async def test_cold_target_is_loaded_by_its_first_switch(server: Server) -> None:
    """A cold target is loaded once; later switches to it only activate."""
    for alias in ("mistral", "llama", "mistral"):
        await server.coordinator.switch(alias)

    assert 1 == server.host.operations.count(("load", "mistral"))
    assert "active" == server.residency("mistral")


async def test_second_call_for_the_target_joins_the_switch(server: Server) -> None:
    """Two callers for one target get one switch, one load and one result."""
    server.host.hold("load", "mistral")
    first = await begin_switch(server, "mistral")
    second = await begin_switch(server, "mistral")

    server.host.release("load", "mistral")

    assert await first is await second
    assert 1 == server.host.operations.count(("load", "mistral"))


@pytest.mark.parametrize("other", ["mistral", "llama"])
async def test_call_for_another_target_is_refused_during_a_switch(
    server: Server, other: str
) -> None:
    """Only one switch runs at a time, including its way back; other targets are refused."""
    server.host.hold("activate", "qwen")
    switch = await begin_switch(server, "qwen")

    with pytest.raises(SwitchInProgress, match="a switch to 'qwen' is in progress"):
        await server.coordinator.switch(other)

    server.host.release("activate", "qwen")
    await switch


async def test_switch_outlives_its_caller(server: Server) -> None:
    """A caller that leaves does not stop the switch."""
    server.host.hold("activate", "qwen")
    switch = await begin_switch(server, "qwen")

    switch.cancel()
    await server.settled()
    server.host.release("activate", "qwen")
    await server.settled()

    assert "qwen" == server.coordinator.active


async def test_failing_switch_outlives_its_caller_quietly(server: Server) -> None:
    """An error of a switch that no caller waits for is not a stray exception."""
    server.host.hold("load", "mistral")
    server.host.fail_next("load", "mistral")
    switch = await begin_switch(server, "mistral")

    switch.cancel()
    await server.settled()
    server.host.release("load", "mistral")
    await server.settled()

    assert "idle" == server.coordinator.serving().phase
    assert "llama" == server.coordinator.active


async def test_drain_waits_for_every_lease(server: Server) -> None:
    """No other model is activated while a request of the source is running."""
    first, second = await hold(server), await hold(server)
    switch = await begin_switch(server, "qwen")

    await first.let_go()
    await server.settled()
    assert [] == server.host.operations

    assert "served" == await second.let_go()
    await switch
    assert [("activate", "qwen")] == server.host.operations


async def test_drain_ends_at_its_deadline(server: Server) -> None:
    """At the deadline of a drain, running requests are aborted with the cause, and counted."""
    holder = await hold(server)

    result = await server.coordinator.switch("qwen", 0.01)

    assert "cut" == await holder.task
    assert holder.lease
    assert holder.lease.cut
    assert "still running 0.01 s after a switch to 'qwen'" in holder.lease.cut.message
    assert 1 == result.requests_cut
    assert ["cut"] == [event.result for event in server.events.of(RequestEnded)]


async def test_configured_deadline_counts_where_the_call_gives_none(
    make_server: MakeServer,
) -> None:
    """`switching.drain_timeout` applies to a switch call without a timeout."""
    server = await make_server(drain_timeout=0)
    holder = await hold(server)

    await server.coordinator.switch("qwen")

    assert "cut" == await holder.task


async def test_request_that_does_not_end_is_cancelled(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that ignores its abort does not block the switch for ever."""
    monkeypatch.setattr("vllm_hotswap.models.drain.CUT_GRACE_S", 0.01)

    async def deaf() -> None:
        async with server.lease("llama"):
            await asyncio.Event().wait()

    task = asyncio.create_task(deaf())
    await server.settled()

    await server.coordinator.switch("qwen", 0)

    assert task.cancelled()
    assert 0 == server.in_flight["llama"]


# --- failures of a switch -------------------------------------------------------------------


async def test_invalid_target_fails_before_anything_is_drained(server: Server) -> None:
    """A switch to an invalid target fails without affecting requests of the source."""
    server.host.engines["mistral"].missing_files = True
    holder = await hold(server)

    with pytest.raises(SwitchFailed, match=r"in phase validate: .* does not exist; 'llama' is"):
        await server.coordinator.switch("mistral", 0)

    assert "served" == await holder.let_go()
    assert "drain" not in [event.phase.value for event in server.events.of(PhaseChanged)]


@pytest.mark.parametrize(
    ("operation", "target", "phase", "residency"),
    [("load", "mistral", "bring_up", "cold"), ("activate", "qwen", "activate", "parked")],
)
async def test_source_serves_on_if_the_target_cannot_be_brought_up(
    server: Server, operation: str, target: str, phase: str, residency: str
) -> None:
    """If the target fails, the caller and held requests get the cause; then all is as before."""
    server.host.hold(operation, target)
    server.host.fail_next(operation, target, HotswapError("out of memory"))
    switch = await begin_switch(server, target)
    holder = await hold(server, target)
    expected = (
        f"switch to '{target}' failed in phase {phase}: out of memory; 'llama' is still active"
    )

    server.host.release(operation, target)

    with pytest.raises(SwitchFailed, match=expected):
        await switch
    with pytest.raises(SwitchFailed, match=expected):
        await holder.task
    assert ("llama", 1, "idle") == (
        server.coordinator.active,
        server.coordinator.epoch,
        server.coordinator.serving().phase,
    )
    assert residency == server.residency(target)
    assert server.host.engines["llama"].is_stepped
    assert "out of memory" == server.events.of(SwitchEnded)[0].cause
    assert "failed" == server.events.of(PhaseChanged)[-1].status


async def test_failed_switch_may_be_tried_again(server: Server) -> None:
    """A failure leaves nothing behind that would hinder the next attempt."""
    server.host.fail_next("load", "mistral")
    with pytest.raises(SwitchFailed):
        await server.coordinator.switch("mistral")

    assert (await server.coordinator.switch("mistral")).switched


async def test_source_that_cannot_go_on_is_given_up(server: Server) -> None:
    """If the way back fails, too, no model is active until recovery brings one back."""
    server.host.fail_next("activate", "qwen")
    server.host.fail_next("activate", "llama", HotswapError("pointer lost"))

    with pytest.raises(SwitchFailed, match="no model is active"):
        await server.coordinator.switch("qwen")

    assert "cold" == server.residency("llama")
    assert "activate of 'qwen' was made to fail" == server.coordinator.serving().failure
    await server.settled()
    assert "llama" == server.coordinator.active
    assert server.coordinator.serving().failure is None


async def test_source_that_dies_on_the_way_back_is_given_up(server: Server) -> None:
    """The source's death and its failed activation are one failure, and the switch ends."""
    server.host.hold("activate", "llama")
    server.host.fail_next("activate", "qwen")
    server.host.fail_next("activate", "llama")
    switch = server.switch("qwen")
    await server.settled()
    assert ("activate", "llama") == server.host.operations[-1]

    server.host.kill_engine("llama")
    server.host.release("activate", "llama")

    assert 503 == (await switch).status_code
    await server.settled()
    assert "active" == server.residency("llama")
    assert "idle" == server.coordinator.serving().phase


async def test_source_stays_where_it_is_if_the_target_cannot_be_loaded(server: Server) -> None:
    """A failed load of the target sends no command to the source's engine."""
    server.host.fail_next("load", "mistral")

    with pytest.raises(SwitchFailed, match="'llama' is still active"):
        await server.coordinator.switch("mistral")

    assert ("activate", "llama") not in server.host.operations
    assert "active" == server.residency("llama")


# --- deaths ---------------------------------------------------------------------------------


async def test_death_of_the_host_ends_every_request(server: Server) -> None:
    """At the host's death running requests end with the cause; later ones are refused with it."""
    holder = await hold(server)

    server.host.kill("the engine host was killed by signal 9")

    assert "cut" == await holder.task
    assert holder.lease
    assert isinstance(holder.lease.cut, EngineUnavailable)
    assert None is server.coordinator.active
    assert ["failed", "failed", "cold"] == [
        server.residency(alias) for alias in ("llama", "qwen", "mistral")
    ]
    with pytest.raises(EngineUnavailable, match="killed by signal 9"):
        async with server.lease("llama"):
            pass
    with pytest.raises(EngineUnavailable, match="killed by signal 9"):
        await server.coordinator.switch("qwen")


@pytest.mark.parametrize(("operation", "target"), [("load", "mistral"), ("activate", "qwen")])
async def test_death_of_the_host_ends_a_switch(server: Server, operation: str, target: str) -> None:
    """At the host's death during a switch, the caller and every held request get the cause."""
    server.host.hold(operation, target)
    switch = await begin_switch(server, target)
    holder = await hold(server, target)

    server.host.kill("the engine host was killed by signal 9")

    with pytest.raises(EngineUnavailable, match="killed by signal 9"):
        await switch
    with pytest.raises(HotswapError, match="killed by signal 9") as caught:
        await holder.task
    assert 503 == caught.value.status
    await server.settled()
    assert ("llama", "idle") == (server.coordinator.active, server.coordinator.serving().phase)


async def test_death_of_the_host_during_a_drain_ends_both_sides(server: Server) -> None:
    """At the host's death in a drain, requests of source and target end with the cause."""
    running = await hold(server)
    switch = await begin_switch(server, "qwen")
    held = await hold(server, "qwen")

    server.host.kill("the engine host was killed by signal 9")

    assert "cut" == await running.task
    with pytest.raises(EngineUnavailable, match="the engine host was killed by signal 9"):
        await switch
    with pytest.raises(HotswapError, match="killed by signal 9"):
        await held.task


async def test_host_that_is_never_started_never_dies(server: Server) -> None:
    """A future that is cancelled when a loop closes does not count as a death."""
    server.host.died.cancel()
    await server.settled()

    assert None is server.coordinator.serving().failure


async def test_death_of_the_active_engine_leaves_the_others(server: Server) -> None:
    """Its requests end, later ones are refused until it is back; switches to others work."""
    holder = await hold(server)
    server.host.hold("load", "llama")

    server.host.kill_engine("llama", "RuntimeError: boom")

    assert "cut" == await holder.task
    with pytest.raises(EngineUnavailable, match="the engine of 'llama' died: RuntimeError: boom"):
        async with server.lease("llama"):
            pass
    await server.settled()
    server.host.release("load", "llama")
    async with server.lease(None) as lease:
        assert "llama" == lease.alias
    await server.coordinator.switch("qwen")
    async with server.lease(None) as lease:
        assert "qwen" == lease.alias


async def test_death_of_a_parked_engine_leaves_the_active_one(server: Server) -> None:
    """If a parked engine dies, the active model stays; a switch loads the dead one again."""
    holder = await hold(server)

    server.host.kill_engine("qwen", "RuntimeError: boom")

    assert "failed" == server.residency("qwen")
    assert "served" == await holder.let_go()
    assert "llama" == server.coordinator.active
    await server.coordinator.switch("qwen")
    assert [("load", "qwen"), ("activate", "qwen")] == server.host.operations


async def test_death_of_the_source_ends_its_drain(server: Server) -> None:
    """If the source dies during the drain, the switch continues to the target at once."""
    holder = await hold(server)
    switch = await begin_switch(server, "qwen")

    server.host.kill_engine("llama")

    assert "cut" == await holder.task
    await switch
    assert ("failed", "active") == (server.residency("llama"), server.residency("qwen"))


async def test_death_of_a_target_that_is_loaded_during_the_drain_is_noticed(
    server: Server,
) -> None:
    """A target that dies during the drain is not activated or reloaded; the source stays active."""
    holder = await hold(server)
    switch = await begin_switch(server, "qwen")
    server.host.kill_engine("qwen", "RuntimeError: boom")

    await holder.let_go()

    with pytest.raises(SwitchFailed, match="the engine of 'qwen' died: RuntimeError: boom"):
        await switch
    assert ("llama", "active") == (server.coordinator.active, server.residency("llama"))


@pytest.mark.parametrize(("operation", "target"), [("load", "mistral"), ("activate", "qwen")])
async def test_death_of_the_target_while_it_is_brought_up_is_noticed(
    server: Server, operation: str, target: str
) -> None:
    """If the target dies, the cause is reported, the source fully active, and a switch works."""
    server.host.hold(operation, target)
    switch = await begin_switch(server, target)
    server.host.kill_engine(target, "RuntimeError: boom")

    server.host.release(operation, target)

    with pytest.raises(SwitchFailed, match=f"the engine of '{target}' died: RuntimeError: boom"):
        await switch
    assert ("active", "failed") == (server.residency("llama"), server.residency(target))
    other = {"qwen": "mistral", "mistral": "qwen"}[target]
    assert (await server.coordinator.switch(other)).switched


async def test_engine_that_dies_as_its_requests_are_admitted_ends_them(server: Server) -> None:
    """A held request that is granted and cut in one turn of the loop gets the cause."""
    server.host.hold("activate", "qwen")
    switch = await begin_switch(server, "qwen")
    holder = await hold(server, "qwen")

    server.host.release("activate", "qwen")
    asyncio.get_running_loop().call_soon(server.host.kill_engine, "qwen")
    await switch

    assert "cut" == await holder.task
    assert 0 == server.in_flight["qwen"]


# --- shutdown -------------------------------------------------------------------------------


async def test_shutdown_lets_running_requests_end(server: Server) -> None:
    """No request is admitted any longer; running ones may end within the time."""
    holder = await hold(server)
    stopping = asyncio.create_task(server.coordinator.shut_down(60))
    await server.settled()

    with pytest.raises(EngineUnavailable, match="the server is shutting down"):
        async with server.lease("llama"):
            pass
    assert "served" == await holder.let_go()
    await stopping


async def test_shutdown_ends_what_runs_longer(server: Server) -> None:
    """After the time, running requests are aborted with the reason."""
    holder = await hold(server)

    await server.coordinator.shut_down(0)

    assert "cut" == await holder.task
    assert holder.lease
    assert "the server is shutting down" == str(holder.lease.cut)


async def test_shutdown_ends_a_switch_that_takes_longer(server: Server) -> None:
    """At shutdown, a long switch's caller and every held request get the reason."""
    server.host.hold("load", "mistral")
    switch = await begin_switch(server, "mistral")
    holder = await hold(server, "mistral")

    await server.coordinator.shut_down(0)

    with pytest.raises(EngineUnavailable, match="the server is shutting down"):
        await switch
    with pytest.raises(HotswapError, match="the server is shutting down"):
        await holder.task


async def test_shutdown_lets_a_switch_end(server: Server) -> None:
    """A switch may end normally within the time; requests that it held are refused."""
    server.host.hold("activate", "qwen")
    switch = await begin_switch(server, "qwen")
    stopping = asyncio.create_task(server.coordinator.shut_down(60))
    await server.settled()

    server.host.release("activate", "qwen")

    assert await switch
    await stopping


# --- any sequence of events -----------------------------------------------------------------


async def test_coordinator_tells_its_state(server: Server) -> None:
    """The coordinator's text form makes logs and failed tests readable."""
    holder = await hold(server)
    assert "<Coordinator active=llama epoch=1 phase=IDLE in_flight=1 waiting=0>" == repr(
        server.coordinator
    )

    switch = await begin_switch(server, "qwen")
    assert "<Coordinator active=llama epoch=1 phase=DRAIN in_flight=1 waiting=0>" == repr(
        server.coordinator
    )
    assert ("qwen", "drain") == (
        server.coordinator.serving().target,
        server.coordinator.serving().phase,
    )

    await holder.let_go()
    await switch
    assert None is server.coordinator.serving().target


ALIASES = st.sampled_from(["llama", "qwen", "mistral"])
ACTIONS = st.one_of(
    st.tuples(st.just("ask"), ALIASES | st.none()),
    st.tuples(st.just("switch"), ALIASES),
    st.tuples(st.just("leave"), st.integers(0, 9)),
    st.tuples(st.just("let_go"), st.integers(0, 9)),
    st.tuples(st.just("fail"), st.tuples(st.sampled_from(["load", "activate"]), ALIASES)),
    st.tuples(st.just("die"), ALIASES),
)


class Chaos:
    """Runs actions chosen by hypothesis, one after the other."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._holders: list[Holder] = []
        self._switches: list[asyncio.Task[object]] = []
        self._epochs: list[int] = []
        self._do: dict[str, Callable[..., object]] = {
            "ask": lambda alias: self._holders.append(Holder(server, alias)),
            "switch": self._switch,
            "leave": lambda number: self._pick(number, lambda holder: holder.task.cancel()),
            "let_go": lambda number: self._pick(number, lambda holder: holder.go.set()),
            "fail": lambda what: server.host.fail_next(*what),
            "die": self._die,
        }

    async def run(self, actions: list[tuple[str, object, bool]]) -> list[int]:
        for verb, what, settle in actions:
            self._do[verb](what)
            await (self._server.settled() if settle else asyncio.sleep(0))
            self._epochs.append(self._server.coordinator.epoch)
        for holder in self._holders:
            holder.go.set()
        await asyncio.wait_for(
            asyncio.gather(
                *self._switches, *(h.task for h in self._holders), return_exceptions=True
            ),
            timeout=10,
        )
        return self._epochs

    def _die(self, alias: str) -> None:
        if self._server.host.engines[alias].is_loaded:
            self._server.host.kill_engine(alias)

    def _switch(self, alias: str) -> None:
        self._switches.append(asyncio.create_task(self._server.coordinator.switch(alias)))

    def _pick(self, number: int, act: Callable[[Holder], object]) -> None:
        if self._holders:
            act(self._holders[number % len(self._holders)])


async def live_through(actions: list[tuple[str, object, bool]]) -> tuple[Server, list[int]]:
    server = await Server().start()
    epochs = await Chaos(server).run(actions)
    await server.stop()
    return server, epochs


@settings(max_examples=examples(25))
@given(
    st.lists(st.tuples(ACTIONS, st.booleans()).map(lambda pair: (*pair[0], pair[1])), max_size=14)
)
def test_no_mix_of_events_leaks_or_hangs(actions: list[tuple[str, object, bool]]) -> None:
    """Requests, departures, failures, deaths and switches all end, in any order.

    No lease is left, no switch hangs, the epoch never falls, residencies agree with the pointer.
    """
    server, epochs = asyncio.run(live_through(actions))

    assert {"llama": 0, "qwen": 0, "mistral": 0} == server.in_flight
    assert "idle" == server.coordinator.serving().phase
    assert sorted(epochs) == epochs
    assert [server.coordinator.active] * len(active(server)) == active(server)
    assert 0 == server.host.stepped_while_parked


def active(server: Server) -> list[str]:
    return [alias for alias in server.in_flight if server.residency(alias) == "active"]


async def test_a_held_request_counts_for_its_name_and_has_its_arrival(server: Server) -> None:
    """A request that is held for a switch is in flight under its name from its arrival on."""
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await settled()
    held = server.ask("qwen")
    await settled()
    [lease] = server.coordinator.registry.model("qwen").entered
    assert 1 == server.coordinator.registry.model("qwen").in_flight_as("qwen")
    assert 0 < lease.arrived_s <= time.monotonic()

    server.host.release("activate", "qwen")
    await asyncio.gather(switch, held)

    assert [] == list(server.coordinator.registry.model("qwen").entered)
    assert 0 <= server.events.of(RequestEnded)[0].waited_s < 60


async def test_a_request_that_leaves_while_it_is_held_leaves_nothing(server: Server) -> None:
    """A held request whose client leaves is forgotten, and the next drain does not wait for it."""
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await settled()
    stream = server.stream("qwen")
    await settled()
    stream.disconnect()
    await settled()
    server.host.release("activate", "qwen")
    await switch

    model = server.coordinator.registry.model("qwen")
    assert (0, 0) == (model.in_flight, server.coordinator.snapshot().waiting)
