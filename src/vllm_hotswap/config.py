"""The YAML file: parsed into frozen values, every mistake named with its place and next step.

Knows no vLLM: engine and frontend settings of a model stay a mapping here; `launch` gives them
to vLLM's own argument parser, which knows their names and types.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from vllm_hotswap.budget import MemoryBudget, Size, parse_size
from vllm_hotswap.errors import ConfigError

CONFIG_VARIABLES = ("VLLM_HOTSWAP_CONFIG", "VLLM_HPU_MULTI_MODEL_CONFIG")
"""Environment variables that may name the YAML file, the first one set wins."""

IDLE_KEYS = ("idle_sleep", "idle_unload")

LoadWhen = Literal["startup", "on_demand"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One entry under `models`."""

    alias: str
    """The name that clients send in `model`."""
    model: str
    """A folder (absolute after parsing) or a model hub's name."""
    load: LoadWhen = "startup"
    """When its engine is made: before the server accepts requests, or at its first switch."""
    pinned: bool = False
    """Whether it is never moved down to make room for another model."""
    idle_sleep: float | None = None
    """Seconds without a request after which it sleeps, once it is not active; None: never."""
    idle_unload: float | None = None
    """The same for unloading."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Every other key: a flag of `vllm serve`, with underscores."""

    @property
    def is_folder(self) -> bool:
        return Path(self.model).is_absolute()


@dataclass(frozen=True, slots=True)
class SwitchingConfig:
    """The `switching` section."""

    drain_timeout: float = 60.0
    """Seconds that a switch waits for running requests, where the call does not say."""
    max_waiting: int = 1024
    """Requests that may be held for the target of a switch; more are refused (429)."""
    max_wait: float = 600.0
    """Seconds that a request may be held; then it ends with 504."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The whole file."""

    path: Path
    default_model: str
    models: tuple[ModelConfig, ...]
    switching: SwitchingConfig = SwitchingConfig()
    memory: MemoryBudget = field(default_factory=MemoryBudget)

    @property
    def aliases(self) -> tuple[str, ...]:
        return tuple(model.alias for model in self.models)


def load_config(path: Path) -> ServerConfig:
    """Read and check the file.

    Raises:
        ConfigError: it is missing, unreadable, not YAML, or something in it cannot work.
    """
    return parse_config(_read_yaml(path), path)


def parse_config(document: object, path: Path) -> ServerConfig:
    """Check a parsed document; `path` is where relative paths start and what errors name."""
    place = str(path)
    top = _mapping(document, place, "a mapping with the keys default_model and models")
    _refuse_unknown(top, ("default_model", "models", "switching", "memory"), place)
    entries = _mapping(top.get("models"), f"{place}: models", "a mapping of alias to settings")
    if not entries:
        raise ConfigError(f"{place}: models is empty; name at least one model")
    models = tuple(_model(alias, entry, path) for alias, entry in entries.items())
    aliases = [model.alias for model in models]
    default = top.get("default_model", aliases[0])
    if default not in aliases:
        hint = _did_you_mean(default, aliases)
        raise ConfigError(
            f"{place}: default_model {default!r} is not configured{hint}; "
            f"configured: {', '.join(aliases)}"
        )
    switching = _switching(top.get("switching"), place)
    return ServerConfig(path, default, models, switching, _memory(top.get("memory"), place))


def unknown_key(place: str, key: object, known: Iterable[str]) -> ConfigError:
    """The error for a key that nobody knows, with the nearest right one."""
    known = list(known)
    hint = _did_you_mean(key, known)
    if not hint and len(known) <= 8:
        hint = f"; known keys: {', '.join(known)}"
    return ConfigError(f"{place}: unknown key {key!r}{hint}")


