"""Which vLLM is installed, and which ones this package has been run on."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host import gaudi

RUN_ON = ("0.26.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
"""Versions on which the tests ran, oldest first; docs/reference/compatibility.md has them, too."""

READ_ON = ("0.33.0",)
"""Newer versions, not run yet, that have every name and signature we use: `make check-vllm`."""


def is_installed() -> bool:
    """Whether there is a vLLM at all, told without importing it."""
    return importlib.util.find_spec("vllm") is not None


def require_vllm() -> None:
    """Look for a vLLM, and for a platform's plugin that is made for another one.

    Raises:
        ConfigError: there is no vLLM, or such a plugin; the message has the next step.
    """
    if not is_installed():
        raise ConfigError(
            "vLLM is not installed in this environment; install the build for your platform "
            "(in a clone, `make setup` installs the one for CPUs)"
        )
    gaudi.require_matching()


def vllm_version() -> str:
    """As vLLM's own `/version` tells it."""
    from vllm.version import __version__

    return str(__version__)


def cache_root() -> Path:
    """The folder in which vLLM keeps what it has found out about this machine."""
    from vllm import envs

    return Path(envs.VLLM_CACHE_ROOT)


def cpu_capability() -> str:
    """The instructions that torch uses on this CPU, such as `AVX2`."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def warning(version: str) -> str | None:
    """What to tell the user about a version of vLLM; None where there is nothing to tell."""
    if numbers(version) in map(numbers, RUN_ON):
        return None
    if numbers(version) in map(numbers, READ_ON):
        return (
            f"vLLM {version} has every name that vllm-hotswap uses, but was not tested with it; "
            f"tested versions: {', '.join(RUN_ON)}"
        )
    return f"vLLM {version} was not tested with vllm-hotswap; tested versions: {', '.join(RUN_ON)}"


def numbers(version: str) -> tuple[int, ...]:
    """`0.32.1rc2.dev3+cpu` as `(0, 32)`: a fix release is taken for the release that it fixes."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()
