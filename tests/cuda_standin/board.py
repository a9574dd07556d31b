"""The board of the stand-in: what the device holds, counts of calls, failures to order.

The layout is that of `standin.h`. The file is shared with all processes that use the device, so a
test can make a running server's driver fail.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

OUT_OF_MEMORY, UNKNOWN = 2, 999
"""CUresult."""


class _Owner(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("pid", "used", "reserved", "pinned", "handles", "streams")
    )


class _Count(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char * 56), ("calls", ctypes.c_int64))


class _Board(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_int64),
        ("others", ctypes.c_int64),
        ("fails_in", ctypes.c_int64),
        ("fail_code", ctypes.c_int64),
        ("failed", ctypes.c_int64),
        ("fail_name", ctypes.c_char * 56),
        ("owners", _Owner * 64),
        ("names", ctypes.c_int64),
        ("calls", _Count * 256),
    )


class Board:
    """The device as a test sees it. Sizes are bytes, of all processes together."""

    def __init__(self, path: Path) -> None:
        """Open the file; it may exist, or is made for a server that is yet to start."""
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(file, ctypes.sizeof(_Board))
            self._mapping = mmap.mmap(file, ctypes.sizeof(_Board))
        finally:
            os.close(file)
        self._board = _Board.from_buffer(self._mapping)

    @property
    def total(self) -> int:
        return int(self._board.total)

    @property
    def used(self) -> int:
        """Return bytes in use on the device, contexts and other processes included."""
        return self.others + self._sum("used")

    @property
    def reserved(self) -> int:
        """Return reserved addresses, with memory or without."""
        return self._sum("reserved")

    @property
    def pinned(self) -> int:
        """Return pinned host memory."""
        return self._sum("pinned")

    @property
    def handles(self) -> int:
        """Return pieces of physical memory that can be mapped."""
        return self._sum("handles")

    @property
    def streams(self) -> int:
        """Return streams made through the driver, as ours are; torch's come from the runtime."""
        return self._sum("streams")

    def books(self) -> dict[str, int]:
        """Return all counts."""
        return {
            name: getattr(self, name)
            for name in ("used", "reserved", "pinned", "handles", "streams")
        }

    def _sum(self, book: str) -> int:
        owners = (owner for owner in self._board.owners if owner.pid)
        return sum(getattr(owner, book) for owner in owners if psutil.pid_exists(owner.pid))

    @property
    def others(self) -> int:
        """Return memory that another process is said to hold."""
        return int(self._board.others)

    @others.setter
    def others(self, nbytes: int) -> None:
        self._board.others = nbytes

    def calls(self) -> dict[str, int]:
        """Return how often each function was called that can be made to fail."""
        counts: dict[str, int] = {}
        for count in self._board.calls[: self._board.names]:
            name = count.name.decode()
            counts[name] = counts.get(name, 0) + count.calls
        return counts

    @property
    def failed(self) -> int:
        """Return how many calls have failed by order."""
        return int(self._board.failed)

    @contextmanager
    def failing(self, call: str, place: int = 1, code: int = UNKNOWN) -> Iterator[None]:
        """Inside, let the `place`-th call of a function fail, once."""
        self._board.fails_in = 0
        self._board.fail_name, self._board.fail_code = call.encode(), code
        self._board.fails_in = place
        try:
            yield
        finally:
            self._board.fails_in = 0
