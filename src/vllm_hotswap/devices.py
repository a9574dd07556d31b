"""What differs between the devices that models move on and off: one small interface.

A `Device` says which sleep levels its workers really have, where a sleeping model's weights are,
how much memory there is and how much this process (with its worker processes) holds of it.
Everything else of the ladder is the same everywhere: vLLM's executor passes `sleep` and `wake_up`
on to its workers. Relies on, in vLLM 0.32.0: `current_platform`, `parallel_config.worker_cls`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
CUDA_WORKER = "vllm.v1.worker.gpu_worker.Worker"
HOSTED_CPU_WORKER = "vllm_hotswap.host.cpu_worker.HostedCPUWorker"

ACCELERATOR_RESERVE_BYTES = 1 << 30
"""Left free on an accelerator for activations and graphs. An estimate, not yet measured."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of the device that models share, in bytes."""

    total: int
    """What the device has."""
    free: int
    """What nobody uses."""
    held: int
    """What this process holds, before any model is loaded: libraries, buffers, contexts."""


class Device(Protocol):
    """One kind of device."""

    name: str
    sleep_levels: frozenset[int]
    """vLLM's sleep levels (1, 2) that give memory of one model back, and of that model alone."""
    is_host_memory: bool
    """Whether device memory is host memory, so that weights asleep still count."""

    kv_is_lazy: bool
    """Whether KV memory is only held once it is used, so that a load does not show it."""

    def configure(self, vllm_config: Any) -> None:
        """Choose the worker class of one model, where the platform's own cannot sleep."""

    def memory(self) -> DeviceMemory:
        """How much there is. Called in the engine host before the first load."""

    def held_bytes(self) -> int:
        """What this process and its workers hold now."""


class CpuDevice:
    """vLLM's CPU platform, with a worker of ours that can sleep."""

    name = "cpu"
    sleep_levels: frozenset[int] = frozenset([1, 2])
    is_host_memory = True
    kv_is_lazy = True

    def configure(self, vllm_config: Any) -> None:
        vllm_config.parallel_config.worker_cls = HOSTED_CPU_WORKER

    def memory(self) -> DeviceMemory:
        from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

        node = get_memory_node_info(get_visible_memory_node()[0])
        return DeviceMemory(node.total_memory, node.available_memory, self.held_bytes())

    def held_bytes(self) -> int:
        return anonymous_bytes()


class OwnSleepDevice:
    """Any platform whose worker's own `sleep` and `wake_up` act on that worker's model alone.

    Intel Gaudi's does: it moves the weights to host memory and drops the KV cache, whatever the
    level, so that there is one level.
    """

    name = "own-sleep"
    sleep_levels: frozenset[int] = frozenset([1])
    is_host_memory = False
    kv_is_lazy = False

    def configure(self, vllm_config: Any) -> None:
        """Nothing: the platform has chosen its worker."""

    def memory(self) -> DeviceMemory:
        return accelerator_memory() or CpuDevice().memory()

    def held_bytes(self) -> int:
        memory = accelerator_memory()
        return memory.held if memory else anonymous_bytes()


class CudaDevice(OwnSleepDevice):
    """CUDA and ROCm: no level yet. vLLM's allocator acts on all models of a process at once.

    Models are parked or unloaded; sleeping needs tags per model (a later piece of work).
    """

    name = "cuda"
    sleep_levels: frozenset[int] = frozenset()


def device_of(vllm_config: Any) -> Device:
    """The device of one model, told by the worker class that its platform has chosen."""
    worker = vllm_config.parallel_config.worker_cls
    if worker in (CPU_WORKER, HOSTED_CPU_WORKER):
        return CpuDevice()
    return CudaDevice() if worker == CUDA_WORKER else OwnSleepDevice()


def accelerator_memory() -> DeviceMemory | None:
    """Memory of the current accelerator; None where torch knows of none."""
    if (module := accelerator_module()) is None:
        return None
    free, total = module.mem_get_info()
    held = module.memory_reserved() if hasattr(module, "memory_reserved") else 0
    return DeviceMemory(total, max(0, free - ACCELERATOR_RESERVE_BYTES), held)


@functools.cache
def accelerator_module() -> Any | None:
    """Torch's module of the accelerator that vLLM uses; None where it uses the CPU.

    Which accelerator torch knows is not the question: vLLM's CPU platform may run beside a GPU,
    which is not to be touched then.
    """
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu() or current_platform.device_type == "cpu":
        return None
    return torch.get_device_module(current_platform.device_type)


def anonymous_bytes(pid: int | None = None) -> int:
    """Memory of a process and its children that the kernel cannot just drop; 0 if it is gone.

    Pages of files (libraries, weights being read) are left out where the kernel tells them apart.
    """
    family = _family(os.getpid() if pid is None else pid)
    return sum(_anonymous(member) for member in family)


def _family(pid: int) -> list[int]:
    """A process and all that its main thread has started, directly or not."""
    try:
        # Quick where the kernel keeps the list; psutil would look at every process there is.
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        return [pid, *(member for child in children for member in _family(int(child)))]
    except OSError:
        return [pid]


def _anonymous(pid: int) -> int:
    with contextlib.suppress(OSError, KeyError):  # it may end meanwhile
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0
