"""The rules of switching, each checked over walks that hypothesis generates.

A walk is a whole server on fake engines under virtual time (`tests.helpers.walk`), with any mix of
requests, slow and vanishing clients, switches, operations and failures, interleaved by single turns
of the event loop. Every test checks one invariant, which looks at the server after every step and
at the end. It compares with its own data: the ledger of what clients saw, and tables that are
written down here again.

Not here, because a fake engine cannot show it: that a model which was away answers exactly as one
that never was (I7, checked on the real engine: `tests/integration/test_residency.py`), that no
cache of one load is seen by another (I6), and memory that is really used (I11; here, what the fake
engines report never exceeds the budget). Switches happen only on a call, so there is no fairness
between models to check (I15).
"""

# ruff: noqa: N802  # invariants are called by their numbers

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.helpers.adapters import write_adapter_for
from tests.helpers.depth import examples
from tests.helpers.virtual import VirtualLoop
from tests.helpers.walk import (
    ALIASES,
    RECOVERY,
    Ask,
    Call,
    Invariant,
    Shape,
    SwitchCall,
    World,
    words_of,
)
from vllm_hotswap.api.bodies import BYTES_PER_VALUE, PLAIN_BYTES_PER_BYTE
from vllm_hotswap.errors import NoRoom
from vllm_hotswap.events import (
    ClientEvicted,
    EngineDied,
    Event,
    HostDied,
    HostRestarted,
    OutputRefused,
    PhaseChanged,
    RequestEnded,
    ResidencyChanged,
    ServiceDegraded,
    SwitchEnded,
    WakeChanged,
)
from vllm_hotswap.models.engine import Adapter
from vllm_hotswap.models.registry import Lease
from vllm_hotswap.states import Residency, ServerState, SwitchPhase
from vllm_hotswap.switching.backoff import MAX_BACKOFF_S

pytestmark = pytest.mark.slow

WALKS = settings(
    max_examples=examples(8),
    stateful_step_count=30,
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=list(HealthCheck),
)

CUT_S = 10.0
"""Seconds in which an aborted request must be over, whatever its client does."""

TURNS = (None, None, None, 0, 1, 2, 5)
"""Turns of the loop that follow a step; None for as many as can run without time passing."""
POLICIES = (None, "abort", "park", "park", "park", "refuse")
HOST_WORK = ("load", "wake", "activate", "verify", "sleep", "unload")
BESIDE = ("wake_some", "give_up_wake")
ROLES = ("active", "active", "target", "target", "other", "none")
OPERATIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("load", {}),
    ("unload", {}),
    ("wake", {}),
    ("sleep", {"level": 1}),
    ("sleep", {"level": 2}),
    ("pin", {"pinned": True}),
    ("pin", {"pinned": False}),
    ("prefetch", {}),
)

When = Callable[[Any], object]


@dataclass(frozen=True)
class Step:
    """Something that can happen in a walk."""

    when: When
    often: int
    choices: Mapping[str, Sequence[Any]]
    """The values that its arguments can take."""


STEPS: dict[str, Step] = {}


def may(when: When = lambda walk: True, *, often: int = 1, **choices: Sequence[Any]) -> Any:
    """Make a method a step of walks."""

    def decorate(step: Callable[..., None]) -> Any:
        STEPS[step.__name__] = Step(when, often, choices)
        drawn = {name: st.sampled_from(values) for name, values in choices.items()}
        return precondition(when)(rule(**drawn)(step))

    return decorate


def in_trouble(walk: Walk) -> bool:
    """Also lose files, and let commands to the host fail."""
    return walk.mood != "calm"


def in_danger(walk: Walk) -> bool:
    """Also let engines and the host die and hang."""
    return walk.mood == "deadly"


SHAPES = (
    Shape(),
    Shape(models_that_fit=2),
    Shape(models_that_fit=1),
    Shape(models_that_fit=2, wait_timeout=3, max_waiting=2, max_parked=1, parked_timeout=15),
    Shape(wait_timeout=7, in_flight=3, max_parked=2, burst=2, client_timeout=4),
    Shape(is_watched=True),
    Shape(models_that_fit=1, is_watched=True),
    Shape(models_that_fit=2, is_watched=True, idles=True),
    Shape(slices=4),
    Shape(models_that_fit=2, slices=3, is_watched=True, idles=True),
)
AUTOMATIC = (
    Shape(policy="batch"),
    Shape(policy="batch", models_that_fit=1, wait_timeout=60),
    Shape(policy="fifo", models_that_fit=2, max_waiting=2),
    Shape(policy="round_robin"),
    Shape(policy="round_robin", models_that_fit=2, is_watched=True, max_parked=1),
    Shape(policy="batch", models_that_fit=2, is_watched=True, idles=True, in_flight=3),
    Shape(policy="batch", models_that_fit=2, slices=3, is_watched=True),
)
BEGINNINGS: dict[str, Sequence[Any]] = {
    "shape": (*SHAPES, *AUTOMATIC),
    "mood": ("calm", "calm", "troubled", "deadly", "deadly"),
    "ending": (None, 0, 5),
}
"""The kind of server, what goes wrong, and the time given to the stop at the end, which comes in
the middle of everything; None for no stop."""


