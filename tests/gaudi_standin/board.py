"""The counts of all processes that have the stand-in's device: the folder FAKEHPU_BOARD."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Counts:
    """Bytes, except `pieces` (held now) and `allocations` (ever made). As they lie in the file."""

    limit: int
    held: int
    peak: int
    pieces: int
    allocations: int
    to_host: int
    to_device: int


FORMAT = struct.Struct("=7Q")


def read(folder: Path) -> dict[int, Counts]:
    """Return the counts of every living process, by its number."""
    files = ((int(path.name), path) for path in folder.iterdir() if path.name.isdigit())
    return {
        pid: Counts(*FORMAT.unpack(path.read_bytes()[: FORMAT.size]))
        for pid, path in files
        if psutil.pid_exists(pid)
    }


def held_bytes(folder: Path) -> int:
    return sum(counts.held for counts in read(folder).values())
