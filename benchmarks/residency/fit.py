"""Straight lines through measured points: `time = t0 + bytes / bandwidth`. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """`y = intercept + slope * x`."""

    intercept: float
    slope: float

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x

    @property
    def bandwidth(self) -> float:
        """Bytes per second, if the line is seconds by bytes; infinite if it does not rise."""
        return 1 / self.slope if self.slope > 0 else math.inf


def least_squares(points: Sequence[Point]) -> Line:
    """Return the line with the smallest sum of squared vertical distances.

    Raises:
        ValueError: fewer than two different places.
    """
    if len({x for x, _ in points}) < 2:
        raise ValueError("a line needs points at two places at least")
    x_mean = sum(x for x, _ in points) / len(points)
    y_mean = sum(y for _, y in points) / len(points)
    rise = sum((x - x_mean) * (y - y_mean) for x, y in points)
    slope = rise / sum((x - x_mean) ** 2 for x, _ in points)
    return Line(y_mean - slope * x_mean, slope)


def residual(line: Line, points: Sequence[Point]) -> float:
    """Return the largest vertical distance of a point from the line."""
    return max(abs(y - line.at(x)) for x, y in points)
