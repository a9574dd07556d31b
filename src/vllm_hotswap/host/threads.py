"""Threads that do not compute, and the binding that they must not inherit.

OpenMP binds the first thread of the process to one core when its library is loaded, before Python
runs. Threads inherit the binding of the thread that starts them. An IO thread on the compute
thread's core would wait for it. So the parent passes the list of cores, and IO threads use all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

_cores: frozenset[int] = frozenset()


def remember_cores(cores: Iterable[int]) -> None:
    """Note the cores that `use_all_cores` restores; with none, it changes nothing."""
    global _cores  # noqa: PLW0603  # set once, when the process starts
    _cores = frozenset(cores)


def use_all_cores() -> None:
    """Undo the inherited binding for the calling thread, and for threads that it starts."""
    if _cores:
        os.sched_setaffinity(0, _cores)
