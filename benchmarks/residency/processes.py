"""What processes hold, from /proc: memory, threads, open files, children."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PROC = Path("/proc")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # listed, not written


@dataclass(frozen=True, slots=True)
class Held:
    """What some processes hold together."""

    anonymous_bytes: int
    """Resident memory that no file backs, shared memory included."""
    file_bytes: int
    """Resident pages of files: libraries, and mapped weights."""
    threads: int
    fds: int
    sockets: int
    processes: int
    shm_mapped: int
    """Mapped files of /dev/shm."""
    shm_files: int
    """Files in /dev/shm, of all processes."""


COUNTS = ("threads", "fds", "sockets", "processes", "shm_mapped")
"""What a process may leak besides memory."""


def held(pid: int, without: int | None = None) -> Held:
    """Return what a process and its descendants hold, except `without` and its descendants."""
    left_out = set(_family(without)) if without is not None else set()
    family = [member for member in _family(pid) if member not in left_out]
    status = [fields((PROC / str(member) / "status").read_text()) for member in family]
    links = [link for member in family for link in _links(member)]
    mapped = {path for member in family for path in _shared_maps(member)}
    return Held(
        anonymous_bytes=_kib(status, ("RssAnon", "RssShmem")),
        file_bytes=_kib(status, ("RssFile",)),
        threads=sum(int(one["Threads"]) for one in status),
        fds=len(links),
        sockets=sum(link.startswith("socket:") for link in links),
        processes=len(family),
        shm_mapped=len(mapped),
        shm_files=sum(1 for _ in SHARED_MEMORY.iterdir()) if SHARED_MEMORY.is_dir() else 0,
    )


def fields(text: str) -> dict[str, str]:
    """Return the fields of a `/proc/PID/status`."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _family(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def _kib(status: Sequence[dict[str, str]], names: Sequence[str]) -> int:
    return 1024 * sum(int(one[name].split()[0]) for one in status for name in names if name in one)


def _links(pid: int) -> list[str]:
    links = []
    for entry in (PROC / str(pid) / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed since
            links.append(str(entry.readlink()))
    return links


def _shared_maps(pid: int) -> set[str]:
    lines = (PROC / str(pid) / "maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if f" {SHARED_MEMORY}/" in line}
