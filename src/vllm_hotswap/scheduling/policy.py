"""When to switch, and to which model: values in, a decision out.

A policy is a function of a `Snapshot`. It knows no clock, no engine and no request: time is a field
of the snapshot, and so is all else that it may look at. `decide` asks it, and keeps the promises
that hold whatever it says. A job's lease is kept, and a request that has waited too long is next.

The theory behind these decisions is that of polling systems with switch-over times: H. Takagi,
"Queuing analysis of polling models", ACM Computing Surveys 20(1), 1988.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

NEVER = math.inf

WORKED_S = 0.05
"""The least time that a model is active before its requests are parked: some steps of an engine.
Without it, switches that cost nothing could park all requests before they make progress."""


@dataclass(frozen=True, slots=True)
class QueueView:
    """The requests that wait for one model. Times are seconds of the snapshot's clock."""

    alias: str
    position: int
    """The model's position among the configured ones, from 0."""
    requests: int
    """How many requests wait."""
    parked: int
    """How many of them are frozen with its engine, and would continue; the others would start."""
    first: int
    """The number of its first request in the order of arrival of all requests."""
    oldest_s: float
    """The time since when that request waits."""
    mean_arrival_s: float
    """The mean of the times since when its requests wait."""
    due_s: float
    """When the first of them will have waited as long as it may (`max_wait`)."""
    priority: int
    """The highest priority of its requests."""
    weight: float
    tokens: int
    """Prompt and output tokens that its requests ask for at most."""
    service_s: float
    """Seconds that one of its requests took lately, from admission to its end; 0 if not known."""
    switch_cost_s: float
    """Seconds from the active model to it without draining, at the residencies that both have."""
    back_cost_s: float
    """Seconds from it back to the model that is active now."""

    def waited_s(self, now_s: float) -> float:
        """Return the seconds that all its requests have waited together."""
        return self.requests * (now_s - self.mean_arrival_s)


@dataclass(frozen=True, slots=True)
class ActiveView:
    """The active model."""

    alias: str
    position: int
    since_s: float
    in_flight: int
    priority: int
    """The highest priority of the requests that it works on."""
    weight: float
    service_s: float
    leased_until_s: float | None = None
    """Until when it is held for a job; None: it is not held."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a policy may look at."""

    now_s: float
    active: ActiveView | None
    own: QueueView | None
    """The requests that wait for the active model; None: there are none."""
    others: tuple[QueueView, ...]
    """The queues of all other models that requests wait for, in the order of the configuration."""

    @property
    def is_idle(self) -> bool:
        """Whether the active model, if there is one, has nothing to do."""
        return self.own is None and (self.active is None or self.active.in_flight == 0)

    @property
    def is_own_due(self) -> bool:
        """Whether a request for the active model is due, and no other request was due before."""
        own = self.own
        return (
            own is not None
            and own.due_s <= self.now_s
            and all(own.due_s <= queue.due_s for queue in self.others)
        )


@dataclass(frozen=True, slots=True)
class ServeOn:
    """Continue with the active model until something changes.

    Its requests that came before `before` (in the order of arrival) are admitted; None: all are.
    Its requests that are due are admitted with them, and so are all that came before those.
    """

    before: int | None = None


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Continue as with `ServeOn`, but decide again at `time_s`."""

    time_s: float
    before: int | None = None


@dataclass(frozen=True, slots=True)
class SwitchTo:
    """Admit nothing more to the active model, and make `alias` active.

    Running requests are waited for until a request is due; with `park` they are frozen at once.
    """

    alias: str
    park: bool = False
    park_from_s: float = 0.0
    """When requests may be frozen; until then they are waited for. `decide` sets it."""

    def drain_until_s(self, began_s: float, drain_timeout_s: float, due_s: float) -> float:
        """Return until when to wait for running requests.

        Args:
            began_s: when this was decided.
            drain_timeout_s: seconds that they get at most.
            due_s: when the first waiting request, for any model, is due.
        """
        until_s = began_s if self.park else min(began_s + drain_timeout_s, due_s)
        return max(began_s, until_s, self.park_from_s)


Decision = ServeOn | WaitUntil | SwitchTo

Policy = Callable[[Snapshot], Decision]
"""A function that decides. Called only while no switch is under way and `others` is not empty.

It must not keep state between calls, block, or raise.
"""


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """The settings that a policy is made with."""

    min_active_s: float = 0.0
    slice_s: float = 2.0


PolicyFactory = Callable[[PolicySettings], Policy]
"""A function that makes a policy; entry points of the group `vllm_hotswap.policies` name one."""


def decide(policy: Policy, snapshot: Snapshot) -> Decision:
    """Return what to do now: what the policy says, within what every request is promised.

    - If no request waits for another model, the active one is served.
    - While the active model is held for a job, it is served.
    - A request that has waited for as long as it may is next; of several, the one that was due
      first. If it is for the active model, it is admitted, and then all queues are looked at again.
      Running requests are parked for a due request, not waited for.
    - Running requests are not parked before their model was active for as long as a switch there
      and back takes (`SwitchTo.park_from_s`).

    Raises whatever the policy raises, and `ValueError` for a model that no request waits for.
    """
    if not snapshot.others:
        return ServeOn()
    active = snapshot.active
    if active is not None and (active.leased_until_s or 0.0) > snapshot.now_s:
        assert active.leased_until_s is not None
        return WaitUntil(active.leased_until_s)
    if snapshot.is_own_due:
        return WaitUntil(snapshot.now_s, before=0)  # requests that are due are admitted anyway
    first_due = min(snapshot.others, key=_due)
    if first_due.due_s <= snapshot.now_s:
        return _switch(snapshot, SwitchTo(first_due.alias, park=True), first_due)
    decision = policy(snapshot)
    if isinstance(decision, SwitchTo):
        for queue in snapshot.others:
            if queue.alias == decision.alias:
                return _switch(snapshot, decision, queue)
        raise ValueError(f"the policy switches to {decision.alias!r}, for which no request waits")
    return _in_time(snapshot, decision, first_due.due_s)


def _switch(snapshot: Snapshot, decision: SwitchTo, target: QueueView) -> SwitchTo:
    active = snapshot.active
    if active is None:
        return decision
    worked_s = max(WORKED_S, target.switch_cost_s + target.back_cost_s)
    return replace(decision, park_from_s=active.since_s + worked_s)


def _in_time(snapshot: Snapshot, decision: ServeOn | WaitUntil, due_s: float) -> WaitUntil:
    """Return the decision, but decide again when a request that still waits then is due."""
    if snapshot.own is not None and decision.before is not None:
        due_s = min(due_s, snapshot.own.due_s)
    match decision:
        case WaitUntil(time_s=time_s, before=before) if snapshot.now_s < time_s < due_s:
            return WaitUntil(time_s, before)
        case _:
            return WaitUntil(due_s, decision.before)


def _due(queue: QueueView) -> float:
    return queue.due_s
