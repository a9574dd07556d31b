"""From a model's YAML keys to vLLM's flags, through vLLM's own parser.

The keys become flags. They are parsed apart from the flags of the command line, whose values they
then replace. So names, types and defaults are vLLM's, and the precedence is: the model's YAML, then
the command line, then vLLM's default.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vllm_hotswap.config import (
    ModelConfig,
    ModelKeys,
    Override,
    Place,
    ServerConfig,
    Surprising,
    WrittenInt,
    read_config,
    refuse_surprises,
    unknown_key,
)
from vllm_hotswap.errors import ConfigError, ConfigMistakes, Mistake, mistakes_of, one_line
from vllm_hotswap.host import is_installed
from vllm_hotswap.launch.vllm_config import serve_parser, validate_serve_args
from vllm_hotswap.system import resolve_beside
from vllm_hotswap.tasks import gc_paused

log = logging.getLogger("vllm_hotswap")

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
    """Return vLLM's namespace for the command line alone. Raises `ConfigError`."""
    server = parser.parse_args(list(flags))
    if server.model_tag is not None:
        raise ConfigError(
            f"unexpected argument {server.model_tag!r}; models are named in the YAML file"
        )
    _refuse_unsupported(server)
    if server.lora_modules:
        raise ConfigError(
            "--lora-modules does not name a model; put lora_modules below a model in the YAML file"
        )
    return server


def model_namespace(
    parser: argparse.ArgumentParser, flags: Sequence[str], model: ModelConfig, path: Path
) -> argparse.Namespace:
    """Return vLLM's namespace for one model.

    Raises:
        ConfigError: names the model; or a `ConfigMistakes` with every key that cannot work.
    """
    words = model_words(parser, model, path)
    extra = [word for given in words.values() for word in given]
    try:
        # A rank that is not set stays None: it will follow from the adapters.
        unset = argparse.Namespace(max_lora_rank=None)
        args = parser.parse_args([*flags, "--model", model.model], unset)
        _replace(args, parser.parse_args(extra), [action.dest for action in words])
        # Some defaults of vLLM's parser are objects that vLLM writes to while it makes a
        # configuration, as with the reasoning parser. Without a copy, every model would get the
        # last model's.
        args = copy.deepcopy(args)
        args.served_model_name = list(model.names)
        _refuse_unsupported(args)
        validate_serve_args(args)
    except ConfigError as error:
        place = model.at(path)
        raise ConfigMistakes([Mistake(place.line, f"{place}: {one_line(error)}")]) from error
    # The outer application checks keys, for all models in one place.
    args.api_key = None
    return args


def setting_mistakes(
    parser: argparse.ArgumentParser, models: Iterable[ModelConfig], path: Path
) -> list[Mistake]:
    """Return what vLLM's parser refuses in the settings of these models, whatever else is wrong."""
    found: list[Mistake] = []
    for model in models:
        try:
            model_words(parser, model, path)
        except ConfigError as error:
            found += mistakes_of(error, model.at(path).line)
    return found


def load_with_flags(
    path: Path, overrides: Iterable[Override], allowed: frozenset[str], is_fake: bool = False
) -> ServerConfig:
    """Load as `config.load_config` does; if that finds mistakes, add those in vLLM's settings.

    Args:
        is_fake: for fake engines: vLLM is not asked, and no checkpoint needs to exist.

    Raises:
        ConfigError: as `config.load_config` does.
    """
    read = read_config(path, overrides, allowed, needs_files=not is_fake)
    config = read.config
    if not read.mistakes or config is None or is_fake or not is_installed():
        return read.whole()
    found = list(read.mistakes)
    if any(model.settings for model in config.models):
        log.info(
            "event=looking_at_flags reason='the file has mistakes; checking its vLLM settings, too'"
        )
        with config.references.hidden_in_errors(), gc_paused():
            parser = serve_parser("vllm-hotswap serve")
            more = setting_mistakes(parser, config.models, path)
            raise ConfigMistakes([*found, *more])
    raise ConfigMistakes(found)


