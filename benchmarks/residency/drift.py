"""Parts `drift` and `compiled`: does anything grow when a model is unloaded and loaded again?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from benchmarks.report import Part, Table
from benchmarks.residency.checkpoints import HOME, KV_BYTES, TINY, home, settings, tiny
from benchmarks.residency.fit import least_squares
from benchmarks.residency.processes import COUNTS
from benchmarks.residency.remote import Remote
from benchmarks.residency.residue import Reading, read
from benchmarks.residency.steps import steps
from benchmarks.servers import Launcher
from benchmarks.stats import median

WARM_UP = 10
MB = 1e6
WORDS = {
    "threads": "threads",
    "fds": "open files",
    "sockets": "sockets among them",
    "processes": "processes",
    "shm_mapped": "files of /dev/shm mapped",
}


@dataclass(slots=True)
class Drift:
    """Readings before and after all cycles, and the host's memory after each cycle."""

    before: Reading
    after: Reading
    used_bytes: list[int] = field(default_factory=list)
    cycle_s: list[float] = field(default_factory=list)
    load_ms: list[float] = field(default_factory=list)


async def measure(launcher: Launcher, cycles: int, warm_up: int, *, compiled: bool) -> Drift:
    """Repeat: unload a model, switch to it (which loads it), send one request, switch home."""
    model = replace(tiny().model(), settings=settings(KV_BYTES, compiled=compiled))
    async with launcher.hotswap(home().model(on_demand=False), model) as server:
        remote = Remote(server.port)
        for _ in steps(range(warm_up), "drift: warm-up cycles"):
            await _cycle(remote)
        before = await read(remote, server, TINY, "parked")
        drift = Drift(before, before)
        for _ in steps(range(cycles), "drift: cycles"):
            started_s = time.perf_counter()
            drift.load_ms.append(await _cycle(remote))
            drift.cycle_s.append(time.perf_counter() - started_s)
            drift.used_bytes.append((await remote.status())["host"]["used_bytes"])
        drift.after = await read(remote, server, TINY, "parked")
    return drift


async def _cycle(remote: Remote) -> float:
    """Run one cycle. Returns the milliseconds of the switch from cold."""
    switch = await remote.switch_from("cold", TINY, HOME)
    await remote.switch(HOME)
    return switch.call_ms


def part(name: str, drift: Drift) -> Part:
    cycles = len(drift.used_bytes)
    settled = drift.after.used_bytes - drift.before.used_bytes
    server = drift.after.server.anonymous_bytes - drift.before.server.anonymous_bytes
    rows = (
        ("host, slope over the cycles, MB per cycle", f"{slope(drift.used_bytes) / MB:+.3f}"),
        ("host, after minus before, MB per cycle", f"{settled / MB / cycles:+.3f}"),
        ("host, after minus before, MB", f"{settled / MB:+.1f}"),
        ("API process, after minus before, MB per cycle", f"{server / MB / cycles:+.3f}"),
        ("cold switch, first ten, p50, ms", f"{median(drift.load_ms[:10]):.0f}"),
        ("cold switch, last ten, p50, ms", f"{median(drift.load_ms[-10:]):.0f}"),
    )
    tables = (
        Table(f"{name}: {cycles} cycles of unload and load", ("", "value"), rows),
        Table(f"{name}: what is held", ("", "before", "after", "more"), _count_rows(drift)),
    )
    return Part(name, tables, (), asdict(drift))


def slope(values: Sequence[float]) -> float:
    """Return the growth per step, by least squares; 0 for fewer than two values."""
    points = [(float(number), value) for number, value in enumerate(values)]
    return least_squares(points).slope if len(points) > 1 else 0.0


def _count_rows(drift: Drift) -> tuple[tuple[str, ...], ...]:
    rows = []
    for who, name in (("host", "host"), ("API process", "server")):
        before, after = asdict(getattr(drift.before, name)), asdict(getattr(drift.after, name))
        rows += [_count_row(f"{who}: {WORDS[count]}", before, after, count) for count in COUNTS]
    before, after = asdict(drift.before.host), asdict(drift.after.host)
    rows.append(_count_row("files in /dev/shm, of all programs", before, after, "shm_files"))
    return tuple(rows)


def _count_row(
    text: str, before: Mapping[str, int], after: Mapping[str, int], name: str
) -> tuple[str, ...]:
    return (text, str(before[name]), str(after[name]), f"{after[name] - before[name]:+d}")
