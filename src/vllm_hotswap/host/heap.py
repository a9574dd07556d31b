"""Gives back free memory that allocators keep: the host's and CUDA's."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
"""Parameters of glibc's mallopt(3)."""

MAPPED_BYTES = 1 << 20
"""From this size on, a block has a mapping of its own while weights are read."""

STEPPING_BYTES = 32 << 20
"""The same at other times: the most that glibc sets by itself, so that steps reuse memory."""


def give_back_free_memory() -> None:
    """Make this process's allocators return free memory.

    Freed weights would otherwise stay in the process: tcmalloc, which vLLM advises to preload
    on CPU, returns memory slowly, and glibc only from the end of its heap. Torch keeps the free
    memory of a CUDA device, so that neither other processes nor separate pools can use it.
    """
    _empty_cuda_cache()
    if sys.platform != "linux":
        return
    process = ctypes.CDLL(None)
    with suppress(AttributeError):
        process.MallocExtension_ReleaseFreeMemory()
        return
    with suppress(AttributeError):  # a C library other than glibc
        process.malloc_trim(0)


def _empty_cuda_cache() -> None:
    torch = sys.modules.get("torch")  # without it, the process has nothing on a device
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def large_blocks_mapped() -> Iterator[None]:
    """Inside, return the memory of a freed tensor to the operating system at once.

    glibc raises its threshold to the largest block that was ever freed. From then on, tensors come
    from the heap, where each one freed between two live ones leaves a hole. A load held up to
    200 MiB more than its weights for a while; with this, 16 MiB.
    """
    _set_thresholds(MAPPED_BYTES)
    try:
        yield
    finally:
        _set_thresholds(STEPPING_BYTES)


def _set_thresholds(mapped_bytes: int) -> None:
    if sys.platform != "linux":
        return
    with suppress(AttributeError):  # a C library other than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, mapped_bytes)
        mallopt(M_TRIM_THRESHOLD, 2 * STEPPING_BYTES)  # glibc's 128 KiB slows steps
