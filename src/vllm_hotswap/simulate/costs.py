"""What switches cost in a simulation, and where models lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

from vllm_hotswap.states import Residency
from vllm_hotswap.trace import TracedSwitch

Key = TypeVar("Key")

Exact = tuple[str | None, str, Residency]


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a switch without draining, by source, target and where the target lies.

    What is not in one table is looked up in the next, ruder one.
    """

    default_s: float
    exact: Mapping[Exact, float] = field(default_factory=dict)
    by_target: Mapping[tuple[str, Residency], float] = field(default_factory=dict)
    by_residency: Mapping[Residency, float] = field(default_factory=dict)
    first: Mapping[str, Residency] = field(default_factory=dict)
    """Where models lie before they are active for the first time; others are parked."""

    def of(self, source: str | None, target: str, residency: Residency) -> float:
        found = self.exact.get((source, target, residency))
        if found is None:
            found = self.by_target.get((target, residency))
        if found is None:
            found = self.by_residency.get(residency)
        return self.default_s if found is None else found


def measured(switches: Iterable[TracedSwitch], default_s: float) -> Costs:
    """The medians of what switches of a recording have cost."""
    exact: dict[Exact, list[float]] = defaultdict(list)
    by_target: dict[tuple[str, Residency], list[float]] = defaultdict(list)
    by_residency: dict[Residency, list[float]] = defaultdict(list)
    first: dict[str, Residency] = {}
    for switch in sorted(switches, key=lambda switch: switch.at_s):
        if switch.result != "switched":
            continue
        residency = switch.residency or Residency.PARKED
        exact[switch.source, switch.target, residency].append(switch.cost_s)
        by_target[switch.target, residency].append(switch.cost_s)
        by_residency[residency].append(switch.cost_s)
        first.setdefault(switch.target, residency)
    return Costs(
        _default(by_residency, default_s),
        _medians(exact),
        _medians(by_target),
        _medians(by_residency),
        first,
    )


def _default(found: Mapping[Residency, list[float]], default_s: float) -> float:
    every = [cost for costs in found.values() for cost in costs]
    return median(every) if every else default_s


def _medians(table: Mapping[Key, list[float]]) -> dict[Key, float]:
    return {key: median(values) for key, values in table.items()}


class Whereabouts:
    """Where each model lies: the last few that were active are parked, the others are cold.

    The mutable state is the models that have been active and are parked, the last one at the end,
    and those that had to go.
    """

    def __init__(self, costs: Costs, resident: int | None) -> None:
        self._costs = costs
        self._resident = resident
        self._parked: dict[str, None] = {}
        self._evicted: set[str] = set()

    def __repr__(self) -> str:
        return f"<Whereabouts parked={list(self._parked)}>"

    def of(self, alias: str) -> Residency:
        if alias in self._parked:
            return Residency.PARKED
        if alias in self._evicted:
            return Residency.COLD
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

    def cost_s(self, source: str | None, target: str) -> float:
        """Of a switch from the active model, or from one that will have become it: the way back."""
        is_gone = source is not None and self._evicted_for(source) == target
        return self._costs.of(source, target, Residency.COLD if is_gone else self.of(target))

    def _evicted_for(self, alias: str) -> str | None:
        """Which model has to go when that one becomes active."""
        if self._resident is None or alias in self._parked or len(self._parked) < self._resident:
            return None
        return next(iter(self._parked))
