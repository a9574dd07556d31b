"""Every setting that a models file can give to vLLM, with its type, as vLLM's sources declare it.

A setting is a field of the engine's or the frontend's arguments, or of a configuration class that
one of them is, or is made into. Its type is closed if only numbers, switches and members of a fixed
set fit: vLLM refuses anything else. What fits into an open one may be the name of anything.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tools.vllm_seams.tree import Found, Tree, dotted

ARGUMENTS = (
    "vllm.engine.arg_utils.AsyncEngineArgs",
    "vllm.entrypoints.common.cli_args.FrontendArgs",
    "vllm.entrypoints.launchers.cli_args.FrontendArgs",
    "vllm.entrypoints.openai.cli_args.FrontendArgs",
)
"""The frontend's have moved twice."""

WHOLE = "vllm.config.VllmConfig"
"""Mappings among the arguments become its fields of the same names."""

NUMBERS = frozenset(["int", "float", "bool", "None"])
ENUMS = frozenset(["Enum", "IntEnum", "StrEnum"])
NO_VALUES = frozenset(["ClassVar", "Callable", "type"])
"""Types that no value in a file has."""

CONTAINERS = frozenset(
    [
        "list",
        "tuple",
        "set",
        "Sequence",
        "Annotated",
        "Optional",
        "Union",
        "SkipValidation",
        "InitVar",
    ]
)
MAPPINGS = frozenset(["dict", "Mapping"])


@dataclass(frozen=True, slots=True)
class Setting:
    """One field."""

    owner: str
    """The class that has it."""
    name: str
    type: str
    is_closed: bool

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}: {self.type}"


def settings_in(tree: Tree) -> list[Setting]:
    """Return all of one version, each class once, in the order of `ARGUMENTS`."""
    reader = _Reader(tree)
    found = [setting for name in ARGUMENTS for setting in reader.of_class(name)]
    names = {setting.name for setting in found}
    return found + list(reader.of_fields(WHOLE, names))


class _Reader:
    """The mutable state is `_seen`: the classes whose fields have been yielded."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._seen: set[str] = set()

    def of_class(self, name: str) -> Iterator[Setting]:
        """Yield the fields of a class, and of the classes that they are of."""
        found = self._tree.find(name)
        if found is None or not isinstance(found.node, ast.ClassDef):
            return
        owner = found.node.name
        if owner in self._seen:
            return
        self._seen.add(owner)
        for module, field, kind in self._fields(found):
            yield Setting(owner, field, ast.unparse(kind), self._is_closed(kind, module))
            yield from self._of_type(kind, module)

    def of_fields(self, name: str, fields: Iterable[str]) -> Iterator[Setting]:
        """Yield the settings in those fields of a class."""
        found = self._tree.find(name)
        wanted = set(fields)
        for module, field, kind in self._fields(found) if found else ():
            if field in wanted:
                yield from self._of_type(kind, module)

    def _of_type(self, kind: ast.expr, module: str) -> Iterator[Setting]:
        for node in ast.walk(kind):
            if isinstance(node, ast.Name | ast.Attribute):
                yield from self.of_class(f"{module}.{dotted(node)}")

    def _fields(self, found: Found) -> Iterator[tuple[str, str, ast.expr]]:
        """Yield module, name and type of each field that can be given."""
        for one in self._tree.lineage(found):
            for statement in getattr(one.node, "body", ()):
                if (
                    isinstance(statement, ast.AnnAssign)
                    and isinstance(statement.target, ast.Name)
                    and not _is_made_later(statement.value)
                ):
                    yield one.module, statement.target.id, _unquoted(statement.annotation)

    def _is_closed(self, kind: ast.expr, module: str) -> bool:
        match kind:
            case ast.Constant(value=str()):
                return self._is_closed(_unquoted(kind), module)
            case ast.Constant():
                return True
            case ast.BinOp(left=left, right=right):
                return self._is_closed(left, module) and self._is_closed(right, module)
            case ast.Tuple(elts=elements):
                return all(self._is_closed(each, module) for each in elements)
            case ast.Subscript(value=base, slice=inner):
                return self._is_closed_subscript(dotted(base).rpartition(".")[2], inner, module)
            case ast.Name() | ast.Attribute():
                return dotted(kind) in NUMBERS or self._is_closed_name(f"{module}.{dotted(kind)}")
        return False

    def _is_closed_subscript(self, base: str, inner: ast.expr, module: str) -> bool:
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if base == "Literal" or base in NO_VALUES:
            return True
        if base == "Annotated":
            return self._is_closed(parts[0], module)
        if base in MAPPINGS:
            return self._is_closed(parts[-1], module)
        return base in CONTAINERS and all(self._is_closed(each, module) for each in parts)

    def _is_closed_name(self, name: str) -> bool:
        """Accept an alias of a closed type, an enumeration, or a class whose fields are yielded."""
        found = self._tree.find(name)
        if found is None or found.node is None:
            return False
        if isinstance(found.node, ast.ClassDef):
            bases = {
                dotted(base).rpartition(".")[2]
                for one in self._tree.lineage(found)
                for base in getattr(one.node, "bases", ())
            }
            return bool(bases & ENUMS) or any(True for _ in self._fields(found))
        value = getattr(found.node, "value", None)
        return isinstance(value, ast.expr) and self._is_closed(value, found.module)


def _is_made_later(value: ast.expr | None) -> bool:
    """Return whether a field is not an argument of its class: `field(init=False)`."""
    return isinstance(value, ast.Call) and any(
        keyword.arg == "init" and getattr(keyword.value, "value", True) is False
        for keyword in value.keywords
    )


def _unquoted(kind: ast.expr) -> ast.expr:
    if isinstance(kind, ast.Constant) and isinstance(kind.value, str):
        return ast.parse(kind.value, mode="eval").body
    return kind
