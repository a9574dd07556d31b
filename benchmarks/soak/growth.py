"""What the server's processes hold while it is switched, and whether it grows."""

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
    """That have ended before."""
    host_pid: int
    all_loaded: bool
    """Every model is loaded: what one takes that is not, is no growth."""
    server: Use
    host: Use
    children: int
    """Processes below the server."""
    temp_files: int
    shm_files: int
    """In /dev/shm, whoever made them."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How one figure of one process grows."""

    name: str
    unit: str
    first: float
    last: float
    slope: Slope | None


def use(pid: int) -> Use:
    """Raises `psutil.Error` if the process is gone."""
    process = psutil.Process(pid)
    memory = process.memory_full_info()
    return Use(memory.rss, memory.uss, process.num_threads(), process.num_fds())


def sample(
    at_s: float, switches: int, pids: tuple[int, int], temp: Path, *, all_loaded: bool
) -> Sample | None:
    """Both processes now, the server's first; None if one of them is gone."""
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
    """Whatever lies below, sockets too; folders do not count."""
    found: list[Path] = []
    with contextlib.suppress(FileNotFoundError):  # somebody else's, removed meanwhile
        found += (path for path in folder.rglob("*") if not path.is_dir())
    return found


def settled(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The samples of each host that was warm, without those in which a model was not loaded."""
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
    """Each figure's growth per switch, between kills; first and last are of all warm samples."""
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
    """MiB by which the API process's USS is more with each host than with the one before.

    Between the medians of their warm samples, so that growth per switch is in it, too.
    """
    levels = [_middle([one.server.uss_bytes / MIB for one in s]) for s in settled(samples)]
    return [after - before for before, after in pairwise(levels)]


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
