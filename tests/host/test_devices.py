"""Devices: which device a model is on, and how much memory processes hold."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host import devices
from vllm_hotswap.host.devices import (
    CPU_WORKER,
    CUDA_WORKER,
    GAUDI_WORKER,
    HOSTED_CPU_WORKER,
    HOSTED_CUDA_WORKER,
    HOSTED_GAUDI_WORKER,
    WAKEFUL_CUDA_WORKER,
    CpuDevice,
    CudaDevice,
    Device,
    GaudiDevice,
    OwnSleepDevice,
    SharedMemory,
    WakefulCudaDevice,
    anonymous_bytes,
    device_of,
)

MIB = 1 << 20
GIB = 1 << 30
HOLD = "import sys; held = b'x' * (48 << 20); print('holds', flush=True); sys.stdin.read()"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {HOLD!r}], stdin=0)
child.wait()
"""


def config(worker: str) -> SimpleNamespace:
    """The part of vLLM's configuration that is read."""
    return SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=worker))


@contextmanager
def process(code: str) -> Iterator[int]:
    """A process that has reported that it holds its memory."""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert b"holds\n" == child.stdout.readline()
        yield child.pid
        assert child.stdin is not None
        child.stdin.close()


# --- which device a model is on -------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "kind", "levels", "is_host_memory"),
    [
        (CPU_WORKER, CpuDevice, {1, 2}, True),
        (HOSTED_CPU_WORKER, CpuDevice, {1, 2}, True),
        (CUDA_WORKER, CudaDevice, {1}, False),
        (HOSTED_CUDA_WORKER, CudaDevice, {1}, False),
        (WAKEFUL_CUDA_WORKER, WakefulCudaDevice, set(), False),
        (GAUDI_WORKER, GaudiDevice, {1}, False),
        (HOSTED_GAUDI_WORKER, GaudiDevice, {1}, False),
        ("another.platform.Worker", OwnSleepDevice, {1}, False),
    ],
)
def test_device_is_told_by_the_worker(
    worker: str, kind: type[Device], levels: set[int], is_host_memory: bool
) -> None:
    """The worker reports the device, with its real sleep levels, for one model alone."""
    device = device_of(config(worker))

    assert kind is type(device)
    assert (levels, is_host_memory) == (device.sleep_levels, device.is_host_memory)


def test_cpu_is_given_a_worker_that_can_sleep() -> None:
    """A worker that can sleep is chosen for a CPU, which otherwise stays the same device."""
    cpu = config(CPU_WORKER)

    device_of(cpu).configure(cpu)

    assert HOSTED_CPU_WORKER == cpu.parallel_config.worker_cls
    assert "cpu" == device_of(cpu).name


def test_cuda_is_given_a_worker_that_sleeps_by_itself() -> None:
    """A worker with its own sleep is chosen for CUDA, which otherwise stays the same device."""
    cuda = config(CUDA_WORKER)

    device_of(cuda).configure(cuda)

    assert HOSTED_CUDA_WORKER == cuda.parallel_config.worker_cls
    assert "cuda" == device_of(cuda).name


@pytest.mark.parametrize(
    ("value", "worker"), [("0", WAKEFUL_CUDA_WORKER), ("1", HOSTED_CUDA_WORKER)]
)
def test_cuda_does_without_sleep_where_it_is_told_so(
    monkeypatch: pytest.MonkeyPatch, value: str, worker: str
) -> None:
    """CUDA works without sleep, as the worker tells the host, which lacks the variable."""
    monkeypatch.setenv("VLLM_HOTSWAP_CUDA_SLEEP", value)
    cuda = config(CUDA_WORKER)
    device_of(cuda).configure(cuda)
    monkeypatch.delenv("VLLM_HOTSWAP_CUDA_SLEEP")

    device = device_of(cuda)

    assert worker == cuda.parallel_config.worker_cls
    assert (value == "1") is (1 in device.sleep_levels) is device.reports_sleep_bytes
    assert device.is_shared
    assert not device.obeys_utilization


def test_a_gaudi_is_given_a_worker_that_tells_what_its_sleep_gives_back() -> None:
    """A worker that reports its sleep is chosen for a Gaudi, which otherwise stays the same."""
    gaudi = config(GAUDI_WORKER)

    device_of(gaudi).configure(gaudi)

    assert HOSTED_GAUDI_WORKER == gaudi.parallel_config.worker_cls
    assert "hpu" == device_of(gaudi).name


