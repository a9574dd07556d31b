"""Figures from samples, and the order in which the two sides take turns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Side = Literal["hotswap", "plain"]
SIDES: tuple[Side, Side] = ("hotswap", "plain")


@dataclass(frozen=True, slots=True)
class Summary:
    """What is told of one list of samples, in the samples' unit."""

    count: int
    minimum: float
    p50: float
    p95: float
    p99: float
    maximum: float

    @property
    def spread(self) -> float:
        """Width of the range as a part of the median."""
        return (self.maximum - self.minimum) / self.p50 if self.p50 else math.nan


@dataclass(frozen=True, slots=True)
class Bar:
    """A target, the figure that was measured, and whether it meets the target."""

    name: str
    value: float
    limit: float
    at_least: bool = False
    """The figure must be at least the limit; otherwise at most."""

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def summarize(samples: Sequence[float]) -> Summary:
    """Raises ValueError if there are no samples."""
    return Summary(
        count=len(samples),
        minimum=min(samples),
        p50=percentile(samples, 50),
        p95=percentile(samples, 95),
        p99=percentile(samples, 99),
        maximum=max(samples),
    )


def percentile(samples: Sequence[float], percent: float) -> float:
    """The percentile with linear interpolation between the two nearest samples."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def median(samples: Sequence[float]) -> float:
    return percentile(samples, 50)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Ratio of the medians."""
    return median(numerator) / median(denominator)


def pair_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Ratio of each run to the run of the other side next to it: slow drifts cancel out."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def alternate(runs: int) -> Iterator[Side]:
    """The sides in the order A B, B A, A B, ...: `runs` turns of each, neither always first."""
    for run in range(runs):
        yield from SIDES if run % 2 == 0 else SIDES[::-1]
