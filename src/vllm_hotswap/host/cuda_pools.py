"""Torch's memory pools over the device memory of one model.

Torch takes an allocator as the addresses of two C functions. Ours are made by ctypes, so that
torch's calls reach `host.cuda_memory.ModelMemory` without a compiled extension.

Torch holds its allocator's lock while it calls them, and they need the interpreter's lock. A second
thread that holds the interpreter's lock, and frees a device tensor, would deadlock with the first.
So only the thread that loads and steps has such tensors (vLLM's `UniProcExecutor` fetches outputs
on it, from 0.26 to 0.33). Garbage, which any thread may collect, is not collected in that time.

Torch keeps a workspace of cuBLAS for each stream for ever. It is made at the stream's first matrix
multiplication, in the pool that is in use then. A captured graph knows the address of its stream's
workspace. So workspaces are dropped before every capture, which makes a new one in the memory of
the graph itself. That memory stays as long as the graph does, whatever is dropped later. They are
also dropped after tensors that sleep have been allocated, and when a model is unloaded.

Relies on torch 2.11 to 2.14: `torch._C._cuda_customAllocator`, which is behind
`torch.cuda.memory.CUDAPluggableAllocator`; `torch.cuda.MemPool` and its `id`;
`torch.cuda.memory_snapshot`; `torch.cuda.use_mem_pool`;
`torch._C._cuda_clearCublasWorkspaces`; all captures starting with
`torch.cuda.CUDAGraph.capture_begin`.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from vllm_hotswap.errors import one_line
from vllm_hotswap.host.cuda_memory import ModelMemory
from vllm_hotswap.host.teardown import collect_leftovers

ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)

log = logging.getLogger("vllm_hotswap.host")


class _Functions:
    """The functions that torch calls for one model's memory. Torch does not keep them alive."""

    def __init__(self, memory: ModelMemory) -> None:
        self.memory = memory
        self.allocate = ALLOCATE(self._allocate)
        self.free = FREE(self._free)
        self.owner: weakref.ReferenceType[ModelPools] | None = None

    @property
    def addresses(self) -> tuple[int, int]:
        found = [ctypes.cast(each, ctypes.c_void_p).value for each in (self.allocate, self.free)]
        return found[0] or 0, found[1] or 0

    @property
    def is_of_use(self) -> bool:
        """Whether torch may still call them."""
        has_owner = self.owner is not None and self.owner() is not None
        return has_owner or self.memory.address_bytes > 0

    def _allocate(self, nbytes: int, _device: int, _stream: int | None) -> int | None:
        try:
            return self.memory.allocate(nbytes)
        except BaseException as error:  # noqa: BLE001  # torch gets None, and raises
            log.info("event=allocation_failed bytes=%d cause=%r", nbytes, one_line(error))
            return None

    def _free(self, address: int, _nbytes: int, _device: int, _stream: int | None) -> None:
        try:
            self.memory.free(address)
        except BaseException as error:  # noqa: BLE001  # torch cannot handle it
            log.error("event=free_failed address=%x cause=%r", address, one_line(error))


_functions: list[_Functions] = []
"""Functions that torch may call, also for tensors that outlive their model or a failed load."""


