"""Which requests wait for which model, and what the policy decides.

The mode `auto` and the simulator both drive this one class: arrivals, departures and activations go
in, admissions and decisions come out. It knows no engine and no clock: its callers pass the time.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from vllm_hotswap.scheduling.average import Average
from vllm_hotswap.scheduling.costs import NEWEST
from vllm_hotswap.scheduling.policy import (
    NEVER,
    ActiveView,
    Decision,
    Policy,
    QueueView,
    ServeOn,
    Snapshot,
    SwitchTo,
    WaitUntil,
    decide,
)

CostEstimate = Callable[[str | None, str], float]
"""Seconds of a switch from a model (None: from none) to another one, as of now."""


@dataclass(frozen=True, slots=True)
class ModelTerms:
    """What the configuration says about how a model takes its turn."""

    alias: str
    priority: int = 0
    max_wait_s: float = 30.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class RequestTerms:
    """What a request asks for its turn; None: as its model has it."""

    priority: int | None = None
    max_wait_s: float | None = None
    may_switch: bool = True
    """Whether it may wait for a model that is not active and is not the target of a switch."""
    rule: str = "rights"
    """The setting that decides it."""
    charge: Callable[[], None] | None = field(default=None, compare=False, repr=False)
    """Called if it would be the first to wait for a model that no switch is bringing. Raises
    `RateLimited` if it must not wait."""


DEFAULT_TERMS = RequestTerms()


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's place, from its arrival to its end. Times are seconds of the caller's clock."""

    alias: str
    order: int
    """Rank by arrival, among all requests."""
    arrived_s: float
    due_s: float
    """When it has waited for as long as it may."""
    priority: int = 0
    tokens: int = 0
    is_parked: bool = False
    admitted_s: float | None = None
    max_wait_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.max_wait_s = self.due_s - self.arrived_s


MOST_OUTDATED = 64
"""Entries of a heap that may be out of date before it is rebuilt."""


@dataclass(eq=False, slots=True)
class _ModelQueue:
    """One model's waiting and running requests, with what a snapshot says about them."""

    terms: ModelTerms
    position: int
    waiting: OrderedDict[int, Ticket] = field(default_factory=OrderedDict)
    """By their order, and sorted by it."""
    priorities: Counter[int] = field(default_factory=Counter)
    running: Counter[int] = field(default_factory=Counter)
    """Priorities of the requests that run."""
    in_flight: int = 0
    due: list[tuple[float, int]] = field(default_factory=list)
    """A heap of due times and orders. Outdated entries stay in it until they come up, or until no
    request waits."""
    arrivals_s: float = 0.0
    tokens: int = 0
    parked: int = 0
    service: Average = field(default_factory=lambda: Average(NEWEST))
    """Seconds from the admission of a request to its end."""
    paused_until_s: float = 0.0
    """Until then, there is no switch to it."""
    view: QueueView | None = None
    """As last computed; None if it is out of date."""

    @property
    def service_s(self) -> float:
        return self.service.value or 0.0

    def put(self, ticket: Ticket) -> None:
        """Insert in the order of arrival: an earlier request may have taken longer to get here."""
        is_first = bool(self.waiting) and ticket.order < next(iter(self.waiting))
        later = []
        for order in reversed(self.waiting):
            if is_first or order < ticket.order:
                break
            later.append(order)
        self.waiting[ticket.order] = ticket
        for order in reversed(later):
            self.waiting.move_to_end(order)
        if is_first:  # as parked requests are
            self.waiting.move_to_end(ticket.order, last=False)
        self.priorities[ticket.priority] += 1
        heapq.heappush(self.due, (ticket.due_s, ticket.order))
        if len(self.due) > 2 * len(self.waiting) + MOST_OUTDATED:
            self.due = [(other.due_s, order) for order, other in self.waiting.items()]
            heapq.heapify(self.due)
        self._count(ticket, 1)

    def take(self, ticket: Ticket) -> None:
        del self.waiting[ticket.order]
        if not self.waiting:
            self.due.clear()
        self.priorities[ticket.priority] -= 1
        if not self.priorities[ticket.priority]:
            del self.priorities[ticket.priority]
        self._count(ticket, -1)

    def _count(self, ticket: Ticket, change: int) -> None:
        self.arrivals_s += change * ticket.arrived_s
        self.tokens += change * ticket.tokens
        self.parked += change * ticket.is_parked
        self.view = None

    def begin(self, ticket: Ticket) -> None:
        self.running[ticket.priority] += 1
        self.in_flight += 1

    def end(self, ticket: Ticket) -> None:
        self.running[ticket.priority] -= 1
        if not self.running[ticket.priority]:
            del self.running[ticket.priority]
        self.in_flight -= 1

    def first(self) -> Ticket:
        return next(iter(self.waiting.values()))

    def due_s(self) -> float:
        """Return when the first waiting request is due."""
        while not self._waits(self.due[0]):
            heapq.heappop(self.due)
        return self.due[0][0]

    def last_due(self, now_s: float) -> int:
        """Return the order of the last request that is due, or 0; all up to it must be admitted."""
        last = 0
        while self.due and self.due[0][0] <= now_s:
            entry = heapq.heappop(self.due)
            if self._waits(entry):
                last = max(last, entry[1])
        return last

    def _waits(self, entry: tuple[float, int]) -> bool:
        ticket = self.waiting.get(entry[1])
        return ticket is not None and ticket.due_s == entry[0]


