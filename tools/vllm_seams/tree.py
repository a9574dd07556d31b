"""Names and signatures in a folder of Python sources, found without importing anything.

A name is looked up as Python would: through `import` lines, base classes, attributes that methods
set on `self`, and the tables of names that a module's `__getattr__` loads late.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FIELD_MAKERS = frozenset(["dataclass", "config", "pydantic_dataclass"])
"""Decorators that make a constructor of a class's annotated fields."""

FIELD_BASES = frozenset(["BaseModel", "Struct", "NamedTuple", "OpenAIBaseModel"])
"""Base classes that do the same."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Signature:
    """What a function can be called with; `self` and `cls` are left out."""

    positional: tuple[str, ...]
    required: frozenset[str]
    keywords: frozenset[str]
    """Parameters that may be given by name, the positional ones among them."""
    takes_more_positional: bool = False
    takes_more_keywords: bool = False

    @classmethod
    def of(cls, node: Function, is_method: bool) -> Signature:
        args = node.args
        is_bound = is_method and "staticmethod" not in _decorators(node)
        names = [arg.arg for arg in (*args.posonlyargs, *args.args)]
        optional = set(names[len(names) - len(args.defaults) :])
        only_named = {
            arg.arg: default for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
        }
        optional |= {name for name, default in only_named.items() if default is not None}
        positional = tuple(names[1:] if is_bound else names)
        return cls(
            positional,
            frozenset({*positional, *only_named} - optional),
            frozenset({*positional, *only_named} - {arg.arg for arg in args.posonlyargs}),
            args.vararg is not None,
            args.kwarg is not None,
        )

    def refuses(self, positional: int, keywords: Iterable[str], is_whole: bool) -> str | None:
        """Return why a call with so many positional arguments and these keywords fails, or None.

        Args:
            is_whole: the call has no `*args` or `**kwargs`, so whatever is required must be there.
        """
        given = set(keywords)
        if positional > len(self.positional) and not self.takes_more_positional:
            return f"takes {len(self.positional)} positional arguments, not {positional}"
        if not self.takes_more_keywords and (unknown := sorted(given - self.keywords)):
            return f"has no parameter {', '.join(unknown)}"
        missing = self.required - given - set(self.positional[:positional])
        if is_whole and missing:
            return f"also needs {', '.join(sorted(missing))}"
        return None

    def __str__(self) -> str:
        rest = sorted(self.keywords - set(self.positional))
        return f"({', '.join([*self.positional, *rest])})"


@dataclass(frozen=True, slots=True)
class Found:
    """Where a name is defined."""

    module: str
    node: ast.AST | None
    """None: a module, or a name that is only made at run time."""
    owner: str = ""
    """The class that it was found in; empty for a module's own names."""

    @property
    def source(self) -> str:
        """Return its code, without comments and layout; the same text for the same code."""
        return "" if self.node is None else ast.unparse(self.node)


