"""What switches cost in a simulation, what the policy knows of that, and where models lie."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from vllm_hotswap.scheduling import SwitchCosts
from vllm_hotswap.simulation.trace import TracedSwitch
from vllm_hotswap.states import Residency

Exact = tuple[str | None, str, Residency]
Seconds = Sequence[float]


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of switches without draining, by source, target and the target's residency.

    A key that is missing in one table is looked up in the next, coarser one. Where there are
    several figures, switches cost them one after the other, and then the first again. Waits depend
    on the mean, to which a few expensive switches add more than a median shows.
    """

    default_s: float
    exact: Mapping[Exact, Seconds] = field(default_factory=dict)
    by_target: Mapping[tuple[str, Residency], Seconds] = field(default_factory=dict)
    by_residency: Mapping[Residency, Seconds] = field(default_factory=dict)
    first: Mapping[str, Residency] = field(default_factory=dict)
    """Residencies of models before they are first active; others are parked."""
    evicted: Mapping[str, Residency] = field(default_factory=dict)
    """Residencies of models after they were evicted; others are cold."""

    def of(self, source: str | None, target: str, residency: Residency) -> tuple[Hashable, Seconds]:
        """Return the key under which such switches are known, and what they have cost."""
        tables: tuple[tuple[Hashable, Mapping[Any, Seconds]], ...] = (
            ((source, target, residency), self.exact),
            ((target, residency), self.by_target),
            (residency, self.by_residency),
        )
        for key, table in tables:
            if key in table:
                return key, table[key]
        return None, (self.default_s,)


def measured(switches: Iterable[TracedSwitch], default_s: float) -> Costs:
    """Return what the switches of a recording have cost, in their order."""
    exact: dict[Exact, list[float]] = defaultdict(list)
    by_target: dict[tuple[str, Residency], list[float]] = defaultdict(list)
    by_residency: dict[Residency, list[float]] = defaultdict(list)
    first: dict[str, Residency] = {}
    evicted: dict[str, Residency] = {}
    for switch in _ended_well(switches):
        residency = _residency(switch)
        exact[switch.source, switch.target, residency].append(switch.cost_s)
        by_target[switch.target, residency].append(switch.cost_s)
        by_residency[residency].append(switch.cost_s)
        first.setdefault(switch.target, residency)
        if residency is not Residency.PARKED:
            evicted[switch.target] = residency
    default_s = _default(by_residency, default_s)
    return Costs(default_s, exact, by_target, by_residency, first, evicted)


def _ended_well(switches: Iterable[TracedSwitch]) -> Iterable[TracedSwitch]:
    ordered = sorted(switches, key=lambda switch: switch.at_s)
    return (switch for switch in ordered if switch.result == "switched")


def _residency(switch: TracedSwitch) -> Residency:
    return switch.residency or Residency.PARKED


def _default(found: Mapping[Residency, list[float]], default_s: float) -> float:
    every = [cost for costs in found.values() for cost in costs]
    return median(every) if every else default_s


class CostModel:
    """The cost of each switch, and what the server expects it to cost.

    The mutable state is how many switches of each kind there have been, and the server's estimates.
    """

    def __init__(self, costs: Costs, before: Iterable[TracedSwitch] = ()) -> None:
        self._costs = costs
        self._counts: Counter[Hashable] = Counter()
        self._estimates = SwitchCosts()
        for switch in _ended_well(before):
            self.record_switch(switch.source, switch.target, _residency(switch), switch.cost_s)

    def __repr__(self) -> str:
        return f"<CostModel switches={self._counts.total()}>"

    def expected_s(self, source: str | None, target: str, residency: Residency) -> float:
        """Return the policy's estimate; for switches not measured yet, it is a good guess."""
        known_s = self._estimates.estimate(source, target, residency, math.nan)
        return self._costs.of(source, target, residency)[1][0] if math.isnan(known_s) else known_s

    def next_s(self, source: str | None, target: str, residency: Residency) -> float:
        """Return the cost of the next such switch."""
        key, figures = self._costs.of(source, target, residency)
        self._counts[key] += 1
        return figures[(self._counts[key] - 1) % len(figures)]

    def record_switch(
        self, source: str | None, target: str, residency: Residency, cost_s: float
    ) -> None:
        """Note that a switch has ended, and that the server has measured it."""
        self._estimates.add(source, target, residency, cost_s)


class ResidencyModel:
    """Where each model lies: the last few that were active are parked, the others are evicted.

    The mutable state is the models that have been active and are parked, the last one at the end,
    and those that were evicted.
    """

    def __init__(self, costs: Costs, resident: int | None) -> None:
        self._costs = costs
        self._resident = resident
        self._parked: dict[str, None] = {}
        self._evicted: set[str] = set()

    def __repr__(self) -> str:
        return f"<ResidencyModel parked={list(self._parked)}>"

    def of(self, alias: str) -> Residency:
        if alias in self._parked:
            return Residency.PARKED
        if alias in self._evicted:
            return self._when_evicted(alias)
        default = Residency.PARKED if self._resident is None else Residency.COLD
        return self._costs.first.get(alias, default)

    def activate(self, alias: str) -> None:
        evicted = self._evicted_for(alias)
        self._parked.pop(alias, None)
        self._evicted.discard(alias)
        self._parked[alias] = None
        if evicted is not None:
            del self._parked[evicted]
            self._evicted.add(evicted)

    def before(self, source: str | None, target: str) -> Residency:
        """Return where the target lies at a switch from the source, which may not be active yet."""
        is_gone = source is not None and self._evicted_for(source) == target
        return self._when_evicted(target) if is_gone else self.of(target)

    def _when_evicted(self, alias: str) -> Residency:
        return self._costs.evicted.get(alias, Residency.COLD)

    def _evicted_for(self, alias: str) -> str | None:
        """Return the model that is evicted when this one becomes active."""
        if self._resident is None or alias in self._parked or len(self._parked) < self._resident:
            return None
        return next(iter(self._parked))