def test_rocm_has_no_sleep_although_its_worker_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm has no NVIDIA driver, so models are parked or unloaded."""
    monkeypatch.setattr("torch.version.hip", "6.4")
    rocm = config(CUDA_WORKER)

    device_of(rocm).configure(rocm)

    assert CUDA_WORKER == rocm.parallel_config.worker_cls
    assert (frozenset(), False) == (device_of(rocm).sleep_levels, device_of(rocm).is_shared)


@pytest.mark.parametrize("worker", ["some.other.Worker"])
def test_other_workers_are_left_as_their_platform_chose_them(worker: str) -> None:
    """Workers of other platforms keep all their settings."""
    chosen = config(worker)

    device_of(chosen).configure(chosen)

    assert worker == chosen.parallel_config.worker_cls


# --- memory of a CUDA device ---------------------------------------------------------------------


class TorchCuda:
    """Torch's view of a device of 80 GiB: `used` by this process, `others` by others."""

    def __init__(self, used: int = 0, others: int = 0, cached: int = 0) -> None:
        self.used, self.others, self.cached = used, others, cached
        self.context = 0

    def mem_get_info(self) -> tuple[int, int]:
        self.context = GIB // 2
        return 80 * GIB - self.used - self.others - self.cached - self.context, 80 * GIB

    def empty_cache(self) -> None:
        self.cached = 0


def on_cuda(monkeypatch: pytest.MonkeyPatch, torch: TorchCuda, has_nvml: bool = True) -> CudaDevice:
    def free(driver: object) -> int | None:
        held = torch.used + torch.others + torch.cached + torch.context
        return 81 * GIB - held if has_nvml else None

    monkeypatch.setattr(devices, "_cuda", lambda: torch)
    monkeypatch.setattr(devices, "check_driver", lambda environment, **_: object())
    monkeypatch.setattr(devices, "device_free_bytes", free)

    def used(pids: list[int], driver: object) -> int | None:
        assert os.getpid() in pids
        return torch.used + torch.cached + torch.context if has_nvml else None

    monkeypatch.setattr(devices, "used_bytes_of", used)
    return CudaDevice()


