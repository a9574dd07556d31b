"""Where vLLM keeps names that it has moved between the versions that this package runs on.

Only names that have moved are here. They are looked up when they are asked for, so that
importing this module imports nothing of vLLM.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any

from vllm_hotswap.errors import ConfigError

PLACES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "SSLCertRefresher": {
            "0.29": "vllm.entrypoints.launchers.utils.ssl",
            "0.26": "vllm.entrypoints.serve.utils.ssl",
        },
        "build_app": {
            "0.29": "vllm.entrypoints.launchers.app",
            "0.26": "vllm.entrypoints.openai.api_server",
        },
        "get_global_kv_cache_groups": {
            "0.33": "vllm.v1.core.kv_cache_planning",
        },
        "get_kv_cache_configs": {
            "0.33": "vllm.v1.core.kv_cache_planning",
            "0.26": "vllm.v1.core.kv_cache_utils",
        },
        "get_uvicorn_log_config": {
            "0.29": "vllm.entrypoints.launchers.utils.server_utils",
            "0.26": "vllm.entrypoints.serve.utils.server_utils",
        },
        "init_app_state": {
            "0.29": "vllm.entrypoints.launchers.api_server.app_state",
            "0.26": "vllm.entrypoints.openai.api_server",
        },
        "init_render_app_state": {
            "0.32": "vllm.entrypoints.launchers.render.app_state",
        },
        "load_chat_template": {
            "0.32": "vllm.renderers.chat_utils",
            "0.26": "vllm.entrypoints.chat_utils",
        },
        "make_arg_parser": {
            "0.33": "vllm.entrypoints.common.cli_args",
            "0.29": "vllm.entrypoints.launchers.cli_args",
            "0.26": "vllm.entrypoints.openai.cli_args",
        },
        "validate_parsed_serve_args": {
            "0.33": "vllm.entrypoints.common.cli_args",
            "0.29": "vllm.entrypoints.launchers.cli_args",
            "0.26": "vllm.entrypoints.openai.cli_args",
        },
    }
)
"""Name -> the first version that has it in a module -> that module; newest first."""

OPTIONAL = frozenset(["get_global_kv_cache_groups", "init_render_app_state"])
"""Names that some versions do not have at all; code that asks for one can do without it."""


def find(name: str, places: Mapping[str, Mapping[str, str]] = PLACES) -> Any:
    """Return what the installed vLLM calls `name`, wherever it keeps it.

    Raises:
        ConfigError: it is in none of the known places.
    """
    modules = places[name].values()
    for module_name in modules:
        module = _module(module_name)
        if module is not None and hasattr(module, name):
            return getattr(module, name)
    raise ConfigError(
        f"the installed vLLM has no {name!r} in {' or '.join(modules)}; "
        "install one of the versions that docs/reference/compatibility.md lists"
    )


def _module(name: str) -> ModuleType | None:
    """Return the module; None if it does not exist. Raises if it exists but cannot be imported."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise
