"""The engine host process: every loaded engine, and the loop that steps the active one."""

from __future__ import annotations

from vllm_hotswap.host import gaudi, grammars, vllm_versions
from vllm_hotswap.host.classes import MULTIPROC_QUALIFIED_NAME, QUALIFIED_NAME
from vllm_hotswap.host.command_handler import CommandHandler
from vllm_hotswap.host.devices import (
    NO_DEVICE,
    SLEEP_VARIABLE,
    Device,
    DeviceMemory,
    SharedMemory,
    anonymous_bytes,
    device_of,
    with_why_no_device,
)
from vllm_hotswap.host.gaudi import why_not_imported
from vllm_hotswap.host.kv_cache import expected_limits, given_bytes, kv_key, kv_shares, ranks
from vllm_hotswap.host.loading import executor_class
from vllm_hotswap.host.messages import (
    CANARY_ID,
    Activate,
    Command,
    CommandResult,
    EngineFailed,
    GiveUpWake,
    Load,
    Loaded,
    LoadStage,
    Measure,
    MeasureNow,
    Message,
    Ping,
    Ready,
    Sleep,
    SocketPaths,
    Stop,
    Unload,
    Wake,
    WakeSlice,
)
from vllm_hotswap.host.platforms import host_environment
from vllm_hotswap.host.process import run
from vllm_hotswap.host.variables import Environment, Variables
from vllm_hotswap.host.vllm_names import find
from vllm_hotswap.host.vllm_versions import (
    RUN_ON,
    cache_root,
    cpu_capability,
    is_installed,
    require_vllm,
)

__all__ = [
    "CANARY_ID",
    "MULTIPROC_QUALIFIED_NAME",
    "NO_DEVICE",
    "QUALIFIED_NAME",
    "RUN_ON",
    "SLEEP_VARIABLE",
    "Activate",
    "Command",
    "CommandHandler",
    "CommandResult",
    "Device",
    "DeviceMemory",
    "EngineFailed",
    "Environment",
    "GiveUpWake",
    "Load",
    "LoadStage",
    "Loaded",
    "Measure",
    "MeasureNow",
    "Message",
    "Ping",
    "Ready",
    "SharedMemory",
    "Sleep",
    "SocketPaths",
    "Stop",
    "Unload",
    "Variables",
    "Wake",
    "WakeSlice",
    "anonymous_bytes",
    "cache_root",
    "cpu_capability",
    "device_of",
    "executor_class",
    "expected_limits",
    "find",
    "gaudi",
    "given_bytes",
    "grammars",
    "host_environment",
    "is_installed",
    "kv_key",
    "kv_shares",
    "ranks",
    "require_vllm",
    "run",
    "vllm_versions",
    "why_not_imported",
    "with_why_no_device",
]
