"""Part `residue`: how much of the host's memory a model takes in each residency."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.report import Part, Table
from benchmarks.residency.checkpoints import HOME, Checkpoint, home, tiny
from benchmarks.residency.processes import Held, held
from benchmarks.residency.remote import STATES, Remote
from benchmarks.residency.steps import steps
from benchmarks.servers import Launcher, Server
from benchmarks.stats import median

SETTLE_S = 2.5
"""Longer than the second without work after which the host does what may wait."""

MB = 1e6


@dataclass(frozen=True, slots=True)
class Reading:
    """The host's and the server's memory, with one model in one residency."""

    model: str
    state: str
    """A residency, or "without": before the model was first loaded."""
    used_bytes: int
    """Memory of the host, from /admin/status."""
    planned_bytes: int
    """What the server counts for the model."""
    host: Held
    server: Held
    """The API process, without the host."""


async def measure(
    launcher: Launcher, checkpoints: Sequence[Checkpoint], rounds: int
) -> list[Reading]:
    """Read memory for one model after the other, in one server: before it, in each residency."""
    first = tiny("first")
    models = [home().model(on_demand=False), first.model(), *(c.model() for c in checkpoints)]
    readings: list[Reading] = []
    async with launcher.hotswap(*models) as server:
        remote = Remote(server.port)
        # What the start has left is only given back after a load and an unload.
        await remote.switch_from("cold", first.alias, HOME)
        await remote.switch(HOME)
        await remote.operate(first.alias, "unload", {})
        for checkpoint in steps(checkpoints, "residue: models"):
            alias = checkpoint.alias
            readings.append(await read(remote, server, alias, "without"))
            for state in STATES * rounds:
                await remote.switch_from("parked", alias, HOME)
                await remote.switch(HOME)
                await remote.lower(alias, state)
                readings.append(await read(remote, server, alias, state))
            await remote.operate(alias, "unload", {})
    return readings


async def read(
    remote: Remote, server: Server, alias: str, state: str, settle_s: float = SETTLE_S
) -> Reading:
    """Read what is held now, after a pause."""
    await asyncio.sleep(settle_s)
    status = await remote.status()
    planned = status["models"][alias]["held"]
    return Reading(
        alias,
        state,
        status["host"]["used_bytes"],
        planned["device_bytes"] + planned["host_bytes"],
        held(status["host"]["pid"]),
        held(server.pid, without=status["host"]["pid"]),
    )


def part(checkpoints: Sequence[Checkpoint], readings: Sequence[Reading]) -> Part:
    tables = (
        Table(
            "The host's memory, minus what it was before the model's first load, MB",
            ("model", "weight files", *STATES, "parked, as planned"),
            tuple(_row(c, readings) for c in checkpoints),
        ),
        Table(
            "The API process, the same (the frontend stays)",
            ("model", *STATES),
            tuple(_server_row(c.alias, readings) for c in checkpoints),
        ),
    )
    samples: dict[str, Any] = {"readings": [asdict(reading) for reading in readings]}
    return Part("residue", tables, (), samples)


def _row(checkpoint: Checkpoint, readings: Sequence[Reading]) -> tuple[str, ...]:
    alias = checkpoint.alias
    before = _middle(readings, alias, "without", "used")
    added = [_middle(readings, alias, state, "used") - before for state in STATES]
    planned = _middle(readings, alias, "parked", "planned")
    texts = [f"{value / MB:.1f}" for value in (*added, planned)]
    return (alias, f"{checkpoint.file_bytes / MB:.1f}", *texts)


def _server_row(alias: str, readings: Sequence[Reading]) -> tuple[str, ...]:
    before = _middle(readings, alias, "without", "server")
    added = [_middle(readings, alias, state, "server") - before for state in STATES]
    return (alias, *(f"{value / MB:.1f}" for value in added))


def _middle(readings: Sequence[Reading], alias: str, state: str, what: str) -> float:
    chosen = [one for one in readings if (one.model, one.state) == (alias, state)]
    values = {
        "used": [one.used_bytes for one in chosen],
        "planned": [one.planned_bytes for one in chosen],
        "server": [one.server.anonymous_bytes for one in chosen],
    }
    return median(values[what])
