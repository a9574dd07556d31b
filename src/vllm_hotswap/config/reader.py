"""The YAML file: parsed into frozen values, every mistake named with its place and next step.

Does not import vLLM: engine and frontend settings of a model stay a mapping here. `launch` gives
them to vLLM's own argument parser, which knows their names and types.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass as plain_dataclass, field, fields, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from vllm_hotswap.access import DEFAULT, Group, Keys, KeySource, PerMinute, Rights, refuse_shared
from vllm_hotswap.config.permissions import check_settings, read_models_file, without_unpermitted
from vllm_hotswap.config.references import References
from vllm_hotswap.config.sampling import SamplingPolicy
from vllm_hotswap.config.settings import (
    ALL,
    SECTIONS,
    STRICT,
    TOP_LEVEL,
    AdapterConfig,
    GroupConfig,
    IsolationConfig,
    LimitsConfig,
    ModelKeys,
    Override,
    RecoveryConfig,
    SwitchingConfig,
    expected_text,
    is_secret,
)
from vllm_hotswap.config.sizes import MemoryBudget
from vllm_hotswap.config.written import (
    OddKey,
    Place,
    Source,
    Surprising,
    read_scalar,
    read_yaml,
    shown,
    surprises,
)
from vllm_hotswap.errors import ConfigError, ConfigMistakes, Mistake, mistakes_of
from vllm_hotswap.hints import did_you_mean
from vllm_hotswap.system import resolve_beside

QUANT_VARIABLE = "QUANT_CONFIG"
"""Variable that a model's `quant_config` sets: the file of Gaudi's quantisation settings."""

MAX_NAME = 256
"""Most characters of an alias, or of a group's name."""

_UNUSABLE = {
    "Cc": "a control character",
    "Cs": "half of a character",
    "Zl": "a control character",
    "Zp": "a control character",
}
"""Unicode categories that a name must not contain, with words for messages."""

MAX_SHOWN = 80
"""A longer value is not repeated in a message."""

UNKNOWN = "unknown"
"""Stands for a model whose `model` is missing or wrong."""

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
    """Its keys that come from `defaults`."""
    environment: dict[str, str | None] = field(default_factory=dict)
    """Variables that must be set, or unset (None), while code works on this model."""
    lines: dict[str, int] = field(default_factory=dict, repr=False)
    """The line of each key, including `defaults`, if known; under "", the model's own line."""

    @property
    def is_folder(self) -> bool:
        return Path(self.model).is_absolute()

    @property
    def names(self) -> tuple[str, ...]:
        """Return every name that clients may send for it, its alias first."""
        return (self.alias, *self.aliases)

    def place(self, key: str) -> str:
        """Return the path of one of its keys in the file: section and key."""
        return _place(self.alias, key, self.inherited)

    def at(self, path: Path, key: str = "", *inner: str | int) -> Place:
        """Return where in the file `path` a key of it stands; without a key, the model itself."""
        keys = self.place(key) if key else f"models.{self.alias}"
        line = self.lines.get(key, self.lines.get("", 0))
        return Place(".".join([keys, *map(str, inner)]), str(path), line)


