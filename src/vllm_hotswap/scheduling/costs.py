"""Measured costs of switches, by source, target and residency of the target."""

from __future__ import annotations

from typing import TypeVar

from vllm_hotswap.states import Residency

Key = TypeVar("Key")

NEW = 0.3
"""Weight of the newest of several measurements."""


class SwitchCosts:
    """Seconds that switches took, without draining. Newer ones count more.

    The mutable state is two tables of means: by source, target and residency of the target, and by
    the latter two only, for sources that have not been measured yet.
    """

    def __init__(self) -> None:
        self._exact: dict[tuple[str | None, str, Residency], float] = {}
        self._by_target: dict[tuple[str, Residency], float] = {}
        self.version = 0
        """Raised by every measurement."""

    def __repr__(self) -> str:
        return f"<SwitchCosts {self._exact}>"

    def add(self, source: str | None, target: str, residency: Residency, cost_s: float) -> None:
        """Record a switch that took `cost_s`; `residency` is the target's before it."""
        _average(self._exact, (source, target, residency), cost_s)
        _average(self._by_target, (target, residency), cost_s)
        self.version += 1

    def estimate(
        self, source: str | None, target: str, residency: Residency, unknown_s: float
    ) -> float:
        """Estimate the cost of a switch; `unknown_s` if none like it has been measured."""
        exact = self._exact.get((source, target, residency))
        return self._by_target.get((target, residency), unknown_s) if exact is None else exact


def _average(table: dict[Key, float], key: Key, value: float) -> None:
    known = table.get(key)
    table[key] = value if known is None else known + NEW * (value - known)
