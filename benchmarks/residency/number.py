"""Part `number`: switches between loaded models, by how many are loaded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from benchmarks.report import Part, Table
from benchmarks.residency.checkpoints import TINY_KV_BYTES, tiny
from benchmarks.residency.fit import least_squares
from benchmarks.residency.remote import Remote
from benchmarks.residency.steps import steps
from benchmarks.servers import Launcher
from benchmarks.stats import percentile, summarize

FEWEST, MOST = 2, 8
DISCARDED = 4

Calls = Mapping[int, list[float]]


async def measure(launcher: Launcher, switches: int) -> Calls:
    """Do half of the switches while models are added, the other half while they are removed."""
    aliases = [f"m{number}" for number in range(1, MOST + 1)]
    models = [
        tiny(alias).model(on_demand=alias != aliases[0], kv_bytes=TINY_KV_BYTES)
        for alias in aliases
    ]
    calls: dict[int, list[float]] = {number: [] for number in range(FEWEST, MOST + 1)}
    async with launcher.hotswap(*models) as server:
        remote = Remote(server.port)
        for number in steps([*calls, *reversed(calls)], "number: loaded models"):
            await remote.switch(aliases[0])
            for place, alias in enumerate(aliases[1:], 1):
                await remote.operate(alias, "load" if place < number else "unload", {})
            calls[number] += await _switches(remote, aliases[:number], switches // 2)
    return calls


async def _switches(remote: Remote, aliases: list[str], count: int) -> list[float]:
    turns = itertools.cycle([*aliases[1:], aliases[0]])
    found = [(await remote.switch(next(turns)))[0] for _ in range(DISCARDED + count)]
    return found[DISCARDED:]


def part(calls: Calls) -> Part:
    rows = []
    for number, found in calls.items():
        summary = summarize(found)
        values = (summary.p50, summary.p95, summary.maximum)
        rows.append((str(number), *(f"{value:.2f}" for value in values), str(summary.count)))
    columns = ("loaded", "p50", "p95", "max", "n")
    tables = (
        Table("Switch between parked models, ms", columns, tuple(rows)),
        Table("Is it flat?", ("", "p50", "p95"), _flatness(calls)),
    )
    return Part("number", tables, (), {"call_ms": {str(n): found for n, found in calls.items()}})


def _flatness(calls: Calls) -> tuple[tuple[str, str, str], ...]:
    ratios, slopes = [], []
    for percent in (50, 95):
        points = [(float(n), percentile(found, percent)) for n, found in calls.items()]
        slopes.append(f"{least_squares(points).slope:+.3f}")
        ratios.append(f"{points[-1][1] / points[0][1]:.2f}")
    return (
        (f"{MOST} models / {FEWEST} models", ratios[0], ratios[1]),
        ("ms per additional model (least squares)", slopes[0], slopes[1]),
    )
