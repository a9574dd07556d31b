"""Giving memory that is free, but kept by the memory allocator, back to the operating system."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def give_back_free_memory() -> None:
    """Have this process's allocator return its free pages.

    Freed weights would otherwise stay in the process: tcmalloc, which vLLM advises to preload
    on CPU, returns memory slowly, and glibc only from the end of its heap.
    """
    if sys.platform != "linux":
        return
    process = ctypes.CDLL(None)
    with suppress(AttributeError):
        process.MallocExtension_ReleaseFreeMemory()
        return
    with suppress(AttributeError):  # a C library other than glibc
        process.malloc_trim(0)
