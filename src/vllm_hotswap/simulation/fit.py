"""Service times, found from a recording.

A request that gets `o` tokens while, on average, `n` requests run takes `o` steps. It also waits
for prompts of `p` tokens: its own and those of requests that begin before it ends. That makes
`step_s * o + per_request_s * o * n + prefill_s_per_token * p`. The three numbers are found for each
model by least squares, none of them below zero.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from vllm_hotswap.simulation.service import Service
from vllm_hotswap.simulation.trace import Trace, TracedRequest

Row = tuple[float, ...]

ROUNDS = 8
"""Iterations of the fit; the figures hardly change after half as many."""

SMALLEST = 1e-9
"""A pivot below this part of the largest value means that the columns are not independent."""


def services(trace: Trace) -> dict[str, Service]:
    """Fit every model with enough data in the trace."""
    by_model: dict[str, list[TracedRequest]] = defaultdict(list)
    for request in trace.requests:
        if request.was_served:
            by_model[request.model].append(request)
    return {alias: service(requests, Clock(alias, trace)) for alias, requests in by_model.items()}


class Clock:
    """Seconds for which a model has been active. It stands still while its requests are parked.

    Without switches in the trace, it was active all the time.
    """

    def __init__(self, alias: str, trace: Trace) -> None:
        self._times, self._sums, self._runs = [0.0], [0.0], [True]
        ordered = sorted(trace.switches, key=lambda switch: switch.at_s)
        mine = [s for s in ordered if alias in (s.source, s.target) and s.result == "switched"]
        if mine:
            self._runs = [mine[0].source == alias]
        for switch in mine:
            drained_s = switch.at_s + switch.drain_s
            runs = switch.target == alias
            self._turn(drained_s + switch.cost_s if runs else drained_s, runs)

    def _turn(self, time_s: float, runs: bool) -> None:
        self._sums.append(self.at(time_s))
        self._times.append(time_s)
        self._runs.append(runs)

    def at(self, time_s: float) -> float:
        place = max(0, bisect_right(self._times, time_s) - 1)
        passed_s = time_s - self._times[place] if self._runs[place] else 0.0
        return self._sums[place] + passed_s


def service(requests: Sequence[TracedRequest], clock: Clock) -> Service:
    """Fit the service of one model to its served requests.

    How many requests ran is a mean over steps, not over time. So it depends on the length of a
    step, which is what is to be found: the better the one is known, the better the other.
    """
    spans = [_span(request, clock) for request in requests]
    prompts = _Prompts(spans, [request.prompt_tokens for request in requests])
    took = [span.end_s - span.begin_s for span in spans]
    found = Service(1.0, 0.0, 0.0)
    for _ in range(ROUNDS):
        crowd = _Concurrency(spans, found)
        rows = [
            (float(tokens), tokens * crowd.mean(span), prompts.within(span))
            for tokens, span in zip((r.output_tokens for r in requests), spans, strict=True)
        ]
        found = Service(*non_negative(rows, took))
    return found


def common(found: Iterable[Service]) -> Service:
    """Return the medians, for models without data; the defaults if there are none."""
    known = list(found)
    if not known:
        return Service()
    return Service(
        median(one.step_s for one in known),
        median(one.per_request_s for one in known),
        median(one.prefill_s_per_token for one in known),
    )


def non_negative(rows: Sequence[Row], values: Sequence[float]) -> Row:
    """Return the coefficients, none below zero, for which the rows come closest to the values.

    Some of them are zero. The others are those of ordinary least squares without these columns:
    with three columns, all sets are tried.
    """
    width = len(rows[0])
    best: tuple[float, Row] = (math.fsum(v * v for v in values), (0.0,) * width)
    for count in range(1, width + 1):
        for columns in itertools.combinations(range(width), count):
            part = least_squares([tuple(row[c] for c in columns) for row in rows], values)
            if part is None or min(part) < 0:
                continue
            full = [0.0] * width
            for column, value in zip(columns, part, strict=True):
                full[column] = value
            best = min(best, (_squares(rows, values, full), tuple(full)))
    return best[1]


def least_squares(rows: Sequence[Row], values: Sequence[float]) -> Row | None:
    """Solve the normal equations; None if the columns do not determine the coefficients."""
    width = len(rows[0])
    scale = [math.sqrt(math.fsum(row[c] ** 2 for row in rows)) for c in range(width)]
    if not all(scale):
        return None
    matrix = [
        [math.fsum(row[i] * row[j] for row in rows) / (scale[i] * scale[j]) for j in range(width)]
        + [math.fsum(row[i] * v for row, v in zip(rows, values, strict=True)) / scale[i]]
        for i in range(width)
    ]
    solved = _solve(matrix)
    return None if solved is None else tuple(x / s for x, s in zip(solved, scale, strict=True))


def _solve(matrix: list[list[float]]) -> list[float] | None:
    """Gauss-Jordan elimination with the largest pivot. The last column is the right side."""
    size = len(matrix)
    for place in range(size):
        pivot = max(range(place, size), key=lambda row: abs(matrix[row][place]))
        matrix[place], matrix[pivot] = matrix[pivot], matrix[place]
        head = matrix[place]
        if abs(head[place]) < SMALLEST:
            return None
        for row in range(size):
            if row != place:
                factor = matrix[row][place] / head[place]
                matrix[row] = [a - factor * b for a, b in zip(matrix[row], head, strict=True)]
    return [matrix[row][size] / matrix[row][row] for row in range(size)]


def _squares(rows: Sequence[Row], values: Sequence[float], coefficients: Sequence[float]) -> float:
    return math.fsum(
        (v - math.fsum(a * b for a, b in zip(row, coefficients, strict=True))) ** 2
        for row, v in zip(rows, values, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Span:
    """From the admission of a request to its end, on the clock of its model."""

    begin_s: float
    end_s: float


def _span(request: TracedRequest, clock: Clock) -> Span:
    assert request.arrived_s is not None
    assert request.waited_s is not None
    assert request.service_s is not None
    begin_s = request.arrived_s + request.waited_s
    return Span(clock.at(begin_s), clock.at(begin_s + request.service_s))


class _Prompts:
    """Prompt tokens of the requests that begin within a span."""

    def __init__(self, spans: Sequence[Span], tokens: Sequence[int]) -> None:
        ordered = sorted((s.begin_s, count) for s, count in zip(spans, tokens, strict=True))
        self._times = [begin_s for begin_s, _ in ordered]
        self._sums = list(itertools.accumulate((count for _, count in ordered), initial=0))

    def within(self, span: Span) -> float:
        first, last = bisect_left(self._times, span.begin_s), bisect_left(self._times, span.end_s)
        return float(self._sums[last] - self._sums[first])


class _Concurrency:
    """How many requests ran, and how many steps they got, summed over time."""

    def __init__(self, spans: Iterable[Span], service: Service) -> None:
        changes = sorted([(s.begin_s, 1) for s in spans] + [(s.end_s, -1) for s in spans])
        self._times: list[float] = []
        self._rates: list[tuple[float, float]] = []
        """From that time on: requests times steps, and steps, each per second."""
        self._sums: list[tuple[float, float]] = []
        """Both, up to that time."""
        running, rates, sums, before_s = 0, (0.0, 0.0), (0.0, 0.0), 0.0
        for time_s, change in changes:
            sums = _add(sums, rates, time_s - before_s)
            running, before_s = running + change, time_s
            step_s = service.step(running)
            rates = (running / step_s, 1 / step_s) if step_s else (float(running), 1.0)
            self._times.append(time_s)
            self._rates.append(rates)
            self._sums.append(sums)

    def mean(self, span: Span) -> float:
        """Return how many requests ran, on average, in a step of that span."""
        (crowd, steps), (crowd_before, before) = self._at(span.end_s), self._at(span.begin_s)
        return (crowd - crowd_before) / (steps - before) if steps > before else 1.0

    def _at(self, time_s: float) -> tuple[float, float]:
        place = bisect_right(self._times, time_s) - 1
        return _add(self._sums[place], self._rates[place], time_s - self._times[place])


def _add(
    sums: tuple[float, float], rates: tuple[float, float], passed_s: float
) -> tuple[float, float]:
    return sums[0] + rates[0] * passed_s, sums[1] + rates[1] * passed_s
