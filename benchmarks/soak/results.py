"""The results of a soak: as checks, as tables, and as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from benchmarks.report import SUMMARY_COLUMNS, Part, Table, summary_row
from benchmarks.soak.growth import Growth, growth_per_restart, growths, settled
from benchmarks.soak.ledger import Ledger, Outcome
from benchmarks.soak.run import Run
from benchmarks.soak.runner import Found
from benchmarks.stats import Slope, summarize

MAX_SAMPLES = 150
"""How many samples of the processes are kept."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Check:
    """A count that must be 0."""

    name: str
    count: int


def checks(found: Found) -> list[Check]:
    """Return all counts that must be 0."""
    run, ledger = found.run, found.run.ledger
    counts = {f"requests {one.value}": ledger.total(one) for one in Outcome if one.is_fault}
    return [
        *(Check(name, count) for name, count in counts.items()),
        Check("requests without an outcome", ledger.unaccounted),
        Check("outputs with a wrong stamp", _counted(found, "hotswap_outputs_refused_total")),
        Check("kills without a recovery", sum(1 for kill in run.kills if kill.answered_s is None)),
        Check("unexpected restarts", _unasked_restarts(found)),
        Check("exit status after SIGTERM", 1 if found.exit_status is None else found.exit_status),
        Check("processes left behind", found.processes_left),
        Check("other problems", len(run.problems)),
        *(Check(f"no {what}", 1) for what in missing(run)),
    ]


def missing(run: Run) -> list[str]:
    """Return what did not happen, but must have for the zeros to mean anything."""
    happened: Mapping[str, object] = {
        "switch": run.switched,
        "stream answered": run.ledger.count("stream", Outcome.ANSWERED),
        "whole answer": run.ledger.count("whole answer", Outcome.ANSWERED),
        "embedding": run.ledger.count("embedding", Outcome.ANSWERED),
        "client that left": run.ledger.total(Outcome.LEFT),
        "kill": run.kills or not run.plan.kill_every_s,
        "parked stream that was resumed": run.ledger.parked[Outcome.ANSWERED]
        or "park" not in run.plan.policies,
    }
    return [what for what, value in happened.items() if not value]


def part(found: Found) -> Part:
    """Return the tables, and the data to keep."""
    run = found.run
    tables = (
        Table("Soak: what must be 0", ("", "count"), _check_rows(checks(found))),
        Table("Requests", ("", *(one.value for one in Outcome)), outcome_rows(run.ledger)),
        Table("Errors, by code", ("code", "requests"), _counter_rows(run.ledger.codes)),
        Table("The run", ("", "value"), _run_rows(found)),
        Table("Switches, ms", ("", *SUMMARY_COLUMNS), _switch_rows(run)),
        Table("Recovery, s from the signal", _KILL_COLUMNS, _kill_rows(run)),
        Table("Growth between kills, when warm", _GROWTH_COLUMNS, _growth_rows(run)),
    )
    return Part("soak", tables, (), samples_of(found))


def samples_of(found: Found) -> dict[str, Any]:
    """Return what is kept of a run: all totals, and the processes' samples, thinned out."""
    run = found.run
    return {
        "plan": asdict(run.plan),
        "elapsed_s": run.elapsed_s,
        "checks": {check.name: check.count for check in checks(found)},
        "requests": {
            kind: {one.value: run.ledger.count(kind, one) for one in Outcome}
            for kind in run.ledger.kinds
        },
        "errors": dict(run.ledger.codes.most_common()),
        "streams_that_were_parked": {o.value: n for o, n in run.ledger.parked.items()},
        "longest_request_s": run.ledger.longest_s,
        "faults": run.ledger.faults,
        "problems": run.problems,
        "kills": [asdict(kill) for kill in run.kills],
        "counters": dict(found.counters),
        "growth": [asdict(growth) for growth in growths(run.samples)],
        "growth_per_restart_mib": growth_per_restart(run.samples),
        "left": {"temp": found.temp_left, "shm": found.shm_left, "exit": found.exit_status},
        "processes": [asdict(one) for one in thin(run.samples, MAX_SAMPLES)],
    }


