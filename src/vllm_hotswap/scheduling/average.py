"""A mean of measurements in which newer ones count more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Average:
    """An exponential moving average. The first measurement is taken as it is.

    The mutable state is `value`, which `add` alone writes.
    """

    weight: float
    """The part that the newest measurement has in the value, from 0 to 1."""
    value: float | None = None
    """None: nothing has been measured yet."""

    def add(self, measured: float) -> None:
        known = self.value
        self.value = measured if known is None else known + self.weight * (measured - known)
