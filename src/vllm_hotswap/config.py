"""The YAML file: parsed into frozen values, every mistake named with its place and next step.

Knows no vLLM: engine and frontend settings of a model stay a mapping here; `launch` gives them
to vLLM's own argument parser, which knows their names and types.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from vllm_hotswap.budget import MemoryBudget
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.keys import Keys, KeySource
from vllm_hotswap.paths import beside
from vllm_hotswap.references import References, read_scalar
from vllm_hotswap.rights import DEFAULT, Group, Rights, refuse_shared
from vllm_hotswap.sampling import SamplingPolicy
from vllm_hotswap.security import check_mode, check_settings
from vllm_hotswap.settings import (
    ALL,
    SECTIONS,
    STRICT,
    TOP_LEVEL,
    AdapterConfig,
    GroupConfig,
    LimitsConfig,
    ModelKeys,
    Override,
    RecoveryConfig,
    SwitchingConfig,
    is_secret,
    wanted,
)

QUANT_VARIABLE = "QUANT_CONFIG"
"""What `quant_config` of a model sets; Gaudi's quantisation reads its configuration from there."""

MAX_SHOWN = 80
"""A longer value is not repeated in a message."""

NOT_SHARED = ("model", "aliases")
"""Keys of a model that can't be in `defaults`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig(ModelKeys):
    """One entry under `models`, with what `defaults` adds to it. Paths are absolute."""

    alias: str
    """The name that clients send in `model`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Every other key: a flag of `vllm serve`, with underscores."""
    inherited: frozenset[str] = frozenset()
    """Which of its keys come from `defaults`."""
    environment: dict[str, str | None] = field(default_factory=dict)
    """Variables that it wants to be set, or not to be set (None), while it is worked with."""

    @property
    def is_folder(self) -> bool:
        return Path(self.model).is_absolute()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that clients may send for it, its alias first."""
        return (self.alias, *self.aliases)

    def place(self, key: str) -> str:
        """Where in the file a key of it stands."""
        return _place(self.alias, key, self.inherited)


