"""YAML as it was written: each value with its text, each key with its line, nothing guessed.

PyYAML reads YAML 1.1 (https://yaml.org/type/), where `0512` is 330, `1:30` is 90, `no` is false and
`2024-01-01` is a date. YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema) and most people
disagree. A value that both read alike is accepted. Any other is kept as a `Surprising` value: a
setting that needs a text gets the text, and every other setting refuses it by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import Reader

from vllm_hotswap.errors import ConfigError, ConfigMistakes, Mistake

MAX_DEPTH = 50
"""Levels of nested lists and mappings; each alias counts as all that it stands for."""

MAX_VALUES = 100_000
"""Values of a file; each alias (`*name`) counts as all that it stands for."""

MAX_NUMBER = 100
"""A longer text is not a number."""

Keys = tuple[str | int, ...]
"""The path to a value: keys of mappings, and positions in lists."""

_TAG = "tag:yaml.org,2002:"
_PLAIN = _TAG + "plain"
"""A scalar without quotes and without a tag; YAML itself has no name for it."""

_NULLS = frozenset(["", "~", "null", "Null", "NULL"])
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_OLD_BOOLS = {"yes": True, "on": True, "no": False, "off": False}
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_OCTAL = re.compile(r"([-+]?)0[0-7_]+")
_OTHER_BASE = re.compile(r"[-+]?0[box][0-9a-fA-F_]+")
_ZERO_FIRST = re.compile(r"[-+]?0[0-9]+")
_UNDERSCORED = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


_KINDS: Mapping[str, type[Node]] = {
    _PLAIN: ScalarNode,
    **{_TAG + tag: ScalarNode for tag in ("str", "int", "float", "bool", "null", "merge")},
    _TAG + "seq": SequenceNode,
    _TAG + "map": MappingNode,
}
"""The kind of node that each tag needs."""


class WrittenInt(int):
    """A whole number that is shown as it was written."""

    text: str

    def __new__(cls, value: int, text: str = "") -> WrittenInt:
        number = super().__new__(cls, value)
        number.text = text or int.__repr__(number)
        return number

    def __repr__(self) -> str:
        return self.text


class WrittenFloat(float):
    """A number that is shown as it was written: `1.10` stays that."""

    text: str

    def __new__(cls, value: float, text: str = "") -> WrittenFloat:
        number = super().__new__(cls, value)
        number.text = text or float.__repr__(number)
        return number

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, repr=False)
class Surprising:
    """Text that YAML 1.1 reads as another value than the reader of the file may expect."""

    text: str
    value: bool | int | float
    """The value in YAML 1.1, or in 1.2 where 1.1 reads a text."""

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"{self.text}, which YAML reads as {shown(self.value)}"

    def __bool__(self) -> bool:
        return bool(self.value)


class OddKey(str):
    """A key, as it was written, that YAML reads as something else than a text."""

    __slots__ = ("value",)

    value: object

    def __new__(cls, text: str, value: object = None) -> OddKey:
        key = super().__new__(cls, text)
        key.value = value
        return key

    def __repr__(self) -> str:
        read = shown(self.value)
        return str(self) if read == self else f"{self!s}, which YAML reads as {read}"


def read_scalar(text: str) -> Any:
    """Read an unquoted text: as a number, a boolean, null, a `Surprising` value or a text."""
    if text in _NULLS:
        return None
    if len(text) > MAX_NUMBER:
        return text
    if text in _BOOLS:
        return _BOOLS[text]
    if _DECIMAL.fullmatch(text):
        return WrittenInt(int(text), text)
    if _HEXADECIMAL.fullmatch(text):
        return WrittenInt(int(text, 16), text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return WrittenFloat(float(text), text)
    value = _surprise(text)
    return text if value is None else Surprising(text, value)


def surprises(value: object, *keys: str | int) -> Iterator[tuple[Keys, Surprising]]:
    """Yield every `Surprising` value in a value, with the path to it."""
    if isinstance(value, Surprising):
        yield keys, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from surprises(item, *keys, str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from surprises(item, *keys, number)


def shown(value: object) -> str:
    """Return a value as it is written in YAML 1.2."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return int.__repr__(value)
    return float.__repr__(value) if isinstance(value, float) else repr(value)


def _surprise(text: str) -> bool | int | float | None:
    """Return what YAML 1.1 reads where a text looks like one of its numbers or words; else None."""
    if text.lower() in _OLD_BOOLS and text in (text.lower(), text.upper(), text.capitalize()):
        return _OLD_BOOLS[text.lower()]
    for pattern, read in _READERS:
        if pattern.fullmatch(text):
            try:
                return read(text.replace("_", ""))
            except ValueError:  # `0b9`: a text in both versions
                return None
    return None