def model_words(
    parser: argparse.ArgumentParser, model: ModelConfig, path: Path
) -> dict[argparse.Action, list[str]]:
    """Return a model's settings as the words of a command line, by flag.

    Raises:
        ConfigMistakes: names every key that vLLM does not have, and every value that it refuses.
    """
    found: list[Mistake] = []
    words: dict[argparse.Action, list[str]] = {}
    for key, action in _by_action(parser, model, path, found).items():
        try:
            words[action] = _key_words(parser, action, model, key, path)
        except ConfigError as error:
            found += mistakes_of(error, model.at(path, key).line)
    if found:
        raise ConfigMistakes(found)
    return words


def _key_words(
    parser: argparse.ArgumentParser,
    action: argparse.Action,
    model: ModelConfig,
    key: str,
    path: Path,
) -> list[str]:
    """Return the words for one key, once vLLM's parser has accepted them."""
    place = model.at(path, key)
    value = _resolved(action, model.settings[key], path, place)
    words = list(_flag(action, value, lambda *inner: model.at(path, key, *inner)))
    try:
        parser.parse_args(words)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error.message}") from error
    return words


def _replace(args: argparse.Namespace, own: argparse.Namespace, names: Iterable[str]) -> None:
    """Give `args` the values that `own` has under these names, vLLM's defaults included."""
    for name in names:
        if hasattr(own, name):
            setattr(args, name, getattr(own, name))
        elif hasattr(args, name):
            delattr(args, name)


def _by_action(
    parser: argparse.ArgumentParser, model: ModelConfig, path: Path, found: list[Mistake]
) -> dict[str, argparse.Action]:
    """Return the flag that each of the model's keys sets; add mistakes in the keys to `found`."""
    actions = model_flags(parser)
    keys: dict[argparse.Action, str] = {}
    for key in model.settings:
        section, _, _ = model.place(key).rpartition(f".{key}")
        place = replace(model.at(path, key), keys=section)
        try:
            action = _find_action(key, actions, place)
            if action in keys:
                raise ConfigError(f"{place}: {keys[action]!r} and {key!r} are the same; keep one")
            keys[action] = key
        except ConfigError as error:
            found += mistakes_of(error, place.line)
    return {key: action for action, key in keys.items()}


