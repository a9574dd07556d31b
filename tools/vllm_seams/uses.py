"""What our own sources use of vLLM, as far as it shows: imports, calls, overridden methods."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

ENTRY_POINTS = frozenset(["vllm.platform_plugins"])
"""Groups of entry points, which look like names of modules."""

PASSED_OVER = "host/vllm_state.py"
"""Names in its list that a version lacks are ignored when they are looked up."""

PYTHONS = frozenset(["__mro__", "__name__", "__dict__", "__module__", "__qualname__", "__doc__"])
"""Attributes that everything has."""

_MENTIONS = re.compile(r"\bvllm(\.| import)|\bfind\(")
"""What a module has that imports something of vLLM, names it, or looks it up."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a name of vLLM."""

    name: str
    place: str
    """`path:line` in our sources."""
    call: Call | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of a call."""

    positional: int
    keywords: tuple[str, ...]
    is_whole: bool
    """It has no `*args` and no `**kwargs`."""
    is_bound: bool = False
    """A method of an object; otherwise a method's first argument is the object."""


@dataclass(frozen=True, slots=True)
class Override:
    """A method of ours in place of one of vLLM."""

    name: str
    place: str
    node: Function


@dataclass(frozen=True, slots=True)
class Uses:
    """All names and overrides."""

    names: tuple[Use, ...]
    overrides: tuple[Override, ...]


def uses_in(source: Path, places: Mapping[str, Mapping[str, str]]) -> Uses:
    """Read all modules below a folder.

    Args:
        source: the folder of our package.
        places: `host.vllm_names.PLACES`: names that are looked up by `find`, which are checked with
            the places that they may be in.
    """
    names: list[Use] = []
    overrides: list[Override] = []
    for path in sorted(source.rglob("*.py")):
        if not _MENTIONS.search(path.read_text(encoding="utf-8")):
            continue
        reader = _Reader(path, source, places)
        names += reader.names()
        overrides += reader.overrides()
    return Uses(tuple(names), tuple(overrides))


class _Reader:
    """Read one file."""

    def __init__(self, path: Path, source: Path, places: Mapping[str, Mapping[str, str]]) -> None:
        self._tree = ast.parse(path.read_text(encoding="utf-8"))
        self._where = path.relative_to(source.parent).as_posix()
        self._places = places
        self._known = self._imports()

    def names(self) -> Iterator[Use]:
        yield from (Use(name, self._place(node)) for name, node in self._imported())
        calls = {id(node.func): node for node in ast.walk(self._tree) if isinstance(node, ast.Call)}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Call) and (name := self._looked_up(node.func)):
                yield Use(name, self._place(node), _call(node))
            elif isinstance(node, (ast.Name, ast.Attribute)) and (name := self._of_vllm(node)):
                call = calls.get(id(node))
                yield Use(name, self._place(node), None if call is None else _call(call))
            elif self._is_name_of_vllm(node):
                yield Use(node.value, self._place(node))
        yield from self._through_self()

    def overrides(self) -> Iterator[Override]:
        for node, base in self._subclasses():
            for method in node.body:
                if isinstance(method, Function):
                    yield Override(f"{base}.{method.name}", self._place(method), method)

    def _through_self(self) -> Iterator[Use]:
        """Yield `super().name(...)` in classes that inherit from vLLM's."""
        for node, base in self._subclasses():
            for call in (inner for inner in ast.walk(node) if isinstance(inner, ast.Call)):
                function = call.func
                if isinstance(function, ast.Attribute) and _is_super(function.value):
                    yield Use(f"{base}.{function.attr}", self._place(call), _call(call))

    def _subclasses(self) -> Iterator[tuple[ast.ClassDef, str]]:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    if name := self._of_vllm(base):
                        yield node, name

    def _imported(self) -> Iterator[tuple[str, ast.AST]]:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            yield from ((name, node) for name in names if name.startswith("vllm."))

    def _imports(self) -> dict[str, str]:
        known: dict[str, str] = {}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        return known

    def _of_vllm(self, node: ast.expr) -> str:
        """Return the dotted name of vLLM that an expression stands for; empty if it is not one."""
        if isinstance(node, ast.Name):
            return self._known.get(node.id, "")
        is_special = isinstance(node, ast.Attribute) and node.attr in PYTHONS
        if (
            isinstance(node, ast.Attribute)
            and not is_special
            and (base := self._of_vllm(node.value))
        ):
            return f"{base}.{node.attr}"
        return ""

    def _looked_up(self, function: ast.expr) -> str:
        """Return the name in `find("name")(...)`, as it stands in `PLACES`."""
        if isinstance(function, ast.Call) and getattr(function.func, "id", "") == "find":
            name = function.args[0]
            if isinstance(name, ast.Constant) and name.value in self._places:
                return str(name.value)
        return ""

    def _is_name_of_vllm(self, node: ast.AST) -> TypeGuard[Any]:
        """Return whether it is a text that names something of vLLM, but not one of several."""
        return (
            isinstance(node, ast.Constant)
            and not self._where.endswith(PASSED_OVER)
            and _is_qualified(node.value)
            and not any(node.value in modules.values() for modules in self._places.values())
        )

    def _place(self, node: ast.AST) -> str:
        return f"{self._where}:{getattr(node, 'lineno', 1)}"


def _call(node: ast.Call) -> Call:
    stars = [arg for arg in node.args if isinstance(arg, ast.Starred)]
    keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg is not None)
    is_whole = not stars and len(keywords) == len(node.keywords)
    is_bound = isinstance(node.func, ast.Attribute) and _is_super(node.func.value)
    return Call(len(node.args) - len(stars), keywords, is_whole, is_bound)


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super"


def _is_qualified(value: object) -> bool:
    """Return whether a text is the dotted name of something in a module of vLLM."""
    return (
        isinstance(value, str)
        and value.startswith("vllm.")
        and value.replace(".", "").replace("_", "").isalnum()
        and value.isascii()
        and value not in ENTRY_POINTS
    )