def _sexagesimal(text: str) -> int | float:
    sign = -1 if text[0] == "-" else 1
    value: int | float = 0
    for part in text.lstrip("+-").split(":"):
        value = 60 * value + (float(part) if "." in part else int(part))
    return sign * value


def _number(text: str) -> int | float:
    return float(text) if set(text) & set(".eE") else int(text)


_READERS: Sequence[tuple[re.Pattern[str], Callable[[str], int | float]]] = (
    (_NOT_FINITE, lambda text: float(text.replace(".", "", 1))),
    (_OCTAL, lambda text: int(text, 8)),
    (_OTHER_BASE, lambda text: int(text, 0)),
    (_ZERO_FIRST, int),
    (_SEXAGESIMAL, _sexagesimal),
    (_UNDERSCORED, _number),
)
"""Texts that YAML 1.1 or 1.2 reads as numbers, and how, without underscores; first match wins."""


# --- where it stands ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a file; as a text, `FILE:LINE: KEYS`."""

    keys: str
    file: str = ""
    line: int = 0
    """From 1; 0 if it is unknown."""

    def __str__(self) -> str:
        file = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(filter(None, (file, self.keys)))


@dataclass(frozen=True)
class Source:
    """A file, and the line of each key in it."""

    path: Path
    lines: Mapping[Keys, int] = field(default_factory=dict, repr=False)

    @cached_property
    def sections(self) -> Mapping[Keys, Mapping[str, int]]:
        """The lines of the keys of each mapping, by the path to the mapping."""
        sections: dict[Keys, dict[str, int]] = {}
        for keys, line in self.lines.items():
            sections.setdefault(keys[:-1], {})[str(keys[-1])] = line
        return sections

    def line(self, *keys: str | int) -> int:
        """Return the line of a key, or of the nearest mapping around it; 0 if none is known."""
        return next(
            (self.lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), 0
        )

    def place(self, *keys: str | int) -> Place:
        return Place(".".join(map(str, keys)), str(self.path), self.line(*keys))


# --- reading ------------------------------------------------------------------------------------


def read_yaml(text: str, path: Path) -> tuple[Any, Source]:
    """Return the values of a file, and their places.

    Raises:
        ConfigError: it is not YAML, has an alias inside itself, or is too deep or too large. The
            message shows nothing of the content, which may hold keys.
    """
    if odd := Reader.NON_PRINTABLE.search(text):
        raise ConfigError(_place_of_character(path, text, odd.start()))
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        loader.tell()
        value = None if node is None else loader.construct_document(node)
        loader.tell()
        return value, Source(path, {} if node is None else dict(_lines(node)))
    except yaml.YAMLError as error:
        found = [*loader.found, error] if error not in loader.found else loader.found
        raise ConfigMistakes([_complaint(path, each) for each in found]) from None
    except (ValueError, OverflowError):  # PyYAML does not check the range of `"\\U..."`, `%YAML`
        line = loader.line + 1
        raise ConfigError(
            f"{path}:{line}: is not valid YAML: an escape or a version is out of range"
        ) from None


