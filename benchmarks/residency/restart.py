"""Part `restart`: plain vLLM, from the start of its process, with the largest model."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.client import Connection
from benchmarks.load import completion
from benchmarks.report import Part, Table
from benchmarks.residency.checkpoints import KV_BYTES, Checkpoint, settings
from benchmarks.servers import Launcher
from benchmarks.stats import Bar, median

FACTOR = 10.0

log = logging.getLogger("benchmarks")


async def measure(
    launcher: Launcher, checkpoint: Checkpoint, runs: int
) -> list[tuple[float, float]]:
    """Return the seconds from each start to the first good `/health`, and to the first token."""
    model = replace(checkpoint.model(), settings=settings(KV_BYTES, on_demand=False))
    found = []
    for number in range(runs):
        log.info("restart: plain vLLM, %d of %d", number + 1, runs)
        async with launcher.plain(model) as server, Connection(server.port) as connection:
            await connection.stream(completion(model.alias, "Hello", 2))
            found.append((server.health_s, time.perf_counter() - server.started_s))
    return found


def part(alias: str, found: Sequence[tuple[float, float]], cold_call_s: float | None) -> Part:
    """Return the part; `cold_call_s` is the median cold switch to that model, if measured."""
    ready, first_token = [one for one, _ in found], [one for _, one in found]
    rows = [
        ("start to ready", f"{median(ready):.1f}", _each(ready)),
        ("start to first token", f"{median(first_token):.1f}", _each(first_token)),
    ]
    bars: tuple[Bar, ...] = ()
    if cold_call_s is not None:
        rows.append(("cold switch, same model", f"{cold_call_s:.2f}", ""))
        ratio = median(ready) / cold_call_s
        bars = (Bar(f"restart to ready / cold switch, {alias}", ratio, FACTOR, at_least=True),)
    table = Table(f"Restart of plain vLLM with {alias}, s", ("", "median", "each"), tuple(rows))
    return Part("restart", (table,), bars, {"ready_s": ready, "first_token_s": first_token})


def _each(values: Sequence[float]) -> str:
    return " ".join(f"{value:.1f}" for value in values)
