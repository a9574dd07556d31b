"""The library with the device (`device.cpp`), and its counts."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import NamedTuple

import torch

LIBRARY, ABSENT = "FAKEHPU_LIBRARY", "FAKEHPU_ABSENT"


class Books(NamedTuple):
    """Bytes, except `pieces` (held now) and `allocations` (ever made)."""

    limit: int
    held: int
    peak: int
    pieces: int
    allocations: int
    to_host: int
    to_device: int


def is_absent() -> bool:
    """Return whether Intel's software is to find no device."""
    return ABSENT in os.environ


@functools.cache
def load() -> ctypes.CDLL:
    """Load it. Raises `ImportError` if the library has not been built."""
    path = Path(os.environ.get(LIBRARY, ""))
    if not path.is_file():
        raise ImportError(
            f"the stand-in's library is not built: {LIBRARY} is '{path}'; "
            "build it with: python -m tests.gaudi_standin.build FOLDER"
        )
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def books() -> Books:
    values = (ctypes.c_uint64 * len(Books._fields))()
    load().fakehpu_read(values)
    return Books(*values)


def acquire() -> None:
    """Take the device. Raises `RuntimeError`, as Intel's does, if there is none or it is taken."""
    if not load().fakehpu_acquire():
        raise RuntimeError("synStatus=8 [Device not found] Device acquire failed.")


def reset_peak() -> None:
    load().fakehpu_reset_peak()