def _place_of_character(path: Path, text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    character = f"U+{ord(text[position]):04X}"
    return (
        f"{path}:{line}: is not valid YAML: the control character {character} is in column "
        f"{column}; delete it, or write it as an escape in double quotes"
    )


def _complaint(path: Path, error: yaml.YAMLError) -> Mistake:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or type(error).__name__
    if mark is None:
        return Mistake(0, f"{path}: is not valid YAML: {problem}")
    line, column = mark.line + 1, mark.column + 1
    return Mistake(line, f"{path}:{line}: is not valid YAML: {problem}, column {column}")


def _lines(node: Node, *keys: str | int) -> Iterator[tuple[Keys, int]]:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            yield (*keys, key.value), key.start_mark.line + 1
            yield from _lines(value, *keys, key.value)
    elif isinstance(node, SequenceNode):
        for number, value in enumerate(node.value):
            yield (*keys, number), value.start_mark.line + 1
            yield from _lines(value, *keys, number)


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses what YAML would accept silently.

    That is a key given twice, an alias inside of what it stands for, and more values or levels than
    any configuration has.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.found: list[yaml.YAMLError] = []
        """Mistakes that do not keep the rest from being read."""
        self._open: list[str | None] = []
        self._sizes: dict[int, int] = {}
        self._depths: dict[int, int] = {}

    def tell(self) -> None:
        """Raise `YAMLError` if a mistake has been found."""
        if self.found:
            raise self.found[-1]

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> Any:
        if kind is not ScalarNode:
            return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        if not implicit[0]:
            return _TAG + "str"
        return _TAG + "merge" if value == "<<" else _PLAIN

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self._open:
                self._refuse(f"the alias *{event.anchor} is inside &{event.anchor}", event)
            return super().compose_node(parent, index)
        if len(self._open) == MAX_DEPTH:
            self._refuse(f"more than {MAX_DEPTH} levels of lists and mappings", event)
        self._open.append(event.anchor)
        node = super().compose_node(parent, index)
        self._open.pop()
        self._check_kind(node)
        self._bound(node, event)
        return node

    def _bound(self, node: Node | None, event: Any) -> None:
        """Count what is in the node, each alias as all that it stands for, and refuse too much."""
        items = [id(item) for item in _items(node)]
        self._sizes[id(node)] = size = 1 + sum(self._sizes[item] for item in items)
        self._depths[id(node)] = depth = 1 + max((self._depths[item] for item in items), default=0)
        if size > MAX_VALUES:
            self._refuse(f"with its aliases it has more than {MAX_VALUES} values", event)
        if depth > MAX_DEPTH:
            self._refuse(f"with its aliases it has more than {MAX_DEPTH} nested levels", event)

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        # Here, not where mappings are made: by then `<<` has added keys that others replace.
        node: MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode) and (key.value, key.tag == _TAG + "merge") in seen:
                problem = f"key {key.value!r} is given twice"
                self.found.append(ComposerError(None, None, problem, key.start_mark))
            seen.add((str(key.value), key.tag == _TAG + "merge"))
        return node

    def _refuse(self, problem: str, event: Any) -> NoReturn:
        raise ComposerError(None, None, problem, event.start_mark)

    def _check_kind(self, node: Node | None) -> None:
        """Note one of YAML's own tags on another kind of node, such as `!!int {a: b}`.

        Here, not where values are made: keys and merged mappings are not made from their tags.
        """
        kind = _KINDS.get(node.tag) if node is not None else None
        if node is not None and kind is not None and not isinstance(node, kind):
            self.found.append(_wrong_tag(node))


def _wrong_tag(node: Node) -> ConstructorError:
    tag = node.tag.removeprefix(_TAG)
    return ConstructorError(
        None, None, f"the value tagged !!{tag} does not fit the tag", node.start_mark
    )


def _items(node: Node | None) -> Iterator[Node]:
    if isinstance(node, MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, SequenceNode):
        yield from node.value


def _plain(_: _Loader, node: ScalarNode) -> Any:
    return read_scalar(node.value)


def _text(_: _Loader, node: ScalarNode) -> str:
    return str(node.value)


def _tagged(loader: _Loader, node: ScalarNode) -> Any:
    """Return a scalar with a tag such as `!!int`; note a tag that is wrong."""
    kinds = {"int": int, "float": int | float, "bool": bool, "null": type(None)}
    value, kind = read_scalar(node.value), node.tag.removeprefix(_TAG)
    if not isinstance(value, kinds[kind]) or (kind != "bool" and isinstance(value, bool)):
        loader.found.append(_wrong_tag(node))
    return value


def _unknown(loader: _Loader, node: Node) -> None:
    problem = f"could not determine a constructor for the tag {node.tag!r}"
    loader.found.append(ConstructorError(None, None, problem, node.start_mark))


def _sequence(loader: _Loader, node: SequenceNode) -> list[Any]:
    return [loader.construct_object(item, deep=True) for item in node.value]


def _mapping(loader: _Loader, node: MappingNode) -> dict[str, Any]:
    loader.flatten_mapping(node)
    return {_key(key): loader.construct_object(value, deep=True) for key, value in node.value}


def _key(node: Node) -> str:
    if not isinstance(node, ScalarNode):
        raise ConstructorError(None, None, "a key must be a scalar", node.start_mark)
    value = read_scalar(node.value) if node.tag == _PLAIN else node.value
    if isinstance(value, Surprising):
        value = value.value
    return value if isinstance(value, str) else OddKey(node.value, value)


_Loader.yaml_constructors = {
    _PLAIN: _plain,
    _TAG + "merge": _text,
    _TAG + "str": _text,
    **{_TAG + kind: _tagged for kind in ("int", "float", "bool", "null")},
    _TAG + "seq": _sequence,
    _TAG + "map": _mapping,
    None: _unknown,
}
