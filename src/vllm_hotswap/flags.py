"""From a model's YAML keys to vLLM's flags, through vLLM's own parser.

The keys become flags and are parsed apart from those of the command line, whose values they then
replace. So names, types and defaults are vLLM's, and the precedence is: the model's YAML, then the
command line, then vLLM's default.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm_hotswap.compat.configuration import validate_serve_args
from vllm_hotswap.config import ModelConfig, unknown_key
from vllm_hotswap.errors import ConfigError, one_line
from vllm_hotswap.paths import beside
from vllm_hotswap.settings import ModelKeys

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
        "log_level",
        "logging_config",
        "port",
        "root_path",
        "shutdown_timeout",
        "ssl_ca_certs",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_ciphers",
        "ssl_keyfile",
        "uds",
        "uvicorn_log_level",
    ]
)
"""Flags of the server as a whole: they go on the command line, not into a model's settings."""

_OURS = frozenset(["help", "model", "model_tag", "served_model_name"])


def parse_server_flags(parser: argparse.ArgumentParser, flags: Sequence[str]) -> argparse.Namespace:
    """vLLM's namespace for the command line alone. Raises `ConfigError`."""
    server = parser.parse_args(list(flags))
    if server.model_tag is not None:
        raise ConfigError(
            f"unexpected argument {server.model_tag!r}; models are named in the YAML file"
        )
    _refuse_unsupported(server)
    if server.lora_modules:
        raise ConfigError(
            "--lora-modules does not say of which model; put lora_modules below a model in the "
            "YAML file"
        )
    return server


def model_namespace(
    parser: argparse.ArgumentParser, flags: Sequence[str], model: ModelConfig, path: Path
) -> argparse.Namespace:
    """vLLM's namespace for one model. Raises `ConfigError`, which names the model or the key."""
    settings = _by_action(parser, model, path)
    extra = [
        word
        for action, key in settings.items()
        for place in [f"{path}: {model.place(key)}"]
        for word in _flag(action, _resolved(action, model.settings[key], path, place), place)
    ]
    try:
        # A rank that nobody sets stays None: it is to follow from the adapters.
        unset = argparse.Namespace(max_lora_rank=None)
        args = parser.parse_args([*flags, "--model", model.model], unset)
        _replace(args, parser.parse_args(extra), [action.dest for action in settings])
        # Defaults of vLLM's parser are objects that it writes to while it makes a configuration,
        # the reasoning parser for one: without a copy, the last model's would be every model's.
        args = copy.deepcopy(args)
        args.served_model_name = list(model.names)
        _refuse_unsupported(args)
        validate_serve_args(args)
    except ConfigError as error:
        raise ConfigError(f"{path}: models.{model.alias}: {one_line(error)}") from error
    # The outer application checks keys, for all models in one place.
    args.api_key = None
    return args


def _replace(args: argparse.Namespace, own: argparse.Namespace, names: Iterable[str]) -> None:
    """Give `args` the values that `own` has under these names; vLLM's defaults among them."""
    for name in names:
        if hasattr(own, name):
            setattr(args, name, getattr(own, name))
        elif hasattr(args, name):
            delattr(args, name)


def _by_action(
    parser: argparse.ArgumentParser, model: ModelConfig, path: Path
) -> dict[argparse.Action, str]:
    """The model's keys by the flag that each of them sets."""
    actions = model_flags(parser)
    keys: dict[argparse.Action, str] = {}
    for key in model.settings:
        section, _, _ = model.place(key).rpartition(f".{key}")
        place = f"{path}: {section}"
        action = _find_action(key, actions, place)
        if action in keys:
            raise ConfigError(f"{place}: {keys[action]!r} and {key!r} are the same; keep one")
        keys[action] = key
    return keys


def model_flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """vLLM's flags that may be keys of a model, by every long name of theirs.

    With underscores, and without the form that turns a switch off.
    """
    names = {
        name.removeprefix("--").replace("-", "_"): action
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--") and not name.startswith("--no-")
    }
    return {name: names[name] for name in names.keys() - SERVER_FLAGS - _OURS}


def _find_action(key: str, actions: Mapping[str, argparse.Action], place: str) -> argparse.Action:
    if key in SERVER_FLAGS:
        raise ConfigError(f"{place}: {key!r} is a setting of the server; give it as a flag")
    if key == "served_model_name":
        raise ConfigError(f"{place}: the alias is the served name; put others into 'aliases'")
    if key not in actions:
        known = sorted({*actions, *(item.name for item in fields(ModelKeys))})
        raise unknown_key(place, key, known)
    return actions[key]


def _resolved(action: argparse.Action, value: Any, path: Path, place: str) -> Any:
    """The value, a path in it made absolute if it is written as one relative to the YAML file."""
    if action.dest == "chat_template" and value is not None:
        return _resolve_template(str(value), path, place)
    return _absolute(value, path, place)


def _absolute(value: Any, path: Path, place: str) -> Any:
    """The value with texts in it that begin with `./` or `../` as absolute paths."""
    if isinstance(value, list):
        return [_absolute(item, path, place) for item in value]
    if isinstance(value, dict):
        return {key: _absolute(item, path, place) for key, item in value.items()}
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str(beside(path, value, place))
    return value


def _resolve_template(template: str, path: Path, place: str) -> str:
    """A template file next to the YAML file as an absolute path; anything else as it is."""
    if "\n" in template or "{" in template:
        return template
    file = beside(path, template, place)
    return str(file) if file.is_file() else template


def _flag(action: argparse.Action, value: Any, place: str) -> Iterator[str]:
    """The command line's form of one YAML value; nothing for null, which is vLLM's default."""
    name = action.option_strings[0] if len(action.option_strings) == 1 else _longest(action)
    if value is None or (value == [] and action.nargs == "+"):
        return
    if isinstance(value, bool):
        yield from _switch_flag(action, name, value, place)
    elif isinstance(value, list) and action.nargs in ("+", "*"):
        yield from (name, *(_word(item, place) for item in value))
    elif isinstance(value, list) and isinstance(action, argparse._AppendAction):
        yield from (f"{name}={_text(item)}" for item in value)
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


def _word(value: Any, place: str) -> str:
    """One of several values of a flag, which must not be taken for another flag."""
    text = _text(value)
    if text.startswith("-"):
        raise ConfigError(f"{place}: {text!r} begins with a dash, as flags do; it can't be a value")
    return text


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _refuse_unsupported(args: argparse.Namespace) -> None:
    if (args.api_server_count or 1) > 1:
        raise ConfigError("--api-server-count above 1 is not supported: one process owns a switch")
    if args.headless or getattr(args, "grpc", False):
        raise ConfigError("--headless and --grpc are not supported with several models")
    if args.data_parallel_size > 1:
        raise ConfigError("--data-parallel-size above 1 is not supported")
