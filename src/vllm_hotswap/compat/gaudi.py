"""What the engine host does for the vLLM Gaudi plugin, once. Checked on vllm-gaudi 0.26.0.

The plugin's platform sets environment variables when a configuration is made. That is in the API
process here, after the host was started. Its own configuration is made at the first question and
kept: the type of the first model would count for all that are loaded later.

Relies on: `HpuPlatform.set_compile_env_defaults`, `extension.runtime.clear_config`. What the plugin
keeps for each model besides is in `compat.state`.
"""

from __future__ import annotations

import os
from typing import Any

DEVICE_TYPE = "hpu"
NO_EXPERT_STREAM = "VLLM_DISABLE_SHARED_EXPERTS_STREAM"


def prepare(platform: Any) -> None:
    """Make this process as the plugin would have it before its first load; nothing elsewhere."""
    if platform.device_type != DEVICE_TYPE:
        return
    if hasattr(type(platform), "set_compile_env_defaults"):  # of the object vLLM says None
        platform.set_compile_env_defaults()
    os.environ[NO_EXPERT_STREAM] = "1"  # as the platform does, whatever was there
    _forget_configuration()


def _forget_configuration() -> None:
    """So that the state of a process without engines holds none, and each load makes its own."""
    try:
        from vllm_gaudi.extension.runtime import clear_config
    except ImportError:  # another plugin's platform of this name, or another version
        return
    clear_config()
