"""Simulates a trace that a server has played, at the costs that were measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import median

from benchmarks.auto.play import Played
from benchmarks.auto.workloads import WARM_UP
from benchmarks.client import BadAnswer
from vllm_hotswap.scheduling.policies import make_policy
from vllm_hotswap.scheduling.policy import PolicySettings
from vllm_hotswap.simulation import costs, fit
from vllm_hotswap.simulation.run import World, simulate
from vllm_hotswap.simulation.trace import Trace, TracedRequest

SIMULATIONS = 15
"""Simulations of a trace whose requests follow one another. Which request took which time to
prepare is not known, so these times are shuffled for each simulation. One millisecond decides which
agent is first, and changes all that follows, in a simulation as in each run of the server."""

NO_COST_S = 0.0
"""The cost of a switch, where none was seen."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """The simulator's figures beside the recorded ones."""

    mean_wait_s: float
    """The median of several simulations, like `switches`."""
    recorded_mean_wait_s: float
    switches: float
    recorded_switches: int
    residencies: dict[str, int]
    """How often recorded switches found their target in each residency."""
    simulations: tuple[tuple[float, int], ...] = ()
    """The mean wait and the switches of each."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One trace, as the server has recorded it."""

    trace: Trace
    before: Trace
    """What came before it."""


def split(recorded: Trace, first: int, asked: Sequence[Trace]) -> Iterator[Recorded]:
    """Split a recording of several traces, played one after the other, into its parts.

    Args:
        recorded: what the server has written.
        first: the number of requests before the first trace and its warm-up.
        asked: the traces.

    Raises:
        BadAnswer: a request is missing. One that never had its turn is not recorded.
    """
    requests = sorted(recorded.requests, key=_arrived_s)
    at = first
    for one in asked:
        at += len(WARM_UP)
        part = tuple(requests[at : at + len(one.requests)])
        if Counter(_models(part)) != Counter(_models(one.requests)):
            raise BadAnswer("the server has not recorded exactly the requests that it was sent")
        begin_s, end_s = _arrived_s(part[0]), max(_ended_s(request) for request in part)
        switches = tuple(s for s in recorded.switches if begin_s <= s.at_s <= end_s)
        before = Trace(
            recorded.head,
            tuple(requests[:at]),
            tuple(s for s in recorded.switches if s.at_s < begin_s),
        )
        head = replace(recorded.head, active=one.head.active)
        yield Recorded(Trace(head, part, switches), before)
        at += len(one.requests)


def simulated(seen: Recorded, asked: Trace, played: Played, resident: int | None) -> Simulated:
    """Simulate the same requests under the same policy, at the measured costs.

    Requests arrive when the server got them. A request that follows another one arrives after it,
    plus the time that the client took in between.
    """
    recorded = seen.trace
    switching = recorded.head.switching
    services = fit.services(recorded)
    world = World(
        costs.measured(recorded.switches, NO_COST_S),
        services,
        fit.common(services.values()),
        switching.drain_timeout,
        resident,
        seen.before,
    )
    policy = make_policy(switching.policy, PolicySettings(switching.min_active, switching.slice))
    simulations = []
    for requests in _variants(recorded, asked, played):
        run = simulate(replace(recorded, requests=requests), policy, world)
        simulations.append((_mean(one.waited_s for one in run), len(run.switches)))
    found = [switch.residency.value for switch in recorded.switches if switch.residency]
    return Simulated(
        mean_wait_s=median(wait_s for wait_s, _ in simulations),
        recorded_mean_wait_s=_mean(request.waited_s or 0.0 for request in recorded.requests),
        switches=median(switches for _, switches in simulations),
        recorded_switches=len(recorded.switches),
        residencies={name: found.count(name) for name in sorted(set(found))},
        simulations=tuple(simulations),
    )


def _variants(recorded: Trace, asked: Trace, played: Played) -> Iterator[tuple[TracedRequest, ...]]:
    """Yield the requests without their results, once for each simulation."""
    if all(request.after is None for request in asked.requests):
        yield tuple(_as_they_came(recorded))
        return
    prepared_s = [request.prepared_s for request in recorded.requests]
    on_the_way_s = _on_the_way_s(recorded, played)
    for seed in range(SIMULATIONS):
        Random(seed).shuffle(prepared_s)  # noqa: S311  # not a secret
        yield tuple(
            replace(
                request,
                prepared_s=looked_at_s,
                think_s=0.0 if outcome.paused_s is None else outcome.paused_s + on_the_way_s,
            )
            for request, outcome, looked_at_s in zip(
                asked.requests, played.outcomes, prepared_s, strict=True
            )
        )


def _as_they_came(recorded: Trace) -> Iterator[TracedRequest]:
    begin_s = _arrived_s(recorded.requests[0])
    for number, request in enumerate(recorded.requests):
        yield TracedRequest(
            id=number,
            model=request.model,
            arrived_s=_arrived_s(request) - begin_s,
            prepared_s=request.prepared_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
        )


def _on_the_way_s(recorded: Trace, played: Played) -> float:
    """Return the mean seconds of a request that the client has seen, and the server has not."""
    took_s = _mean(outcome.took_s for outcome in played.outcomes)
    known_s = _mean(_ended_s(request) - _arrived_s(request) for request in recorded.requests)
    return max(0.0, took_s - known_s)


def _models(requests: Iterable[TracedRequest]) -> Iterator[str]:
    return (request.model for request in requests)


def _arrived_s(request: TracedRequest) -> float:
    return request.arrived_s or 0.0


def _ended_s(request: TracedRequest) -> float:
    return _arrived_s(request) + (request.waited_s or 0.0) + (request.service_s or 0.0)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