class Walk(RuleBasedStateMachine):
    """All steps, in any order."""

    kinds: ClassVar[tuple[type[Invariant], ...]] = ()
    folders: ClassVar[tuple[Path, ...]] = ()

    @initialize(**{name: st.sampled_from(values) for name, values in BEGINNINGS.items()})
    def start(self, shape: Shape, mood: str, ending: int | None) -> None:
        self.mood, self.ending = mood, ending
        self.world = World(shape, self.folders)
        self.world.watch(self.kinds)

    def go_on(self, turns: int | None) -> None:
        if turns is None:
            self.world.settle()
        else:
            self.world.turn(turns)

    # --- clients ------------------------------------------------------------------------------

    @may(often=4, role=ROLES, words=(1, 3, 20, 20), streamed=(True, False), turns=TURNS)
    def ask(self, role: str, words: int, streamed: bool, turns: int | None) -> None:
        self.world.ask(self.world.alias_of(role), words, streamed)
        self.go_on(turns)

    @may(role=ROLES, turns=TURNS)
    def crowd(self, role: str, turns: int | None) -> None:
        for streamed in (True, False, True, False):
            self.world.ask(self.world.alias_of(role), 3, streamed)
        self.go_on(turns)

    @may(lambda self: self.world.open_asks, which=range(6), turns=TURNS)
    def leave(self, which: int, turns: int | None) -> None:
        _chosen(self.world.open_asks, which).leave()
        self.go_on(turns)

    @may(lambda self: self.world.open_asks, which=range(6), turns=TURNS)
    def stop_reading(self, which: int, turns: int | None) -> None:
        _chosen(self.world.open_asks, which).stop_reading()
        self.go_on(turns)

    @may(lambda self: self.world.stopped_readers, which=range(6), turns=TURNS)
    def go_on_reading(self, which: int, turns: int | None) -> None:
        _chosen(self.world.stopped_readers, which).go_on_reading()
        self.go_on(turns)

    # --- who moves models -----------------------------------------------------------------------

    @may(alias=ALIASES, timeout=(0, 1, 5, 30, None), policy=POLICIES, turns=TURNS)
    def switch(self, alias: str, timeout: int | None, policy: Any, turns: int | None) -> None:
        self.world.switch(alias, timeout, policy)
        self.go_on(turns)

    @may(often=4, by=(1, 2), timeout=(0, 2), policy=POLICIES, turns=TURNS)
    def switch_on(self, by: int, timeout: int, policy: Any, turns: int | None) -> None:
        at = ALIASES.index(self.world.coordinator.active or "llama")
        self.world.switch(ALIASES[(at + by) % len(ALIASES)], timeout, policy)
        self.go_on(turns)

    @may(lambda self: self.world.open_switches, which=range(6), turns=TURNS)
    def leave_switch(self, which: int, turns: int | None) -> None:
        _chosen(self.world.open_switches, which).walk_away()
        self.go_on(turns)

    @may(alias=ALIASES, operation=OPERATIONS, turns=TURNS)
    def operate(self, alias: str, operation: tuple[str, Any], turns: int | None) -> None:
        name, body = operation
        self.world.operate(alias, name, **body)
        self.go_on(turns)

    @may(lambda self: self.world.shape.slices, often=3, alias=ALIASES, turns=TURNS)
    def announce(self, alias: str, turns: int | None) -> None:
        self.world.announce(alias)
        self.go_on(turns)

    # --- failures -------------------------------------------------------------------------------

    @may(in_trouble, alias=ALIASES, name=HOST_WORK)
    def fail_next(self, alias: str, name: str) -> None:
        self.world.host.fail_next(name, alias)

    @may(
        lambda self: in_trouble(self) and self.world.shape.slices,
        alias=ALIASES,
        name=BESIDE,
        lacks_room=(True, False),
    )
    def fail_beside(self, alias: str, name: str, lacks_room: bool) -> None:
        error = NoRoom("no room") if lacks_room and name == "wake_some" else None
        self.world.host.fail_next(name, alias, error)

    @may(lambda self: in_danger(self) and self.world.shape.slices, alias=ALIASES, name=BESIDE)
    def hold_beside(self, alias: str, name: str) -> None:
        self.world.hold(name, alias)

    @may(in_trouble, alias=ALIASES)
    def corrupt_or_repair(self, alias: str) -> None:
        engine = self.world.host.engines[alias]
        engine.canary = "corrupt" if engine.canary == "canary" else "canary"

    @may(lambda self: in_trouble(self) and self.world.coordinator.serving().phase == "idle")
    def misstamp(self) -> None:
        self.world.settle()
        self.world.host.misstamp(self.world.coordinator.active or "llama")

    @may(lambda self: in_danger(self) and not self.world.host.is_busy, turns=TURNS)
    def kill_engine(self, turns: int | None) -> None:
        """A step is never taken while the host executes a command."""
        for engine in self.world.host.engines.values():
            if engine.is_stepped:
                self.world.befall(partial(self.world.host.kill_engine, engine.alias))
        self.go_on(turns)

    @may(in_danger, turns=TURNS)
    def kill_host(self, turns: int | None) -> None:
        self.world.befall(self.world.host.kill)
        self.go_on(turns)

    @may(lambda self: in_danger(self) and self.world.can_hang, often=2)
    def hang_host(self) -> None:
        self.world.hang()

    @may(in_danger, alias=ALIASES, name=HOST_WORK)
    def hold(self, alias: str, name: str) -> None:
        self.world.hold(name, alias)

    @may(lambda self: self.world.host.held)
    def let_go(self) -> None:
        self.world.host.let_go()

    @may(in_danger)
    def fail_next_restart(self) -> None:
        self.world.host.fail_next("restart", "")

    @may(in_trouble, alias=ALIASES)
    def lose_files(self, alias: str) -> None:
        self.world.host.engines[alias].missing_files = True

    @may(in_trouble)
    def find_files(self) -> None:
        for engine in self.world.host.engines.values():
            engine.missing_files = False

    # --- time -----------------------------------------------------------------------------------

    @may(often=5, seconds=(1, 1, 2, 3, 5, 10, 20, 120))
    def let_pass(self, seconds: int) -> None:
        self.world.let_pass(seconds)
        self.go_on(None)

    @may(turns=range(1, 11))
    def turn(self, turns: int) -> None:
        self.world.turn(turns)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            if sys.exc_info()[0] is None:
                self.end()
        finally:
            self.world.close()

    def end(self) -> None:
        if self.ending is not None:
            self.world.shut_down(self.ending)
        self.world.finish()


