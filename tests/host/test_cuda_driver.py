"""Errors about a GPU, a driver or settings with which models cannot sleep."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import pytest

from tests.helpers.cuda import FakeCuda
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host import cuda_driver
from vllm_hotswap.host.cuda_driver import Driver, DriverError, check_driver
from vllm_hotswap.host.nvml import device_free_bytes, used_bytes_of

GIB = 1 << 30


@pytest.mark.parametrize(
    ("cuda", "environment", "says"),
    [
        (
            FakeCuda(),
            {"CUDA_VISIBLE_DEVICES": ""},
            "CUDA_VISIBLE_DEVICES is '', which hides every GPU; unset it, or name one, such as 0",
        ),
        (FakeCuda(), {"CUDA_VISIBLE_DEVICES": "-1"}, "which hides every GPU"),
        (
            FakeCuda(init_code=100),
            {},
            "there is no GPU: the NVIDIA driver sees 0; run nvidia-smi",
        ),
        (
            FakeCuda(devices=0),
            {},
            "run nvidia-smi, which also shows whether MIG is on without an instance",
        ),
        (
            FakeCuda(devices=0),
            {"CUDA_VISIBLE_DEVICES": "7"},
            "there is no GPU that CUDA_VISIBLE_DEVICES=7 names: the NVIDIA driver sees 0",
        ),
        (
            FakeCuda(init_code=803),
            {},
            "the NVIDIA driver cannot be used: fake error 803 (CUDA error 803); run nvidia-smi for",
        ),
        (
            FakeCuda(can_map=False),
            {},
            "GPU 0 or its driver cannot map memory (CUDA virtual memory management), which sleep",
        ),
        (
            FakeCuda(),
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            "do not work with expandable segments; remove expandable_segments from it",
        ),
    ],
)
def test_a_device_that_cannot_be_used_is_told_in_one_line(
    cuda: FakeCuda, environment: Mapping[str, str], says: str
) -> None:
    """A device that cannot be used is reported in one line with the fact, and what to do."""
    with pytest.raises(ConfigError) as error:
        check_driver(environment, cuda)

    assert says in error.value.message
    assert "\n" not in error.value.message


def test_a_device_that_can_be_used_is_passed_by() -> None:
    """A usable device is accepted, also one named by number, or an instance of a divided GPU."""
    cuda = FakeCuda()
    for visible in ("0", "MIG-f3a4"):
        assert cuda is check_driver({"CUDA_VISIBLE_DEVICES": visible}, cuda)


def test_a_machine_without_the_driver_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing driver is reported as such, instead of a library that cannot be loaded."""
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda-of-nobody.so.1")

    with pytest.raises(ConfigError, match="there is no NVIDIA driver: libcuda-of-nobody"):
        check_driver({})


def test_a_call_that_fails_says_which_and_why() -> None:
    """A failed call has the driver's words, and shows whether memory is lacking."""
    cuda = FakeCuda(total=0, refuses={"cuMemAddressReserve"})
    driver = Driver(0, cuda)

    with pytest.raises(DriverError, match=r"cuMemAddressReserve: fake error 999 \(CUDA error 999"):
        driver.reserve(driver.step)
    with pytest.raises(DriverError, match=r"cuMemCreate: out of memory") as error:
        driver.create(driver.step)
    assert error.value.is_out_of_memory


def test_a_thread_without_a_context_gets_torchs() -> None:
    """A thread that torch calls back on, without a context of its own, gets torch's."""

    class Bare(FakeCuda):
        has_context = False

        def _cuCtxGetCurrent(self, context: Any) -> None:
            context._obj.value = 1 if self.has_context else 0

        def _cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> None:
            context._obj.value = 77 + device.value

        def _cuCtxSetCurrent(self, context: Any) -> None:
            assert 77 == context.value
            self.has_context = True

    cuda = Bare()
    driver = Driver(0, cuda)
    driver.ensure_context()
    driver.ensure_context()

    assert 1 == cuda.calls.count("cuCtxSetCurrent")


# --- what is free, without a context -------------------------------------------------------------


class FakeNvml:
    """NVML of one GPU."""

    def __init__(self, free: int, is_divided: bool = False, works: bool = True) -> None:
        self.free, self.is_divided, self.works = free, is_divided, works
        self.is_open = False

    def nvmlInit_v2(self) -> int:
        self.is_open = self.works
        return 0 if self.works else 9

    def nvmlShutdown(self) -> int:
        self.is_open = False
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus_id: Any, handle: Any) -> int:
        assert b"00000000:01:00.0" == bus_id.value
        handle._obj.value = 5
        return 0

    def nvmlDeviceGetMigMode(self, handle: Any, current: Any, pending: Any) -> int:
        current._obj.value = int(self.is_divided)
        return 0

    processes: tuple[tuple[int, int], ...] = ()
    """Numbers of processes, and the bytes that they use."""

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, found: Any) -> int:
        room, count._obj.value = count._obj.value, len(self.processes)
        if len(self.processes) > room:
            return 7
        for place, (pid, used) in zip(found or (), self.processes, strict=False):
            place.pid, place.used = pid, used
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.free = self.free
        return 0


class WithBus:
    """libcuda, reduced to the location of a GPU."""

    def cuDeviceGetPCIBusId(self, bus_id: Any, size: Any, device: Any) -> int:
        ctypes.memmove(bus_id, b"00000000:01:00.0", 17)
        return 0


@pytest.mark.parametrize(
    ("nvml", "free"),
    [
        (FakeNvml(7 * GIB), 7 * GIB),
        (FakeNvml(7 * GIB, is_divided=True), None),
        (FakeNvml(7 * GIB, works=False), None),
        (object(), None),
    ],
    ids=["whole", "divided", "without rights", "another library"],
)
def test_free_memory_is_asked_for_without_a_context(nvml: Any, free: int | None) -> None:
    """Free memory is known for a whole GPU only; if unknown, that is not an error."""
    assert free == device_free_bytes(WithBus(), nvml)
    assert not getattr(nvml, "is_open", False)


@pytest.mark.parametrize(
    ("processes", "is_divided", "used"),
    [
        (((7, GIB), (9, 2 * GIB), (8, 4 * GIB)), False, 3 * GIB),
        (((8, 4 * GIB),), False, None),
        ((), False, None),
        (((7, (1 << 64) - 1),), False, None),
        (tuple((pid, GIB) for pid in range(300)), False, None),
        (((7, GIB),), True, None),
    ],
    ids=["ours and others", "numbers of elsewhere", "none", "untold", "too many", "divided"],
)
def test_what_processes_use_of_a_device_is_told_where_it_is_known(
    processes: tuple[tuple[int, int], ...], is_divided: bool, used: int | None
) -> None:
    """The sum for all processes is known, or None where a container has other process numbers."""
    nvml = FakeNvml(0, is_divided)
    nvml.processes = processes

    assert used == used_bytes_of([7, 9], WithBus(), nvml)
    assert used_bytes_of([7], WithBus(), object()) is None


def test_free_memory_is_unknown_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library free memory is unknown, as on this machine."""
    monkeypatch.setattr("vllm_hotswap.host.nvml.LIBRARY", "libnvml-of-nobody.so.1")

    assert device_free_bytes(WithBus()) is None
    assert used_bytes_of([7], WithBus()) is None


def test_without_sleep_neither_mapping_nor_torchs_pools_have_to_work() -> None:
    """Without sleep models lie in torch's own memory: mapping and pools need not work."""
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

    assert check_driver(environment, cuda := FakeCuda(can_map=False), maps=False) is cuda
