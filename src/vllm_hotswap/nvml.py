"""What is free on a GPU, asked without a context of one's own, which would take some of it.

NVIDIA's management library (NVML) tells, where there is one, and where the GPU is a whole one: an
instance of a divided GPU (MIG) is another matter. Protocol: the NVML API reference, "Device
Queries"; and `cuDeviceGetPCIBusId` of the driver API.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
BUS_ID_BYTES = 32
INSTANCES_ON = 1
"""NVML_DEVICE_MIG_ENABLE."""


class _Memory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def device_free_bytes(driver: Any, library: Any = None, device: int = 0) -> int | None:
    """Bytes that nobody uses on a device; None where that cannot be told.

    Args:
        driver: libcuda, initialised.
        library: libnvidia-ml; the installed one by default.
        device: numbered as torch does.
    """
    with suppress(OSError, AttributeError):  # no such library, or an old one
        nvml = ctypes.CDLL(LIBRARY) if library is None else library
        if nvml.nvmlInit_v2() == 0:
            try:
                return _free(driver, nvml, device)
            finally:
                nvml.nvmlShutdown()
    return None


def _free(driver: Any, nvml: Any, device: int) -> int | None:
    bus_id = ctypes.create_string_buffer(BUS_ID_BYTES)
    if driver.cuDeviceGetPCIBusId(bus_id, ctypes.c_int(BUS_ID_BYTES), ctypes.c_int(device)):
        return None
    handle = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id, ctypes.byref(handle)):
        return None
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    asked = nvml.nvmlDeviceGetMigMode(handle, ctypes.byref(current), ctypes.byref(pending))
    if asked == 0 and current.value == INSTANCES_ON:
        return None
    memory = _Memory()
    if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
        return None
    return int(memory.free)
