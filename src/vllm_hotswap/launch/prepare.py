"""From a configured model to what vLLM needs to run it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
from pydantic import ValidationError

from vllm_hotswap.config import MemoryBudget, ModelConfig, SamplingPolicy, ServerConfig
from vllm_hotswap.errors import ConfigError, ConfigMistakes, Mistake, mistakes_of, one_line
from vllm_hotswap.host import (
    DeviceMemory,
    Environment,
    Variables,
    device_of,
    gaudi,
    with_why_no_device,
)
from vllm_hotswap.launch.adapters import check_names, check_support, read_adapters
from vllm_hotswap.launch.budget import ModelNeeds, resolve_budget, share_kv_memory
from vllm_hotswap.launch.checkpoint import (
    check_description,
    check_generation,
    converted_bytes,
    weight_files_bytes,
)
from vllm_hotswap.launch.flags import model_namespace, parse_server_flags
from vllm_hotswap.launch.hub import hub_weights_bytes, require_known
from vllm_hotswap.launch.inspection import inspected_together
from vllm_hotswap.launch.needs import model_needs
from vllm_hotswap.launch.vllm_config import engine_config, nearest_architectures, serve_parser
from vllm_hotswap.models import AdapterFiles, Usage

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelLaunch:
    """Everything that is needed to make one model's engine and frontend."""

    alias: str
    model: str
    load_at_startup: bool
    args: argparse.Namespace
    vllm_config: Any
    weights_bytes: int
    converted_bytes: int = 0
    """What its weights take in memory beyond their files, because their type is larger there."""
    pinned: bool = False
    variables: Environment = field(default_factory=dict)
    """Environment variables that it wants while it is worked with."""
    sampling: SamplingPolicy = field(default_factory=SamplingPolicy)
    aliases: tuple[str, ...] = ()
    adapters: tuple[AdapterFiles, ...] = ()

    @property
    def needs(self) -> ModelNeeds:
        """What is known of its memory before it is loaded."""
        return model_needs(
            self.alias, self.vllm_config, self.weights_bytes, self.pinned, self.converted_bytes
        )


@dataclass(frozen=True, slots=True)
class Launch:
    """The server's flags and the launches of all models, in the file's order."""

    config: ServerConfig
    server_args: argparse.Namespace
    models: tuple[ModelLaunch, ...]


def parse_flags(config: ServerConfig, flags: Sequence[str]) -> dict[str, argparse.Namespace]:
    """vLLM's namespace for the server (key "") and for every alias.

    Raises:
        ConfigError: a flag or a key that vLLM does not know, or a value that it refuses.
    """
    parser = serve_parser("vllm-hotswap serve")
    server = parse_server_flags(parser, flags)
    with config.references.hidden_in_errors():
        models = _for_each(config, lambda model: model_namespace(parser, flags, model, config.path))
    return {"": server, **models}


def _for_each(config: ServerConfig, do: Callable[[ModelConfig], T]) -> dict[str, T]:
    """What `do` returns for each model, by alias.

    Raises:
        ConfigMistakes: with everything that was raised, once all models had their turn.
    """
    found: list[Mistake] = []
    done: dict[str, T] = {}
    for model in config.models:
        try:
            done[model.alias] = do(model)
        except ConfigError as error:
            found += mistakes_of(error, model.at(config.path).line)
    if found:
        raise ConfigMistakes(found)
    return done


def prepare(config: ServerConfig, namespaces: Mapping[str, argparse.Namespace]) -> Launch:
    """Build every model's `VllmConfig`.

    Raises:
        ConfigError: vLLM refuses a model's configuration; the message names the alias.
    """
    variables = Variables()
    with inspected_together():
        models = _for_each(
            config, lambda model: prepare_model(model, namespaces[model.alias], config, variables)
        )
    check_names(config, {alias: model.adapters for alias, model in models.items()})
    gaudi.check_platform(models[config.default_model].vllm_config.device_config.device_type)
    return Launch(config, namespaces[""], tuple(models.values()))


def prepare_model(
    model: ModelConfig, args: argparse.Namespace, config: ServerConfig, variables: Variables
) -> ModelLaunch:
    """Build one model's `VllmConfig`, with the environment variables that it wants.

    Raises:
        ConfigError: vLLM refuses it; the message names the alias.
    """
    with config.references.hidden_in_errors():
        return _prepare_model(model, args, config, variables)


