"""vLLM's CPU worker, able to sleep.

Named by its qualified name in `parallel_config.worker_cls`. On CPU, device memory is host memory,
so vLLM's own worker ignores `sleep`; here level 1 gives the KV memory back to the operating
system. Pausing the scheduler and resetting the prefix cache are the caller's part: a request must
not go on with KV memory that has become zero.

Relies on, in vLLM 0.32.0: `Worker._maybe_get_memory_pool_context`, whose context surrounds the
allocation of the KV tensors; `allocate_kv_cache` making them with `torch.zeros(size, dtype=int8)`.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_hotswap.host.arena import Arena

QUALIFIED_NAME = "vllm_hotswap.host.cpu_worker.HostedCPUWorker"

SMALLEST_LAZY_BYTES = 1 << 20

log = logging.getLogger("vllm_hotswap.host")


class LazyZeros(TorchFunctionMode):  # type: ignore[misc]  # torch's types stop here
    """Within it, `torch.zeros` of many bytes takes them from an arena, untouched."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        nbytes = _raw_bytes(args, kwargs) if func is torch.zeros else 0
        if nbytes < SMALLEST_LAZY_BYTES:
            return func(*args, **kwargs)
        memory = torch.frombuffer(self._arena.allocate(nbytes), dtype=torch.int8)
        return memory.view(*args)


class HostedCPUWorker(CPUWorker):  # type: ignore[misc]  # vLLM's types stop here
    """A CPU worker whose KV memory costs nothing until it is used, and nothing while it sleeps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kv_memory = Arena()

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        if tag == "kv_cache":
            return LazyZeros(self._kv_memory)
        context: AbstractContextManager[Any] = super()._maybe_get_memory_pool_context(tag)
        return context

    def sleep(self, level: int = 1) -> None:
        """Give the KV memory back to the operating system."""
        self._kv_memory.give_back()

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Nothing: KV memory comes back when it is written."""


def _raw_bytes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes of the tensor that `torch.zeros` is asked for; 0 if it is not raw memory on CPU."""
    if kwargs.get("dtype") is not torch.int8 or len(args) != 1:
        return 0
    if torch.device(kwargs.get("device") or "cpu").type != "cpu":
        return 0
    return math.prod(args[0]) if isinstance(args[0], tuple) else int(args[0])