class Scheduler:
    """The queues of all models, and the policy that decides between them.

    Its mutable state is the line of each model, the number of the last arrival, and how many
    requests are in all lines; also which model is active, since when, and until when it is held
    for a job.
    """

    def __init__(self, models: Iterable[ModelTerms], policy: Policy, cost_s: CostEstimate) -> None:
        self._queues = {
            terms.alias: _ModelQueue(terms, position) for position, terms in enumerate(models)
        }
        self.policy = policy
        self._cost_s = cost_s
        self._active: _ModelQueue | None = None
        self._since_s = 0.0
        self._arrivals = 0
        self._queued = 0
        self.leased_until_s: float | None = None
        """Until when the active model is held for a job."""

    def __repr__(self) -> str:
        waiting = {alias: len(line.waiting) for alias, line in self._queues.items() if line.waiting}
        return f"<Scheduler active={self.active} waiting={waiting}>"

    @property
    def active(self) -> str | None:
        return self._active.terms.alias if self._active else None

    @property
    def is_empty(self) -> bool:
        """Whether no request waits or is parked."""
        return not self._queued

    @property
    def waiting(self) -> int:
        """Requests that wait, for any model; parked ones do not count."""
        return self._queued - sum(line.parked for line in self._queues.values())

    def waiting_for(self, alias: str) -> int:
        line = self._queues[alias]
        return len(line.waiting) - line.parked

    def queue(self, alias: str) -> list[Ticket]:
        """Return the requests that wait for the model, in order."""
        return list(self._queues[alias].waiting.values())

    def service_s(self, alias: str) -> float:
        """Seconds that a request of the model took lately, from its admission to its end."""
        return self._queues[alias].service_s

    # --- what happens -------------------------------------------------------------------------

    def ticket(self, alias: str, now_s: float, asked: RequestTerms = DEFAULT_TERMS) -> Ticket:
        """Return a place for a request that has arrived; it counts from `enter` on."""
        terms = self._queues[alias].terms
        self._arrivals += 1
        wait_s = terms.max_wait_s if asked.max_wait_s is None else asked.max_wait_s
        priority = terms.priority if asked.priority is None else asked.priority
        return Ticket(alias, self._arrivals, now_s, now_s + wait_s, priority)

    def enter(self, ticket: Ticket, now_s: float, is_open: bool = True) -> bool:
        """Let a request wait. Return True if it is admitted at once, because no other one waits.

        During a switch none is: pass `is_open=False` then.
        """
        line = self._queues[ticket.alias]
        if is_open and line is self._active and not self._queued:
            self._begin(line, ticket, now_s)
            return True
        self._put(line, ticket)
        return False

    def leave(self, ticket: Ticket, now_s: float, counts: bool = True) -> None:
        """Note that a request has ended, or waits no longer. Idempotent.

        `counts` says whether its time is typical of how long requests of the model take.
        """
        line = self._queues[ticket.alias]
        if ticket.order in line.waiting:
            self._take(line, ticket)
        elif ticket.admitted_s is not None:
            line.end(ticket)
            if counts:
                self.served(ticket.alias, now_s - ticket.admitted_s)
            ticket.admitted_s = None

    def served(self, alias: str, took_s: float) -> None:
        """Note how long a request of the model took, from its admission on."""
        line = self._queues[alias]
        if took_s or line.service_s:  # 0 means unknown: a time of 0 does not begin the average
            line.service.add(took_s)
        line.view = None

    def park(self, tickets: Iterable[Ticket], now_s: float, at_most_s: float = NEVER) -> None:
        """Note that running requests froze with their engine: they wait again, from now on.

        Each is due after its longest wait, but after `at_most_s` at the latest.
        """
        for ticket in tickets:
            line = self._queues[ticket.alias]
            line.end(ticket)
            ticket.is_parked, ticket.admitted_s = True, None
            wait_s = min(ticket.max_wait_s, at_most_s)
            ticket.arrived_s, ticket.due_s = now_s, now_s + wait_s
            self._put(line, ticket)

    def activate(self, alias: str, now_s: float) -> list[Ticket]:
        """Make the model active; return the requests admitted at once, parked ones included.

        These are as many as the policy would let it serve, all that are due, and at least one.
        """
        self._active, self._since_s = self._queues[alias], now_s
        self._active.paused_until_s = 0.0
        self.costs_changed()
        return [*self._resume(self._active, now_s), *self._admit_some(self._active, now_s)]

    def deactivate(self) -> None:
        """Note that no model is active."""
        self._active = None
        self.costs_changed()

    def pause(self, alias: str, until_s: float) -> None:
        """Do not switch to a model before that."""
        self._queues[alias].paused_until_s = until_s

    def costs_changed(self) -> None:
        """Note that the cost estimate may have changed."""
        for line in self._queues.values():
            line.view = None

    def advance(self, now_s: float) -> tuple[list[Ticket], Decision]:
        """Return the requests that are admitted now, and the decision for this moment.

        The decision is `ServeOn` where there is no reason to ask again. Raises what `decide` does.
        """
        decision = decide(self.policy, self.snapshot(now_s))
        match decision:
            case ServeOn(before=before) | WaitUntil(before=before) if self._active is not None:
                return self._admit(self._active, now_s, before), decision
            case _:
                return [], decision

    def drain_until_s(self, switch: SwitchTo, began_s: float, drain_timeout_s: float) -> float:
        """Return until when a switch decided on at `began_s` waits for running requests.

        Ask again after every arrival: a new request may be due earlier.
        """
        lines = [line for line in self._queues.values() if line.waiting]
        due_s = min((max(line.due_s(), line.paused_until_s) for line in lines), default=NEVER)
        return switch.drain_until_s(began_s, drain_timeout_s, due_s)

    # --- the snapshot -------------------------------------------------------------------------

    def snapshot(self, now_s: float) -> Snapshot:
        active = self._active
        own = self._view(active) if active is not None and active.waiting else None
        others = tuple(
            line.view or self._view(line)
            for line in self._queues.values()
            if line.waiting and line is not active and line.paused_until_s <= now_s
        )
        return Snapshot(now_s, self._active_view(), own, others)

    def _active_view(self) -> ActiveView | None:
        line = self._active
        if line is None:
            return None
        return ActiveView(
            alias=line.terms.alias,
            position=line.position,
            since_s=self._since_s,
            in_flight=line.in_flight,
            priority=max(line.running, default=line.terms.priority),
            weight=line.terms.weight,
            service_s=line.service_s,
            leased_until_s=self.leased_until_s,
        )

    def _view(self, line: _ModelQueue) -> QueueView:
        if line.view is None:
            count, first = len(line.waiting), line.first()
            active, alias = self.active, line.terms.alias
            line.view = QueueView(
                alias=alias,
                position=line.position,
                requests=count,
                parked=line.parked,
                first=first.order,
                oldest_s=first.arrived_s,
                mean_arrival_s=line.arrivals_s / count,
                due_s=line.due_s(),
                priority=max(line.priorities),
                weight=line.terms.weight,
                tokens=line.tokens,
                service_s=line.service_s,
                switch_cost_s=0.0 if alias == active else self._cost_s(active, alias),
                back_cost_s=0.0 if active in (alias, None) else self._cost_s(alias, active),
            )
        return line.view

    # --- admission ----------------------------------------------------------------------------

    def _admit_some(self, line: _ModelQueue, now_s: float) -> list[Ticket]:
        if not line.waiting:
            return []
        snapshot = self.snapshot(now_s)
        decision = self.policy(snapshot) if snapshot.others else ServeOn()
        match decision:
            case ServeOn(before=before) | WaitUntil(before=before):
                admitted = self._admit(line, now_s, before)
            case _:
                admitted = []
        return admitted or self._admit(line, now_s, line.first().order + 1)

    def _admit(self, line: _ModelQueue, now_s: float, before: int | None) -> list[Ticket]:
        """Admit requests that came before `before` (None: all), and all up to the last due one."""
        if before is not None:
            before = max(before, line.last_due(now_s) + 1)
        admitted = []
        while line.waiting and (before is None or line.first().order < before):
            ticket = line.first()
            self._take(line, ticket)
            self._begin(line, ticket, now_s)
            admitted.append(ticket)
        return admitted

    def _resume(self, line: _ModelQueue, now_s: float) -> Sequence[Ticket]:
        if not line.parked:
            return []
        resumed = [ticket for ticket in line.waiting.values() if ticket.is_parked]
        for ticket in resumed:
            self._take(line, ticket)
            self._begin(line, ticket, now_s)
        return resumed

    def _put(self, line: _ModelQueue, ticket: Ticket) -> None:
        line.put(ticket)
        self._queued += 1

    def _take(self, line: _ModelQueue, ticket: Ticket) -> None:
        line.take(ticket)
        self._queued -= 1

    def _begin(self, line: _ModelQueue, ticket: Ticket, now_s: float) -> None:
        ticket.admitted_s, ticket.is_parked = now_s, False
        line.begin(ticket)
