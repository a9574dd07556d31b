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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from vllm_hotswap.errors import ConfigError, one_line
from vllm_hotswap.host import gaudi
from vllm_hotswap.host.cuda_driver import DriverError, check_driver, has_driver
from vllm_hotswap.host.nvml import device_free_bytes, used_bytes_of
from vllm_hotswap.system import value_of

CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
CUDA_WORKER = "vllm.v1.worker.gpu_worker.Worker"
HOSTED_CUDA_WORKER = "vllm_hotswap.host.cuda_worker.HostedCudaWorker"
WAKEFUL_CUDA_WORKER = "vllm_hotswap.host.cuda_worker.WakefulCudaWorker"
HOSTED_CPU_WORKER = "vllm_hotswap.host.cpu_worker.HostedCPUWorker"
GAUDI_WORKER = "vllm_gaudi.v1.worker.hpu_worker.HPUWorker"
HOSTED_GAUDI_WORKER = "vllm_hotswap.host.gaudi_worker.HostedHPUWorker"

NO_DEVICE = "Failed to infer device type"
"""What vLLM says where it finds no device that it is built for (0.26 to 0.33)."""

ACCELERATOR_RESERVE_BYTES = 1 << 30
"""Left free on an accelerator for activations and graphs. An estimate, not yet measured."""

SLEEP_VARIABLE = "VLLM_HOTSWAP_CUDA_SLEEP"
"""`0`: models on CUDA lie in torch's own memory, and do not sleep."""

RESERVED_PART = 32
"""On CUDA, one part of so many of the device is left free, if that is more: activations grow with
the batches that a larger device is for. An estimate, not yet measured."""

