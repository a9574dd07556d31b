"""CPU cores for test servers that run side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

ALL_CORES = frozenset(os.sched_getaffinity(0))


def share_of_cores() -> frozenset[int]:
    """Return this worker's cores, where several workers run tests side by side.

    Threads of two engine hosts that wait for each other on the same cores would take turns in
    slices of milliseconds.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    if not 1 < workers <= len(ALL_CORES):
        return ALL_CORES
    return frozenset(sorted(ALL_CORES)[number % workers :: workers])


@contextmanager
def on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Restrict what is started inside to these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    yield
    os.sched_setaffinity(0, before)
