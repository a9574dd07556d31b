"""The simulation: the server's scheduler and a policy under virtual time.

Four things can happen next: a request arrives, a request ends, a switch proceeds, or the time comes
until which the policy waits. The earliest happens, and time jumps there. As in the server, a switch
admits nothing more to its source, and waits for its running requests, for `drain_timeout` at most.
Then it parks what is left, takes its cost, and admits to its target.
"""

from __future__ import annotations

import heapq
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from vllm_hotswap.scheduling import (
    NEVER,
    Decision,
    ModelTerms,
    Policy,
    Scheduler,
    SwitchTo,
    Ticket,
    WaitUntil,
)
from vllm_hotswap.simulation.costs import CostModel, Costs, ResidencyModel
from vllm_hotswap.simulation.service import Engine, Service
from vllm_hotswap.simulation.trace import Trace, TracedRequest


@dataclass(frozen=True, slots=True)
class World:
    """What is simulated, apart from the trace and the policy."""

    costs: Costs
    services: Mapping[str, Service] = field(default_factory=dict)
    """By alias."""
    service: Service = field(default_factory=Service)
    """For the other models."""
    drain_timeout_s: float = 60.0
    resident: int | None = None
    """How many models may be parked, the active one included; None: all."""
    before: Trace | None = None
    """A recording of what the server has done before, which tells it how long things take."""

    def service_of(self, alias: str) -> Service:
        return self.services.get(alias, self.service)


@dataclass(frozen=True, slots=True)
class Switched:
    """One switch. Times are in seconds since the trace started."""

    source: str | None
    target: str
    began_s: float
    drained_s: float
    active_s: float


@dataclass(frozen=True, slots=True)
class Served:
    """The outcome of one request."""

    request: TracedRequest
    arrived_s: float
    due_s: float
    admitted_s: float
    """When it was first admitted."""
    ended_s: float

    @property
    def waited_s(self) -> float:
        """Seconds until its first admission."""
        return self.admitted_s - self.arrived_s

    @property
    def took_s(self) -> float:
        """Seconds from its arrival to its end, including the time parked."""
        return self.ended_s - self.arrived_s


@dataclass(slots=True)
class Run:
    """One policy's run through a trace."""

    requests: tuple[TracedRequest, ...]
    arrived: array[float]
    due: array[float]
    admitted: array[float]
    ended: array[float]
    switches: list[Switched] = field(default_factory=list)
    serving_s: float = 0.0
    """Time during which at least one request was worked on."""
    end_s: float = 0.0

    def __iter__(self) -> Iterator[Served]:
        """Yield the outcome of every request, in the order of the trace."""
        times = zip(self.arrived, self.due, self.admitted, self.ended, strict=True)
        return (Served(r, *t) for r, t in zip(self.requests, times, strict=True))


@dataclass(slots=True)
class _Switch:
    """A switch that is under way."""

    source: str | None
    target: str
    decision: SwitchTo
    began_s: float
    next_s: float
    """When it proceeds: when it stops waiting for running requests, or when it is done."""
    drained_s: float | None = None


