"""The configuration: every setting, the YAML file, and what it may not do unasked."""

from __future__ import annotations

from vllm_hotswap.config.models_file import ModelsFile
from vllm_hotswap.config.permissions import ALLOW_VARIABLE, PERMISSIONS, parse_allowed
from vllm_hotswap.config.reader import (
    NOT_SHARED,
    ModelConfig,
    ReadConfig,
    ServerConfig,
    load_config,
    read_config,
    refuse_surprises,
    unknown_key,
)
from vllm_hotswap.config.sampling import GENERATING_PATHS, SamplingPolicy
from vllm_hotswap.config.schema_file import SCHEMA
from vllm_hotswap.config.settings import (
    CONFIG_VARIABLES,
    FORWARDED_VARIABLE,
    SECTIONS,
    STRICT,
    TOP_LEVEL,
    Count,
    DrainAction,
    GroupConfig,
    IsolationConfig,
    LimitsConfig,
    ModelKeys,
    Override,
    Priority,
    RecoveryConfig,
    Seconds,
    SecondsAboveZero,
    SwitchingConfig,
    Text,
    overrides,
    server_settings,
)
from vllm_hotswap.config.sizes import _GIB, MemoryBudget, resolve_size
from vllm_hotswap.config.written import Place, Surprising, WrittenInt

__all__ = [
    "ALLOW_VARIABLE",
    "CONFIG_VARIABLES",
    "FORWARDED_VARIABLE",
    "GENERATING_PATHS",
    "NOT_SHARED",
    "PERMISSIONS",
    "SCHEMA",
    "SECTIONS",
    "STRICT",
    "TOP_LEVEL",
    "_GIB",
    "Count",
    "DrainAction",
    "GroupConfig",
    "IsolationConfig",
    "LimitsConfig",
    "MemoryBudget",
    "ModelConfig",
    "ModelKeys",
    "ModelsFile",
    "Override",
    "Place",
    "Priority",
    "ReadConfig",
    "RecoveryConfig",
    "SamplingPolicy",
    "Seconds",
    "SecondsAboveZero",
    "ServerConfig",
    "Surprising",
    "SwitchingConfig",
    "Text",
    "WrittenInt",
    "load_config",
    "overrides",
    "parse_allowed",
    "read_config",
    "refuse_surprises",
    "resolve_size",
    "server_settings",
    "unknown_key",
]
