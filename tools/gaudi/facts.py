"""What is on this machine: versions, variables, the driver, the device, and vLLM's platform.

A process that uses a Gaudi holds it until its end, and no other process gets it. So everything that
imports torch, vLLM or the plugin is done in a process of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.gaudi.private import ROOT, SECRET
from tools.gaudi.results import TEXT, last_line, output_of

PACKAGES = (
    "vllm",
    "vllm-gaudi",
    "vllm-hotswap",
    "torch",
    "habana-torch-plugin",
    "neural-compressor-pt",
    "transformers",
)
OWN = "vllm_hotswap"
KINDS = re.compile(r"VLLM_|PT_|HABANA_|HLS_|LOG_LEVEL_|QUANT_CONFIG|RUNTIME_|FUSER_|TORCH|PYTORCH_")
PLAIN = re.compile(r"-?\d+(\.\d+)?|true|false|yes|no|on|off|", re.IGNORECASE)
DRIVER = Path("/sys/module/habanalabs/version")
ASK_DRIVER = ["hl-smi", "-Q", "driver_version", "-f", "csv,noheader"]
DEVICE_LIMIT_S = 300


def facts() -> dict[str, Any]:
    """Return versions of packages and the driver, the clone's commit, and relevant variables."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": sys.version.split()[0],
        "versions": versions,
        "driver": driver(),
        **clone(),
        "variables": variables(os.environ),
    }


def driver() -> str | None:
    """Return the version of the kernel's driver; None if it is nowhere to be read."""
    try:
        return last_line(output_of(ASK_DRIVER, 30)) or None
    except (OSError, RuntimeError, subprocess.TimeoutExpired):
        return DRIVER.read_text(**TEXT).strip() if DRIVER.exists() else None


GIT = ["git", "-c", f"safe.directory={ROOT}"]
"""In a container the clone is often another user's, and git refuses to read it."""


def clone() -> dict[str, Any]:
    """Return the commit, whether files have changed since, and whether Python uses this code.

    Another package than the clone's is wrong: results would be of unknown code.
    """
    spec = importlib.util.find_spec(OWN)
    here = None if spec is None or spec.origin is None else Path(spec.origin).parent
    is_ours = here is not None and digest(here) == digest(ROOT / "src" / OWN)
    other = (
        f"Python finds {here or 'no package'} as {OWN}, which is not the clone's; reinstall the "
        "clone: pip install ."
    )
    return {
        "commit": commit(ROOT),
        "is_changed": is_changed(ROOT),
        "package_is_the_clones": is_ours,
        "wrong": [] if is_ours else [other],
    }


def commit(clone: Path) -> str | None:
    """Return the commit that is checked out. Read from git's own files where there is no git."""
    with suppress(OSError, RuntimeError, subprocess.TimeoutExpired):
        return output_of([*GIT, "rev-parse", "HEAD"], 30, clone).strip()
    with suppress(OSError):
        head = (clone / ".git/HEAD").read_text(**TEXT).strip()
        name = head.removeprefix("ref: ")
        return head if name == head else _commit_of(clone / ".git", name)
    return None


def _commit_of(git: Path, name: str) -> str | None:
    """Return a branch's commit, by gitrepository-layout(5): its own file, or in `packed-refs`."""
    if (own := git / name).exists():
        return own.read_text(**TEXT).strip()
    lines = (git / "packed-refs").read_text(**TEXT).splitlines()
    return next((line.partition(" ")[0] for line in lines if line.endswith(f" {name}")), None)


def is_changed(clone: Path) -> bool | None:
    """Return whether files have changed; None if git can't tell."""
    status = [*GIT, "status", "--porcelain", "--untracked-files=no"]
    with suppress(OSError, RuntimeError, subprocess.TimeoutExpired):
        return bool(output_of(status, 60, clone).strip())
    return None


def digest(package: Path) -> str:
    """Return a digest of the names and the contents of a package's modules."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package)}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables of vLLM, the plugin, torch and Gaudi; of texts, only that they are set."""
    return {
        name: value if PLAIN.fullmatch(value) and not SECRET.search(name) else "(a text)"
        for name, value in sorted(environment.items())
        if KINDS.match(name)
    }


DEVICE = """
import json, torch, habana_frameworks.torch as h

def seen():
    torch.hpu.synchronize()
    free, total = torch.hpu.mem_get_info()
    found = {"free": free, "total": total}
    for name in ("memory_allocated", "memory_reserved"):
        ask = getattr(torch.hpu, name, None)
        found[name] = ask() if ask else None
    return found

torch.ones(1, device="hpu")
before = seen()
some = torch.ones(256 << 20, dtype=torch.uint8, device="hpu")
during = seen()
del some
print(json.dumps({
    "count": torch.hpu.device_count(), "name": torch.hpu.get_device_name(),
    "has_rng_state": hasattr(torch.hpu, "get_rng_state"),
    "before": before, "with_256_mib": during, "after": seen(),
}))
"""

PLATFORM = """
from vllm.platforms import current_platform as platform
print(platform.device_type, type(platform).__module__ + "." + type(platform).__name__)
"""

MOST_OF_IT = 240 << 20
"""Bytes of the 256 MiB that have to be seen to come and go. Allocators round."""


NEEDED = {
    "mem_get_info": "",
    "memory_allocated": ", so whether weights leave the device is not judged",
}


def device() -> dict[str, Any]:
    """Return which numbers follow 256 MiB that come and go.

    Budgets need `mem_get_info`, and whether a model's weights leave is judged by
    `memory_allocated`.
    """
    found: dict[str, Any] = json.loads(_last_line_of(DEVICE))
    used = [each["total"] - each["free"] for each in _three(found)]
    follow = {
        "mem_get_info": _follows(used),
        **{
            name: _follows([each[name] for each in _three(found)])
            for name in ("memory_allocated", "memory_reserved")
        },
    }
    wrong = [
        f"torch.hpu.{name} does not show that 256 MiB come and go{so}"
        for name, so in NEEDED.items()
        if not follow[name]
    ]
    return {**found, "follows": follow, "wrong": wrong}


def _three(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [found["before"], found["with_256_mib"], found["after"]]


def _follows(used: list[int | None]) -> bool:
    before, during, after = used
    if before is None or during is None or after is None:
        return False
    return during - before >= MOST_OF_IT and during - after >= MOST_OF_IT


def platform() -> dict[str, Any]:
    kind, _, name = _last_line_of(PLATFORM).partition(" ")
    wrong = [] if kind == "hpu" else [f"vLLM has chosen {name} ({kind}), not the plugin's platform"]
    return {"platform": name, "device_type": kind, "wrong": wrong}


def _last_line_of(program: str) -> str:
    return last_line(output_of([sys.executable, "-B", "-c", program], DEVICE_LIMIT_S))
