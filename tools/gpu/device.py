"""The device as the driver and its management library (NVML) report it, without a context.

A context would take half a GiB of it. Protocol: the NVML API reference, "Device Queries".
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host.cuda_driver import DriverError, check_driver
from vllm_hotswap.host.nvml import asked, device_free_bytes, handle_of, is_divided

GIB = 1 << 30
MIB = 1 << 20

NEEDED_BYTES = 3 * GIB
"""What the phases with tiny models take of the device, contexts included."""

STAND_IN_USED = "FAKEGPU_STAT"
"""A stand-in for the driver writes what is in use, in MiB, into the file that it names."""

COMPUTE_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""

NAME_BYTES = 96


class Unusable(Exception):
    """The check cannot run here; the message says why and what to do, in one line."""


def check_device(environment: Mapping[str, str], library: Any = None, nvml: Any = None) -> Any:
    """Return libcuda, with a device that the check can use.

    Raises:
        Unusable: there is none.
    """
    try:
        driver = check_driver(environment, library)
    except (ConfigError, DriverError) as error:
        raise Unusable(str(error)) from error
    free = device_free_bytes(driver, nvml)
    if free is not None:
        check_free(free)
    return driver


def check_free(free: int) -> None:
    """Raise `Unusable` if so few bytes are free that not even the tiny models fit."""
    if free < NEEDED_BYTES:
        raise Unusable(
            f"only {free / GIB:.1f} GiB of the GPU's memory are free, but the tiny models need "
            f"{NEEDED_BYTES / GIB:.0f}; nvidia-smi shows what holds the rest: stop that, or name "
            "another GPU in CUDA_VISIBLE_DEVICES"
        )


def check_packages(version: Callable[[str], str] = metadata.version) -> None:
    """Raise `Unusable` if this Python has no torch and no vLLM for CUDA."""
    for package in ("torch", "vllm"):
        try:
            found = version(package)
        except metadata.PackageNotFoundError:
            found = ""
        if not found or found.endswith("+cpu"):
            told = f"is {found}, a build for the CPU" if found else "is not installed"
            raise Unusable(
                f"{package} {told} in {sys.executable}; name the Python that has vLLM's CUDA "
                "build: make check-gpu PYTHON=..."
            )


def used_bytes(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return what is in use on the first device, by any process; None if not known (MIG)."""
    if stat := environment.get(STAND_IN_USED):
        with suppress(OSError, ValueError):
            return int(Path(stat).read_text(encoding="ascii")) * MIB
        return None
    try:
        driver = check_driver(environment)
    except (ConfigError, DriverError):
        return None
    free = device_free_bytes(driver)
    return None if free is None else total_bytes(driver) - free


def total_bytes(driver: Any) -> int:
    """Return what the first device has."""
    total = ctypes.c_size_t()
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), ctypes.c_int(0))
    return total.value


def facts(driver: Any, nvml: Any = None) -> dict[str, Any]:
    """Return name, compute capability, driver's version, MIG, and processes on the first device."""
    found: dict[str, Any] = {
        "name": _text(lambda buffer, size: driver.cuDeviceGetName(buffer, size, ctypes.c_int(0))),
        "compute capability": ".".join(str(_attribute(driver, n)) for n in COMPUTE_CAPABILITY),
    }
    return found | (asked(lambda library: _managed(driver, library), nvml) or {})


def _managed(driver: Any, nvml: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"driver": _text(nvml.nvmlSystemGetDriverVersion)}
    if (handle := handle_of(driver, nvml, 0)) is None:
        return found
    found["MIG"] = False
    with suppress(AttributeError):
        found["MIG"] = is_divided(nvml, handle)
    with suppress(AttributeError):
        count = ctypes.c_uint(0)
        nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), None)
        found["processes"] = count.value
    return found


def _attribute(driver: Any, number: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), ctypes.c_int(number), ctypes.c_int(0))
    return value.value


def _text(ask: Any) -> str:
    buffer = ctypes.create_string_buffer(NAME_BYTES)
    return "" if ask(buffer, NAME_BYTES) else buffer.value.decode(errors="replace")