@plain_dataclass(frozen=True, slots=True)
class ServerConfig:
    """The whole file."""

    path: Path
    default_model: str
    models: tuple[ModelConfig, ...]
    switching: SwitchingConfig = field(default_factory=SwitchingConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    isolation: IsolationConfig = field(default_factory=IsolationConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    memory: MemoryBudget = field(default_factory=MemoryBudget)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    rights: tuple[Group, ...] = ()
    references: References = field(default_factory=References, repr=False)
    """Values from environment variables, which must not be shown."""
    needs_files: bool = True
    """Whether the checkpoints, files and folders that it names must exist."""

    @property
    def aliases(self) -> tuple[str, ...]:
        return tuple(model.alias for model in self.models)

    @property
    def adapter_folders(self) -> tuple[Path, ...]:
        """Return absolute paths. Raises `ConfigError` if one is not a folder."""
        with self.references.hidden_in_errors():
            return tuple(self._folder(name) for name in self.adapters.folders)

    def _folder(self, name: str) -> Path:
        place = f"{self.path}: adapters.folders"
        folder = resolve_beside(self.path, name, place)
        if self.needs_files and not folder.is_dir():
            raise ConfigError(f"{place}: {str(folder)!r} is not a folder")
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
        overrides: settings given elsewhere; each wins over the file, a later one over earlier ones.
        allowed: dangers that are accepted; see `permissions`.
        environment: values for `${NAME}` in the file.

    Raises:
        ConfigError: the file is missing, unreadable or not YAML; or, as a `ConfigMistakes`, all
            that cannot work in it.
    """
    return read_config(path, overrides, allowed, environment).whole()


def read_config(
    path: Path,
    overrides: Iterable[Override] = (),
    allowed: frozenset[str] = frozenset(),
    environment: Mapping[str, str] = os.environ,
    needs_files: bool = True,
) -> ReadConfig:
    """Do as `load_config`, but return the mistakes beside what could be read.

    Args:
        needs_files: whether a file or folder that it names, and that does not exist, is a mistake.

    Raises:
        ConfigError: the file is missing, unreadable or not YAML.
    """
    document, source = read_yaml(_read_text(path, allowed), path)
    return _parse(document, source, overrides, allowed, environment, needs_files)


def parse_config(
    document: object,
    path: Path,
    overrides: Iterable[Override] = (),
    allowed: frozenset[str] = frozenset(),
    environment: Mapping[str, str] = os.environ,
) -> ServerConfig:
    """Check a parsed document; `path` is where relative paths start and what errors name."""
    return _parse(document, Source(path), overrides, allowed, environment).whole()


def _parse(
    document: object,
    source: Source,
    overrides: Iterable[Override],
    allowed: frozenset[str],
    environment: Mapping[str, str],
    needs_files: bool = True,
) -> ReadConfig:
    references = References(environment)
    filled = references.fill(document, source)
    reader = _Reader(source, overrides, allowed, needs_files)
    config = reader.read(filled)
    if config is not None:
        config = replace(config, references=references, needs_files=needs_files)
    # An error that only follows from a variable that is not set is not a mistake of its own.
    lines = {mistake.line for mistake in references.unset if mistake.line}
    found = [mistake for mistake in reader.mistakes if mistake.line not in lines]
    hidden = (Mistake(one.line, references.hide(one.message)) for one in found)
    return ReadConfig(config, reader.unusable, (*references.unset, *hidden))


@plain_dataclass(frozen=True, slots=True)
class ReadConfig:
    """The part of a file that could be read, and its mistakes."""

    config: ServerConfig | None
    """None if there is no model to look at; else without the values that are wrong."""
    unusable: frozenset[str]
    """Aliases of models with mistakes; only their `settings` are as in the file.

    Even there, refused settings are left out, so that no code parses them.
    """
    mistakes: tuple[Mistake, ...]

    def whole(self) -> ServerConfig:
        """Return the configuration. Raises `ConfigMistakes` if anything is wrong with it."""
        if self.mistakes or self.config is None:
            raise ConfigMistakes(self.mistakes)
        return self.config


def unknown_key(place: object, key: object, known: Iterable[str]) -> ConfigError:
    """Return the error for an unknown key, with the nearest known one."""
    known = list(known)
    hint = did_you_mean(str(key), known)
    if not hint and len(known) <= 10:
        hint = f"; known keys: {', '.join(known)}"
    return ConfigError(f"{place}: unknown key {key!r}{hint}")


@plain_dataclass(frozen=True, slots=True)
class _Noting:
    """A context that collects `ConfigError`s raised inside, and suppresses them."""

    mistakes: list[Mistake]
    line: int
    """The line of errors that do not know theirs."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if not isinstance(error, ConfigError):
            return False
        self.mistakes.extend(mistakes_of(error, self.line))
        return True


class _Reader:
    """Turns one document into a `ServerConfig`; knows where every value was given.

    The mutable state is its findings: `mistakes`, and the models that are `unusable`.
    """

    def __init__(
        self,
        source: Source,
        overrides: Iterable[Override],
        allowed: frozenset[str],
        needs_files: bool,
    ) -> None:
        self._source = source
        self._path = source.path
        self._allowed = allowed
        self._needs_files = needs_files
        self._overrides = list(overrides)
        self.mistakes: list[Mistake] = []
        self._unusable: set[str] = set()

    @property
    def unusable(self) -> frozenset[str]:
        return frozenset(self._unusable)

    def read(self, document: object) -> ServerConfig | None:
        """Return what can be used of the document; None if that includes no model."""
        top: Mapping[Any, Any] = {}
        with self._noting():
            top = _mapping(
                document, self._source.place(), "a mapping with the keys default_model and models"
            )
            self._refuse_unknown(top, TOP_LEVEL)
        models = self._models(top) if not self.mistakes or "models" in top else ()
        sections = {name: self._section(name, kind, top) for name, kind in SECTIONS.items()}
        if not models:
            return None
        default_model = models[0].alias
        with self._noting("default_model"):
            default_model = self._default_model(top, models)
        groups: list[Group] = []
        with self._noting("rights"):
            groups = self._rights(top.get("rights"), models)
        return ServerConfig(
            path=self._path,
            default_model=default_model,
            models=models,
            rights=tuple(groups),
            **sections,
        )

    def _noting(self, *keys: str | int) -> _Noting:
        """Return a context that adds `ConfigError`s raised inside to the mistakes."""
        return _Noting(self.mistakes, self._source.line(*keys))

    def _refuse_unknown(
        self, values: Mapping[Any, Any], known: Iterable[str], *keys: str | int, shown: bool = True
    ) -> None:
        """Note every unknown key as a mistake."""
        known = list(known)
        for key in [key for key in values if key not in known]:
            place = self._resolve_beside(*keys, key)
            with self._noting(*keys, key):
                if not shown:
                    raise ConfigError(f"{place}: a key is unknown; known keys: {', '.join(known)}")
                raise unknown_key(place, key, known)

    def _default_model(self, top: Mapping[str, Any], models: Sequence[ModelConfig]) -> str:
        default, origin = top.get("default_model", models[0].alias), self._place("default_model")
        for override in self._given(""):
            default, origin = override.value, override.origin
        return _configured(default, models, origin)

    def _place(self, *keys: str | int) -> str:
        return str(self._source.place(*keys))

    def _resolve_beside(self, *keys: Any) -> Place:
        """Return the section that a key is in, with the key's own line."""
        return replace(self._source.place(*keys[:-1]), line=self._source.line(*keys))

    # --- rights -------------------------------------------------------------------------------

    def _rights(self, section: object, models: Sequence[ModelConfig]) -> list[Group]:
        if section is None:
            return []
        place, read = self._place("rights"), []
        groups = _mapping(section, place, "a mapping of a group's name to its rights", shown=False)
        for name, entry in groups.items():
            with self._noting("rights", str(name)):
                if not _is_name(name):
                    raise ConfigError(
                        f"{self._resolve_beside('rights', name)}: a group's name must be a string; "
                        "put it in quotes"
                    )
                _refuse_odd("the group's name", name, self._resolve_beside("rights", name))
                read.append(self._group(name, entry, models))
        refuse_shared([(group, group.source.given) for group in read])
        return read

    def _group(self, name: str, entry: object, models: Sequence[ModelConfig]) -> Group:
        keys = ("rights", name)
        place = self._place(*keys)
        values = self._keys(GroupConfig, entry, *keys, shown=False)
        given: GroupConfig = _validated(
            GroupConfig, values, lambda *inner: self._source.place(*keys, *inner)
        )
        if name == DEFAULT and (given.keys or given.key_file):
            raise ConfigError(
                f"{place} applies to callers without a group, so it cannot have keys; give the "
                "keys to another group"
            )
        secrets = Keys.of(
            [key.get_secret_value() for key in given.keys], self._place(*keys, "keys")
        )
        if name != DEFAULT and not (secrets or given.key_file):
            raise ConfigError(f"{place} has no key; give it keys or a key_file")
        file_place = self._place(*keys, "key_file")
        files = [resolve_beside(self._path, given.key_file, file_place)] if given.key_file else []
        switch_to = None
        if given.switch_to != ALL:
            where = self._place(*keys, "switch_to")
            switch_to = frozenset(_configured(alias, models, where) for alias in given.switch_to)
        per_minute = PerMinute(
            given.requests_per_minute, given.tokens_per_minute, given.switches_per_minute
        )
        rights = Rights(name, switch_to, given.max_priority, given.min_max_wait, per_minute)
        return Group(rights, place, KeySource(secrets, files))

    # --- sections -----------------------------------------------------------------------------

    def _section(self, name: str, kind: type[Any], top: Mapping[str, Any]) -> Any:
        """Read one section; return its defaults if there is a mistake in it."""
        values, origins = {}, {}
        with self._noting(name):
            values = dict(self._keys(kind, top.get(name), name))
        for override in self._given(name):
            values[override.key] = read_scalar(override.value)
            origins[override.key] = Place(override.origin)

        def place(key: str, *inner: str | int) -> Place:
            return origins.get(key) or self._source.place(name, key, *inner)

        with self._noting(name):
            return _validated(kind, values, place)
        return kind()

    def _given(self, section: str) -> Iterator[Override]:
        return (override for override in self._overrides if override.section == section)

    def _keys(
        self, kind: type[Any], section: object, *keys: str | int, shown: bool = True
    ) -> Mapping[str, Any]:
        """Return the known keys of a section; note every other one. A missing section has none."""
        if section is None:
            return {}
        known = [item.name for item in fields(kind)]
        names = " and ".join(filter(None, (", ".join(known[:-1]), known[-1])))
        expected = f"a mapping with the {'keys' if known[1:] else 'key'} {names}"
        values = _mapping(section, self._place(*keys), expected, shown)
        self._refuse_unknown(values, known, *keys, shown=shown)
        return {key: value for key, value in values.items() if key in known}

    # --- models -------------------------------------------------------------------------------

    def _models(self, top: Mapping[str, Any]) -> tuple[ModelConfig, ...]:
        """Read all models that have an alias and a mapping, whatever else is wrong with them."""
        entries: Mapping[Any, Any] = {}
        shared: dict[str, Any] = {}
        with self._noting("models"):
            place = self._place("models")
            entries = _mapping(top.get("models"), place, "a mapping of alias to settings")
            if not entries:
                raise ConfigError(f"{place} is empty; name at least one model")
        with self._noting("defaults"):
            shared = self._defaults(top.get("defaults"))
        models = []
        for alias, entry in self._indented(entries):
            with self._noting("models", alias):
                models.append(self._model(alias, entry, shared))
        self._refuse_shared_names(models)
        return tuple(models)

    def _indented(self, entries: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
        """Yield the entries; note an empty one whose keys stand beside it, and drop these."""
        items = list(entries.items())
        while items:
            alias, entry = items.pop(0)
            below = takewhile(_is_key_of_a_model, items) if entry is None else ()
            keys = [key for key, _ in below]
            if not keys:
                yield alias, entry
                continue
            del items[: len(keys)]
            with self._noting("models", alias):
                names = " and ".join(f"`{key}`" for key in keys)
                raise ConfigError(
                    f"{self._place('models', alias)} is empty, and {names} "
                    f"{'are' if keys[1:] else 'is'} beside it; indent {names} below {alias}"
                )

    def _defaults(self, section: object) -> dict[str, Any]:
        if section is None:
            return {}
        place = self._place("defaults")
        values = self._underscored(
            _mapping(section, place, "a mapping with keys of a model"), "defaults"
        )
        for key in NOT_SHARED:
            if key in values:
                del values[key]
                with self._noting("defaults", key):
                    raise ConfigError(
                        f"{self._resolve_beside('defaults', key)}: {key!r} can't be shared; "
                        "give it to each model"
                    )
        return values

    def _model(self, alias: object, entry: object, shared: Mapping[str, Any]) -> ModelConfig:
        place = self._place("models", str(alias))
        if not isinstance(alias, str) or not _is_name(alias):
            odd = (
                f" YAML reads this alias as {shown(alias.value)};"
                if isinstance(alias, OddKey)
                else ""
            )
            raise ConfigError(
                f"{place}:{odd} an alias must be a non-empty string; put it in quotes"
            )
        _refuse_odd(f"the alias {_shortened(alias)}", alias, self._resolve_beside("models", alias))
        keys = ("models", alias)
        own = self._underscored(
            _mapping(entry, place, "a mapping with at least the key model"), *keys
        )
        inherited = frozenset(shared.keys() - own.keys())
        values = {**shared, **own}
        ours = {
            item.name: values.pop(item.name) for item in fields(ModelKeys) if item.name in values
        }
        given = _Given(self._source, alias, inherited)
        before = len(self.mistakes)
        with self._noting(*keys):
            check_settings(values, given.place, self._allowed)
        values = without_unpermitted(values, self._allowed)
        with self._noting(*keys):
            if "sampling" in ours:
                section = ours.pop("sampling")
                ours["sampling"] = self._sampling(section, given)
        base = {"alias": alias, "settings": values, "inherited": inherited, "lines": given.lines()}
        model = self._validated_model(ours, base, given)
        for name in model.aliases:
            with self._noting(*keys, "aliases"):
                _refuse_odd(f"the name {_shortened(name)}", name, given.place("aliases"))
        with self._noting(*keys, "model"):
            if model.model != UNKNOWN:
                model = replace(model, model=self._checkpoint(model.model, given.place("model")))
        with self._noting(*keys):
            if "quant_config" in ours:
                model = replace(model, environment=self._environment(model, given))
        if len(self.mistakes) > before:
            self._unusable.add(alias)
        return model

    def _validated_model(
        self, ours: dict[str, Any], base: dict[str, Any], given: _Given
    ) -> ModelConfig:
        """Make the model without those of its keys that are wrong, which are noted."""
        with self._noting("models", given.alias):
            model: ModelConfig = _validated(ModelConfig, {**ours, **base}, given.place)
            return model
        good: dict[str, Any] = {"model": UNKNOWN}
        for key, value in ours.items():
            with suppress(ConfigError):
                _validated(ModelConfig, {**good, key: value, **base}, given.place)
                good[key] = value
        rest: ModelConfig = _validated(ModelConfig, {**good, **base}, given.place)
        return rest

    def _sampling(self, section: object, given: _Given) -> SamplingPolicy:
        values = self._keys(SamplingPolicy, section, *given.keys("sampling"))
        parameters = {key: value for key, value in values.items() if key != "drop_unsupported"}
        refuse_surprises(parameters, lambda *inner: given.place("sampling", *inner))
        policy: SamplingPolicy = _validated(
            SamplingPolicy, values, lambda *inner: given.place("sampling", *inner)
        )
        return policy

    def _environment(self, model: ModelConfig, given: _Given) -> dict[str, str | None]:
        if model.quant_config is None:
            return {QUANT_VARIABLE: None}
        place = given.place("quant_config")
        file = resolve_beside(self._path, model.quant_config, place)
        if self._needs_files and not file.is_file():
            raise ConfigError(f"{place}: the file {str(file)!r} does not exist")
        return {QUANT_VARIABLE: str(file)}

    def _checkpoint(self, model: str, place: Place) -> str:
        """Resolve a folder or a GGUF file to an absolute path; leave a model hub's name as it is.

        If files need not exist, return the path of a missing one, too.
        """
        try:
            return _resolve_model(model, place, self._path)
        except ConfigError:
            local = resolve_beside(self._path, model, place)
            if self._needs_files or local.exists():
                raise
            return str(local)

    def _underscored(self, values: Mapping[Any, Any], *keys: str) -> dict[str, Any]:
        """Return keys of a model or of `defaults`, with dashes replaced by underscores."""
        result: dict[str, Any] = {}
        for key, value in values.items():
            with self._noting(*keys, key):
                place = self._resolve_beside(*keys, key)
                if not isinstance(key, str) or isinstance(key, OddKey):
                    raise ConfigError(f"{place}: every key must be a string, not {key!r}")
                name = key.replace("-", "_")
                if name in result:
                    raise ConfigError(
                        f"{place}: {name!r} is given twice, once with dashes; keep one"
                    )
                result[name] = value
        return result

    def _refuse_shared_names(self, models: Iterable[ModelConfig]) -> None:
        """Note every name that more than one model has."""
        owners: dict[str, str] = {}
        for model in models:
            for name in model.names:
                with self._noting("models", model.alias):
                    if name in owners:
                        raise ConfigError(
                            f"{self._place('models', model.alias)}: the name {name!r} is taken by "
                            f"models.{owners[name]}; each alias may be used once"
                        )
                owners[name] = model.alias


@plain_dataclass(frozen=True, slots=True)
class _Given:
    """Finds where the keys of one model stand: below it, or in `defaults`."""

    source: Source
    alias: str
    inherited: frozenset[str]

    def keys(self, key: str, *inner: str | int) -> tuple[str | int, ...]:
        section = ("defaults",) if key in self.inherited else ("models", self.alias)
        return (*section, key, *inner)

    def place(self, key: str, *inner: str | int) -> Place:
        place = self.source.place(*self.keys(key, *inner))
        is_known = self.keys(key) in self.source.lines
        return place if is_known else replace(place, line=self.lines().get(key, place.line))

    def lines(self) -> dict[str, int]:
        """Return each given key's line, dashes as underscores; under "", the model's own line."""
        sections: list[tuple[str, ...]] = [("defaults",), ("models", self.alias)]
        return {"": self.source.line("models", self.alias)} | {
            key.replace("-", "_"): line
            for section in sections
            for key, line in self.source.sections.get(section, {}).items()
        }


def _configured(name: object, models: Sequence[ModelConfig], place: str) -> str:
    """Return the alias of the model that has this name. Raises `ConfigError`."""
    for model in models:
        if name in model.names:
            return model.alias
    aliases = [model.alias for model in models]
    raise ConfigError(
        f"{place} {name!r} is not configured; configured: {', '.join(aliases)}"
        f"{did_you_mean(str(name), aliases)}"
    )


def _place(alias: str, key: str, inherited: Container[str]) -> str:
    section = "defaults" if key in inherited else f"models.{alias}"
    return f"{section}.{key}"


def _validated(kind: type[Any], values: Mapping[str, Any], place: Callable[..., Place]) -> Any:
    """Make a value of that kind. Raises `ConfigMistakes` with everything that is wrong.

    `place` is called with the keys that lead to a value inside it.
    """
    try:
        return kind(**{key: _switched(kind, key, value) for key, value in values.items()})
    except ValidationError as error:
        found = [_mistake(detail, kind, place) for detail in error.errors()]
        raise ConfigMistakes(found) from None


def _switched(kind: type[Any], key: str, value: object) -> object:
    """Accept `yes`, `no`, `on` and `off` where only true and false can be meant."""
    field_info = kind.__pydantic_fields__.get(key)
    if isinstance(value, Surprising) and isinstance(value.value, bool) and field_info:
        return value.value if field_info.annotation is bool else value
    return value


def _mistake(detail: Any, kind: type[Any], place: Callable[..., Place]) -> Mistake:
    key, *inner = detail["loc"]
    where = place(key, *inner)
    if detail["type"] == "missing":
        return Mistake(where.line, f"{where} is missing; name {expected_text(kind, key)}")
    value = "cannot be used" if is_secret(kind, key) else f"is {detail['input']!r}"
    return Mistake(where.line, f"{where} {value}; {_complaint(detail, kind, key)}")


def refuse_surprises(value: object, place: Callable[..., Place]) -> None:
    """Refuse values that YAML may read otherwise than meant, where any type is accepted.

    Raises:
        ConfigMistakes: names each of them.
    """
    found = [
        Mistake(
            place(*keys).line,
            f"{place(*keys)} is {item!r}; "
            f"write {shown(item.value)}, or {item.text!r} in quotes for the text",
        )
        for keys, item in surprises(value)
    ]
    if found:
        raise ConfigMistakes(found)


def _complaint(first: Any, kind: type[Any], key: str) -> str:
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    words = expected_text(kind, key) if len(first["loc"]) == 1 else None
    message: str = first["msg"]
    return f"it must be {words}" if words else message.replace("Input should be", "it must be")


def _read_text(path: Path, allowed: frozenset[str]) -> str:
    try:
        return read_models_file(path, allowed).decode()
    except FileNotFoundError:
        raise ConfigError(
            f"configuration file {str(path)!r} does not exist; "
            "`vllm-hotswap demo --write DIR` writes one that works"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"configuration file {str(path)!r} is not UTF-8 text; save it as UTF-8"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{str(path)!r} is a folder; name the YAML file in it") from None
    except OSError as error:
        raise ConfigError(
            f"configuration file {str(path)!r} cannot be read: {error.strerror}"
        ) from error


def _resolve_model(model: str, place: Place, path: Path) -> str:
    """Resolve a checkpoint's folder or GGUF file to an absolute path; leave a hub's name alone."""
    looks_like_path = model.startswith(("/", "./", "../", "~")) or model in (".", "..")
    local = resolve_beside(path, model, place)
    if not looks_like_path and not local.exists():
        return model
    if local.suffix == ".gguf" and local.is_file():
        return str(local)
    if local.is_file():
        raise ConfigError(f"{place}: {str(local)!r} is neither a folder nor a .gguf file")
    if not local.is_dir():
        what = "file" if local.suffix == ".gguf" else "folder"
        raise ConfigError(f"{place}: the {what} {str(local)!r} does not exist")
    # Mistral's own format has `params.json` instead of `config.json`.
    if not any((local / name).is_file() for name in ("config.json", "params.json")):
        raise ConfigError(
            f"{place}: the folder {str(local)!r} has no config.json; it is not a checkpoint"
        )
    return str(local)


def _is_name(name: object) -> bool:
    return isinstance(name, str) and not isinstance(name, OddKey) and bool(name.strip())


def _refuse_odd(what: str, name: str, place: Place) -> None:
    """Refuse a name that commands cannot use, or terminals and logs cannot show: `ConfigError`."""
    if reason := _oddity(name):
        raise ConfigError(f"{place}: {what} cannot be used: {reason}")


def _shortened(name: str) -> str:
    return ascii(name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "...")


def _oddity(name: str) -> str:
    """Return what is wrong with a name; an empty text if it can be used."""
    if name in (".", ".."):
        return "it would be a relative path; choose another name"
    for character in name:
        if what := _UNUSABLE.get(unicodedata.category(character)):
            return f"U+{ord(character):04X} in it is {what}; leave it out"
    if len(name) > MAX_NAME:
        return f"it has {len(name)} characters; choose a name of at most {MAX_NAME}"
    return ""


def _is_key_of_a_model(item: tuple[object, object]) -> bool:
    """Whether an entry among the models can only be a key that belongs below a model."""
    return item[1] is not None and not isinstance(item[1], dict)


def _mapping(value: object, place: object, expected: str, shown: bool = True) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        kind = _kind(value) if shown or value is None else type(value).__name__
        raise ConfigError(f"{place} must be {expected}, not {kind}")
    return value


def _kind(value: object) -> str:
    if value is None:
        return "empty"
    if isinstance(value, Surprising):
        return repr(value)
    kinds = (kind for kind in (bool, int, float) if isinstance(value, kind))
    shown = f" {value!r}"
    return next(kinds, type(value)).__name__ + (shown if len(shown) <= MAX_SHOWN else "")