def thin(items: Sequence[T], limit: int) -> list[T]:
    """Return at most about `limit` of the items, evenly spaced."""
    return list(items[:: -(-len(items) // limit) or 1])


# --- rows -------------------------------------------------------------------------------

Rows = tuple[tuple[str, ...], ...]

_KILL_COLUMNS = ("signal, phase", "noticed", "/ready", "first answer")
_GROWTH_COLUMNS = ("", "first", "last", "per 1000 switches", "95 % upper bound", "samples")


def outcome_rows(ledger: Ledger) -> Rows:
    rows = [(kind, *(str(ledger.count(kind, one)) for one in Outcome)) for kind in ledger.kinds]
    return (*rows, ("all", *(str(ledger.total(one)) for one in Outcome)))


def _check_rows(found: Sequence[Check]) -> Rows:
    return tuple((check.name, str(check.count)) for check in found)


def _counter_rows(counter: Counter[str]) -> Rows:
    return tuple((name, str(count)) for name, count in counter.most_common())


def _run_rows(found: Found) -> Rows:
    run, ledger = found.run, found.run.ledger
    ended = sum(ledger.counts.values())
    refused = ledger.total(Outcome.REFUSED)
    policies = Counter(one.policy for one in run.switched.values())
    values = {
        "seconds": f"{run.elapsed_s:.0f}",
        "seed": str(run.plan.seed),
        "clients": str(run.plan.clients),
        "switches": str(len(run.switched)),
        **{f"switches with {policy}": str(count) for policy, count in sorted(policies.items())},
        "requests and calls": str(ended),
        "of them accepted": str(ended - refused),
        "requests cut at a drain's deadline": str(
            sum(one.requests_cut for one in run.switched.values())
        ),
        "requests parked": str(sum(one.requests_parked for one in run.switched.values())),
        "parked streams that were completed, identical": str(ledger.parked[Outcome.ANSWERED]),
        "parked streams that ended with an error": str(ledger.parked[Outcome.FAILED]),
        "longest request, s": f"{ledger.longest_s:.1f}",
        "kills": str(len(run.kills)),
        "temporary files left": str(len(found.temp_left)),
        "files in /dev/shm left, of all programs": str(found.shm_left),
        "API process: USS growth per restart of the host, MiB": " ".join(
            f"{value:+.1f}" for value in growth_per_restart(run.samples)
        ),
        "hosts that were warm": str(len(settled(run.samples))),
    }
    return tuple(values.items())


def _switch_rows(run: Run) -> Rows:
    switched = list(run.switched.values())
    if not switched:
        return ()
    named = {"whole": [one.duration_ms for one in switched]}
    for phase in dict.fromkeys(phase for one in switched for phase in one.phases_ms):
        named[phase] = [o.phases_ms[phase] for o in switched if phase in o.phases_ms]
    return tuple(summary_row(name, summarize(values)) for name, values in named.items())


def _kill_rows(run: Run) -> Rows:
    rows = [
        (
            f"{kill.signal}, {kill.phase}",
            *map(_seconds, (kill.noticed_s, kill.ready_s, kill.answered_s)),
        )
        for kill in run.kills
    ]
    for name, pick in (("median", 0), ("max", 1)):
        figures = []
        for what in ("noticed_s", "ready_s", "answered_s"):
            known = [getattr(k, what) for k in run.kills if getattr(k, what) is not None]
            found = summarize(known) if known else None
            figures.append(_seconds((found.p50, found.maximum)[pick] if found else None))
        rows.append((name, *figures))
    return tuple(rows)


def _growth_rows(run: Run) -> Rows:
    return tuple(_growth_row(growth) for growth in growths(run.samples))


def _growth_row(growth: Growth) -> tuple[str, ...]:
    name = f"{growth.name}, {growth.unit}" if growth.unit else growth.name
    return (name, f"{growth.first:.1f}", f"{growth.last:.1f}", *_slope(growth.slope))


def _slope(slope: Slope | None) -> tuple[str, ...]:
    if slope is None:
        return ("", "", "too few")
    return (f"{slope.value * 1000:+.2f}", f"{slope.upper * 1000:+.2f}", str(slope.points))


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f}"


def _counted(found: Found, name: str) -> int:
    return round(found.counters.get(name, 0.0))


def _unasked_restarts(found: Found) -> int:
    return max(0, _counted(found, "hotswap_host_restarts_total") - len(found.run.kills))