def _chosen(calls: Sequence[Any], which: int) -> Any:
    return calls[which % len(calls)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter_for(folder / "adapter", {"model.layers.0.q_proj": (8, 8)})
    return folder


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """Silence the log: thousands of failures are made here, and each would be logged."""
    logging.getLogger("vllm_hotswap").disabled = True
    yield
    logging.getLogger("vllm_hotswap").disabled = False


def walk(kind: type[Invariant], *, machine: type[Walk] = Walk, tries: int = 8) -> None:
    """Check one invariant over walks; a walk that breaks it is made as short as possible."""
    run_state_machine_as_test(
        type(kind.__name__, (machine,), {"kinds": (kind,)}),
        settings=settings(WALKS, max_examples=examples(tries)),
    )


def walk_at_random(seed: int, kinds: tuple[type[Invariant], ...], steps: int) -> None:
    """Run one walk fast: without hypothesis, which takes most of the time of the others."""
    draw = random.Random(seed)  # noqa: S311  # no secret
    taken = []

    def drawn(choices: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        return {name: draw.choice(values) for name, values in choices.items()}

    walk = type("Walk", (Walk,), {"kinds": kinds})()
    try:
        walk.start(**drawn(BEGINNINGS))
        for _ in range(steps):
            possible = [name for name, step in STEPS.items() if step.when(walk)]
            [name] = draw.choices(possible, [STEPS[name].often for name in possible])
            arguments = drawn(STEPS[name].choices)
            taken.append(f"{name}({arguments})")
            getattr(walk, name)(**arguments)
        walk.end()
    except Exception as error:
        error.add_note("\n".join([f"seed {seed}:", *taken]))
        raise
    finally:
        walk.world.close()


# --- I1 ---------------------------------------------------------------------------------------


class NoWrongModel(Invariant):
    """A client gets only what the model that it asked for made, while that model was active."""

    def at_any_time(self) -> None:
        for ask in self.world.recent_asks:
            self._check(ask)
        self.expect(self.world.host.stepped_while_parked == 0, "a parked engine was stepped")

    def on_piece(self, call: Call, piece: bytes) -> None:
        if isinstance(call, Ask) and call.has_always_read and b'"model"' in piece:
            for alias in call.models:
                stamp = self.world.host.engines[alias].steps.stamp
                self.expect(stamp[0] == alias, f"{call} was given what {stamp} made")

    def _check(self, ask: Ask) -> None:
        if not ask.models:
            return
        [alias, *others] = ask.models
        self.expect(not others, f"{ask} was answered by {ask.models}")
        self.expect(alias == (ask.alias or alias), f"{ask} was answered by {alias}")
        self.expect(words_of(alias, 20).startswith(ask.text), f"{ask} of {alias}: {ask.text}")
        ended_s = self.world.now_s if ask.ended_s is None else ask.ended_s
        served = self.world.active_between(ask.began_s, ended_s)
        self.expect(alias in served, f"{ask} was answered by {alias}; active were {served}")


def test_I1_no_wrong_model() -> None:
    """Every word comes from the model that was asked for, only while that model is stepped."""
    walk(NoWrongModel)


# --- I2 ---------------------------------------------------------------------------------------


class NoLostRequest(Invariant):
    """Accepted = answered in full + explicitly failed + left by the client."""

    def on_piece(self, call: Call, piece: bytes) -> None:
        self.expect(call.ended_s is None, f"{call} is answered after its end")

    def at_any_time(self) -> None:
        for ask in self.world.recent_asks:
            self.expect(ask.outcome != "lost", f"{ask}: {ask.status} {bytes(ask.answer)!r}")
            self.expect(ask.mistake is None, f"{ask}: {ask.mistake!r}")
            self.expect(ask.surplus == 0, f"{ask} was answered more than once")
            told = not (ask.broken and ask.has_always_read)
            honest = ask.code != "wrong_stamp" or self.world.host.misstamped
            self.expect(honest, f"{ask} was refused its own answer")
            self.expect(told, f"{ask} lost its connection: {ask.status} {bytes(ask.answer)!r}")

    def at_end(self) -> None:
        ends = Counter(ask.outcome for ask in self.world.asks)
        total = ends["answered"] + ends["failed"] + ends["left"]
        self.expect(total == len(self.world.asks), f"of {len(self.world.asks)}: {ends}")


def test_I2_no_lost_request() -> None:
    """Every request ends in exactly one whole answer, or in an error that cannot be missed."""
    walk(NoLostRequest)


# --- I3 ---------------------------------------------------------------------------------------


class BoundedWait(Invariant):
    """No request waits longer than the settings say, whatever happens during the wait."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._parked_s: dict[Lease, float] = {}
        self._cut_s: dict[Lease, float] = {}

    def at_any_time(self) -> None:
        now_s, leases = self.world.now_s, self.world.leases.values()
        self._parked_s = {x: self._parked_s.get(x, now_s) for x in leases if x.is_parked}
        self._cut_s = {x: self._cut_s.get(x, now_s) for x in leases if x.cut is not None}
        for lease, since_s in self._parked_s.items():
            bound_s = self.world.shape.parked_timeout + CUT_S
            self.expect(now_s - since_s <= bound_s, f"{lease} is parked for ever")
        for lease, since_s in self._cut_s.items():
            self.expect(now_s - since_s <= CUT_S, f"{lease} was ended, and goes on")
        for ask in self.world.recent_asks:
            self._check_ask(ask)
        for call in self.world.open_switches:
            bound_s = self._bound_s(call)
            self.expect(now_s - call.began_s <= bound_s, f"{call} > {bound_s} s")

    def when_settled(self) -> None:
        active = self.world.coordinator.active
        if active is not None and self.world.coordinator.serving().phase == "idle":
            parked = self.world.registry.model(active).parked
            self.expect(not parked, f"{parked} are parked, and their model is active")

    def _check_ask(self, ask: Ask) -> None:
        if ask.blocked_s is not None and ask.task in self.world.leases:
            blocked_s, bound_s = self.world.now_s - ask.blocked_s, self.world.shape.client_timeout
            self.expect(blocked_s <= 2 * bound_s + CUT_S, f"{ask} takes nothing, and is not let go")
        if not ask.is_open or not ask.has_always_read:
            return  # a client that does not read causes its own wait
        if ask.task not in self.world.leases:
            waited_s = self.world.now_s - ask.began_s
            self.expect(waited_s <= self.world.shape.wait_timeout, f"{ask} held for {waited_s} s")
        elif (lease := self.world.leases[ask.task]).cut is None:
            assert ask.admitted_s is not None
            active_s = self.world.active_s(lease.alias, ask.admitted_s)
            # A token for each activation is kept back until the engine has been verified.
            bound_s = ask.body["max_tokens"] + 1 + len(self.world.stays) + 40 * self.world.hangs
            self.expect(active_s <= bound_s, f"{ask} had the engine for {active_s} s")

    def _bound_s(self, call: SwitchCall) -> float:
        """Return the time to drain, to move every model there and back, and for earlier calls."""
        drain_s = call.body.get("drain_timeout", self.world.shape.drain_timeout)
        each_s = 30.0 + (RECOVERY.load_timeout if self.world.hangs else 0.0)
        return float(drain_s + CUT_S) + each_s * (1 + call.ahead)

    def at_end(self) -> None:
        for call in self.world.calls:
            self.expect(not call.is_open, f"{call} has not ended")


def test_I3_bounded_wait() -> None:
    """Requests and switch calls end within the times that the settings give them."""
    walk(BoundedWait)


# --- I4 ---------------------------------------------------------------------------------------

EDGES = {
    "cold": {"loading", "failed"},
    "loading": {"parked", "cold", "failed"},
    "parked": {"active", "asleep", "discarded", "cold", "failed"},
    "active": {"parked", "failed"},
    "asleep": {"parked", "discarded", "cold", "failed"},
    "discarded": {"parked", "cold", "failed"},
    "failed": {"cold"},
}
PHASES = ["validate", "drain", "make_room", "bring_up", "activate", "verify"]


class OneTransitionAtATime(Invariant):
    """Models move along the edges of the table, one switch and one move at a time."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._where = {m.alias: m.residency.value for m in world.registry}
        self._epoch = world.coordinator.epoch
        self._phases: list[tuple[str, str]] = []
        self._operation: str | None = None

    def on_event(self, event: Event) -> None:
        if not isinstance(event, RequestEnded):  # the epoch is that of its request
            self.expect(event.epoch >= self._epoch, f"{event} is of the past: {self._epoch}")
            self._epoch = event.epoch
        match event:
            case ResidencyChanged():
                self._moved(event)
            case PhaseChanged():
                self._phase(event)
            case SwitchEnded():
                self._operation, self._phases = None, []

    def _moved(self, event: ResidencyChanged) -> None:
        before, after = event.before.value, event.after.value
        self.expect(self._where[event.model] == before, f"{event}: it was {self._where}")
        self.expect(after in EDGES[before], f"{event} is no edge")
        self._where[event.model] = after
        active = [alias for alias, where in self._where.items() if where == "active"]
        self.expect(len(active) <= 1, f"{event}: {active} are active together")

    def _phase(self, event: PhaseChanged) -> None:
        self.expect(self._operation in (None, event.operation_id), f"{event} in {self._operation}")
        self._operation = event.operation_id
        before = self._phases[-1] if self._phases else ("", "finished")
        if event.status == "started":
            self.expect(before[1] == "finished", f"{event} begins within {before}")
            later = before[0] == "" or PHASES.index(before[0]) < PHASES.index(event.phase.value)
            self.expect(later, f"{event} after {before}")
        else:
            self.expect(before == (event.phase.value, "started"), f"{event} after {before}")
        self._phases.append((event.phase.value, event.status))

    def at_any_time(self) -> None:
        most = self.world.host.most_at_once
        self.expect(most <= 1, f"the host was told {most} things at once")
        epochs = [stay.epoch or 0 for stay in self.world.stays]
        self.expect(epochs == sorted(set(epochs)), f"epochs {epochs} do not rise strictly")
        self.expect(
            self.world.coordinator.epoch == epochs[-1],
            f"epoch {self.world.coordinator.epoch} is not that of the last activation, {epochs}",
        )


def test_I4_one_transition_at_a_time() -> None:
    """Models take only listed edges, one at a time; each activation has a higher epoch."""
    walk(OneTransitionAtATime)


# --- I5 ---------------------------------------------------------------------------------------


class DrainEnds(Invariant):
    """Admission closes before the drain begins; then requests only become fewer, until T."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._before: set[int] = set()
        self._kept: list[Any] = []
        self._source: str | None = None
        self._ended = 0
        self._began_s = 0.0

    def on_event(self, event: Event) -> None:
        match event:
            case PhaseChanged(phase=SwitchPhase.DRAIN, status="started"):
                self._source = self.world.coordinator.active
                self._kept = list(self._leases())
                self._before = set(map(id, self._kept))
                self._ended, self._began_s = 0, self.world.now_s
            case PhaseChanged(phase=SwitchPhase.DRAIN):
                self._drained(event)
            case RequestEnded(model=model) if model == self._source:
                self._ended += event.service_s is not None  # it had been admitted
            case SwitchEnded():
                self._source = None

    def _leases(self) -> list[Any]:
        return [] if self._source is None else list(self.world.registry.model(self._source).leases)

    def _drained(self, event: PhaseChanged) -> None:
        took_s = self.world.now_s - self._began_s
        timeout_s = self.world.drain_timeout_of(event.target)
        if not self.world.is_automatic:  # the drain waits for those that cannot be parked
            self.expect(took_s <= timeout_s + CUT_S, f"a drain of {timeout_s} s took {took_s} s")
        leases = self._leases()
        running = [lease for lease in leases if lease.cut is None and not lease.is_parked]
        self.expect(event.status == "failed" or not running, f"{running} run after the drain")

    def at_any_time(self) -> None:
        if self._source is None:
            return
        now = self._leases()
        late = [lease for lease in now if id(lease) not in self._before]
        self.expect(not late, f"{late} admitted to {self._source} while it was drained")
        self.expect(
            len(now) + self._ended == len(self._before),
            f"{len(now)} + {self._ended} requests of {self._source}, {len(self._before)} before",
        )


def test_I5_drain_ends() -> None:
    """A model that is drained admits nothing, and the drain is over when its time is."""
    walk(DrainEnds, tries=21)


# --- I8 ---------------------------------------------------------------------------------------


class AtomicSwitch(Invariant):
    """A switch ends with its target active, or its source, or plainly with no model active."""

    def on_event(self, event: Event) -> None:
        if not isinstance(event, SwitchEnded):
            return
        active = self.world.coordinator.active
        self.expect(self.world.coordinator.epoch == event.epoch, f"{event} is of another epoch")
        if self.world.stopping is None and not self.world.host.died.done():  # noticed next turn
            allowed = [event.target] if event.status == "switched" else [event.source, None]
            self.expect(active in allowed, f"{event}, and active is {active}")
            self._check_state()

    def when_settled(self) -> None:
        if self.world.coordinator.serving().phase == "idle" and self.world.stopping is None:
            self._check_state()
            self._check_nobody_is_left()

    def _check_state(self) -> None:
        active = self.world.coordinator.active
        where = {m.alias: m.residency for m in self.world.registry}
        is_active = [alias for alias, residency in where.items() if residency is Residency.ACTIVE]
        self.expect(is_active == ([active] if active else []), f"active is {active}, but {where}")
        stepped = [e.alias for e in self.world.host.engines.values() if e.is_stepped]
        hangs = self.world.hangs > 0
        self.expect(
            not active or hangs or stepped == [active], f"active is {active}, stepped {stepped}"
        )
        for alias, residency in where.items():
            loaded = self.world.host.engines[alias].is_loaded
            expected = residency in (Residency.ACTIVE, Residency.PARKED)
            is_moving = self.world.host.is_busy
            self.expect(is_moving or loaded == expected, f"{alias} is {residency}, loaded={loaded}")

    def _check_nobody_is_left(self) -> None:
        coordinator = self.world.coordinator
        is_idle = not any(model.leases for model in self.world.registry)
        if self.world.is_automatic and not (coordinator._switcher.can_switch and is_idle):
            return  # its turn has not come
        for ask in self.world.open_asks:
            waits = ask.is_reading and ask.task not in self.world.leases
            self.expect(not waits, f"{ask} waits, and for nothing")


def test_I8_atomic_switch() -> None:
    """After any failure in a switch, one model is active and alone is stepped, or none is."""
    walk(AtomicSwitch)


# --- I9 ---------------------------------------------------------------------------------------


class TruthfulHealth(Invariant):
    """A server that reports ready answers a request sent now; one that does not will again."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._down_s: float | None = None
        self._hung_s: float | None = None

    def on_event(self, event: Event) -> None:
        if isinstance(event, SwitchEnded | ServiceDegraded):
            self._down_s = None  # there was an attempt

    def at_any_time(self) -> None:
        world, now_s = self.world, self.world.now_s
        over = world.is_given_up or world.stopping is not None
        is_missed = world.coordinator.serving().state is not ServerState.IDLE
        is_down = world.coordinator.active is None and world.coordinator.serving().phase == "idle"
        is_down = is_down and is_missed
        self._down_s = (self._down_s or now_s) if is_down and not over else None
        bound_s = RECOVERY.max_backoff + (RECOVERY.load_timeout if world.hangs else 0) + 1
        tries = self._down_s is None or now_s - self._down_s <= bound_s
        self.expect(tries, "nobody is active, and nobody tries to change that")
        is_hung = world.host.is_hung and not world.coordinator._state.host_is_gone  # nor starting
        self._hung_s = (self._hung_s or now_s) if is_hung and not over else None
        seen = self._hung_s is None or now_s - self._hung_s <= RECOVERY.hang_timeout + 2
        self.expect(seen, "the host hangs, and nobody sees it")

    def when_settled(self) -> None:
        live, ready = self.world.get("/health"), self.world.get("/ready")
        is_live = live.status == 200
        self.expect(is_live != self.world.is_given_up, f"/health: {live.status}")
        if ready.status == 200:
            active, epoch = ready.json["active"], ready.json["epoch"]
            stay = self.world.stays[-1]
            is_true = stay.ended_s is None and (stay.alias, stay.epoch) == (active, epoch)
            # In automatic mode, requests are accepted while models move; also while the server is
            # idle.
            is_idle = active is None and self.world.coordinator.serving().state is ServerState.IDLE
            is_true = is_true or is_idle
            is_true = is_true or (
                self.world.is_automatic and self.world.coordinator.serving().target
            )
            self.expect(is_true, f"{ready.json}, and the last was {stay}")
            self.expect(is_live, "ready, and not live")

    def at_end(self) -> None:
        """Check that a server in which nothing is broken any longer serves what it says."""
        ready = self.world.get("/ready")
        over = self.world.is_given_up or self.world.stopping is not None
        self.expect(over == (ready.status != 200), f"/ready: {ready.status} {ready.json}")
        is_automatic = self.world.is_automatic
        self.world.let_pass(MAX_BACKOFF_S if is_automatic else 0)
        for ask in (self.world.ask(None, words=1), self.world.ask("qwen", words=1)):
            self.world.let_pass(30 if is_automatic else 2)
            is_served = is_automatic or ask.alias in (None, ready.json.get("active"))
            expected = ready.status == 200 and is_served
            self.expect(expected == (ask.outcome == "answered"), f"{ready.json}: {ask} {ask.code}")


class ProbingWalk(Walk):
    """Send a request now and then, and compare the result with `/ready`."""

    @rule()
    def probe(self) -> None:
        self.world.settle()
        ready = self.world.get("/ready")
        if self.world.coordinator.active is None:
            return
        ask = self.world.ask(self.world.coordinator.active, words=1)
        self.world.settle()
        is_admitted = ask.task in self.world.leases or ask.code == "queue_full"
        if self.world.is_automatic:  # it may have to wait for its turn
            is_admitted = is_admitted or ask.is_open
        assert is_admitted == (ready.status == 200), f"/ready: {ready.json}; {ask} {ask.code}"


def test_I9_truthful_health() -> None:
    """`/ready` is 200 exactly when a request for the active model is served, `/health` until the
    server gives up; once nothing is broken, it becomes ready again by itself."""
    walk(TruthfulHealth, machine=ProbingWalk)


# --- I12 --------------------------------------------------------------------------------------


class FreshAdapterNumbers(Invariant):
    """A number belongs to one adapter for ever: engines and caches identify adapters by it."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._seen: dict[int, Adapter] = {}

    def at_any_time(self) -> None:
        for model in self.world.registry:
            for adapter in model.engine.adapters.values():
                first = self._seen.setdefault(adapter.id, adapter)
                self.expect(first is adapter, f"{adapter} and {first} have one number")


class AdapterWalk(Walk):
    """Add and remove adapters, too."""

    @rule(alias=st.sampled_from(ALIASES), name=st.sampled_from(["sql", "pirate"]))
    def add_adapter(self, alias: str, name: str) -> None:
        for _ in range(3):  # the first one, and two that take its place
            self.world.operate(alias, "adapters", name=name, path="adapter", in_place=True)
            self.go_on(None)

    @rule(alias=st.sampled_from(ALIASES), name=st.sampled_from(["sql", "pirate"]))
    def remove_adapter(self, alias: str, name: str) -> None:
        self.world.operate(alias, f"adapters/{name}", method="DELETE")
        self.go_on(None)


def test_I12_adapter_numbers_are_never_reused(adapters: Path) -> None:
    """An adapter replaced, removed or re-added gets a new number, for any model, loaded or not."""

    class Machine(AdapterWalk):
        folders = (adapters,)

    walk(FreshAdapterNumbers, machine=Machine)


# --- I13 --------------------------------------------------------------------------------------


class Idempotent(Invariant):
    """A switch to the active model changes nothing; concurrent calls for one target share one."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._ended: dict[str, SwitchEnded] = {}
        self._begun: dict[str, int] = {}

    def on_event(self, event: Event) -> None:
        match event:
            case PhaseChanged(phase=SwitchPhase.VALIDATE, status="started"):
                self._begun[event.operation_id] = len(self.world.host.told)
            case SwitchEnded():
                again = event.operation_id in self._ended
                self.expect(not again, f"{event.operation_id} ended twice")
                self._ended[event.operation_id] = event
                self._check_work(event)

    def _check_work(self, event: SwitchEnded) -> None:
        begun = self._begun.get(event.operation_id, len(self.world.host.told))
        done = Counter(self.world.host.told[begun:])
        for name in ("load", "wake", "activate"):
            times = done[name, event.target]
            self.expect(times <= 1, f"{event.operation_id}: {name} {event.target} {times} times")

    def on_piece(self, call: Call, piece: bytes) -> None:
        if not isinstance(call, SwitchCall) or call.status != 200:
            return
        told = call.json
        event = self._ended.get(told["operation_id"])
        if told["switched"]:
            done = event is not None and event.status == "switched"
            self.expect(done, f"{call} tells of {told['operation_id']}, which is {event}")
            moved = told["previous_model"] != told["current_model"]
            self.expect(moved, f"{call} was done, and nothing was to be done: {told}")
        else:
            self.expect(event is None, f"{call} tells of {event}, and that nothing was done")
            self.expect(told["current_model"] == call.target, f"{call}: {told}")
        if event is not None:
            told_of = (told["current_model"], told["epoch"])
            self.expect(told_of == (event.target, event.epoch), f"{call}: {told}, {event}")

    def at_any_time(self) -> None:
        counts = (self.world.coordinator.snapshot().switches, len(self.world.all_of(SwitchEnded)))
        self.expect(counts[0] == counts[1] == len(self._ended), f"{counts}, {len(self._ended)}")


def test_I13_idempotent_attributable() -> None:
    """Calls for one target join one switch with one number, and each target comes up once."""
    walk(Idempotent)


# --- I14 --------------------------------------------------------------------------------------


class SuccessMeansVerified(Invariant):
    """A switch call succeeds only after an engine that generates what it should confirmed it."""

    def on_piece(self, call: Call, piece: bytes) -> None:
        if not (isinstance(call, SwitchCall) and call.status == 200 and call.json["switched"]):
            return
        target, told = call.target, call.json
        served = {stay.epoch: stay.alias for stay in self.world.stays}
        self.expect(served.get(told["epoch"]) == target, f"{call}: {told}, {served}")
        canaries = [canary for alias, canary in self.world.host.canaries if alias == target]
        self.expect(canaries, f"{call}, and {target} was never verified")
        self.expect(canaries[-1] == canaries[0], f"{call}, and it generated {canaries}")
        done = [name for name, alias in self.world.host.told if alias == target]
        moved = max(done[::-1].index(name) * -1 for name in ("load", "wake") if name in done)
        self.expect(
            done[::-1].index("verify") * -1 > moved, f"{call}, and was not verified: {done}"
        )


def test_I14_success_means_verified() -> None:
    """A switch call that succeeds names the epoch in which its model is served."""
    walk(SuccessMeansVerified)


# --- I16 --------------------------------------------------------------------------------------


class BoundedQueue(Invariant):
    """The queue never exceeds its limit, and a request beyond it is refused at once."""

    def on_piece(self, call: Call, piece: bytes) -> None:
        if call.status != 429 or not isinstance(call, Ask):
            return
        shape, waiting = self.world.shape, self.world.coordinator.snapshot().waiting
        most = max(len(m.leases) + len(m.entered) for m in self.world.registry)
        is_full = waiting >= shape.max_waiting or waiting + most >= shape.in_flight
        failed = self.world.is_automatic and self.world.has_failed_now
        emptied = failed or self.world.stopping is not None  # before the error could be sent
        self.expect(is_full or emptied, f"{call} refused, {waiting} wait, {most} in flight")
        self.expect(int(call.headers["retry-after"]) >= 1, f"{call}: {call.headers}")
        at_once = not call.has_always_read or self.world.now_s == call.began_s
        self.expect(at_once, f"{call} waited, and was refused then")

    def at_any_time(self) -> None:
        shape, waiting = self.world.shape, self.world.coordinator.snapshot().waiting
        self.expect(waiting <= shape.max_waiting, f"{waiting} wait, {shape.max_waiting} may")
        for model in self.world.registry:
            parked, in_flight = len(model.parked), len(model.leases)
            self.expect(parked <= shape.max_parked, f"{parked} are parked")
            self.expect(in_flight <= shape.in_flight, f"{in_flight} are in flight")

    def when_settled(self) -> None:
        held, asks = self.world.app.router.bodies.held_bytes, self.world.open_asks
        served = [ask for ask in asks if not ask.is_refused]  # no other body has to be buffered
        is_right = sum(map(_weight, served)) <= held <= sum(map(_weight, asks))
        self.expect(is_right, f"{held} bytes are held for {asks}")


def _weight(ask: Ask) -> int:
    """Return how much a request counts while it is open. All texts are ASCII."""
    body = json.dumps(ask.body)
    values = sum(map(body.count, ",[{"))
    return PLAIN_BYTES_PER_BYTE * len(body) + BYTES_PER_VALUE * values


def test_I16_bounded_queue() -> None:
    """The queue reaches its limit and never exceeds it; a refused request is refused at once."""
    walk(BoundedQueue)


# --- I17 --------------------------------------------------------------------------------------


class DisconnectFrees(Invariant):
    """A client that leaves takes its request with it; one that leaves a switch does not stop it."""

    def when_settled(self) -> None:
        for call in (*self.world.recent_asks, *self.world.switches):
            lease = self.world.leases.get(call.task)
            # An answer that waits for its engine to be verified notices nothing until then.
            is_gated = lease is not None and lease.gate is not None
            gone = not (call.left and call.is_open) or is_gated
            self.expect(gone, f"{call} goes on, and its client has left")
        tasks = {ask.task for ask in self.world.open_asks}
        strangers = [lease for task, lease in self.world.leases.items() if task not in tasks]
        self.expect(not strangers, f"{strangers} are nobody's")

    def at_end(self) -> None:
        begun = {e.operation_id for e in self.world.all_of(PhaseChanged)}
        ended = {e.operation_id for e in self.world.all_of(SwitchEnded)}
        self.expect(begun <= ended, f"{begun - ended} began and never ended")


def test_I17_disconnect_frees() -> None:
    """Nothing of a request is left once its client is gone, whatever state it was in."""
    walk(DisconnectFrees)


# --- I18 --------------------------------------------------------------------------------------

Stop = tuple[str, str]
"""A model that is switched to, and the expected result."""

ROUTES = st.lists(
    st.tuples(st.sampled_from(ALIASES), st.sampled_from(["fine", "fails", "dies"])), max_size=6
)


def arrival(route: list[Stop], last: str) -> dict[str, Any]:
    """Return what can be observed on a server with room for one model, whatever its history."""
    world = World(Shape(models_that_fit=1))
    try:
        for alias, what in [*route, (last, "fine")]:
            if what == "fails" and alias != world.coordinator.active:
                world.host.fail_next("activate", alias)
            world.switch(alias, policy="park")
            world.let_pass(60)
            if what == "dies":
                world.befall(partial(world.host.kill_engine, world.coordinator.active))
                world.let_pass(60)
        asks = {alias: world.ask(alias) for alias in (*ALIASES, None)}
        world.let_pass(5)
        [card] = [card for card in world.get("/v1/models").json["data"] if card["id"] == last]
        status = world.get("/admin/status").json
        model = status["models"][last]
        return {
            "answers": {alias: (ask.outcome, ask.code, ask.text) for alias, ask in asks.items()},
            "active": status["active"],
            "state": status["state"],
            "used": status["memory"]["device"]["used"],
            "card": card,
            "model": {key: model[key] for key in model.keys() - {"idle_s", "switch_cost_s"}},
        }
    finally:
        world.close()


@settings(WALKS)
@given(route=ROUTES, last=st.sampled_from(ALIASES))
def test_I18_path_independence(route: list[Stop], last: str) -> None:
    """The state after a switch is the same whatever came before, detours and failures included."""
    assert arrival([], last) == arrival(route, last)


# --- I19 --------------------------------------------------------------------------------------


SAMPLES = (
    "hotswap_requests_total",
    "hotswap_switches_total",
    "hotswap_loads_total",
    "hotswap_requests_in_flight",
    "hotswap_requests_waiting",
    "hotswap_model_active",
    "hotswap_epoch",
    "hotswap_ready",
    "hotswap_requests_parked",
    "hotswap_outputs_refused_total",
    "hotswap_clients_evicted_total",
    "hotswap_engine_failures_total",
    "hotswap_host_restarts_total",
)


class MetricsTruth(Invariant):
    """What `/metrics` counts is what happened."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._last: dict[tuple[str, ...], float] = {}

    def when_settled(self) -> None:
        coordinator, now = self.world.coordinator, self._samples()
        fallen = [
            key
            for key, before in self._last.items()
            if key[0].endswith("_total") and now[key] < before
        ]
        self.expect(not fallen, f"{fallen} went down")
        self._last = now
        for model in self.world.registry:
            in_flight = now["hotswap_requests_in_flight", model.alias]
            self.expect(in_flight == len(model.leases), f"{model}: {in_flight} in flight")
            parked = now["hotswap_requests_parked", model.alias]
            self.expect(parked == len(model.parked), f"{model}: {parked} are parked")
            active = now["hotswap_model_active", model.alias]
            self.expect(active == (coordinator.active == model.alias), f"{model}: {active}")
        waiting = sum(now["hotswap_requests_waiting", m.alias] for m in self.world.registry)
        told = coordinator.snapshot().waiting
        self.expect(waiting == told, f"{waiting} wait, {told}")
        ready = coordinator.serving().is_ready
        self.expect(now["hotswap_ready",] == ready, f"ready {ready}, {now}")
        epoch = now["hotswap_epoch",]
        self.expect(epoch == coordinator.epoch, f"epoch {epoch}, {coordinator.epoch}")

    def at_end(self) -> None:
        counted = self._samples()
        for ask in self.world.asks:
            self._check_ask(ask)
        ended = [events for ask in self.world.asks for events in self.world.released[ask.task]]
        admitted = (e for e in ended if e.service_s is not None or e.result not in ("cut", "left"))
        seen = Counter((event.model, event.result) for event in admitted)
        self._compare("hotswap_requests_total", seen, counted)
        switches = self.world.all_of(SwitchEnded)
        of_target = Counter((event.target, event.status) for event in switches)
        self._compare("hotswap_switches_total", of_target, counted)
        loads = [e for e in self.world.all_of(ResidencyChanged) if e.before is Residency.LOADING]
        made = Counter((event.model,) for event in loads if event.after is Residency.PARKED)
        self._compare("hotswap_loads_total", made, counted)
        for name, kind in (
            ("hotswap_outputs_refused_total", OutputRefused),
            ("hotswap_clients_evicted_total", ClientEvicted),
            ("hotswap_engine_failures_total", EngineDied),
        ):
            events = Counter((event.model,) for event in self.world.all_of(kind))
            self._compare(name, events, counted)
        refused = [ask for ask in self.world.asks if ask.code == "wrong_stamp"]
        events = len(self.world.all_of(OutputRefused))
        self.expect(events >= len(refused), f"{events} outputs refused, {refused} told so")
        restarts = counted.get(("hotswap_host_restarts_total",), 0)
        done = len(self.world.all_of(HostRestarted))
        self.expect(restarts == done, f"{restarts} restarts were counted, of {done}")

    def _check_ask(self, ask: Ask) -> None:
        """Compare how the end of a request was counted with what its client saw."""
        ended = [event.result for event in self.world.released[ask.task]]
        if ask.outcome == "answered" and ask.has_always_read:
            self.expect(ended == ["served"], f"{ask} was counted as {ended}")
        elif ask.outcome == "failed":
            self.expect(ended in ([], ["cut"]), f"{ask} was counted as {ended}")
        else:  # a late reader may find a whole answer although its request was aborted
            self.expect(len(ended) <= 1, f"{ask} was counted as {ended}")

    def _compare(
        self, name: str, seen: Counter[Any], counted: dict[tuple[str, ...], float]
    ) -> None:
        told = {key[1:]: value for key, value in counted.items() if key[0] == name and value}
        self.expect(told == dict(seen), f"{name}: {told}, seen were {dict(seen)}")

    def _samples(self) -> dict[tuple[str, ...], float]:
        """Return the values by name and labels."""
        registry = self.world.app.metrics.registry.restricted_registry(SAMPLES)
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in registry.collect()
            for sample in family.samples
        }


def test_I19_metrics_truth() -> None:
    """Counters never fall, gauges show the state, and sums match those of the clients."""
    walk(MetricsTruth)


# --- wakes before a request ---------------------------------------------------------------------


class WakesBeside(Invariant):
    """A wake ahead of any request blocks nothing, and is visible only in statistics."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._under_way: dict[str, str] = {}

    def on_event(self, event: Event) -> None:
        if isinstance(event, HostDied):
            is_ended = "the engine host was ended" in event.cause
            was_made_to = self.world.hangs or "a switch was not undone" in event.cause
            self.expect(was_made_to or not is_ended, f"nothing hangs, and {event.cause}")
        if not isinstance(event, WakeChanged):
            return
        before = self._under_way.pop(event.model, None)
        if event.change in ("begun", "done"):
            self._under_way[event.model] = event.change
        follows = {"begun": (None, "begun", "done"), "done": ("begun",)}
        allowed = follows.get(event.change, ("begun", "done"))
        self.expect(before in allowed, f"{event} after {before}")
        self.expect(event.done_bytes <= event.total_bytes, f"{event}")

    def at_any_time(self) -> None:
        host = self.world.host
        self.expect(not host.slices_while_moving, "a slice was begun while a model was moved")
        self.expect(host.most_slices_at_once <= 1, f"{host.most_slices_at_once} slices at once")
        most, budget = host.most_held_bytes, host.budget.device
        self.expect(most <= budget, f"{most} bytes were held, the budget is {budget}")
        for model in self.world.registry:
            where = model.residency
            is_asleep = where is Residency.ASLEEP
            self.expect(model.waking is None or is_asleep, f"{model.alias} wakes, and is {where}")
            told = model.alias in self._under_way
            self.expect(told == (model.waking is not None), f"{model.alias}: {self._under_way}")

    def when_settled(self) -> None:
        if self.world.host.is_busy or self.world.hangs:
            return
        for model in self.world.registry:
            taken = self.world.host.engines[model.alias].place.slices_done
            self.expect(not taken or model.waking, f"{model.alias} has {taken} slices of nobody")


class WakingWalk(Walk):
    """Walk on a device where models wake in slices."""

    @initialize(
        shape=st.sampled_from([shape for shape in (*SHAPES, *AUTOMATIC) if shape.slices]),
        mood=st.sampled_from(BEGINNINGS["mood"]),
        ending=st.sampled_from(BEGINNINGS["ending"]),
    )
    def start(self, shape: Shape, mood: str, ending: int | None) -> None:
        super().start(shape, mood, ending)
        for alias in ("qwen", "mistral"):
            self.world.operate(alias, "load")
            self.world.let_pass(10)
            self.world.operate(alias, "sleep", level=1)
            self.world.let_pass(5)

    @rule(next_up=st.sampled_from([("qwen", "mistral"), ("mistral", "qwen"), ("qwen", "llama")]))
    def go_elsewhere(self, next_up: tuple[str, str]) -> None:
        """A switch waits for a request, while a slice of another model's wake ends."""
        announced, target = next_up
        self.world.settle()
        self.world.ask(self.world.alias_of("active"), 3, True)
        self.world.announce(announced)
        self.world.settle()
        self.world.switch(target, 30, "abort")
        self.world.let_pass(5)


def test_wakes_before_somebody_asks_are_in_nobodys_way() -> None:
    """Early wakes run one slice at a time, never while models move; nothing is left of them."""
    walk(WakesBeside, machine=WakingWalk, tries=16)


# --- I20, I10 -----------------------------------------------------------------------------------


class CleanStop(Invariant):
    """After a stop no request waits, no resource is left, and nothing starts."""

    def at_end(self) -> None:
        if self.world.stopping is None:
            return
        self.expect(self.world.stopping.done(), "it has not stopped")
        for call in self.world.calls:
            self.expect(not call.is_open, f"{call} is open")
        left = self.world.left_by_stop
        self.expect(not left, f"it has stopped, and {left} go on")
        took_s = self.world.stop_took_s
        bound_s = self.world.stop_timeout_s + CUT_S
        self.expect(took_s <= bound_s, f"it took {took_s} s to stop")
        late = [self.world.ask("llama"), self.world.switch("qwen")]
        self.world.settle()
        for call in late:
            self.expect(call.status == 503, f"{call} after the stop: {call.status}")


class StopWalk(Walk):
    """End with a stop, whatever is going on."""

    def teardown(self) -> None:
        if hasattr(self, "world") and self.ending is None:
            self.ending = 1
        super().teardown()


def test_I20_clean_stop() -> None:
    """Stopped at any moment, the server answers every request and ends in its time."""
    walk(CleanStop, machine=StopWalk)


class NoGrowth(Invariant):
    """Once everything is over, the server holds what it held before."""

    def at_end(self) -> None:
        coordinator = self.world.coordinator
        self.expect(not self.world.leases, f"{self.world.leases} are left")
        waiting, phase = coordinator.snapshot().waiting, coordinator.serving().phase
        self.expect(waiting == 0, f"{waiting} wait")
        self.expect(phase == "idle", f"a switch is left in {phase}")
        self.expect(not coordinator.ladder.move_lock().locked(), "somebody keeps the turn")
        for model in self.world.registry:
            self.expect(model.drained is None, f"somebody waits for {model} to be empty")
        background = self.world.background
        left = asyncio.all_tasks(self.world.loop) - set(background)
        left -= {model.waking.task for model in self.world.registry if model.waking}
        # The check that the host is alive has a task of its own.
        names = [task.get_name() for task in left if not self.world.shape.is_watched]
        self.expect(not names, f"tasks are left: {names}")
        timers, most = self.world.loop.timers, len(background)
        self.expect(timers <= most, f"{timers} timers are left, {most} are for ever")

    def at_any_time(self) -> None:
        most, budget = self.world.host.most_held_bytes, self.world.host.budget.device
        self.expect(most <= budget, f"{most} bytes were held, the budget is {budget}")


def test_I10_no_growth() -> None:
    """No lease, future, task or timer is left over; the budget is never exceeded."""
    walk(NoGrowth)


@settings(WALKS, max_examples=examples(4))
@given(route=st.lists(st.sampled_from(ALIASES), min_size=2, max_size=4), fit=st.integers(1, 3))
def test_I10_round_trips_leave_nothing_behind(route: list[str], fit: int) -> None:
    """After more rounds of switches and requests, as many objects are held as before."""
    world = World(Shape(models_that_fit=fit))

    def go_round() -> None:
        for alias in route:
            world.switch(alias, 0, "park")
            world.ask(alias, words=3)
            world.ask(alias, words=20, streamed=False)
            world.let_pass(30)
        world.let_pass(60)

    def held() -> int:
        for log in (world.host.told, world.host.operations, world.host.verified):
            log.clear()
        world.host.canaries.clear()
        return reachable(world.app, World, VirtualLoop)

    try:
        for _ in range(12):  # until the predictions stop changing
            go_round()
        before = held()
        for _ in range(5):
            go_round()
        assert before == held()
    finally:
        world.close()


def reachable(root: object, *but: type[Any]) -> int:
    """Count objects of ours, and containers, that can be reached without going through `but`."""
    found: dict[int, object] = {}
    ahead = [root]
    while ahead:
        item = ahead.pop()
        is_seen = id(item) in found
        if is_seen or isinstance(item, (*but, type, ModuleType, FunctionType, str, int, float)):
            continue
        found[id(item)] = item
        ahead += gc.get_referents(item)
    return len(found)


# --- all of them --------------------------------------------------------------------------------

ALL = tuple(Invariant.__subclasses__())


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_all_invariants_over_many_walks(first: int) -> None:
    """All invariants hold together, on longer walks than those of hypothesis."""
    for seed in range(first, first + 10):
        walk_at_random(seed, ALL, steps=40)


@pytest.mark.long
@pytest.mark.parametrize("first", range(40, 440, 40))
def test_all_invariants_over_very_many_walks(first: int) -> None:
    """All invariants hold together on ten times as many walks."""
    for seed in range(first, first + 40):
        walk_at_random(seed, ALL, steps=40)
