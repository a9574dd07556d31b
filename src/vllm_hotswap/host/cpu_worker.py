"""vLLM's CPU worker, able to sleep.

Named by its qualified name in `parallel_config.worker_cls`. On CPU, device memory is host memory,
so vLLM's own worker ignores `sleep`; here level 1 gives the KV memory back to the operating
system, and level 2 also the weights. The caller pauses the scheduler and resets the prefix cache: a
request must not continue with KV memory that has become zero.

Relies on, in vLLM 0.32.0: `Worker._maybe_get_memory_pool_context`, whose context surrounds the
allocation of the KV tensors; `allocate_kv_cache` making them with `torch.zeros(size, dtype=int8)`;
`get_model` loading a second model from a copy of the first one's configuration.
"""

from __future__ import annotations

import copy
import gc
import logging
import math
import time
from contextlib import AbstractContextManager
from typing import Any

import vllm_hotswap.host.gloo  # before groups are made
import vllm_hotswap.host.uncompiled  # noqa: F401  # before vLLM's modules

# isort: split
import torch
from torch.overrides import TorchFunctionMode
from vllm.config import CompilationMode, set_current_vllm_config
from vllm.model_executor.model_loader import get_model

from vllm_hotswap.errors import one_line
from vllm_hotswap.host.arena import Arena
from vllm_hotswap.host.base_cpu_worker import CPUWorker
from vllm_hotswap.host.compiled import CompiledCode, is_compiled
from vllm_hotswap.host.heap import give_back_free_memory, large_blocks_mapped
from vllm_hotswap.host.lora import use_masking
from vllm_hotswap.host.randomness import drawing_nothing
from vllm_hotswap.host.weights import DroppedWeights, Weights, find_undroppable

SMALLEST_LAZY_BYTES = 1 << 20

log = logging.getLogger("vllm_hotswap.host")


class LazyZeros(TorchFunctionMode):  # type: ignore[misc]  # torch's types stop here
    """A mode in which a large `torch.zeros` takes its memory from an arena, untouched."""

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
    """A CPU worker whose KV memory costs nothing until it is used, and nothing while it sleeps.

    Its own state is `_kv_memory`; `_dropped`, set while the weights are discarded; and
    `_loading_config`, the configuration as it was before anything was loaded.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self._kv_memory = Arena()
        self._dropped: DroppedWeights | None = None
        self._loading_config = copy.deepcopy(vllm_config)
        self.compiled_code = CompiledCode()  # an engine in this process lends its own
        use_masking()
        super().__init__(vllm_config, *args, **kwargs)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        if tag == "kv_cache":
            return LazyZeros(self._kv_memory)
        context: AbstractContextManager[Any] = super()._maybe_get_memory_pool_context(tag)
        return context

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with large_blocks_mapped():
            super().load_model(*args, **kwargs)

    def _should_warm_up_model(self) -> bool:
        # vLLM asks just before it would run the model for the first time, and so compile it.
        self.compiled_code.apply_to(self.model_runner)
        if is_compiled(self.model_runner) and self.cache_config.kv_cache_memory_bytes is not None:
            return False
        return bool(super()._should_warm_up_model())

    def sleep(self, level: int = 1) -> None:
        """Give memory back to the operating system. Sleeping deeper than before is allowed.

        Args:
            level: 1 gives back the KV memory, 2 the weights, too.

        Raises:
            NotImplementedError: level 2 is not possible with this model; nothing was changed.
        """
        if level >= 2 and (obstacle := self._obstacle_to_discard()):
            raise NotImplementedError(
                f"the weights of {self.model_config.model} cannot be dropped: {obstacle}; "
                "use level 1 or unload the model"
            )
        self._kv_memory.give_back()
        if level >= 2 and self._dropped is None:
            self._dropped = DroppedWeights(self.get_model())
            give_back_free_memory()

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Read discarded weights again. KV memory comes back by itself when it is written.

        Raises:
            RuntimeError: the weights could not be read; the model stays discarded.
        """
        if self._dropped is None or (tags is not None and "weights" not in tags):
            return
        before = time.monotonic()
        try:
            with large_blocks_mapped():
                with drawing_nothing():  # the loader may initialise weights before it reads them
                    again = self._load_again()
                self._dropped.put_back(again)
        except Exception as error:
            raise RuntimeError(
                f"the weights of {self.model_config.model} could not be read again: "
                f"{one_line(error)}"
            ) from error
        self._dropped = None
        give_back_free_memory()
        log.info("event=weights_read_again seconds=%.2f", time.monotonic() - before)

    def supports_discard(self) -> bool:
        """Whether `sleep(2)` is possible. Callable through `collective_rpc`."""
        return self._obstacle_to_discard() is None

    def weights_bytes(self) -> int:
        """Return the bytes that `sleep(2)` gives back besides KV memory. For `collective_rpc`."""
        return Weights.of(self.get_model()).nbytes

    def _obstacle_to_discard(self) -> str | None:
        if self._dropped is not None:
            return None
        if self.vllm_config.speculative_config is not None:
            return "a draft model shares some of them"
        if self.vllm_config.weight_transfer_config is not None:
            return "a trainer may have changed them since they were read"
        if self._has_frozen_weights():
            return "compiled code has copies of them (max_autotune)"
        if weight := find_undroppable(self.get_model()):
            return f"{weight} has memory that is not its own"
        return None

    def _has_frozen_weights(self) -> bool:
        config = self.compilation_config
        is_compiled = config.mode != CompilationMode.NONE
        return is_compiled and bool(config.inductor_compile_config.get("max_autotune"))

    def _load_again(self) -> Any:
        """Load a second model of the same configuration, not compiled, as it will never be run."""
        config = copy.deepcopy(self._loading_config)
        config.compilation_config.mode = CompilationMode.NONE
        if gc.get_freeze_count() == 0:
            # The loader collects garbage twice. In the host, vLLM's engine has frozen the objects
            # that exist. In the workers of a tensor-parallel model nothing has: it takes a second.
            gc.freeze()
        with set_current_vllm_config(config):
            return get_model(vllm_config=config)


def _raw_bytes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the bytes that `torch.zeros` is asked for; 0 if it is not raw memory on CPU."""
    if kwargs.get("dtype") is not torch.int8 or len(args) != 1:
        return 0
    if torch.device(kwargs.get("device") or "cpu").type != "cpu":
        return 0
    return math.prod(args[0]) if isinstance(args[0], tuple) else int(args[0])
