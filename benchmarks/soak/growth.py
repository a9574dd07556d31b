"""What the server's processes hold during switches, and whether it grows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import psutil

from benchmarks.residency.processes import SHARED_MEMORY
from benchmarks.stats import Slope, pooled_slope

WARM_UP_SWITCHES = 20
"""Switches after which a host that has all models counts as warm."""


@dataclass(frozen=True, slots=True)
class Use:
    """What one process holds."""

    rss_bytes: int
    uss_bytes: int
    threads: int
    fds: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Both processes, at one moment."""

    at_s: float
    switches: int
    """Switches that have ended before."""
    host_pid: int
    all_loaded: bool
    """Whether every model is loaded: if not, a later load would look like growth."""
    server: Use
    host: Use
    children: int
    """Processes below the server."""
    temp_files: int
    shm_files: int
    """Files in /dev/shm, of all processes."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How one figure of one process grows."""

    name: str
    unit: str
    first: float
    last: float
    slope: Slope | None


def use(pid: int) -> Use:
    """Return what a process holds. Raises `psutil.Error` if it is gone."""
    process = psutil.Process(pid)
    memory = process.memory_full_info()
    return Use(memory.rss, memory.uss, process.num_threads(), process.num_fds())


def sample(
    at_s: float, switches: int, pids: tuple[int, int], temp: Path, *, all_loaded: bool
) -> Sample | None:
    """Sample both processes now, the server's first; None if one of them is gone."""
    server_pid, host_pid = pids
    try:
        return Sample(
            at_s=at_s,
            switches=switches,
            host_pid=host_pid,
            all_loaded=all_loaded,
            server=use(server_pid),
            host=use(host_pid),
            children=len(psutil.Process(server_pid).children(recursive=True)),
            temp_files=len(files_in(temp)),
            shm_files=len(files_in(SHARED_MEMORY)),
        )
    except psutil.Error:
        return None


def files_in(folder: Path) -> list[Path]:
    """Return all files below a folder, sockets too, but not folders."""
    found: list[Path] = []
    with contextlib.suppress(FileNotFoundError):  # removed by another process since
        found += (path for path in folder.rglob("*") if not path.is_dir())
    return found


def settled(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Return the samples of each warm host, without those in which a model was not loaded."""
    segments = []
    for _, group in groupby(samples, key=lambda one: one.host_pid):
        loaded = [one for one in group if one.all_loaded]
        warm = [one for one in loaded if one.switches - loaded[0].switches >= WARM_UP_SWITCHES]
        if warm:
            segments.append(warm)
    return segments


Read = Callable[[Sample], float]
MIB = 1 << 20
FIGURES: Sequence[tuple[str, str, Read]] = (
    ("host: USS", "MiB", lambda one: one.host.uss_bytes / MIB),
    ("host: RSS", "MiB", lambda one: one.host.rss_bytes / MIB),
    ("host: threads", "", lambda one: one.host.threads),
    ("host: open files", "", lambda one: one.host.fds),
    ("API process: USS", "MiB", lambda one: one.server.uss_bytes / MIB),
    ("API process: RSS", "MiB", lambda one: one.server.rss_bytes / MIB),
    ("API process: threads", "", lambda one: one.server.threads),
    ("API process: open files", "", lambda one: one.server.fds),
    ("processes below the server", "", lambda one: one.children),
    ("temporary files", "", lambda one: one.temp_files),
    ("files in /dev/shm, of all programs", "", lambda one: one.shm_files),
)


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Return each figure's growth per switch, between kills; first and last of warm samples."""
    segments = settled(samples)
    if not segments:
        return []
    first, last = segments[0][0], segments[-1][-1]
    return [
        Growth(
            name,
            unit,
            read(first),
            read(last),
            pooled_slope([[(float(o.switches), read(o)) for o in segment] for segment in segments]),
        )
        for name, unit, read in FIGURES
    ]


def growth_per_restart(samples: Sequence[Sample]) -> list[float]:
    """Return how many MiB the API process's USS grows from each host to the next.

    Between the medians of their warm samples, so that growth per switch is included.
    """
    levels = [_middle([one.server.uss_bytes / MIB for one in s]) for s in settled(samples)]
    return [after - before for before, after in pairwise(levels)]


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
