"""Phase `facts`: what is here, and whether host memory can be pinned."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import vllm_hotswap
from tools.gpu import device
from tools.gpu.device import MIB, NEEDED_BYTES
from tools.gpu.results import Say
from tools.gpu.task import Task
from vllm_hotswap.host.cuda_driver import Driver, check_driver
from vllm_hotswap.host.cuda_memory import HostCopy
from vllm_hotswap.host.nvml import device_free_bytes

PINNED_BYTES = 64 * MIB
CONTEXT_BYTES = 512 * MIB
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LINK = "pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current"
QUERY_S = 20


def run(_task: Task, say: Say) -> None:
    cuda = check_driver(os.environ)
    for name, value in device.facts(cuda).items():
        say.fact(name, name, value)
    say.check("maps", "the driver can map memory (VMM)", True)  # or check_driver would have refused
    free_before = device_free_bytes(cuda)
    _versions(say)
    driver = Driver(0, cuda)
    driver.ensure_context()
    memory(say, driver, free_before)
    _host(say)
    pinning(say, driver)


def _versions(say: Say) -> None:
    import torch

    say.fact("hotswap", "vllm-hotswap", vllm_hotswap.__version__)
    say.fact("python", "Python", platform.python_version())
    say.fact("torch", "torch", torch.__version__)
    say.fact("triton", "triton", _version("triton"))
    say.fact("vllm", "vLLM", _version("vllm"))
    wanted = "" if torch.version.cuda else "install vLLM's build for CUDA, and torch's with it"
    shown = torch.version.cuda or "none: torch is built for the CPU"
    say.check("cuda", "torch's CUDA", torch.version.cuda is not None, shown, note=wanted)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def memory(say: Say, driver: Driver, free_before: int | None) -> None:
    free, total = driver.memory_info()
    say.fact("total", "memory of the device", total // MIB, "MiB")
    is_enough = free >= NEEDED_BYTES - CONTEXT_BYTES
    told = "" if is_enough else "stop what uses the GPU, or name another one: CUDA_VISIBLE_DEVICES"
    say.check("free", "free, beside a context", is_enough, free // MIB, "MiB", told)
    if free_before is None:
        say.fact("others", "held by other processes", "not known here (MIG, or no NVML)")
        return
    say.fact("others", "held by other processes", max(0, total - free_before) // MIB, "MiB")
    say.fact("context", "a context", max(0, free_before - free) // MIB, "MiB")


def _host(say: Say) -> None:
    say.fact("cores", "cores", len(os.sched_getaffinity(0)))
    say.fact("host", "host memory", psutil.virtual_memory().total // MIB, "MiB")
    say.fact("host_free", "host memory, available", psutil.virtual_memory().available // MIB, "MiB")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft // 1024} KiB"
    say.fact("memlock", "limit of locked memory", limit)
    if HUGE_PAGES.exists():
        say.fact("huge_pages", "huge pages", HUGE_PAGES.read_text(encoding="ascii").strip())
    say.fact("pcie", f"nvidia-smi: {LINK}", _smi(LINK))


def _smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return "not known"
    return done.stdout.strip()


def pinning(say: Say, driver: Any, nbytes: int = PINNED_BYTES) -> None:
    """Check whether the device can copy from host memory at full speed."""
    before_s = time.perf_counter()
    copy = HostCopy(driver, nbytes)
    took_s = time.perf_counter() - before_s
    note = "" if copy.refusal is None else refusal(copy.refusal)
    say.check("pinned", "host memory can be pinned", copy.refusal is None, note=note)
    if copy.refusal is None:
        say.fact("pin", "pinning fresh memory", nbytes / 1e9 / took_s, "GB/s")
    copy.close()


def refusal(cause: str) -> str:
    """Return what to do where it cannot."""
    return (
        f"{cause}; raise the limit of locked memory: ulimit -l unlimited, or for a container "
        "--ulimit memlock=-1; models sleep and wake without, but several times slower"
    )