def _prepare_model(
    model: ModelConfig, args: argparse.Namespace, config: ServerConfig, variables: Variables
) -> ModelLaunch:
    if not model.is_folder:
        _require_known(model, args, config.path)
    _check_files(model, args, config.path)
    adapters = read_adapters(args, model, config.path)
    variables.register(model.alias, model.environment)
    if config.switching.mode == "auto":
        # A frontend and its engine count on the other to see the same media in the same order;
        # requests that wait here, and may leave, would put them out of step.
        args.mm_processor_cache_gb = 0
    try:
        with variables.applied(model.alias):
            vllm_config = engine_config(args)
            gaudi.check_quantisation(vllm_config, os.environ)
    except Exception as error:
        # vLLM and the libraries below it raise whatever they like for a bad configuration.
        raise ConfigError(f"{model.at(config.path)}: {_reason(error)}") from error
    refuse_sleep_mode(model, vllm_config, config.path)
    check_support(adapters, vllm_config, str(model.at(config.path, "lora_modules")))
    return ModelLaunch(
        alias=model.alias,
        model=model.model,
        load_at_startup=model.load == "startup" or model.alias == config.default_model,
        args=args,
        vllm_config=vllm_config,
        weights_bytes=weights_bytes(model, vllm_config),
        converted_bytes=_converted_bytes(model, vllm_config),
        pinned=model.pinned,
        variables=model.environment,
        sampling=model.sampling,
        aliases=model.aliases,
        adapters=adapters,
    )


def refuse_sleep_mode(model: ModelConfig, vllm_config: Any, path: Path) -> None:
    """vLLM's own sleep mode is for one model in a process: the second one could not be loaded."""
    if not device_of(vllm_config).is_shared:
        return
    for key in ("enable_sleep_mode", "enable_cumem_allocator"):
        if getattr(vllm_config.model_config, key, False):
            raise ConfigError(
                f"{model.at(path, key)}: {key} is vLLM's own sleep mode, which works for one "
                "model per process; models sleep here without it, so remove it"
            )


def _require_known(model: ModelConfig, args: argparse.Namespace, path: Path) -> None:
    try:
        require_known(model.model, args.revision)
    except ConfigError as error:
        raise ConfigError(f"{model.at(path, 'model')}: {error.message}") from error


def _check_files(model: ModelConfig, args: argparse.Namespace, path: Path) -> None:
    """Refuse broken files of which the libraries below say nothing that helps, or nothing."""
    folder = Path(model.model)
    try:
        if model.is_folder and not args.hf_config_path and args.config_format in ("auto", "hf"):
            check_description(folder)
        if args.generation_config == "auto" and model.is_folder:
            check_generation(folder)
    except ConfigError as error:
        raise ConfigError(f"{model.at(path, 'model')}: {error.message}") from error


def budget_of(launches: Iterable[ModelLaunch], memory: MemoryBudget, device: DeviceMemory) -> Usage:
    """What all models together may hold, with the host memory that is free now.

    Raises:
        ConfigError: there is less than is asked for, or nothing is left for models.
    """
    configs = [launch.vllm_config for launch in launches]
    fraction = max(
        config.cache_config.gpu_memory_utilization if device_of(config).obeys_utilization else 1.0
        for config in configs
    )
    return resolve_budget(memory, device, psutil.virtual_memory().available, fraction)


def plan_memory(
    launches: Sequence[ModelLaunch], memory: MemoryBudget, device: DeviceMemory
) -> tuple[Usage, Mapping[str, ModelNeeds]]:
    """The budget for models, and what each needs with the KV memory that it is given.

    A start and a check plan alike. `device` says, too, what a worker process will hold: it imports
    what the engine host has imported.

    Raises:
        ConfigError: there is less than is asked for, or a model does not fit.
    """
    budget = budget_of(launches, memory, device)
    needs = [replace(launch.needs, host_bytes=device.held) for launch in launches]
    shares = share_kv_memory(needs, budget.device)
    return budget, {each.alias: replace(each, kv_bytes=shares[each.alias]) for each in needs}


def _reason(error: Exception) -> str:
    """What is wrong, without what pydantic adds around it."""
    if isinstance(error, ValidationError):
        said = (str(detail["msg"]).removeprefix("Value error, ") for detail in error.errors())
        message = "; ".join(" ".join(text.split()) for text in said)
    else:
        message = one_line(error)
    return nearest_architectures(with_why_no_device(message))


def _converted_bytes(model: ModelConfig, vllm_config: Any) -> int:
    path = Path(model.model)
    if vllm_config.quant_config is not None or not path.is_dir():
        return 0
    return converted_bytes(path, vllm_config.model_config.dtype.itemsize)


def weights_bytes(model: ModelConfig, vllm_config: Any) -> int:
    """Size of a checkpoint's weight files, local or on the hub; 0 where it is not known."""
    if not model.is_folder:
        return hub_weights_bytes(model.model, vllm_config.model_config.revision)
    path = Path(model.model)
    if path.is_file():
        return path.stat().st_size
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    return weight_files_bytes(sizes)