class Module:
    """One parsed file: what its top level binds, and what it imports."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._is_package = path.name == "__init__.py"
        self.root = ast.parse(path.read_text(encoding="utf-8"))

    @cached_property
    def bindings(self) -> Mapping[str, ast.AST]:
        """Return names that the top level defines, in any branch; the first definition counts."""
        found: dict[str, ast.AST] = {}
        for statement in _statements(self.root.body):
            for name in _bound(statement):
                found.setdefault(name, statement)
        return found

    @cached_property
    def imports(self) -> Mapping[str, str]:
        """Return local name -> dotted name that it stands for."""
        found: dict[str, str] = {}
        for statement in _statements(self.root.body):
            if isinstance(statement, ast.ImportFrom):
                base = self._absolute(statement)
                found |= {a.asname or a.name: f"{base}.{a.name}" for a in statement.names}
            elif isinstance(statement, ast.Import):
                found |= {a.asname: a.name for a in statement.names if a.asname}
        return found

    @cached_property
    def star_imports(self) -> tuple[str, ...]:
        return tuple(name.removesuffix(".*") for name in self.imports.values() if name[-2:] == ".*")

    @cached_property
    def late_names(self) -> frozenset[str]:
        """Return names that a module-level `__getattr__` may know: the keys of its tables."""
        if "__getattr__" not in self.bindings:
            return frozenset()
        return frozenset(
            key.value
            for node in ast.walk(self.root)
            if isinstance(node, ast.Dict)
            for key in node.keys
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        )

    def walk(self) -> Iterator[ast.AST]:
        return ast.walk(self.root)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        kept = parts[: len(parts) - node.level + self._is_package]
        return ".".join([*kept, *([node.module] if node.module else [])])


class Tree:
    """The sources of one version.

    Args:
        root: the folder that holds the package's folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            base = self.root.joinpath(*name.split("."))
            paths = (base / "__init__.py", base.with_suffix(".py"))
            path = next((path for path in paths if path.is_file()), None)
            self._modules[name] = None if path is None else Module(name, path)
        return self._modules[name]

    def modules(self, package: str, words: Iterable[str] = ("",)) -> Iterator[Module]:
        """Yield a package's modules that have one of these words, in the order of their paths."""
        wanted = [word.encode() for word in words]
        for path in sorted(self.root.joinpath(*package.split(".")).rglob("*.py")):
            text = path.read_bytes()
            if not any(word in text for word in wanted):
                continue
            parts = path.relative_to(self.root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if (module := self.module(name)) is not None:
                yield module

    def find(self, name: str) -> Found | None:
        """Return what a dotted name stands for; None where there is no such thing."""
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            module = self.module(".".join(parts[:length]))
            if module is not None:
                return self._in_module(module, parts[length:])
        return None

    def has(self, name: str) -> bool:
        return self.find(name) is not None

    def signature(self, name: str) -> Signature | None:
        """Return how a function, a method or a class is called; None where that cannot be read."""
        found = self.find(name)
        if found is None:
            return None
        if isinstance(found.node, Function):
            return Signature.of(found.node, is_method=bool(found.owner))
        if isinstance(found.node, ast.ClassDef):
            return self._constructor(found)
        return None

    def wants_its_object(self, name: str) -> bool:
        """Return whether it is a method that is called with an object as its first argument."""
        found = self.find(name)
        return (
            found is not None
            and bool(found.owner)
            and isinstance(found.node, Function)
            and not {"classmethod", "staticmethod"} & set(_decorators(found.node))
        )

    def _in_module(self, module: Module, parts: list[str]) -> Found | None:
        if not parts:
            return Found(module.name, None)
        first, *rest = parts
        node = module.bindings.get(first)
        if isinstance(node, ast.ClassDef):
            found = Found(module.name, node)
            return self._member(found, rest) if rest else found
        if node is not None:
            return Found(module.name, node)
        return self._elsewhere(module, first, rest)

    def _elsewhere(self, module: Module, first: str, rest: list[str]) -> Found | None:
        """Return a name that a module imports, or makes when it is used."""
        if (target := module.imports.get(first)) is not None:
            return self._imported(".".join([target, *rest]))
        if first in module.late_names:
            return Found(module.name, None)
        found = (self.find(".".join([star, first, *rest])) for star in module.star_imports)
        return next((one for one in found if one is not None), None)

    def _imported(self, target: str) -> Found | None:
        if self.module(target.split(".", maxsplit=1)[0]) is None:
            return Found(target, None)  # of another package, whose sources are not here
        return self.find(target)

    def _member(self, owner: Found, parts: list[str]) -> Found | None:
        name, *rest = parts
        for found in self.lineage(owner):
            node = _member(found.node, name) if found.node is not None else None
            if isinstance(node, ast.ClassDef) and rest:
                return self._member(Found(found.module, node), rest)
            if node is not None:
                owner_name = getattr(found.node, "name", "")
                return Found(found.module, node, owner_name)
        return None

    def lineage(self, found: Found) -> Iterator[Found]:
        """Yield a class and those that it inherits from, as far as their sources are here."""
        yield found
        module = self.module(found.module)
        if not isinstance(found.node, ast.ClassDef) or module is None:
            return
        for base in found.node.bases:
            name = dotted(base.value if isinstance(base, ast.Subscript) else base)
            parent = self._in_module(module, name.split(".")) if name else None
            if parent is not None and isinstance(parent.node, ast.ClassDef):
                yield from self.lineage(parent)

    def _constructor(self, found: Found) -> Signature | None:
        for one in self.lineage(found):
            init = _member(one.node, "__init__")
            if isinstance(init, Function):
                return Signature.of(init, is_method=True)
        lineage = list(self.lineage(found))
        if not any(_makes_fields(one.node) for one in lineage):
            return None
        fields = [name for one in reversed(lineage) for name in _fields(one.node)]
        return Signature(tuple(fields), frozenset(), frozenset(fields))


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements of a block and of its branches, but not of functions and classes."""
    for statement in body:
        yield statement
        if isinstance(statement, Function | ast.ClassDef):
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Yield names that one statement binds, except imports."""
    if isinstance(statement, Function | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign):
        for target in statement.targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
    elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        yield statement.target.id


def _member(node: ast.AST | None, name: str) -> ast.AST | None:
    """Return what a class's body or one of its methods binds under a name."""
    if not isinstance(node, ast.ClassDef):
        return None
    for statement in _statements(node.body):
        if name in _bound(statement):
            return statement
    return next((inner for inner in ast.walk(node) if _sets_on_self(inner, name)), None)


def _sets_on_self(node: ast.AST, name: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and node.attr == name
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _fields(node: ast.AST | None) -> Iterator[str]:
    for statement in getattr(node, "body", ()):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id


def _makes_fields(node: ast.AST | None) -> bool:
    if not isinstance(node, ast.ClassDef):
        return False
    bases = {dotted(base).rpartition(".")[2] for base in node.bases}
    return bool(bases & FIELD_BASES or set(_decorators(node)) & FIELD_MAKERS)


def _decorators(node: Function | ast.ClassDef) -> list[str]:
    called = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return [dotted(one).rpartition(".")[2] for one in called]


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` of a name or of attributes of one; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""