GRAPHS_BYTES = 512 << 20
"""What CUDA graphs and their inputs take of the device for a model that is not eager, until a load
has measured it. An estimate: vLLM's own logs tell of 0.3 GiB to 1 GiB."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of the device that models share, in bytes."""

    total: int
    """What the device has."""
    free: int
    """What nobody uses."""
    held: int
    """What this process holds, before any model is loaded: libraries, buffers, contexts. While
    models are loaded, what it holds of a shared device with them and its workers; 0 where that is
    unknown."""
    reserve: int = 0
    """What is left free on purpose, and is no part of `free`; 0 where that is not told apart."""


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """What was last seen of a device that others may use, in bytes."""

    seen: DeviceMemory
    used: int
    """What models held of it then, as they were measured."""
    base: int
    """What the engine host held before the first load."""

    @property
    def own(self) -> int:
        """What the engine host holds besides models.

        It grows while they run: kernels, handles of libraries. That is seen where the device tells
        whose memory it is; otherwise it looks like others'.
        """
        return max(self.base, self.seen.held - self.used)

    @property
    def others(self) -> int:
        """What other processes hold."""
        return max(0, self.seen.total - self.seen.free - self.seen.reserve - self.own - self.used)

    @property
    def for_models(self) -> int:
        """What models may hold: half of the reserve may be gone before they have to move."""
        return max(0, self.seen.free + self.used + self.seen.reserve // 2)


class Device(Protocol):
    """One kind of device."""

    name: str
    sleep_levels: frozenset[int]
    """vLLM's sleep levels (1, 2) that give memory of one model back, and of that model alone."""
    is_host_memory: bool
    """Whether device memory is host memory, so that weights asleep still count."""

    kv_is_lazy: bool
    """Whether KV memory is only held once it is used, so that a load does not show it."""

    reports_sleep_bytes: bool
    """Whether a loaded model's worker tells what its sleep gives back and takes: `sleep_bytes`."""
    keeps_copy: bool
    """Whether weights that have been copied to host memory stay there once the model is awake."""
    is_shared: bool
    """Whether other processes may take its memory at any time, which `memory_now` tells."""
    obeys_utilization: bool
    """Whether `gpu_memory_utilization` bounds what all models may have by default."""
    graphs_bytes: int
    """What graphs of a model take, that is not eager; an estimate."""
    wakes_in_slices: bool
    """Whether a worker can wake in parts while another model is served: `host.together`."""

    def configure(self, vllm_config: Any) -> None:
        """Choose the worker class of one model, where the platform's own cannot sleep."""

    def memory(self) -> DeviceMemory:
        """How much there is. Called in the engine host before the first load.

        Raises:
            ConfigError: the device cannot be used; the message says why.
        """

    def memory_now(self, enough_bytes: int) -> DeviceMemory:
        """How much there is, in the engine host, while models are loaded.

        What allocators keep counts as free; it is given back if less than `enough_bytes` are free.
        """

    def held_bytes(self) -> int:
        """What this process and its workers hold now."""


class CpuDevice:
    """vLLM's CPU platform, with a worker of ours that can sleep."""

    name = "cpu"
    sleep_levels: frozenset[int] = frozenset([1, 2])
    is_host_memory = True
    kv_is_lazy = True
    reports_sleep_bytes = keeps_copy = False
    is_shared = False
    obeys_utilization = True
    graphs_bytes = 0
    wakes_in_slices = False

    def configure(self, vllm_config: Any) -> None:
        vllm_config.parallel_config.worker_cls = HOSTED_CPU_WORKER

    def memory(self) -> DeviceMemory:
        from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

        node = get_memory_node_info(get_visible_memory_node()[0])
        return DeviceMemory(node.total_memory, node.available_memory, self.held_bytes())

    def memory_now(self, enough_bytes: int) -> DeviceMemory:
        return self.memory()

    def held_bytes(self) -> int:
        return anonymous_bytes()


class OwnSleepDevice:
    """Any platform whose worker's own `sleep` and `wake_up` act on that worker's model alone.

    There is one level: the weights go to host memory, and the KV memory is dropped.
    """

    name = "own-sleep"
    is_exclusive = False
    """Whether one process at a time has the device."""
    sleep_levels: frozenset[int] = frozenset([1])
    is_host_memory = False
    kv_is_lazy = False
    reports_sleep_bytes = keeps_copy = False
    is_shared = False
    obeys_utilization = True
    graphs_bytes = 0
    wakes_in_slices = False

    def configure(self, vllm_config: Any) -> None:
        """Nothing: the platform has chosen its worker."""

    def memory(self) -> DeviceMemory:
        try:
            found = accelerator_memory(self.is_exclusive)
        except RuntimeError as error:  # torch's errors are
            raise ConfigError(
                f"the device cannot be used: {one_line(error)}; "
                f"{self.why_unusable() or 'run the tools of its maker'}"
            ) from error
        return found or CpuDevice().memory()

    def why_unusable(self) -> str | None:
        """What is known to be wrong where it cannot be used."""
        return None

    def memory_now(self, enough_bytes: int) -> DeviceMemory:
        return self.memory()

    def held_bytes(self) -> int:
        memory = accelerator_memory(self.is_exclusive)
        return memory.held if memory else anonymous_bytes()


class GaudiDevice(OwnSleepDevice):
    """Intel's, with the plugin's worker, whatever the level; ours tells what that gives back.

    What is held is told by the device (`mem_get_info`), as the plugin itself measures it. What
    `torch.hpu.memory_reserved` counts is not known.
    """

    name = "hpu"
    is_exclusive = reports_sleep_bytes = True

    def configure(self, vllm_config: Any) -> None:
        vllm_config.parallel_config.worker_cls = HOSTED_GAUDI_WORKER

    def why_unusable(self) -> str | None:
        return gaudi.why_no_device() or "run hl-smi, which shows whether another process has it"


class RocmDevice(OwnSleepDevice):
    """ROCm: no level. vLLM's allocator acts on all models of a process at once.

    Models are parked or unloaded.
    """

    name = "rocm"
    sleep_levels: frozenset[int] = frozenset()


class CudaDevice:
    """NVIDIA's GPUs, with a worker of ours that can sleep by itself.

    What is held is told by the device, not by torch, which knows neither contexts nor graphs, and
    counts addresses behind which there is nothing. So other processes must not come and go during
    a load, or its model is measured with them.
    """

    name = "cuda"
    sleep_levels: frozenset[int] = frozenset([1])
    is_host_memory = False
    kv_is_lazy = False
    reports_sleep_bytes = keeps_copy = True
    is_shared = True
    obeys_utilization = False
    graphs_bytes = GRAPHS_BYTES
    wakes_in_slices = True
    worker = HOSTED_CUDA_WORKER

    def configure(self, vllm_config: Any) -> None:
        vllm_config.parallel_config.worker_cls = self.worker

    def memory(self) -> DeviceMemory:
        driver = check_driver(os.environ, maps=self.reports_sleep_bytes)
        free_before = device_free_bytes(driver)  # without a context, which the next line makes
        free, total = _first_memory_info()
        base = 0
        if free_before is not None:
            free_after = device_free_bytes(driver)
            base = 0 if free_after is None else max(0, free_before - free_after)
        reserve = reserve_bytes(total)
        return DeviceMemory(total, max(0, free - reserve), base, reserve)

    def memory_now(self, enough_bytes: int) -> DeviceMemory:
        free, total = _cuda().mem_get_info()
        if free < enough_bytes:
            _cuda().empty_cache()
            free, total = _cuda().mem_get_info()
        reserve = reserve_bytes(total)
        return DeviceMemory(total, free - reserve, self._used_by_us(), reserve)

    def _used_by_us(self) -> int:
        driver = check_driver(os.environ, maps=False)
        return used_bytes_of(_family(os.getpid()), driver) or 0

    def held_bytes(self) -> int:
        _cuda().empty_cache()
        free, total = _cuda().mem_get_info()
        return int(total - free)


class WakefulCudaDevice(CudaDevice):
    """NVIDIA's GPUs without memory of ours: models are parked or unloaded."""

    sleep_levels: frozenset[int] = frozenset()
    reports_sleep_bytes = keeps_copy = wakes_in_slices = False
    worker = WAKEFUL_CUDA_WORKER


def reserve_bytes(total: int) -> int:
    """What of a CUDA device with so many bytes is left free on purpose."""
    return max(ACCELERATOR_RESERVE_BYTES, total // RESERVED_PART)


def _first_memory_info() -> tuple[int, int]:
    """Bytes that are free, and that there are. This makes the context of the process.

    Raises:
        ConfigError: there is no room even for that, or the GPU cannot be used.
    """
    try:
        free, total = _cuda().mem_get_info()
    except RuntimeError as error:  # torch's errors are
        raise ConfigError(
            f"the GPU cannot be used: {one_line(error)}; run nvidia-smi, which also shows whether "
            "another process fills it, and stop that process or use another GPU"
        ) from error
    return free, total


def _cuda() -> Any:
    import torch

    return torch.cuda


def device_of(vllm_config: Any) -> Device:
    """The device of one model, told by the worker class that its platform has chosen."""
    worker = vllm_config.parallel_config.worker_cls
    if worker in (CPU_WORKER, HOSTED_CPU_WORKER):
        return CpuDevice()
    if worker == HOSTED_CUDA_WORKER:
        return CudaDevice()
    if worker == WAKEFUL_CUDA_WORKER:
        return WakefulCudaDevice()
    if worker == CUDA_WORKER:
        if is_rocm():
            return RocmDevice()
        return CudaDevice() if value_of(SLEEP_VARIABLE) != "0" else WakefulCudaDevice()
    if worker in (GAUDI_WORKER, HOSTED_GAUDI_WORKER):
        return GaudiDevice()
    return OwnSleepDevice()


def why_no_device(environment: Mapping[str, str]) -> str | None:
    """What is wrong with this machine's NVIDIA GPU; None where nothing is known to be."""
    try:
        check_driver(environment)
    except (ConfigError, DriverError) as error:
        return f"for an NVIDIA GPU: {error}"
    return None


def with_why_no_device(message: str) -> str:
    """What vLLM says; where it has found no device, with what is wrong with the one that is wanted.

    It may be another kind that is missing: vLLM's own words stay. Without the plugin for Gaudi,
    an NVIDIA GPU is wanted where there is a driver or torch is built for CUDA. The quickstart's
    variable, which names a Gaudi, may be set on either.
    """
    if NO_DEVICE not in message:
        return message
    if gaudi.has_plugin():
        return f"{message}; {gaudi.why_not_taken()}"
    for_gaudi = None if has_driver() else gaudi.why_no_device()
    for_cuda = why_no_device(os.environ) if is_cuda() or for_gaudi is None else None
    return "; ".join([message, *(why for why in (for_cuda, for_gaudi) if why is not None)])


def is_cuda() -> bool:
    """Whether torch is built for CUDA."""
    import torch

    return bool(torch.version.cuda)


def is_rocm() -> bool:
    """Whether torch is built for ROCm, which takes vLLM's GPU worker, too."""
    import torch

    return bool(torch.version.hip)


def accelerator_memory(is_exclusive: bool = False) -> DeviceMemory | None:
    """Memory of the current accelerator; None where torch knows of none.

    What is held is what torch's allocator keeps; of a device `is_exclusive`, which one process has
    to itself, all that is not free.
    """
    if (module := accelerator_module()) is None:
        return None
    free, total = module.mem_get_info()
    if is_exclusive:
        held = total - free
    else:
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
    except OSError:
        return [pid]
    programs = [int(child) for child in children if not _is_copy(int(child), pid)]
    return [pid, *(member for child in programs for member in _family(child))]


def _is_copy(child: int, parent: int) -> bool:
    """Whether a process has been forked, and has not begun its program yet.

    Its pages are its parent's until then, and would count twice. Worker processes are spawned.
    """
    with contextlib.suppress(OSError):  # it may end meanwhile
        lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (child, parent)]
        return lines[0] == lines[1] != b""
    return False


def _anonymous(pid: int) -> int:
    with contextlib.suppress(OSError, KeyError):  # it may end meanwhile
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0
