"""What the machine itself can do with a model's bytes: read its files, copy them once.

Both into memory that has been touched before, on one thread: the shortest time in which any
server could bring the bytes up. Files have been read before, so they come from the page cache.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.residency.checkpoints import Checkpoint
from benchmarks.stats import median


@dataclass(frozen=True, slots=True)
class Limit:
    """Seconds for one model's bytes, each sample a whole pass over them."""

    file_bytes: int
    read_s: list[float] = field(default_factory=list)
    copy_s: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The median time to read, plus the median time to copy."""
        return median(self.read_s) + median(self.copy_s)

    @property
    def read_bandwidth(self) -> float:
        return self.file_bytes / median(self.read_s)

    @property
    def copy_bandwidth(self) -> float:
        return self.file_bytes / median(self.copy_s)


class LimitMeter:
    """Measures the limits of several models, one sample of each at a time.

    Its mutable state is the samples, and two buffers as large as the largest model's files.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._files = {c.alias: c.files for c in checkpoints}
        self.limits: Mapping[str, Limit] = {c.alias: Limit(c.file_bytes) for c in checkpoints}
        largest = max(c.file_bytes for c in checkpoints)
        # Written to, not only allocated: the first touch of a page takes the kernel time.
        self._read = np.full(largest, 1, np.uint8)
        self._copied = np.full(largest, 1, np.uint8)

    def warm_up(self) -> None:
        """Bring all files into the page cache."""
        for files in self._files.values():
            self._read_all(files)

    def sample(self, alias: str) -> None:
        """Read one model's files and copy the bytes, once."""
        limit, started_s = self.limits[alias], time.perf_counter()
        self._read_all(self._files[alias])
        read_s = time.perf_counter()
        np.copyto(self._copied[: limit.file_bytes], self._read[: limit.file_bytes])
        limit.read_s.append(read_s - started_s)
        limit.copy_s.append(time.perf_counter() - read_s)

    def _read_all(self, files: Sequence[Path]) -> None:
        place = memoryview(self._read)  # type: ignore[arg-type]  # numpy arrays are buffers
        for path in files:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(place):
                    place = place[count:]
