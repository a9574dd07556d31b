"""The figures of a run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from vllm_hotswap.simulation.run import Run


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one policy. A wait ends when its request is first admitted."""

    policy: str
    requests: int
    wait_mean_s: float
    wait_p50_s: float
    wait_p95_s: float
    wait_p99_s: float
    wait_max_s: float
    took_mean_s: float
    """Mean time from arrival to end, including the time that a request was parked."""
    switches: int
    serving: float
    """Part of the time in which requests were worked on, also while draining."""
    switching: float
    """Part of the time that switches took, without draining."""
    idle: float
    fairness: float
    """Jain's index of the models' mean waits."""
    late: int
    """Requests for which it took more than two switches after they were due: one that was under way
    and their own. They had to wait for models whose requests were due earlier."""
    end_s: float


def figures(policy: str, run: Run) -> Figures:
    served = list(run)
    waits = sorted(one.waited_s for one in served)
    by_model: dict[str, list[float]] = defaultdict(list)
    for one in served:
        by_model[one.request.model].append(one.waited_s)
    switching_s = math.fsum(switch.active_s - switch.drained_s for switch in run.switches)
    activated = [switch.active_s for switch in run.switches]
    whole_s = run.end_s or 1.0
    return Figures(
        policy=policy,
        requests=len(served),
        wait_mean_s=mean(waits),
        wait_p50_s=at(waits, 0.5),
        wait_p95_s=at(waits, 0.95),
        wait_p99_s=at(waits, 0.99),
        wait_max_s=at(waits, 1.0),
        took_mean_s=mean([one.took_s for one in served]),
        switches=len(run.switches),
        serving=run.serving_s / whole_s,
        switching=switching_s / whole_s,
        idle=max(0.0, 1 - (run.serving_s + switching_s) / whole_s),
        fairness=jain([mean(values) for values in by_model.values()]),
        late=sum(_switches(activated, one.due_s, one.admitted_s) > 2 for one in served),
        end_s=run.end_s,
    )


def _switches(activated: Sequence[float], after_s: float, until_s: float) -> int:
    return max(0, bisect_right(activated, until_s) - bisect_right(activated, after_s))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def at(ordered: Sequence[float], part: float) -> float:
    """Return the value that this part of them does not exceed: the nearest rank."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else 0.0


def jain(values: Sequence[float]) -> float:
    """Return Jain's index: from 1, where all are equal, to 1/n, where one has everything.

    R. Jain, D. Chiu, W. Hawe, "A quantitative measure of fairness and discrimination for resource
    allocation in shared computer systems", DEC Research Report TR-301, 1984.
    """
    squares = math.fsum(value * value for value in values)
    return math.fsum(values) ** 2 / (len(values) * squares) if squares else 1.0


COLUMNS = {
    "policy": "policy",
    "wait_mean_s": "mean wait",
    "wait_p50_s": "p50",
    "wait_p95_s": "p95",
    "wait_p99_s": "p99",
    "wait_max_s": "max",
    "took_mean_s": "mean total",
    "switches": "switches",
    "serving": "serving",
    "switching": "switching",
    "idle": "idle",
    "fairness": "fairness",
    "late": "late",
}


def table(rows: Iterable[Figures]) -> str:
    """Format figures, times in seconds, parts of the time in percent."""
    lines = [list(COLUMNS.values()), *([_cell(row, name) for name in COLUMNS] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cell(row: Figures, name: str) -> str:
    value = getattr(row, name)
    if name in ("serving", "switching", "idle"):
        return f"{value:.1%}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def as_dict(row: Figures) -> dict[str, object]:
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
