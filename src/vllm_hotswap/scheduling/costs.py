"""Measured costs of switches, by source, target and residency of the target."""

from __future__ import annotations

from vllm_hotswap.scheduling.average import Average
from vllm_hotswap.states import Residency

NEWEST = 0.3
"""Weight of the newest of several measurements."""


class SwitchCosts:
    """Seconds that switches took, without draining. Newer ones count more.

    The mutable state is two tables of means: by source, target and residency of the target, and by
    the latter two only, for sources that have not been measured yet.
    """

    def __init__(self) -> None:
        self._exact: dict[tuple[str | None, str, Residency], Average] = {}
        self._by_target: dict[tuple[str, Residency], Average] = {}
        self.version = 0
        """Raised by every measurement."""

    def __repr__(self) -> str:
        return f"<SwitchCosts {self._exact}>"

    def add(self, source: str | None, target: str, residency: Residency, cost_s: float) -> None:
        """Record a switch that took `cost_s`; `residency` is the target's before it."""
        self._exact.setdefault((source, target, residency), Average(NEWEST)).add(cost_s)
        self._by_target.setdefault((target, residency), Average(NEWEST)).add(cost_s)
        self.version += 1

    def estimate(
        self, source: str | None, target: str, residency: Residency, unknown_s: float
    ) -> float:
        """Estimate the cost of a switch; `unknown_s` if none like it has been measured."""
        exact = self._exact.get((source, target, residency))
        known = exact or self._by_target.get((target, residency))
        return unknown_s if known is None or known.value is None else known.value
