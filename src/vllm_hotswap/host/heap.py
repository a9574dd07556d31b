"""Giving memory that is free, but kept by memory allocators, back: the host's and CUDA's."""

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
"""The same at other times: as far as glibc goes by itself, so that steps reuse their memory."""


def give_back_free_memory() -> None:
    """Have this process's allocators return what is free.

    Freed weights would otherwise stay in the process: tcmalloc, which vLLM advises to preload
    on CPU, returns memory slowly, and glibc only from the end of its heap. Torch keeps what is free
    on a CUDA device for itself, where neither other processes nor pools of their own can have it.
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
    torch = sys.modules.get("torch")  # whoever has not imported it has nothing on a device
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def large_blocks_mapped() -> Iterator[None]:
    """Within it, a tensor that is freed is back with the operating system at once.

    glibc raises its threshold to the largest block that was ever freed. From then on tensors come
    from the heap, where each one that is freed between two that live leaves a hole: a load held up
    to 200 MiB more than its weights for a while, 16 MiB with this.
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
        mallopt(M_TRIM_THRESHOLD, 2 * STEPPING_BYTES)  # glibc's own is 128 KiB: steps would pay
