"""What a GPU worker does differently because it is one of several in a process.

Mixed in before vLLM's `Worker`. It knows vLLM only by the methods that it overrides and the
attributes that it reads. vLLM's own sleep mode (`enable_sleep_mode`) is not used, and must be off.

Relies on, in vLLM 0.26.0 to 0.32.0:

- `Worker.init_device` being the only reader of `cache_config.gpu_memory_utilization` where
  `kv_cache_memory_bytes` is given: it refuses a device with less than that free;
- `_maybe_get_memory_pool_context(tag)` around the load of the weights ("weights") and the
  allocation of the KV memory ("kv_cache"; in 0.26 of more of the runner). 0.32 also asks for
  "runtime" and "workspace";
- `model_runner.kv_caches`: tensors, or lists of them;
- `model_runner.cudagraph_manager.graphs`, where there is such a manager;
- `CUDAGraphWrapper.clear_all_graphs` and `BreakableCUDAGraphWrapper.clear_all_graphs`, which drop
  the graphs of the engine whose state is in place.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from vllm_hotswap.errors import HotswapError, NoRoom
from vllm_hotswap.host.cuda_driver import Driver
from vllm_hotswap.host.cuda_memory import ModelMemory, Range
from vllm_hotswap.host.cuda_pools import ModelPools, NoPools, Torch, TorchCuda
from vllm_hotswap.host.devices import reserve_bytes

SLEEPING = ("weights", "kv_cache")
"""Tags whose memory a sleep gives back. Workspaces and the rest of a runner stay on the device."""

LITTLE = 0.001
"""The share of the device that vLLM must find free. The budget has checked the real room."""

WRAPPERS = (
    ("vllm.compilation.cuda_graph", "CUDAGraphWrapper"),
    ("vllm.compilation.breakable_cudagraph", "BreakableCUDAGraphWrapper"),
)
"""Classes that list all their instances; `host.vllm_state` keeps one such list for each engine."""

BLOCK = 512
"""Torch allocates whole blocks of so many bytes: what follows a tensor in its last is unused."""

log = logging.getLogger("vllm_hotswap.host")


class HostedOnCuda:
    """A GPU worker that shares its process with others.

    Its own state is `_pools`, made with the device, and `_is_ready_to_sleep`.
    """

    # Attributes of vLLM's `Worker`:
    cache_config: Any
    lora_config: Any
    model_config: Any
    model_runner: Any
    parallel_config: Any
    vllm_config: Any

    has_pools = True
    """Whether it has its own memory pools, which it needs in order to sleep."""

    _pools: ModelPools | NoPools | None = None
    _torch: Torch = TorchCuda()
    _is_ready_to_sleep = False
    """Whether weights that may change have been copied for the next sleep."""

    # --- a load -------------------------------------------------------------------------------

    def init_device(self) -> None:
        """Initialise the device, and make the memory pools.

        Raises:
            HotswapError: the size of the KV memory is not given. vLLM would measure it, which
                clears the graphs of all models, and assumes that no other model uses the device.
        """
        if self.cache_config.kv_cache_memory_bytes is None:
            raise HotswapError(
                "the size of the KV memory is not given, and cannot be measured beside other "
                "models; set kv_cache_memory_bytes"
            )
        with self._content_with_little():
            super().init_device()  # type: ignore[misc]
        self._torch.clear_before_captures()
        self._pools = self._make_pools()

    def _make_pools(self) -> ModelPools | NoPools:
        if self.has_pools:
            return ModelPools(self._make_memory(), self._torch)
        return NoPools(self._torch)

    @contextmanager
    def _content_with_little(self) -> Iterator[None]:
        """Keep vLLM from refusing a device because other models hold most of its memory."""
        asked = self.cache_config.gpu_memory_utilization
        self.cache_config.gpu_memory_utilization = LITTLE
        try:
            yield
        finally:
            self.cache_config.gpu_memory_utilization = asked

    def _make_memory(self) -> ModelMemory:
        import torch

        return ModelMemory(Driver(torch.cuda.current_device()))

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        if tag in SLEEPING and self._pools is not None:
            return self._pools.allocating(tag)
        return nullcontext()

    # --- residency ----------------------------------------------------------------------------

    @property
    def pools(self) -> ModelPools:
        assert isinstance(self._pools, ModelPools), "no pools, or init_device() was not called"
        return self._pools

    def sleep(self, level: int = 1) -> None:
        """Give back the device memory of weights and KV cache; weights stay in host memory.

        Raises:
            NotImplementedError: the level is not 1, or the worker has no memory pools.
            NoRoom: there is too little host memory. In both cases nothing has changed.
        """
        if not self.has_pools:
            raise NotImplementedError("the model cannot sleep: VLLM_HOTSWAP_CUDA_SLEEP is 0")
        if level != 1:
            raise NotImplementedError(
                f"sleep level {level} is not supported on this device; use 1, or unload the model"
            )
        memory, before_s = self.pools.memory, time.monotonic()
        before = memory.device_bytes
        memory.sleep(*self._kept_and_not())
        _log("asleep", before - memory.device_bytes, before_s)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the device memory again, at the same addresses; KV memory is zero.

        Raises:
            NoRoom: there is too little device memory; it is still asleep.
        """
        memory, before_s = self.pools.memory, time.monotonic()
        self._with_what_torch_keeps(memory.wake)
        _log("awake", memory.device_bytes, before_s)

    # --- the same in parts, for `host.together` ------------------------------------------------

    def wake_some(self, at_most: int) -> tuple[int, int] | str:
        """Take a part of the memory again, while another model is served.

        Leaves half of the device's reserve to that model, and also what torch keeps.

        Returns: the bytes taken so far, and the bytes in total; or why there is too little memory.
        In that case it has given back what it had taken.
        """
        memory = self.pools.memory
        try:
            progress = memory.wake_some(at_most, reserve_bytes(memory.whole_bytes) // 2)
        except NoRoom as error:
            return error.message
        return progress.done_bytes, progress.total_bytes

    def give_up_wake(self, at_most: int | None = None) -> int:
        """Give back what `wake_some` has taken, or `at_most` bytes of it; return what is left."""
        return self.pools.memory.give_up_wake(at_most)

    def get_ready_to_wake(self) -> str | None:
        """Do all of `wake_up` that may fail; return why there is too little memory, or None."""
        memory = self.pools.memory
        try:
            self._with_what_torch_keeps(lambda: memory.wake_some(memory.address_bytes))
        except NoRoom as error:
            return error.message
        return None

    def get_ready_to_sleep(self) -> str | None:
        """Do all of `sleep` that may fail; return why there is too little host memory, or None."""
        try:
            self.pools.memory.get_ready_to_sleep(*self._kept_and_not())
        except NoRoom as error:
            return error.message
        self._is_ready_to_sleep = True
        return None

    def stay_awake(self) -> None:
        """Undo `get_ready_to_sleep`."""
        self._is_ready_to_sleep = False
        self.pools.memory.stay_awake()

    def _with_what_torch_keeps(self, take: Callable[[], object]) -> None:
        try:
            take()
        except NoRoom:
            self._torch.empty_cache()  # what other engines' steps have left
            take()

    # --- what it reports ------------------------------------------------------------------------

    def supports_discard(self) -> bool:
        """Whether `sleep(2)` is possible. Callable through `collective_rpc`."""
        return False

    def sleep_bytes(self) -> tuple[int, int]:
        """Return the bytes that a sleep gives back on the device, and that it takes on the host."""
        memory = self.pools.memory
        return memory.device_bytes, memory.copy_bytes(self._kv_ranges())

    def _kept_and_not(self) -> tuple[list[Range], list[Range]]:
        """Return the ranges that a sleep does not keep, and those that no step writes to."""
        if self._writes_weights() and not self._is_ready_to_sleep:
            self.pools.memory.weights_changed()
        self._is_ready_to_sleep = False
        return self._kv_ranges(), self._constant_ranges()

    def _writes_weights(self) -> bool:
        """Whether parameters may have been written to since the last sleep.

        Slots of adapters are parameters; experts are moved; a trainer sends new weights.
        """
        return (
            self.lora_config is not None
            or bool(self.parallel_config.enable_eplb)
            or self.vllm_config.weight_transfer_config is not None
        )

    def reload_weights(self, *args: Any, **kwargs: Any) -> Any:
        self._weights_changed()
        return super().reload_weights(*args, **kwargs)  # type: ignore[misc]

    def reset_weights(self) -> Any:
        self._weights_changed()
        return super().reset_weights()  # type: ignore[misc]

    def _weights_changed(self) -> None:
        if self.has_pools:
            self.pools.memory.weights_changed()

    def _kv_ranges(self) -> list[Range]:
        caches = getattr(self.model_runner, "kv_caches", None) or []
        return list(_ranges(_tensors(caches)))

    def _constant_ranges(self) -> list[Range]:
        """Return the ranges of parameters; a step may write to the rest of the weights' memory."""
        models = [self.model_runner.model]
        if drafter := getattr(getattr(self.model_runner, "drafter", None), "model", None):
            models.append(drafter)
        return [
            (address, -(-nbytes // BLOCK) * BLOCK)
            for model in models
            for address, nbytes in _ranges(model.parameters())
        ]

    # --- the end ------------------------------------------------------------------------------

    def release_graphs(self) -> None:
        """Release the memory of CUDA graphs now, rather than with a garbage collection."""
        self._torch.synchronize()
        manager = getattr(getattr(self, "model_runner", None), "cudagraph_manager", None)
        if graphs := getattr(manager, "graphs", None):
            graphs.clear()
        for module, name in WRAPPERS:
            if wrapper := getattr(sys.modules.get(module), name, None):
                wrapper.clear_all_graphs()

    def shutdown(self) -> None:
        """End a worker process; close its pools, so that torch calls nothing while Python exits."""
        pools = self.take_pools()
        super().shutdown()  # type: ignore[misc]
        if pools is not None:
            self.release_graphs()
            self.model_runner = None
            pools.close()

    def take_pools(self) -> ModelPools | NoPools | None:
        """Return the pools, which the caller closes once the model has been taken apart."""
        pools, self._pools = self._pools, None
        return pools


def _tensors(found: Any) -> Iterator[Any]:
    """Yield the tensors in nested lists, without None."""
    if isinstance(found, list | tuple):
        for each in found:
            yield from _tensors(each)
    elif found is not None:
        yield found


def _ranges(tensors: Iterable[Any]) -> Iterator[Range]:
    """Yield the range of each of their storages once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    found = {storage.data_ptr(): storage.nbytes() for storage in storages}
    yield from found.items()


def _log(what: str, nbytes: int, before_s: float) -> None:
    seconds = time.monotonic() - before_s
    log.info("event=%s device_bytes=%d seconds=%.3f", what, nbytes, seconds)