class Torch(Protocol):
    """What this module needs of torch."""

    def allocator(self, allocate: int, free: int) -> Any:
        """Return an allocator made from the addresses of its two functions."""

    def pool(self, allocator: Any) -> Any:
        """Return a memory pool, which is given back when it is dropped."""

    def using(self, pool: Any) -> Any:
        """Return a context in which this thread's tensors on the device lie in the pool."""

    def unused(self, pool: Any) -> list[int]:
        """Return the addresses of the pool's segments that hold nothing."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def empty_cache(self) -> None:
        """Give back free memory that torch keeps."""

    def clear_workspaces(self) -> None:
        """Give back the scratch memory of matrix multiplications on all streams.

        Memory that was made during the capture of a graph stays with that graph.
        """

    def move_out(self, is_inside: Callable[[int], bool]) -> list[str]:
        """Replace process-wide tensors that begin at such an address; return their names."""

    def clear_before_captures(self) -> None:
        """From now on, clear workspaces before each capture of a graph in this process."""


class TorchCuda:
    """The installed torch, on the current device."""

    def allocator(self, allocate: int, free: int) -> Any:
        import torch

        return torch._C._cuda_customAllocator(allocate, free)

    def pool(self, allocator: Any) -> Any:
        import torch

        return torch.cuda.MemPool(allocator)

    def using(self, pool: Any) -> Any:
        import torch

        return torch.cuda.use_mem_pool(pool)

    def unused(self, pool: Any) -> list[int]:
        import torch

        # Not pool.snapshot(): there torch releases a reference to the pool's number that it does
        # not own. Above 256, where Python keeps no number for ever, that corrupts the process.
        return [
            segment["address"]
            for segment in torch.cuda.memory_snapshot()
            if segment["segment_pool_id"] == pool.id and segment["allocated_size"] == 0
        ]

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def empty_cache(self) -> None:
        import torch

        torch.cuda.empty_cache()

    def clear_workspaces(self) -> None:
        import torch

        torch._C._cuda_clearCublasWorkspaces()

    def move_out(self, is_inside: Callable[[int], bool]) -> list[str]:
        from vllm_hotswap.host.strays import move_out

        return move_out(is_inside)

    def clear_before_captures(self) -> None:
        import torch

        begin = torch.cuda.CUDAGraph.capture_begin
        if getattr(begin, "clears_workspaces", False):
            return

        @functools.wraps(begin)
        def capture_begin(*args: Any, **kwargs: Any) -> Any:
            self.synchronize()
            self.clear_workspaces()
            return begin(*args, **kwargs)

        capture_begin.clears_workspaces = True  # type: ignore[attr-defined]
        torch.cuda.CUDAGraph.capture_begin = capture_begin


class ModelPools:
    """The memory of one model's tensors that sleep with it.

    The mutable state is `_pools`, one for each use of `allocating`. Torch gives the segments of a
    pool back once the pool is dropped and no tensor is left in it.
    """

    def __init__(self, memory: ModelMemory, torch: Torch | None = None) -> None:
        self.memory = memory
        self._torch = torch or TorchCuda()
        self._pools: list[Any] = []
        _functions[:] = [each for each in _functions if each.is_of_use]
        functions = _Functions(memory)
        functions.owner = weakref.ref(self)
        _functions.append(functions)
        self._allocator = self._torch.allocator(*functions.addresses)

    def __repr__(self) -> str:
        return f"<ModelPools {self.memory!r}>"

    @contextmanager
    def allocating(self, tag: str) -> Iterator[None]:
        """Put what this thread allocates on the device inside into memory that sleeps."""
        pool, before = self._torch.pool(self._allocator), self.memory.tag
        self._pools.append(pool)
        self.memory.tag = tag
        try:
            with _garbage_kept(), self._torch.using(pool):
                yield
        finally:
            self.memory.tag = before
        self._torch.synchronize()
        self._torch.clear_workspaces()  # one that was made inside would sleep, too
        if moved := self._torch.move_out(self.memory.has):
            log.info("event=moved_out what=%s", moved)
        # Nothing more is allocated in this pool, and torch would keep its free memory.
        for address in self._torch.unused(pool):
            self.memory.empty(address)
        self.memory.weights_changed()

    def close(self) -> None:
        """Give back all memory of a model of which no tensor is left.

        Memory of a tensor that is still referenced goes with that tensor: without it, the process
        would crash when it touches the tensor.
        """
        with _garbage_kept():
            self._torch.synchronize()
            self._torch.clear_workspaces()  # one of them is in the memory of its graphs
            self._pools.clear()
            self._torch.empty_cache()
        if self.memory.is_in_use:  # in reference cycles, such as those of adapters
            collect_leftovers()
            self._torch.empty_cache()
        if self.memory.is_in_use:
            log.warning("event=tensors_left bytes=%d memory=%r", self.memory.device_bytes, self)
            self.memory.drop_copies()
        else:
            self.memory.close()


class NoPools:
    """Stands in for `ModelPools`, for a model in torch's own memory, which never sleeps."""

    def __init__(self, torch: Torch) -> None:
        self._torch = torch

    @contextmanager
    def allocating(self, tag: str) -> Iterator[None]:
        """Allocate inside as torch does by itself."""
        yield

    def close(self) -> None:
        """Give back what torch keeps of a model that has been taken apart."""
        self._torch.synchronize()
        self._torch.clear_workspaces()  # one of them is in the memory of its graphs
        self._torch.empty_cache()


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Inside, keep all threads from collecting garbage automatically."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
