"""A model's `lora_modules`: the adapters that its YAML names, and what they need of its engine.

vLLM's parser has read the values. `engines.adapters` loads adapters, not vLLM's frontend, whose
numbers for them would start again with every model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_hotswap.config import ModelConfig, ServerConfig
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.launch import hub
from vllm_hotswap.launch.adapter_files import read_adapter, shapes_of, smallest_rank
from vllm_hotswap.launch.vllm_adapters import allowed_ranks, check_adapter, default_rank
from vllm_hotswap.models import AdapterFiles
from vllm_hotswap.system import resolve_beside


def read_adapters(
    args: argparse.Namespace, model: ModelConfig, path: Path
) -> tuple[AdapterFiles, ...]:
    """Read the adapters of one model, and change `args` so that its engine can hold them.

    Args:
        args: vLLM's namespace; a `max_lora_rank` of None was not set.
        model: the model.
        path: the YAML file, where relative paths start.

    Raises:
        ConfigError: an adapter is missing, incomplete, or made for another model.
    """
    modules, args.lora_modules = args.lora_modules or [], None
    place = str(model.at(path, "lora_modules"))
    adapters = []
    if modules:
        base = shapes_of(hub.local_folder(model.model, getattr(args, "revision", None)))
        adapters = [_read(module, model, base, path, place) for module in modules]
        args.enable_lora = True
    if args.max_lora_rank is None:
        needed = [adapter.rank for adapter in adapters]
        args.max_lora_rank = smallest_rank(needed, allowed_ranks(), default_rank())
    _check_ranks(adapters, args.max_lora_rank, place)
    return tuple(adapters)


def check_support(adapters: Iterable[AdapterFiles], vllm_config: Any, place: str) -> None:
    """Check that vLLM accepts the adapters' configurations. Raises `ConfigError`."""
    for adapter in adapters:
        try:
            check_adapter(adapter.name, adapter.path, vllm_config)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error.message}") from error


def check_names(config: ServerConfig, adapters: Mapping[str, Iterable[AdapterFiles]]) -> None:
    """Check that no adapter has the name of a model or of another adapter.

    Raises:
        ConfigError: a name is used twice; the message says where.
    """
    places = {name: f"models.{model.alias}" for model in config.models for name in model.names}
    for model in config.models:
        where = model.place("lora_modules")
        for adapter in adapters.get(model.alias, ()):
            if adapter.name in places:
                at = replace(model.at(config.path, "lora_modules"), keys="")
                raise ConfigError(
                    f"{at}: the name {adapter.name!r} is used twice, in {places[adapter.name]} "
                    f"and in {where}; aliases and adapters of all models need distinct names"
                )
            places[adapter.name] = where


def _read(
    module: Any, model: ModelConfig, base: Mapping[str, Any], path: Path, place: str
) -> AdapterFiles:
    if not all(isinstance(value, str) and value for value in (module.name, module.path)):
        raise ConfigError(f"{place}: an adapter needs a name and a path, both text")
    if module.base_model_name not in (None, *model.names):
        raise ConfigError(
            f"{place}: the base_model_name of {module.name!r} is {module.base_model_name!r}; "
            f"here it can only be {' or '.join(map(repr, model.names))}; leave it out"
        )
    is_3d = bool(getattr(module, "is_3d_lora_weight", False))
    try:
        return read_adapter(module.name, _folder(module.path, path, place), base, is_3d)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error.message} ({module.path})") from error


def _folder(name: str, path: Path, place: str) -> Path:
    """Return an adapter's folder, beside the YAML file or in the hub's cache."""
    local = resolve_beside(path, name, place)
    looks_like_path = name.startswith((".", "/", "~"))
    return local if looks_like_path or local.exists() else hub.local_folder(name, None) or local


def _check_ranks(adapters: Iterable[AdapterFiles], most: int, place: str) -> None:
    for adapter in adapters:
        if adapter.rank > most:
            raise ConfigError(
                f"{place}: adapter {adapter.name!r} has rank {adapter.rank}, and max_lora_rank is "
                f"{most}; raise it, or remove it so that the adapters set it"
            )
