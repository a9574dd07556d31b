"""Figures from samples, and the order in which the two sides take turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

Side = Literal["hotswap", "plain"]
SIDES: tuple[Side, Side] = ("hotswap", "plain")

Point = tuple[float, float]
MAX_CORRELATION = 0.95
MIN_FREEDOM = 3


@dataclass(frozen=True, slots=True)
class Summary:
    """The reported figures of one list of samples, in the samples' unit."""

    count: int
    minimum: float
    p50: float
    p95: float
    p99: float
    maximum: float

    @property
    def spread(self) -> float:
        """The width of the range, as a fraction of the median."""
        return (self.maximum - self.minimum) / self.p50 if self.p50 else math.nan


@dataclass(frozen=True, slots=True)
class Bar:
    """A target, the measured figure, and whether it meets the target."""

    name: str
    value: float
    limit: float
    at_least: bool = False
    """Whether the figure must be at least the limit; otherwise at most."""

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def summarize(samples: Sequence[float]) -> Summary:
    """Return the figures of samples. Raises ValueError if there are none."""
    return Summary(
        count=len(samples),
        minimum=min(samples),
        p50=percentile(samples, 50),
        p95=percentile(samples, 95),
        p99=percentile(samples, 99),
        maximum=max(samples),
    )


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the percentile, with linear interpolation between the two nearest samples."""
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
    """Return the ratio of the medians."""
    return median(numerator) / median(denominator)


def pair_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Return the ratio of each run to the other side's adjacent run: slow drifts cancel out."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def alternate(runs: int) -> Iterator[Side]:
    """Yield the sides as A B, B A, A B, ...: `runs` turns of each, neither always first."""
    for run in range(runs):
        yield from SIDES if run % 2 == 0 else SIDES[::-1]


@dataclass(frozen=True, slots=True)
class Slope:
    """How much something grows per step."""

    value: float
    upper: float
    """The upper bound, with 95 % confidence."""
    points: int


def pooled_slope(segments: Sequence[Sequence[Point]]) -> Slope | None:
    """Return the one slope that fits all segments best, each with a level of its own.

    By least squares. Neighbouring samples of one process resemble each other, so they say less
    than as many independent ones: the bound allows for the correlation of neighbours' residuals.

    Returns:
        None if there is too little data: fewer than three points beyond what a line with these
        levels needs, or no two places in any segment.
    """
    segments = [segment for segment in segments if len(segment) > 1]
    centred = [_centred(segment) for segment in segments]
    flat = [point for segment in centred for point in segment]
    freedom = len(flat) - len(segments) - 1
    width = sum(x * x for x, _ in flat)
    if freedom < MIN_FREEDOM or not width:
        return None
    value = sum(x * y for x, y in flat) / width
    residuals = [[y - value * x for x, y in segment] for segment in centred]
    squares = sum(r * r for segment in residuals for r in segment)
    error = math.sqrt(squares / freedom / width) * _widened(residuals, squares)
    return Slope(value, value + student_t(0.95, freedom) * error, len(flat))


def _centred(points: Sequence[Point]) -> list[Point]:
    x_mean = sum(x for x, _ in points) / len(points)
    y_mean = sum(y for _, y in points) / len(points)
    return [(x - x_mean, y - y_mean) for x, y in points]


def _widened(residuals: Sequence[Sequence[float]], squares: float) -> float:
    """Return the factor by which the standard error grows because neighbours are correlated."""
    if not squares:
        return 1.0
    products = sum(a * b for segment in residuals for a, b in itertools.pairwise(segment))
    correlation = min(MAX_CORRELATION, max(0.0, products / squares))
    return math.sqrt((1 + correlation) / (1 - correlation))


def student_t(probability: float, freedom: int) -> float:
    """Return Student's quantile above the median; at most 1 % off, from 3 degrees of freedom.

    By the expansion of Cornish and Fisher around the normal quantile.
    """
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
