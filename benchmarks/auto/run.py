"""Plays every trace under both policies, with cheap and with costly switches, repeatedly.

Each server plays all traces, one after the other. Servers take turns, in an order that alternates,
so that other work of the machine affects both policies.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.auto import agreement, checkpoints
from benchmarks.auto.agreement import Simulated
from benchmarks.auto.play import COMPLETIONS, Played, References, play, take_references
from benchmarks.auto.workloads import (
    WARM_UP,
    WARM_UP_TOKENS,
    WORKLOADS,
    Amount,
    workload,
)
from benchmarks.client import BadAnswer
from benchmarks.load import completion
from benchmarks.servers import Launcher, Model, Server
from benchmarks.wire import ask
from vllm_hotswap.simulation import trace as traces
from vllm_hotswap.simulation.trace import Trace, TracedSwitching

log = logging.getLogger("benchmarks")

POLICIES: dict[str, Mapping[str, object]] = {"fifo": {"max_wait": 3600}, "batch": {}}
"""Policies with their settings. A request that is due is admitted together with all earlier ones.
So with a shorter `max_wait`, an overloaded `fifo` would group requests, too: not a baseline."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What decides the cost of switches."""

    width: int
    """The width of the models' MLPs."""
    sections: Mapping[str, object]
    """Sections of the configuration."""
    resident: int | None
    """How many models are loaded at a time; None: all."""


COSTS: Mapping[str, Cost] = {
    "cheap": Cost(checkpoints.TINY, {}, None),
    "dear": Cost(checkpoints.WIDE, {"memory": {"device": "704MiB"}}, 1),
}
"""With the second, a model that comes up leaves no room for the weights of another, even asleep:
every switch reads them from files."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    repeats: int
    amounts: Mapping[str, Amount]
    """Name of a cost -> how much to send."""


@dataclass(frozen=True, slots=True)
class Case:
    """One of the combinations that are compared."""

    cost: str
    workload: str
    policy: str


@dataclass(slots=True)
class Found:
    """The results of every case, one for each repetition, and those of the simulator."""

    played: dict[Case, list[Played]] = field(default_factory=lambda: defaultdict(list))
    simulated: dict[Case, list[Simulated]] = field(default_factory=lambda: defaultdict(list))


async def measure(launcher: Launcher, models: Mapping[str, Sequence[Model]], plan: Plan) -> Found:
    """Run the whole plan; `models` has the models for each cost."""
    found = Found()
    for repeat in range(plan.repeats):
        for cost in plan.amounts:
            for policy in POLICIES if repeat % 2 == 0 else reversed(POLICIES):
                log.info("auto: %s, %s, %d of %d", cost, policy, repeat + 1, plan.repeats)
                await _serve(launcher, models[cost], plan, (cost, policy, repeat), found)
    return found


async def _serve(
    launcher: Launcher,
    models: Sequence[Model],
    plan: Plan,
    which: tuple[str, str, int],
    found: Found,
) -> None:
    cost, policy, repeat = which
    switching = TracedSwitching(policy=policy)
    settings = {"mode": "auto", "policy": policy, "wait_timeout": 3600, **POLICIES[policy]}
    sections = {"switching": settings, **COSTS[cost].sections}
    recording = launcher.folder / f"recorded-{cost}-{policy}-{repeat}.jsonl"
    asked = {name: workload(name, plan.amounts[cost], switching) for name in WORKLOADS}
    arguments = ("--record", str(recording))
    async with launcher.hotswap(*models, sections=sections, arguments=arguments) as server:
        references = await take_references(server)
        for name, trace in asked.items():
            played = await _play(server, trace, references)
            found.played[Case(cost, name, policy)].append(played)
            log.info(
                "auto: %s: %d switches, %.1f s, %d errors",
                name,
                played.switches,
                played.total_s,
                len(played.errors),
            )
    try:
        parts = list(agreement.split(traces.read(recording), len(references), list(asked.values())))
    except BadAnswer as error:
        log.warning("auto: not simulated: %s", error)
        return
    for name, part in zip(asked, parts, strict=True):
        case = Case(cost, name, policy)
        played = found.played[case][-1]
        simulated = agreement.simulated(part, asked[name], played, COSTS[cost].resident)
        found.simulated[case].append(simulated)


async def _play(server: Server, trace: Trace, references: References) -> Played:
    """Play a trace, from the same state each time."""
    for alias in WARM_UP:
        body = completion(alias, "Hello", WARM_UP_TOKENS)
        reply = await ask(server.port, COMPLETIONS, body)
        if reply.status != 200:
            raise BadAnswer(f"a single request failed: {bytes(reply.body[:300])!r}")
    return await play(server, trace, references)
