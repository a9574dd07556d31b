"""From a configured model to what vLLM needs to run it.

A model's YAML keys become flags behind those of the command line and go through vLLM's own
parser. So names, types and defaults are vLLM's, and the precedence is: the model's YAML, then
the command line, then vLLM's default.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_hotswap import compat
from vllm_hotswap.config import ModelConfig, ServerConfig, unknown_key
from vllm_hotswap.errors import ConfigError, one_line

SERVER_FLAGS = frozenset(
    [
        "allow_credentials",
        "allowed_headers",
        "allowed_methods",
        "allowed_origins",
        "api_key",
        "api_server_count",
        "config",
        "disable_access_log_for_endpoints",
        "disable_uvicorn_access_log",
        "enable_ssl_refresh",
        "grpc",
        "grpc_port",
        "h11_max_header_count",
        "h11_max_incomplete_event_size",
        "headless",
        "host",
        "log_config_file",
        "port",
        "root_path",
        "ssl_ca_certs",
        "ssl_certfile",
        "ssl_ciphers",
        "ssl_keyfile",
        "uds",
        "uvicorn_log_level",
    ]
)
"""Flags of the server as a whole: they go on the command line, not into a model's settings."""

_OURS = frozenset(["help", "model", "model_tag", "served_model_name"])


@dataclass(frozen=True, slots=True)
class ModelLaunch:
    """Everything that is needed to make one model's engine and frontend."""

    alias: str
    model: str
    load_at_startup: bool
    args: argparse.Namespace
    vllm_config: Any
    weights_bytes: int


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
    parser = compat.serve_parser("vllm-hotswap serve")
    server = parser.parse_args(list(flags))
    _refuse_unsupported(server)
    namespaces = {"": server}
    for model in config.models:
        namespaces[model.alias] = _model_namespace(parser, flags, model, config.path)
    return namespaces


def prepare(config: ServerConfig, namespaces: Mapping[str, argparse.Namespace]) -> Launch:
    """Build every model's `VllmConfig`.

    Raises:
        ConfigError: vLLM refuses a model's configuration; the message names the alias.
    """
    models = tuple(_launch(model, namespaces[model.alias], config) for model in config.models)
    return Launch(config, namespaces[""], models)


def _launch(model: ModelConfig, args: argparse.Namespace, config: ServerConfig) -> ModelLaunch:
    try:
        vllm_config = compat.engine_config(args)
    except Exception as error:
        # vLLM and the libraries below it raise whatever they like for a bad configuration.
        raise ConfigError(f"{config.path}: models.{model.alias}: {_reason(error)}") from error
    return ModelLaunch(
        alias=model.alias,
        model=model.model,
        load_at_startup=model.load == "startup" or model.alias == config.default_model,
        args=args,
        vllm_config=vllm_config,
        weights_bytes=_weights_bytes(model, vllm_config),
    )


def _model_namespace(
    parser: argparse.ArgumentParser, flags: Sequence[str], model: ModelConfig, path: Path
) -> argparse.Namespace:
    place = f"{path}: models.{model.alias}"
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    extra = ["--model", model.model]
    for key, value in model.settings.items():
        extra += _as_flags(key, value, actions, place, path)
    try:
        args = parser.parse_args([*flags, *extra])
        args.served_model_name = [model.alias]
        compat.validate_serve_args(args)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error.message}") from error
    # The outer application checks keys, for all models in one place.
    args.api_key = None
    return args


def _as_flags(
    key: str, value: Any, actions: Mapping[str, argparse.Action], place: str, path: Path
) -> list[str]:
    name = key.replace("-", "_")
    if name in SERVER_FLAGS:
        raise ConfigError(f"{place}: {key!r} is a setting of the server; give it as a flag")
    if name == "served_model_name":
        raise ConfigError(f"{place}: the alias is the served name; remove {key!r}")
    if name not in actions or name in _OURS:
        known = sorted({"model", "load", *actions} - SERVER_FLAGS - _OURS)
        raise unknown_key(place, key, known)
    if value is None:
        return []
    if name == "chat_template":
        value = _resolve_template(str(value), path)
    return list(_flag(actions[name], value, f"{place}.{key}"))


def _flag(action: argparse.Action, value: Any, place: str) -> Iterator[str]:
    """The command line's form of one YAML value."""
    name = action.option_strings[0] if len(action.option_strings) == 1 else _longest(action)
    if isinstance(value, bool):
        yield from _switch_flag(action, name, value, place)
    elif isinstance(value, list) and action.nargs in ("+", "*"):
        yield from (name, *map(_text, value))
    elif isinstance(value, list) and isinstance(action, argparse._AppendAction):
        for item in value:
            yield from (name, _text(item))
    else:
        # One word, so that a value that begins with a dash is not taken for a flag.
        yield f"{name}={_text(value)}"


def _switch_flag(action: argparse.Action, name: str, value: bool, place: str) -> Iterator[str]:
    if isinstance(action, argparse.BooleanOptionalAction):
        yield name if value else "--no-" + name.removeprefix("--")
    elif action.nargs == 0:
        if value:
            yield name
    elif action.nargs == "?" and value:
        yield name
    else:
        raise ConfigError(f"{place} is {str(value).lower()}; vLLM wants a value for {name}")


def _longest(action: argparse.Action) -> str:
    names = [n for n in action.option_strings if not n.startswith("--no-")]
    return max(names, key=len)


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _resolve_template(template: str, path: Path) -> str:
    """A template file next to the YAML file as an absolute path; anything else as it is."""
    if "\n" in template or "{" in template:
        return template
    beside = (path.parent / Path(template).expanduser()).resolve()
    return str(beside) if beside.is_file() else template


def _refuse_unsupported(args: argparse.Namespace) -> None:
    if args.model_tag is not None:
        raise ConfigError(
            f"unexpected argument {args.model_tag!r}; models are named in the YAML file"
        )
    if (args.api_server_count or 1) > 1:
        raise ConfigError("--api-server-count above 1 is not supported: one process owns a switch")
    if args.headless or getattr(args, "grpc", False):
        raise ConfigError("--headless and --grpc are not supported with several models")
    if args.data_parallel_size > 1:
        raise ConfigError("--data-parallel-size above 1 is not supported")


def _reason(error: Exception) -> str:
    """What is wrong, without what pydantic adds around it."""
    if isinstance(error, ValidationError):
        return "; ".join(" ".join(str(detail["msg"]).split()) for detail in error.errors())
    return one_line(error)


def _weights_bytes(model: ModelConfig, vllm_config: Any) -> int:
    """Size of a checkpoint's weight files, in a folder or on the hub; 0 where it is not known."""
    if not model.is_folder:
        return compat.hub_weights_bytes(model.model, vllm_config.model_config.revision)
    sizes = {file.name: file.stat().st_size for file in Path(model.model).iterdir()}
    return compat.weight_files_bytes(sizes)
