"""Threads that do not compute, and the binding that they must not inherit.

OpenMP binds the first thread of the process to one core when its library is loaded, before Python
runs, and threads inherit the binding of whoever starts them. An IO thread on the compute thread's
core would wait for it, so the parent says which cores there are, and IO threads go back to them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

_cores: frozenset[int] = frozenset()


def remember_cores(cores: Iterable[int]) -> None:
    """Note the cores that `use_all_cores` is to give back; none: change nothing."""
    global _cores  # noqa: PLW0603  # said once, when the process starts
    _cores = frozenset(cores)


def use_all_cores() -> None:
    """Undo the inherited binding for the calling thread, and for threads that it starts."""
    if _cores:
        os.sched_setaffinity(0, _cores)
