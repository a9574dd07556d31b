"""Environment variables that this process forgets, or keeps for itself.

Linux shows the variables that a process was started with to its user and to root, in
`/proc/PID/environ`, whatever becomes of them later. That file shows the process's own memory, so
they can be overwritten.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

STAT = Path("/proc/self/stat")
_ENV_START, _ENV_END = 50, 51
"""Fields of `/proc/PID/stat`, counted from 1: proc_pid_stat(5)."""


def forget(names: Iterable[str]) -> None:
    """Remove variables, and overwrite the values that this process was started with.

    Code that reads them other than through `os.environ` must have done so before. On systems other
    than Linux they are only removed.
    """
    found = {name for name in names if os.environ.pop(name, None) is not None}
    if found:
        _overwrite(found)


_aside: dict[str, str] = {}


def set_aside(names: Iterable[str]) -> None:
    """Remove variables whose values are still needed: only `value_of` returns them."""
    found = {name: os.environ[name] for name in names if name in os.environ}
    _aside.update(found)
    forget(found)


def value_of(name: str) -> str | None:
    """Return a variable's value, or the one it had when it was set aside; None without either."""
    return os.environ.get(name, _aside.get(name))


def _overwrite(names: Iterable[str]) -> None:
    block = _block()
    if block is None:
        return
    start, text = block
    wanted = b"|".join(re.escape(os.fsencode(name)) for name in names)
    for entry in re.finditer(rb"(?:^|\0)(?:" + wanted + rb")=([^\0]+)", text):
        ctypes.memset(start + entry.start(1), 0, len(entry[1]))


def _block() -> tuple[int, bytes] | None:
    """Return address and content of the variables as the kernel shows them; None if unknown."""
    with suppress(OSError, ValueError, IndexError):
        # The second field is the program's name, in parentheses; it may hold anything.
        fields = STAT.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        start, end = (int(fields[number - 3]) for number in (_ENV_START, _ENV_END))
        if 0 < start < end:
            return start, ctypes.string_at(start, end - start)
    return None
