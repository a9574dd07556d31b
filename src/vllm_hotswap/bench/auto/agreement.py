"""What the simulator makes of a trace that a server has played, at the costs that were measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from vllm_hotswap.bench.auto.workloads import WARM_UP, WARM_UP_TOKENS
from vllm_hotswap.policies import make_policy
from vllm_hotswap.policy import PolicySettings
from vllm_hotswap.simulate import costs, fit
from vllm_hotswap.simulate.run import World, simulate
from vllm_hotswap.trace import Trace, TracedRequest

BEFORE_S = 60.0
"""How long before a simulated trace the requests of the warm-up begin."""

NO_COST_S = 0.0
"""Of a switch where none was seen."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """The simulator's figures beside the recorded ones."""

    mean_wait_s: float
    recorded_mean_wait_s: float
    switches: int
    recorded_switches: int
    residencies: dict[str, int]
    """How often a recorded switch found its target where."""


def split(recorded: Trace, first: int, played: Sequence[Trace]) -> Iterator[Trace]:
    """A recording of several traces, played one after the other, in parts.

    Args:
        recorded: what the server has written.
        first: requests that came before the first of them and its warm-up.
        played: the traces.
    """
    requests = sorted(recorded.requests, key=_arrived_s)
    at = first
    for one in played:
        at += len(WARM_UP)
        part = tuple(requests[at : at + len(one.requests)])
        begin_s, end_s = _arrived_s(part[0]), max(_ended_s(request) for request in part)
        switches = (switch for switch in recorded.switches if begin_s <= switch.at_s <= end_s)
        yield Trace(recorded.head, part, tuple(switches))
        at += len(one.requests)


def simulated(recorded: Trace, played: Trace, resident: int | None) -> Simulated:
    """The same requests under the same policy, with the costs of switches and service measured.

    Requests come when the server got them; those that follow another one come after it, and after
    the time that the client took in between.
    """
    switching = recorded.head.switching
    services = fit.services(recorded)
    world = World(
        costs.measured(recorded.switches, NO_COST_S),
        services,
        fit.common(services.values()),
        switching.drain_timeout,
        resident,
    )
    trace = replace(recorded, requests=(*warm_up(), *_asked(recorded, played)))
    policy = make_policy(switching.policy, PolicySettings(switching.min_active, switching.slice))
    run = simulate(trace, policy, world)
    seen = [switch.residency.value for switch in recorded.switches if switch.residency]
    return Simulated(
        mean_wait_s=_mean(one.waited_s for one in islice(run, len(WARM_UP), None)),
        recorded_mean_wait_s=_mean(request.waited_s or 0.0 for request in recorded.requests),
        switches=sum(switch.began_s >= BEFORE_S for switch in run.switches),
        recorded_switches=len(recorded.switches),
        residencies={name: seen.count(name) for name in sorted(set(seen))},
    )


def warm_up() -> Iterator[TracedRequest]:
    """As before the trace: one after the other."""
    for number, alias in enumerate(WARM_UP):
        asked = TracedRequest(id=number, model=alias, output_tokens=WARM_UP_TOKENS)
        is_first = number == 0
        yield replace(asked, arrived_s=0.0) if is_first else replace(asked, after=number - 1)


def _asked(recorded: Trace, played: Trace) -> Iterator[TracedRequest]:
    """What was asked, without what became of it, from `BEFORE_S` on."""
    first = len(WARM_UP)
    if any(request.after is not None for request in played.requests):
        for request in played.requests:
            after = None if request.after is None else first + request.after
            arrived_s = None if request.arrived_s is None else BEFORE_S + request.arrived_s
            yield replace(request, id=first + request.id, after=after, arrived_s=arrived_s)
        return
    begin_s = _arrived_s(recorded.requests[0])
    for number, request in enumerate(recorded.requests, first):
        yield TracedRequest(
            id=number,
            model=request.model,
            arrived_s=BEFORE_S + _arrived_s(request) - begin_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
        )


def _arrived_s(request: TracedRequest) -> float:
    return request.arrived_s or 0.0


def _ended_s(request: TracedRequest) -> float:
    return _arrived_s(request) + (request.waited_s or 0.0) + (request.service_s or 0.0)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