@pytest.mark.parametrize(("has_nvml", "base"), [(True, GIB // 2), (False, 0)])
def test_base_of_a_cuda_device_is_its_context(
    monkeypatch: pytest.MonkeyPatch, has_nvml: bool, base: int
) -> None:
    """The base of a CUDA device is its context, from NVML if possible, without others' memory."""
    memory = on_cuda(monkeypatch, TorchCuda(others=20 * GIB), has_nvml).memory()

    assert (80 * GIB, base) == (memory.total, memory.held)
    assert 80 * GIB // 32 == memory.reserve
    assert 80 * GIB - 20 * GIB - GIB // 2 - memory.reserve == memory.free


def test_what_torch_keeps_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch keeps free does not count as held: torch has released it before."""
    cuda = on_cuda(monkeypatch, TorchCuda(used=3 * GIB, cached=5 * GIB))

    assert 3 * GIB + GIB // 2 == cuda.held_bytes()


def test_torch_keeps_what_is_free_as_long_as_there_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch keeps what is free as long as there is enough, so that looks do not slow steps."""
    cuda = on_cuda(monkeypatch, torch := TorchCuda(used=3 * GIB, cached=5 * GIB))

    cuda.memory_now(enough_bytes=60 * GIB)
    assert 5 * GIB == torch.cached

    assert 80 * GIB * 31 // 32 - 3 * GIB - GIB // 2 == cuda.memory_now(75 * GIB).free
    assert 0 == torch.cached


def test_a_device_that_is_full_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full device, without room even for this process's context, gets one line."""

    def mem_get_info() -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    cuda = on_cuda(monkeypatch, torch := TorchCuda())
    monkeypatch.setattr(torch, "mem_get_info", mem_get_info)

    with pytest.raises(ConfigError) as error:
        cuda.memory()

    assert "the GPU cannot be used: CUDA error: out of memory" in error.value.message
    assert "whether another process fills it" in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("has_nvml", "own", "others"),
    [(True, 2 * GIB, 20 * GIB), (False, GIB // 2, 21 * GIB + GIB // 2)],
)
def test_growth_of_the_engine_host_is_its_own(
    monkeypatch: pytest.MonkeyPatch, has_nvml: bool, own: int, others: int
) -> None:
    """The host's growth is its own if the device knows whose memory it is, otherwise others'."""
    torch = TorchCuda(others=20 * GIB)
    cuda = on_cuda(monkeypatch, torch, has_nvml)
    base = cuda.memory().held or GIB // 2
    torch.used = 5 * GIB + 3 * GIB // 2  # models of 5 GiB, and kernels

    shared = SharedMemory(cuda.memory_now(0), 5 * GIB, base)

    assert (own, others) == (shared.own, shared.others)
    assert shared.for_models == shared.seen.free + 5 * GIB + 80 * GIB // 64


def test_a_device_that_cannot_be_used_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that cannot be used ends the start with what is wrong, not a library's error."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    with pytest.raises(ConfigError, match="hides every GPU"):
        CudaDevice().memory()


# --- memory of processes --------------------------------------------------------------------


def test_another_device_that_cannot_be_used_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The line says what is wrong with a Gaudi, where one is wanted."""

    def acquire(_is_exclusive: bool) -> None:
        raise RuntimeError("synStatus=26 [Generic failure] Device acquire failed.\nmore")

    monkeypatch.setattr(devices, "accelerator_memory", acquire)
    monkeypatch.delenv("VLLM_HPU_MULTI_MODEL_CONFIG", raising=False)
    with pytest.raises(ConfigError, match=r"^the device cannot be used: syn.*; run the tools"):
        OwnSleepDevice().memory()

    with pytest.raises(ConfigError, match=r"failed\. more; run hl-smi"):
        GaudiDevice().memory()

    monkeypatch.setenv("VLLM_HPU_MULTI_MODEL_CONFIG", "models.yaml")
    with pytest.raises(ConfigError, match=r"failed\..*; for a Gaudi: there is no package"):
        GaudiDevice().memory()


@pytest.mark.parametrize(("device", "held"), [(GaudiDevice(), 5 * GIB), (OwnSleepDevice(), GIB)])
def test_what_is_held_of_an_accelerator(
    monkeypatch: pytest.MonkeyPatch, device: Device, held: int
) -> None:
    """A Gaudi's one process holds all that is not free. For others torch's allocator counts."""
    module = SimpleNamespace(
        mem_get_info=lambda: (3 * GIB, 8 * GIB), memory_reserved=lambda: 1 * GIB
    )
    monkeypatch.setattr(devices, "accelerator_module", lambda: module)

    assert held == device.held_bytes() == device.memory().held
    assert (8 * GIB, 2 * GIB) == (device.memory().total, device.memory().free)


def test_memory_of_this_process_grows_with_what_it_holds() -> None:
    """The memory of this process grows with what it holds, and shrinks with what it releases."""
    before = CpuDevice().held_bytes()
    assert before > MIB

    # Not bytes: the allocator may have room for them in memory that this process already holds.
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        for _ in range(64):
            held.write(b"x" * MIB)
        between = anonymous_bytes()

    assert between - before > 60 * MIB
    assert anonymous_bytes() - before < 16 * MIB


@pytest.mark.parametrize("code", [HOLD, PARENT])
def test_memory_of_a_process_is_that_of_all_it_has_started(code: str) -> None:
    """All descendants of a process count, however many processes are between."""
    with process(code) as pid:
        held = anonymous_bytes(pid)

    assert 48 * MIB < held < 200 * MIB


def test_process_that_has_ended_holds_nothing() -> None:
    """A process that has ended holds nothing, whether or not it was waited for."""
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()  # its end is reported by the process
        before_it_is_waited_for = anonymous_bytes(child.pid)
    assert before_it_is_waited_for < 32 * MIB

    assert 0 == anonymous_bytes(child.pid)


STARTING = """
import subprocess
held = bytearray(100 << 20)
for _ in range(100):
    subprocess.run(["true"], check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell no such thing")
def test_a_process_that_starts_another_is_not_counted_twice() -> None:
    """A child's memory counts as its parent's until it starts its program, and not twice."""
    most = 0
    with subprocess.Popen([sys.executable, "-c", STARTING]) as process:
        while process.poll() is None:
            most = max(most, anonymous_bytes(process.pid))

    assert 100 * MIB < most < 180 * MIB