def model_flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return vLLM's flags that may be keys of a model, by each of their long names.

    The names have underscores. The form that turns a switch off is left out.
    """
    names = {
        name.removeprefix("--").replace("-", "_"): action
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--") and not name.startswith("--no-")
    }
    return {name: names[name] for name in names.keys() - SERVER_FLAGS - _OURS}


def _find_action(key: str, actions: Mapping[str, argparse.Action], place: Place) -> argparse.Action:
    if key in SERVER_FLAGS:
        raise ConfigError(f"{place}: {key!r} is a setting of the server; give it as a flag")
    if key == "served_model_name":
        raise ConfigError(
            f"{place}: {key!r} cannot be set: the alias is the served name; "
            "put additional names into 'aliases'"
        )
    if key not in actions:
        known = sorted({*actions, *(item.name for item in fields(ModelKeys))})
        raise unknown_key(place, key, known)
    return actions[key]


def _resolved(action: argparse.Action, value: Any, path: Path, place: Place) -> Any:
    """Return the value; a path in it that is written relative to the YAML file becomes absolute."""
    if action.dest == "chat_template" and value is not None:
        return _resolve_template(str(value), path, place)
    return _absolute(value, path, place)


def _absolute(value: Any, path: Path, place: Place) -> Any:
    """Return the value; texts in it that begin with `./` or `../` become absolute paths."""
    if isinstance(value, list):
        return [_absolute(item, path, place) for item in value]
    if isinstance(value, dict):
        return {key: _absolute(item, path, place) for key, item in value.items()}
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str(resolve_beside(path, value, place))
    return value


def _resolve_template(template: str, path: Path, place: Place) -> str:
    """Return a template file beside the YAML file as an absolute path; anything else unchanged."""
    if "\n" in template or "{" in template:
        return template
    file = resolve_beside(path, template, place)
    return str(file) if file.is_file() else template


def _flag(action: argparse.Action, value: Any, place: Callable[..., Place]) -> Iterator[str]:
    """Yield the command line's form of one YAML value; nothing for null, vLLM's default."""
    name = action.option_strings[0] if len(action.option_strings) == 1 else _longest(action)
    if value is None or (value == [] and action.nargs == "+"):
        return
    if isinstance(value, Surprising) and not _takes_text(action, value.text):
        value = _plain_switch(action, value, place)
    if isinstance(value, bool):
        yield from _switch_flag(action, name, value, place())
    elif isinstance(value, list) and action.nargs in ("+", "*"):
        yield from (name, *(_word(action, item, place, n) for n, item in enumerate(value)))
    elif isinstance(value, list) and isinstance(action, argparse._AppendAction):
        yield from (f"{name}={_text(action, item, place, n)}" for n, item in enumerate(value))
    else:
        # One word, so that a value that begins with a dash is not taken for a flag.
        yield f"{name}={_text(action, value, place)}"


def _takes_text(action: argparse.Action, text: str) -> bool:
    """Whether a flag keeps a text as a text, instead of making a number of it."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return False
    try:
        return action.type is None or isinstance(action.type(text), str)  # type: ignore[operator]
    except Exception:  # noqa: BLE001  # whatever a flag's type raises
        return False


def _plain_switch(action: argparse.Action, value: Surprising, place: Callable[..., Place]) -> bool:
    """Return `yes`, `no`, `on` or `off` as a bool if a flag is a switch; refuse anything else."""
    is_switch = action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction)
    if not is_switch or not isinstance(value.value, bool):
        refuse_surprises(value, place)
    return bool(value)


def _switch_flag(action: argparse.Action, name: str, value: bool, place: Place) -> Iterator[str]:
    if isinstance(action, argparse.BooleanOptionalAction):
        yield name if value else "--no-" + name.removeprefix("--")
    elif action.nargs == 0:
        if value:
            yield name
    elif action.nargs == "?" and value:
        yield name
    else:
        raise ConfigError(f"{place} is {str(value).lower()}; vLLM needs a value for {name}")


def _longest(action: argparse.Action) -> str:
    names = [n for n in action.option_strings if not n.startswith("--no-")]
    return max(names, key=len)


def _word(action: argparse.Action, value: Any, place: Callable[..., Place], n: int) -> str:
    """Return one of several values of a flag; refuse one that would be taken for a flag."""
    text = _text(action, value, place, n)
    if text.startswith("-"):
        raise ConfigError(
            f"{place()}: {text!r} begins with a dash, as flags do; it can't be a value"
        )
    return text


def _text(
    action: argparse.Action, value: Any, place: Callable[..., Place], *inner: str | int
) -> str:
    """Return a value as one word: a number as it was written, if the flag takes a text."""
    if isinstance(value, Surprising) and _takes_text(action, value.text):
        return value.text
    refuse_surprises(value, lambda *further: place(*inner, *further))
    if isinstance(value, dict | list | bool):
        return json.dumps(value)
    is_hexadecimal = isinstance(value, WrittenInt) and not _takes_text(action, value.text)
    return str(int(value)) if is_hexadecimal else str(value)


def _refuse_unsupported(args: argparse.Namespace) -> None:
    if (args.api_server_count or 1) > 1:
        raise ConfigError("--api-server-count above 1 is not supported: one process owns a switch")
    if args.headless or getattr(args, "grpc", False):
        raise ConfigError("--headless and --grpc are not supported with several models")
    if args.data_parallel_size > 1:
        raise ConfigError("--data-parallel-size above 1 is not supported")
