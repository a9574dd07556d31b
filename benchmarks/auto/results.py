"""Tables and bars of the mode `auto`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.auto.agreement import Simulated
from benchmarks.auto.play import Played
from benchmarks.auto.run import Case, Found
from benchmarks.auto.workloads import WORKLOADS
from benchmarks.report import Part, Table
from benchmarks.stats import Bar, median, percentile

MAX_SWITCHES = 0.25
"""The most switches of `batch`, as a fraction of those of `fifo`, if models are interleaved."""
MAX_DEVIATION = 0.15

FIGURES: Mapping[str, Callable[[Played], float]] = {
    "switches": lambda played: played.switches,
    "mean wait, s": lambda played: sum(played.waits_s) / len(played.waits_s),
    "p50, s": lambda played: percentile(played.waits_s, 50),
    "p95, s": lambda played: percentile(played.waits_s, 95),
    "p99, s": lambda played: percentile(played.waits_s, 99),
    "total, s": lambda played: played.total_s,
}
"""Figures of one trace, played once."""

RATIOS = ("switches", "mean wait, s", "p95, s", "total, s")

NAMES = {
    "burst": "interleaved burst",
    "agents": "alternating agents",
    "zipf": "Zipf, Poisson arrivals",
}


def part(found: Found) -> Part:
    """Return all tables and bars."""
    costs = list(dict.fromkeys(case.cost for case in found.played))
    tables = [_figures(found, cost) for cost in costs]
    tables += [_ratios(found, costs), _errors(found)]
    tables.append(_agreement(found))
    samples = {
        f"{case.cost}/{case.workload}/{case.policy}": {
            "played": [_as_dict(played) for played in all_played],
            "simulated": [asdict(one) for one in found.simulated.get(case, [])],
        }
        for case, all_played in found.played.items()
    }
    return Part("auto", tuple(tables), tuple(_bars(found, costs)), samples)


def _as_dict(played: Played) -> dict[str, Any]:
    return {
        "switches": played.switches,
        "total_s": played.total_s,
        "errors": played.errors,
        "not_golden": sum(not outcome.matches_reference for outcome in played.outcomes),
        "waits_s": played.waits_s,
    }


def _figures(found: Found, cost: str) -> Table:
    cases = [case for case in found.played if case.cost == cost]
    cases.sort(key=lambda case: list(WORKLOADS).index(case.workload))
    rows = tuple(
        (
            f"{NAMES[case.workload]}, {case.policy}",
            str(len(found.played[case][0].outcomes)),
            *(_spread([figure(one) for one in found.played[case]]) for figure in FIGURES.values()),
        )
        for case in cases
    )
    return Table(
        f"Waits at {cost} switches ({_where(found, cases)}): medians of runs, and their range",
        ("", "requests", *FIGURES),
        rows,
    )


def _where(found: Found, cases: Sequence[Case]) -> str:
    """Return in which residencies switches have found their targets."""
    counts: dict[str, int] = {}
    for case in cases:
        for one in found.simulated.get(case, []):
            for name, count in one.residencies.items():
                counts[name] = counts.get(name, 0) + count
    whole = sum(counts.values())
    return ", ".join(f"{count / whole:.0%} from {name}" for name, count in counts.items())


def _spread(values: Sequence[float]) -> str:
    middle, digits = median(values), 0 if all(float(v).is_integer() for v in values) else 3
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _pairs(found: Found, cost: str, workload: str, figure: str) -> list[float]:
    """Return the ratio of batch to fifo, for each repetition."""
    of = FIGURES[figure]
    fifo, batch = (found.played[Case(cost, workload, name)] for name in ("fifo", "batch"))
    return [of(b) / of(f) if of(f) else 1.0 for f, b in zip(fifo, batch, strict=True)]


def _ratios(found: Found, costs: Sequence[str]) -> Table:
    rows = tuple(
        (
            f"{NAMES[workload]}, {cost}",
            *(_spread(_pairs(found, cost, workload, figure)) for figure in RATIOS),
        )
        for cost in costs
        for workload in WORKLOADS
    )
    return Table("batch / fifo, of each pair of runs", ("", *RATIOS), rows)


def _errors(found: Found) -> Table:
    rows = []
    for case, runs in found.played.items():
        outcomes = [outcome for played in runs for outcome in played.outcomes]
        wrong = sum(outcome.error is not None for outcome in outcomes)
        reference = sum(outcome.matches_reference for outcome in outcomes)
        name = f"{NAMES[case.workload]}, {case.cost}, {case.policy}"
        rows.append((name, str(len(outcomes)), str(wrong), str(reference)))
    columns = ("", "answers", "errors, or not of the named model", "word for word as alone")
    return Table("Answers", columns, tuple(rows))


@dataclass(frozen=True, slots=True)
class Compared:
    """A figure of the server, and that of the simulator."""

    real: float
    simulated: float

    @property
    def deviation(self) -> float:
        """The difference, as a fraction of the real figure."""
        return (self.simulated - self.real) / self.real if self.real else self.simulated

    def __str__(self) -> str:
        return f"{self.deviation:+.0%}"


def waits(run: Simulated) -> Compared:
    return Compared(run.recorded_mean_wait_s, run.mean_wait_s)


def switches(run: Simulated) -> Compared:
    return Compared(run.recorded_switches, run.switches)


def medians(runs: Sequence[Compared]) -> Compared:
    """Return the medians of all runs: the server's differ, and the simulator aims at the middle."""
    return Compared(median([run.real for run in runs]), median([run.simulated for run in runs]))


def _agreement(found: Found) -> Table:
    columns = ["", "mean wait, s", "simulated", "off by", "each", "switches", "simulated", "off by"]
    rows = []
    for case, runs in found.simulated.items():
        row = [f"{NAMES[case.workload]}, {case.cost}, {case.policy}"]
        for figure, digits in ((waits, 3), (switches, 0)):
            each = [figure(run) for run in runs]
            middle = medians(each)
            row += [f"{middle.real:.{digits}f}", f"{middle.simulated:.{digits}f}", str(middle)]
            row.append(", ".join(map(str, each)))
        rows.append(tuple(row))
    return Table("The simulator and the server", (*columns, "each"), tuple(rows))


def _bars(found: Found, costs: Sequence[str]) -> Iterator[Bar]:
    errors = sum(len(played.errors) for runs in found.played.values() for played in runs)
    yield Bar("errors", errors, 0)
    for cost in costs:
        fewer, shorter = (
            median(_pairs(found, cost, "burst", figure)) for figure in ("switches", "p95, s")
        )
        yield Bar(f"burst, {cost}: switches, batch / fifo", fewer, MAX_SWITCHES)
        yield Bar(f"burst, {cost}: p95 wait, batch / fifo", shorter, 1.0)
    for case, runs in found.simulated.items():
        name = f"simulator, {case.cost} {case.workload} {case.policy}"
        for told, figure in (("mean wait", waits), ("switches", switches)):
            off = medians([figure(run) for run in runs]).deviation
            yield Bar(f"{name}: {told}, off by", abs(off), MAX_DEVIATION)