class Simulation:
    """One run. The mutable state is the time and all next events, the engines, the scheduler, the
    switch under way, and the outcomes of requests so far.
    """

    def __init__(self, trace: Trace, policy: Policy, world: World) -> None:
        self._world = world
        self._requests = trace.requests
        self._terms = {
            alias: ModelTerms(alias, model.priority, model.max_wait_s, model.weight)
            for alias, model in trace.head.models.items()
        }
        self._residencies = ResidencyModel(world.costs, world.resident)
        before = world.before or Trace(trace.head)
        self._cost_model = CostModel(world.costs, before.switches)
        self.scheduler = Scheduler(self._terms.values(), policy, self._expected_s)
        for request in before.requests:
            if request.service_s is not None:
                self.scheduler.served(request.model, request.service_s)
        self._engines = {alias: Engine[Ticket](world.service_of(alias)) for alias in self._terms}
        self._active: Engine[Ticket] | None = None
        self._arrivals: list[tuple[float, int]] = []
        self._followers: dict[int, list[int]] = defaultdict(list)
        self._numbers: dict[Ticket, int] = {}
        self._prepared: dict[int, Ticket] = {}
        self._arrived = 0
        self._switch: _Switch | None = None
        self._timer_s = NEVER
        self._now_s = 0.0
        self.left = len(self._requests)
        """Requests that have not ended yet."""
        blank = array("d", [NEVER]) * self.left
        self.run = Run(self._requests, blank[:], blank[:], blank[:], blank[:])
        self._enqueue_arrivals()
        if trace.head.active is not None:
            self._residencies.activate(trace.head.active)
            self._activate(trace.head.active)

    def __repr__(self) -> str:
        return f"<Simulation now={self._now_s:.3f} left={self.left} {self.scheduler!r}>"

    def play(self, progress: Callable[[int], object] = lambda _: None) -> Run:
        """Run it all; `progress` gets the number of requests that have just ended."""
        while self.left:
            before = self.left
            self.step()
            if before != self.left:
                progress(before - self.left)
        self.run.end_s = self._now_s
        return self.run

    def step(self) -> None:
        """Make the next thing happen."""
        end_s = self._active.next_end_s() if self._active else NEVER
        switch_s = self._switch.next_s if self._switch else NEVER
        arrival_s = self._arrivals[0][0] if self._arrivals else NEVER
        now_s = min(end_s, switch_s, arrival_s, self._timer_s)
        assert now_s < NEVER  # every waiting request is due at some time
        self._advance_clock(now_s)
        if now_s == end_s:
            self._end()
        elif now_s == switch_s:
            self._get_on()
        elif now_s == arrival_s:
            self._arrive()
        if self._switch is None:
            self._advance()

    def _advance_clock(self, now_s: float) -> None:
        if self._active is not None and self._active.running:
            self.run.serving_s += now_s - self._now_s
        self._now_s = now_s

    # --- requests -----------------------------------------------------------------------------

    def _enqueue_arrivals(self) -> None:
        places = {request.id: place for place, request in enumerate(self._requests)}
        for place, request in enumerate(self._requests):
            if request.arrived_s is not None:
                self._arrivals.append((request.arrived_s, place))
            else:
                assert request.after is not None
                self._followers[places[request.after]].append(place)
        heapq.heapify(self._arrivals)

    def _arrive(self) -> None:
        """Handle the next arrival: a request comes, or asks for its turn after its preparation."""
        _, place = heapq.heappop(self._arrivals)
        if (ticket := self._prepared.pop(place, None)) is None:
            ticket = self._ticket(place)
            prepared_s = self._requests[place].prepared_s
            if prepared_s:
                self._prepared[place] = ticket
                heapq.heappush(self._arrivals, (self._now_s + prepared_s, place))
                return
        if self.scheduler.enter(ticket, self._now_s, is_open=self._switch is None):
            self._begin(ticket)
        elif self._switch is not None and self._switch.drained_s is None:
            self._switch.next_s = self._drain_until_s(self._switch)

    def _ticket(self, place: int) -> Ticket:
        request = self._requests[place]
        terms = self._terms[request.model]
        wait_s = terms.max_wait_s if request.max_wait_s is None else request.max_wait_s
        due_s = self._now_s + wait_s
        priority = terms.priority if request.priority is None else request.priority
        tokens = request.prompt_tokens + request.output_tokens
        self._arrived += 1
        ticket = Ticket(request.model, self._arrived, self._now_s, due_s, priority, tokens)
        self._numbers[ticket] = place
        self.run.arrived[place], self.run.due[place] = self._now_s, due_s
        return ticket

    def _begin(self, ticket: Ticket) -> None:
        place = self._numbers[ticket]
        if self.run.admitted[place] < NEVER:
            return  # it was parked, and is in its engine already
        self.run.admitted[place] = self._now_s
        request = self._requests[place]
        engine = self._engines[ticket.alias]
        engine.begin(ticket, request.prompt_tokens, request.output_tokens, self._now_s)

    def _end(self) -> None:
        assert self._active is not None
        ticket = self._active.end_next(self._now_s)
        self.scheduler.leave(ticket, self._now_s)
        place = self._numbers.pop(ticket)
        self.run.ended[place] = self._now_s
        self.left -= 1
        for follower in self._followers.pop(place, ()):
            when_s = self._now_s + self._requests[follower].think_s
            heapq.heappush(self._arrivals, (when_s, follower))
        if self._switch is not None and self._switch.drained_s is None and not self._active.running:
            self._drained()

    # --- switches -----------------------------------------------------------------------------

    def _advance(self) -> None:
        admitted, decision = self.decide()
        for ticket in admitted:
            self._begin(ticket)
        self._timer_s = NEVER
        match decision:
            case WaitUntil(time_s=time_s):
                self._timer_s = max(time_s, self._now_s)
            case SwitchTo():
                self._begin_switch(decision)

    def decide(self) -> tuple[list[Ticket], Decision]:
        """Return what the scheduler decides now."""
        return self.scheduler.advance(self._now_s)

    def _expected_s(self, source: str | None, target: str) -> float:
        residency = self._residencies.before(source, target)
        return self._cost_model.expected_s(source, target, residency)

    def _begin_switch(self, decision: SwitchTo) -> None:
        now_s = self._now_s
        self._switch = switch = _Switch(
            self.scheduler.active, decision.alias, decision, now_s, next_s=now_s
        )
        switch.next_s = self._drain_until_s(switch)
        if self._active is None or not self._active.running or switch.next_s <= now_s:
            self._drained()

    def _drain_until_s(self, switch: _Switch) -> float:
        timeout_s = self._world.drain_timeout_s
        until_s = self.scheduler.drain_until_s(switch.decision, switch.began_s, timeout_s)
        return max(self._now_s, until_s)

    def _drained(self) -> None:
        """End the drain: what still runs is parked, and the cost of the switch begins."""
        assert self._switch is not None
        if self._active is not None:
            self.scheduler.park(self._active.jobs, self._now_s)
            self._active.stop(self._now_s)
            self._active = None
        source, target = self._switch.source, self._switch.target
        cost_s = self._cost_model.next_s(source, target, self._residencies.before(source, target))
        self._switch.drained_s, self._switch.next_s = self._now_s, self._now_s + cost_s

    def _get_on(self) -> None:
        assert self._switch is not None
        if self._switch.drained_s is None:
            self._drained()
            return
        switch, drained_s = self._switch, self._switch.drained_s
        self._switch = None
        self.run.switches.append(
            Switched(switch.source, switch.target, switch.began_s, drained_s, self._now_s)
        )
        residency = self._residencies.before(switch.source, switch.target)
        self._cost_model.record_switch(
            switch.source, switch.target, residency, self._now_s - drained_s
        )
        self._residencies.activate(switch.target)
        self._activate(switch.target)

    def _activate(self, alias: str) -> None:
        self._active = self._engines[alias]
        self._active.start(self._now_s)
        for ticket in self.scheduler.activate(alias, self._now_s):
            self._begin(ticket)


def simulate(
    trace: Trace,
    policy: Policy,
    world: World,
    progress: Callable[[int], object] = lambda _: None,
) -> Run:
    """Run one policy through a trace."""
    return Simulation(trace, policy, world).play(progress)