def _read_yaml(path: Path) -> object:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"configuration file {str(path)!r} does not exist; "
            "`vllm-hotswap demo --write DIR` writes one that works"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {str(path)!r} cannot be read: {error}") from error
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(
            f"configuration file {str(path)!r} is not valid YAML: {' '.join(str(error).split())}"
        ) from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the base class refuses it
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _model(alias: object, entry: object, path: Path) -> ModelConfig:
    place = f"{path}: models.{alias}"
    if not isinstance(alias, str) or not alias.strip():
        raise ConfigError(f"{place}: an alias must be a non-empty string; put it in quotes")
    settings = dict(_mapping(entry, place, "a mapping with at least the key model"))
    model = settings.pop("model", None)
    if not isinstance(model, str) or not model:
        raise ConfigError(f"{place}.model is missing; name a folder or a model hub's name")
    load = settings.pop("load", "startup")
    if load not in ("startup", "on_demand"):
        raise ConfigError(f"{place}.load is {load!r}; it must be startup or on_demand")
    if not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"{place}: every key must be a string")
    pinned = settings.pop("pinned", False)
    if not isinstance(pinned, bool):
        raise ConfigError(f"{place}.pinned is {pinned!r}; it must be true or false")
    idle = {key: _seconds(settings.pop(key, None), f"{place}.{key}") for key in IDLE_KEYS}
    return ModelConfig(
        alias,
        _resolve_model(model, place, path),
        load,
        pinned,
        idle["idle_sleep"],
        idle["idle_unload"],
        settings,
    )


def _seconds(value: object, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ConfigError(f"{place} is {value!r}; it must be a number of seconds above 0, or null")
    return float(value)


def _memory(section: object, place: str) -> MemoryBudget:
    if section is None:
        return MemoryBudget()
    place = f"{place}: memory"
    values = _mapping(section, place, "a mapping with the keys device and host")
    _refuse_unknown(values, [f.name for f in fields(MemoryBudget)], place)
    sizes: dict[str, Size] = {}
    for key, value in values.items():
        try:
            sizes[key] = parse_size(value)
        except ValueError as error:
            raise ConfigError(f"{place}.{key} is {value!r}; {error}") from None
    return MemoryBudget(**sizes)


def _resolve_model(model: str, place: str, path: Path) -> str:
    """A checkpoint's folder or GGUF file as an absolute path; a model hub's name as it is."""
    looks_like_path = model.startswith(("/", "./", "../", "~")) or model in (".", "..")
    try:
        local = (path.parent / Path(model).expanduser()).resolve()
    except (RuntimeError, ValueError) as error:  # an unknown user after ~, a null byte
        raise ConfigError(f"{place}.model: {model!r} is no path: {error}") from error
    if not looks_like_path and not local.exists():
        return model
    if local.suffix == ".gguf" and local.is_file():
        return str(local)
    if not local.is_dir():
        raise ConfigError(f"{place}.model: the folder {str(local)!r} does not exist")
    # Mistral's own format has the second one instead of the first.
    if not any((local / name).is_file() for name in ("config.json", "params.json")):
        raise ConfigError(
            f"{place}.model: the folder {str(local)!r} has no config.json; it is not a checkpoint"
        )
    return str(local)


def _switching(section: object, place: str) -> SwitchingConfig:
    if section is None:
        return SwitchingConfig()
    place = f"{place}: switching"
    values = _mapping(section, place, "a mapping")
    _refuse_unknown(values, [f.name for f in fields(SwitchingConfig)], place)
    for key, value in values.items():
        wanted = (int,) if key == "max_waiting" else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted) or not 0 <= value < 1e9:
            raise ConfigError(f"{place}.{key} is {value!r}; it must be a number of at least 0")
    return SwitchingConfig(**values)


def _mapping(value: object, place: str, wanted: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{place} must be {wanted}, not {_kind(value)}")
    return value


def _kind(value: object) -> str:
    return "empty" if value is None else f"{type(value).__name__} {value!r}"[:80]


def _refuse_unknown(values: Mapping[Any, Any], known: Iterable[str], place: str) -> None:
    known = list(known)
    for key in values:
        if key not in known:
            raise unknown_key(place, key, known)


def _did_you_mean(name: object, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
