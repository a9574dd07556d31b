"""Part `switch`: switches to models of several sizes, from every residency."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.report import Part, Table
from benchmarks.residency.checkpoints import HOME, LARGEST, Checkpoint, home
from benchmarks.residency.fit import Line, Point, least_squares, residual
from benchmarks.residency.limits import Limit, LimitMeter
from benchmarks.residency.remote import PHASES, STATES, Remote, Switch
from benchmarks.residency.steps import steps
from benchmarks.servers import Launcher
from benchmarks.stats import Bar, median, percentile

DISCARDED = 2
SETTLE_S = 0.5
"""Pause before the machine is measured: the server's threads spin for a while after a request."""

FITTED = ("cold", "discarded")
"""The residencies from which bytes must be read."""

LIMIT_FACTOR, LIMIT_CONSTANT_S = 2.5, 1.0
PARKED_P95_MS = 50.0
GB = 1e9


@dataclass(slots=True)
class Measured:
    """All samples of the part."""

    checkpoints: Sequence[Checkpoint]
    limits: Mapping[str, Limit]
    switches: list[Switch] = field(default_factory=list)

    def of(self, alias: str, state: str) -> list[Switch]:
        return [s for s in self.switches if (s.model, s.state) == (alias, state)]

    def cold_call_s(self, alias: str) -> float:
        return median([s.call_ms for s in self.of(alias, "cold")]) / 1000

    def bring_up(self, state: str) -> list[Point]:
        """Return bytes and median seconds of the phase `bring_up`, a point for each model."""
        return [
            (c.file_bytes, median([s.phases_ms["bring_up"] for s in self.of(c.alias, state)]) / 1e3)
            for c in self.checkpoints
        ]

    def fit(self, state: str) -> Line:
        return least_squares(self.bring_up(state))


async def measure(launcher: Launcher, checkpoints: Sequence[Checkpoint], rounds: int) -> Measured:
    """Measure each model from each residency once per round, so that a slow minute hits all."""
    meter = LimitMeter(checkpoints)
    await asyncio.to_thread(meter.warm_up)
    measured = Measured(checkpoints, meter.limits)
    models = [home().model(on_demand=False), *(c.model() for c in checkpoints)]
    turns = [(number, c.alias) for number in range(DISCARDED + rounds) for c in checkpoints]
    async with launcher.hotswap(*models) as server:
        remote = Remote(server.port)
        for number, alias in steps(turns, "switch: rounds of each model"):
            found = [await remote.switch_from(state, alias, HOME) for state in STATES]
            if number >= DISCARDED:
                measured.switches += found
                await asyncio.sleep(SETTLE_S)
                await asyncio.to_thread(meter.sample, alias)
    return measured


def part(measured: Measured) -> Part:
    tables = (
        _machine_table(measured),
        _switch_table(measured),
        _phase_table(measured),
        _fit_table(measured),
    )
    return Part("switch", tables, _bars(measured), _samples(measured))


def _machine_table(measured: Measured) -> Table:
    rows = []
    for c in measured.checkpoints:
        limit = measured.limits[c.alias]
        rows.append(
            (
                c.alias,
                f"{c.parameters / 1e6:.0f} M" if c.parameters else "",
                f"{c.file_bytes / GB:.4f}",
                f"{median(limit.read_s) * 1e3:.1f}",
                f"{median(limit.copy_s) * 1e3:.1f}",
                f"{limit.read_bandwidth / GB:.1f}",
                f"{limit.copy_bandwidth / GB:.1f}",
            )
        )
    columns = ("model", "weights", "GB", "read, ms", "copy, ms", "read, GB/s", "copy, GB/s")
    return Table("What this machine needs for the bytes alone", columns, tuple(rows))


def _switch_table(measured: Measured) -> Table:
    columns = ("model, from", "p50", "p95", "max", "first token", "both", "move down", "n")
    rows = []
    for c, state in itertools.product(measured.checkpoints, STATES):
        found = measured.of(c.alias, state)
        call = [s.call_ms for s in found]
        values = (median(call), percentile(call, 95), max(call))
        first = median([s.first_token_ms for s in found])
        both = median([s.call_ms + s.first_token_ms for s in found])
        down = median([s.down_ms for s in found])
        texts = [f"{value:.1f}" for value in (*values, first, both, down)]
        rows.append((f"{c.alias}, {state}", *texts, str(len(found))))
    return Table("Switch by residency, client's clock, ms", columns, tuple(rows))


def _phase_table(measured: Measured) -> Table:
    rows = []
    for c, state in itertools.product(measured.checkpoints, STATES):
        found = measured.of(c.alias, state)
        phases = [median([s.phases_ms[name] for s in found]) for name in PHASES]
        texts = [f"{value:.2f}" for value in phases]
        worst = max(s.phases_ms["bring_up"] for s in found)
        rows.append((f"{c.alias}, {state}", *texts, f"{worst:.1f}"))
    columns = ("model, from", *PHASES, "bring_up max")
    return Table("Phases of a switch, server's clock, p50, ms", columns, tuple(rows))


def _fit_table(measured: Measured) -> Table:
    limit = measured.limits[LARGEST]
    both = limit.file_bytes / limit.seconds
    rows = []
    for state in FITTED:
        line = measured.fit(state)
        texts = (
            f"{line.intercept * 1e3:.0f}",
            f"{line.bandwidth / GB:.2f}",
            f"{line.bandwidth / limit.read_bandwidth:.2f}",
            f"{line.bandwidth / limit.copy_bandwidth:.2f}",
            f"{line.bandwidth / both:.2f}",
            f"{residual(line, measured.bring_up(state)) * 1e3:.0f}",
        )
        rows.append((state, *texts))
    columns = ("from", "t0, ms", "GB/s", "/ read", "/ copy", "/ read+copy", "largest miss, ms")
    return Table("bring_up = t0 + bytes / bandwidth", columns, tuple(rows))


def _bars(measured: Measured) -> tuple[Bar, ...]:
    limit_s = LIMIT_FACTOR * measured.limits[LARGEST].seconds + LIMIT_CONSTANT_S
    name = f"cold switch, {LARGEST}, s ({LIMIT_FACTOR} x (read + copy) + {LIMIT_CONSTANT_S:g} s)"
    parked = [s.call_ms for c in measured.checkpoints for s in measured.of(c.alias, "parked")]
    return (
        Bar(name, measured.cold_call_s(LARGEST), round(limit_s, 3)),
        Bar("switch from parked, all models, p95, ms", percentile(parked, 95), PARKED_P95_MS),
    )


def _samples(measured: Measured) -> dict[str, Any]:
    return {
        "models": [
            {"model": c.alias, "parameters": c.parameters, "file_bytes": c.file_bytes}
            for c in measured.checkpoints
        ],
        "limits": {alias: asdict(limit) for alias, limit in measured.limits.items()},
        "fits": {state: asdict(measured.fit(state)) for state in FITTED},
        "switches": [asdict(switch) for switch in measured.switches],
    }