@plain_dataclass(frozen=True, slots=True)
class ServerConfig:
    """The whole file."""

    path: Path
    default_model: str
    models: tuple[ModelConfig, ...]
    switching: SwitchingConfig = field(default_factory=SwitchingConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    memory: MemoryBudget = field(default_factory=MemoryBudget)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    rights: tuple[Group, ...] = ()
    references: References = field(default_factory=References, repr=False)
    """What came from environment variables, and is not to be shown."""

    @property
    def aliases(self) -> tuple[str, ...]:
        return tuple(model.alias for model in self.models)

    @property
    def adapter_folders(self) -> tuple[Path, ...]:
        """Absolute. Raises `ConfigError` if one is no folder."""
        with self.references.hidden_in_errors():
            return tuple(self._folder(name) for name in self.adapters.folders)

    def _folder(self, name: str) -> Path:
        place = f"{self.path}: adapters.folders"
        folder = beside(self.path, name, place)
        if not folder.is_dir():
            raise ConfigError(f"{place}: {str(folder)!r} is no folder")
        return folder


def load_config(
    path: Path,
    overrides: Iterable[Override] = (),
    allowed: frozenset[str] = frozenset(),
    environment: Mapping[str, str] = os.environ,
) -> ServerConfig:
    """Read and check the file.

    Args:
        path: the YAML file.
        overrides: settings given otherwise; a later one counts more, and each more than the file.
        allowed: dangers that are accepted; see `security`.
        environment: what `${NAME}` in a value stands for.

    Raises:
        ConfigError: it is missing, unreadable, not YAML, or something in it cannot work.
    """
    document = _read_yaml(path)
    check_mode(path, allowed)
    return parse_config(document, path, overrides, allowed, environment)


def parse_config(
    document: object,
    path: Path,
    overrides: Iterable[Override] = (),
    allowed: frozenset[str] = frozenset(),
    environment: Mapping[str, str] = os.environ,
) -> ServerConfig:
    """Check a parsed document; `path` is where relative paths start and what errors name."""
    references = References(environment)
    with references.hidden_in_errors():
        filled = references.fill(document, str(path))
        return replace(_Reader(path, overrides, allowed).read(filled), references=references)


def unknown_key(place: str, key: object, known: Iterable[str]) -> ConfigError:
    """The error for a key that nobody knows, with the nearest right one."""
    known = list(known)
    hint = _did_you_mean(key, known)
    if not hint and len(known) <= 10:
        hint = f"; known keys: {', '.join(known)}"
    return ConfigError(f"{place}: unknown key {key!r}{hint}")


class _Reader:
    """Turns one document into a `ServerConfig`; knows where every value was given."""

    def __init__(self, path: Path, overrides: Iterable[Override], allowed: frozenset[str]) -> None:
        self._path = path
        self._allowed = allowed
        self._overrides = list(overrides)

    def read(self, document: object) -> ServerConfig:
        place = str(self._path)
        top = _mapping(document, place, "a mapping with the keys default_model and models")
        _refuse_unknown(top, TOP_LEVEL, place)
        entries = _mapping(top.get("models"), f"{place}: models", "a mapping of alias to settings")
        if not entries:
            raise ConfigError(f"{place}: models is empty; name at least one model")
        shared = self._defaults(top.get("defaults"))
        models = tuple(self._model(alias, entry, shared) for alias, entry in entries.items())
        _refuse_shared_names(models, place)
        return ServerConfig(
            path=self._path,
            default_model=self._default_model(top, models),
            models=models,
            rights=self._rights(top.get("rights"), models),
            **{name: self._section(name, kind, top) for name, kind in SECTIONS.items()},
        )

    def _default_model(self, top: Mapping[str, Any], models: Sequence[ModelConfig]) -> str:
        default, origin = top.get("default_model", models[0].alias), f"{self._path}: default_model"
        for override in self._given(""):
            default, origin = override.value, override.origin
        return _configured(default, models, origin)

    def _rights(self, section: object, models: Sequence[ModelConfig]) -> tuple[Group, ...]:
        groups = tuple(self._groups(section, models))
        refuse_shared([(group, group.source.given) for group in groups])
        return groups

    def _groups(self, section: object, models: Sequence[ModelConfig]) -> Iterator[Group]:
        if section is None:
            return
        place = f"{self._path}: rights"
        groups = _mapping(section, place, "a mapping of a group's name to its rights", shown=False)
        for name, entry in groups.items():
            if not isinstance(name, str) or not name.strip():
                raise ConfigError(f"{place}: a group's name must be a text; put it in quotes")
            yield self._group(name, entry, models)

    def _group(self, name: str, entry: object, models: Sequence[ModelConfig]) -> Group:
        place = f"{self._path}: rights.{name}"
        values = _keys(GroupConfig, entry, place, shown=False)
        given: GroupConfig = _validated(GroupConfig, values, lambda key: f"{place}.{key}")
        if name == DEFAULT and (given.keys or given.key_file):
            raise ConfigError(
                f"{place} is for everybody who is in no other group, and has no keys; give them to "
                "a group of another name"
            )
        keys = Keys.of([key.get_secret_value() for key in given.keys], f"{place}.keys")
        if name != DEFAULT and not (keys or given.key_file):
            raise ConfigError(f"{place} has no key; give it keys or a key_file")
        file_place = f"{place}.key_file"
        files = [beside(self._path, given.key_file, file_place)] if given.key_file else []
        switch_to = None
        if given.switch_to != ALL:
            where = f"{place}.switch_to"
            switch_to = frozenset(_configured(alias, models, where) for alias in given.switch_to)
        rights = Rights(name, switch_to, given.max_priority, given.min_max_wait)
        return Group(rights, place, KeySource(keys, files))

    def _section(self, name: str, kind: type[Any], top: Mapping[str, Any]) -> Any:
        place = f"{self._path}: {name}"
        values = dict(_keys(kind, top.get(name), place))
        origins = {}
        for override in self._given(name):
            values[override.key] = read_scalar(override.value)
            origins[override.key] = override.origin
        return _validated(kind, values, lambda key: origins.get(key, f"{place}.{key}"))

    def _given(self, section: str) -> Iterator[Override]:
        return (override for override in self._overrides if override.section == section)

    def _defaults(self, section: object) -> dict[str, Any]:
        if section is None:
            return {}
        place = f"{self._path}: defaults"
        values = _underscored(_mapping(section, place, "a mapping with keys of a model"), place)
        for key in NOT_SHARED:
            if key in values:
                raise ConfigError(f"{place}: {key!r} can't be shared; give it to each model")
        return values

    def _model(self, alias: object, entry: object, shared: Mapping[str, Any]) -> ModelConfig:
        place = f"{self._path}: models.{alias}"
        if not isinstance(alias, str) or not alias.strip():
            raise ConfigError(f"{place}: an alias must be a non-empty string; put it in quotes")
        own = _underscored(_mapping(entry, place, "a mapping with at least the key model"), place)
        inherited = frozenset(shared.keys() - own.keys())
        values = {**shared, **own}
        ours = {
            item.name: values.pop(item.name) for item in fields(ModelKeys) if item.name in values
        }

        check_settings(values, place, self._allowed)

        def place_of(key: str) -> str:
            return f"{self._path}: {_place(alias, key, inherited)}"

        if "sampling" in ours:
            ours["sampling"] = _sampling(ours["sampling"], place_of("sampling"))
        model: ModelConfig = _validated(
            ModelConfig,
            {**ours, "alias": alias, "settings": values, "inherited": inherited},
            place_of,
        )
        return replace(
            model,
            model=_resolve_model(model.model, place, self._path),
            environment=self._environment(model) if "quant_config" in ours else {},
        )

    def _environment(self, model: ModelConfig) -> dict[str, str | None]:
        if model.quant_config is None:
            return {QUANT_VARIABLE: None}
        place = f"{self._path}: {model.place('quant_config')}"
        file = beside(self._path, model.quant_config, place)
        if not file.is_file():
            raise ConfigError(f"{place}: the file {str(file)!r} does not exist")
        return {QUANT_VARIABLE: str(file)}


def _configured(name: object, models: Sequence[ModelConfig], place: str) -> str:
    """The alias of the model that has this name. Raises `ConfigError`."""
    for model in models:
        if name in model.names:
            return model.alias
    aliases = [model.alias for model in models]
    raise ConfigError(
        f"{place} {name!r} is not configured{_did_you_mean(name, aliases)}; "
        f"configured: {', '.join(aliases)}"
    )


def _place(alias: str, key: str, inherited: Container[str]) -> str:
    section = "defaults" if key in inherited else f"models.{alias}"
    return f"{section}.{key}"


def _keys(kind: type[Any], section: object, place: str, shown: bool = True) -> Mapping[str, Any]:
    """The keys of a section, each of which is known. Nothing at all means the defaults."""
    if section is None:
        return {}
    known = [item.name for item in fields(kind)]
    values = _mapping(
        section, place, f"a mapping with the keys {', '.join(known[:-1])} and {known[-1]}", shown
    )
    _refuse_unknown(values, known, place, shown)
    return values


def _sampling(section: object, place: str) -> SamplingPolicy:
    values = _keys(SamplingPolicy, section, place)
    policy: SamplingPolicy = _validated(SamplingPolicy, values, lambda key: f"{place}.{key}")
    return policy


def _validated(kind: type[Any], values: Mapping[str, Any], place: Callable[[str], str]) -> Any:
    """A value of that kind. Raises `ConfigError` with the place of the first mistake."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key, *rest = (str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ConfigError(f"{place(key)} is missing; name {wanted(kind, key)}") from None
        where = ".".join([place(key), *rest])
        value = "cannot be used" if is_secret(kind, key) else f"is {first['input']!r}"
        raise ConfigError(f"{where} {value}; {_complaint(first, kind, key)}") from None


def _complaint(first: Any, kind: type[Any], key: str) -> str:
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    words = wanted(kind, key) if len(first["loc"]) == 1 else None
    message: str = first["msg"]
    return f"it must be {words}" if words else message.replace("Input should be", "it must be")


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
        # Without the lines themselves, which may hold keys.
        raise ConfigError(
            f"configuration file {str(path)!r} is not valid YAML: {_yaml_complaint(error)}"
        ) from None


def _yaml_complaint(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or type(error).__name__
    return f"{problem}, line {mark.line + 1}, column {mark.column + 1}" if mark else problem


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where YAML would silently keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not where mappings are made: by then `<<` has added what it may replace.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"key {key.value!r} is given twice", key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return node


def _resolve_model(model: str, place: str, path: Path) -> str:
    """A checkpoint's folder or GGUF file as an absolute path; a model hub's name as it is."""
    looks_like_path = model.startswith(("/", "./", "../", "~")) or model in (".", "..")
    local = beside(path, model, f"{place}.model")
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


def _mapping(value: object, place: str, wanted: str, shown: bool = True) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        kind = _kind(value) if shown or value is None else type(value).__name__
        raise ConfigError(f"{place} must be {wanted}, not {kind}")
    return value


def _kind(value: object) -> str:
    if value is None:
        return "empty"
    shown = f" {value!r}"
    return type(value).__name__ + (shown if len(shown) <= MAX_SHOWN else "")


def _refuse_unknown(
    values: Mapping[Any, Any], known: Iterable[str], place: str, shown: bool = True
) -> None:
    known = list(known)
    for key in values:
        if key not in known:
            if not shown:
                raise ConfigError(f"{place}: a key is unknown; known keys: {', '.join(known)}")
            raise unknown_key(place, key, known)


def _underscored(values: Mapping[Any, Any], place: str) -> dict[str, Any]:
    """Keys of a model or of `defaults`, dashes in them as underscores."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"{place}: every key must be a string")
        name = key.replace("-", "_")
        if name in result:
            raise ConfigError(f"{place}: {name!r} is given twice, once with dashes; keep one")
        result[name] = value
    return result


def _refuse_shared_names(models: Iterable[ModelConfig], place: str) -> None:
    """Every name that a client may send is one model's."""
    owners: dict[str, str] = {}
    for model in models:
        for name in model.names:
            if name in owners:
                raise ConfigError(
                    f"{place}: models.{model.alias}: the name {name!r} is taken by "
                    f"models.{owners[name]}; every alias may be used once"
                )
            owners[name] = model.alias


def _did_you_mean(name: object, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
