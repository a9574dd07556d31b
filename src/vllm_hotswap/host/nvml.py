"""Free memory of a GPU, and memory that processes use, without a CUDA context of our own.

NVIDIA's management library (NVML) reports it, if it is installed and the GPU is not divided (MIG).
Protocol: the NVML API reference, "Device Queries"; and `cuDeviceGetPCIBusId` of the driver API.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

LIBRARY = "libnvidia-ml.so.1"
BUS_ID_BYTES = 32
INSTANCES_ON = 1
"""NVML_DEVICE_MIG_ENABLE."""

UNKNOWN = (1 << 64) - 1
"""NVML_VALUE_NOT_AVAILABLE."""

MOST_PROCESSES = 256
"""Processes that a device is asked about at most. If it has more, nothing is known."""


class _Memory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t, as version 3 of the call fills it."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


def device_free_bytes(driver: Any, library: Any = None, device: int = 0) -> int | None:
    """Return the free bytes of a device; None if they are not known.

    Args:
        driver: libcuda, initialised.
        library: libnvidia-ml; the installed one by default.
        device: its number, as torch counts.
    """
    return asked(lambda nvml: _free(driver, nvml, device), library)


def asked(ask: Callable[[Any], T], library: Any = None) -> T | None:
    """Return what the library reports; None if there is none, or it lacks the function."""
    with suppress(OSError, AttributeError):
        nvml = ctypes.CDLL(LIBRARY) if library is None else library
        if nvml.nvmlInit_v2() == 0:
            try:
                return ask(nvml)
            finally:
                nvml.nvmlShutdown()
    return None


def used_bytes_of(
    pids: Collection[int], driver: Any, library: Any = None, device: int = 0
) -> int | None:
    """Return the bytes of a device that processes use; None if unknown, or if none is found.

    In a container, NVML may report the process numbers from outside it. Then none is found.

    Args:
        pids: the processes, counted together.
        driver, library, device: as for `device_free_bytes`.
    """
    with suppress(AttributeError):  # an old library
        nvml = _kept_open() if library is None else library
        if nvml is not None and (handle := _whole_device(driver, nvml, device)) is not None:
            return _used(pids, nvml, handle)
    return None


@functools.cache
def _kept_open() -> Any | None:
    """Open the library once per process: opening it takes longer than asking it."""
    with suppress(OSError, AttributeError):
        nvml = ctypes.CDLL(LIBRARY)
        if nvml.nvmlInit_v2() == 0:
            return nvml
    return None


def _used(pids: Collection[int], nvml: Any, handle: Any) -> int | None:
    processes = (_Process * MOST_PROCESSES)()
    count = ctypes.c_uint(MOST_PROCESSES)
    if nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), processes):
        return None
    found = [each.used for each in processes[: count.value] if each.pid in pids]
    return sum(found) if found and UNKNOWN not in found else None


def _free(driver: Any, nvml: Any, device: int) -> int | None:
    handle = _whole_device(driver, nvml, device)
    memory = _Memory()
    if handle is None or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
        return None
    return int(memory.free)


def _whole_device(driver: Any, nvml: Any, device: int) -> Any:
    """Return NVML's handle of a device; None if there is none, or if the GPU is divided."""
    handle = handle_of(driver, nvml, device)
    return None if handle is None or is_divided(nvml, handle) else handle


def handle_of(driver: Any, nvml: Any, device: int) -> Any:
    """Return NVML's handle of a device; None if it has none."""
    bus_id, handle = ctypes.create_string_buffer(BUS_ID_BYTES), ctypes.c_void_p()
    if driver.cuDeviceGetPCIBusId(bus_id, ctypes.c_int(BUS_ID_BYTES), ctypes.c_int(device)):
        return None
    if nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id, ctypes.byref(handle)):
        return None
    return handle


def is_divided(nvml: Any, handle: Any) -> bool:
    """Whether a GPU has instances (MIG); False for a GPU that cannot have any."""
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    refused = nvml.nvmlDeviceGetMigMode(handle, ctypes.byref(current), ctypes.byref(pending))
    return refused == 0 and current.value == INSTANCES_ON
