"""`python -m tools.measure_house [SRC]`: how large a package is in its parts, and how they meet.

Prints one JSON object, to compare two trees. A room is a folder of the package, or a module beside
the folders. An arrow is an import from one module into another. An arrow runs up if the room that
it leads to needs, directly or not, the room that it comes from.
"""

from __future__ import annotations

import ast
import io
import json
import statistics
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = "vllm_hotswap"
SHORTEST_COPY = 6
"""Runs of at least so many equal statements in two places count as copied."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Part:
    """A module, a class or a function."""

    name: str
    lines: int


@dataclass(slots=True)
class Tree:
    """What has been found of a package."""

    modules: list[Part] = field(default_factory=list)
    classes: list[Part] = field(default_factory=list)
    functions: list[Part] = field(default_factory=list)
    arrows: set[tuple[str, str]] = field(default_factory=set)
    """Imports between modules, by their names below the package."""
    comments: int = 0
    lines: int = 0
    copied: int = 0
    """Runs of `SHORTEST_COPY` statements that occur more than once, beyond the first."""


def read(source: Path) -> Tree:
    """Read a package below a `src` folder.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = source / PACKAGE
    if not folder.is_dir():
        raise FileNotFoundError(f"{source} has no package {PACKAGE}; name a checkout's `src`")
    tree, runs = Tree(), Counter[str]()
    paths = {module_of(path, folder): path for path in sorted(folder.rglob("*.py"))}
    for name, path in paths.items():
        text = path.read_text(encoding="utf-8")
        parsed = ast.parse(text)
        tree.modules.append(Part(name, text.count("\n")))
        tree.lines += text.count("\n")
        tree.comments += sum(1 for _ in comments(text))
        tree.arrows |= {(name, other) for other in imported(parsed, paths) if other != name}
        for node in ast.walk(parsed):
            if isinstance(node, ast.ClassDef):
                tree.classes.append(part(name, node))
            elif isinstance(node, Function):
                tree.functions.append(part(name, node))
                runs.update(runs_of(node))
    tree.copied = sum(count - 1 for count in runs.values() if count > 1)
    return tree


def module_of(path: Path, folder: Path) -> str:
    """Return its name below the package; a folder's own is the folder's."""
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room_of(module: str) -> str:
    return module.partition(".")[0]


def part(module: str, node: ast.ClassDef | Function) -> Part:
    return Part(f"{module}.{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1)


def comments(text: str) -> Iterator[str]:
    """Yield comments for people: those for tools do not count."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(
            ("# noqa", "# type:", "#!", "# pragma")
        ):
            yield token.string


def imported(parsed: ast.Module, known: Mapping[str, object]) -> Iterator[str]:
    """Yield modules of the package that a module imports, wherever in it."""
    for node in ast.walk(parsed):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if below(name) in known else node.module for name in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (below(name) for name in names if below(name) in known)


def below(name: str) -> str:
    return name.removeprefix(f"{PACKAGE}.") if name.startswith(f"{PACKAGE}.") else ""


def runs_of(function: Function) -> Iterator[str]:
    """Yield all runs of statements that are long enough to be a copy, without their places."""
    for node in ast.walk(function):
        body = getattr(node, "body", None)
        if isinstance(body, list) and len(body) >= SHORTEST_COPY:
            shapes = [ast.dump(statement) for statement in body]
            for start in range(len(shapes) - SHORTEST_COPY + 1):
                yield "\n".join(shapes[start : start + SHORTEST_COPY])


def circles(arrows: set[tuple[str, str]]) -> list[list[str]]:
    """Return groups in which each module can be reached from each. Source: Tarjan, 1972."""
    after: dict[str, set[str]] = defaultdict(set)
    for one, other in arrows:
        after[one].add(other)
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        path.append(node)
        for other in sorted(after[node]):
            if other not in number:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in path:
                lowest[node] = min(lowest[node], number[other])
        if lowest[node] == number[node]:
            at = path.index(node)
            group, path[at:] = path[at:], []
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(after):
        if node not in number:
            visit(node)
    return sorted(found)


def floors(arrows: set[tuple[str, str]]) -> int:
    """Return how many rooms are on the longest path of imports; in a cycle, each counts once."""
    after: dict[str, set[str]] = defaultdict(set)
    for one, other in arrows:
        after[one].add(other)
    height: dict[str, int] = {}

    def climb(node: str, below_it: frozenset[str]) -> int:
        if node not in height:
            ways = [other for other in after[node] if other not in below_it]
            height[node] = 1 + max((climb(o, below_it | {node}) for o in ways), default=0)
        return height[node]

    return max((climb(node, frozenset()) for node in sorted(after)), default=0)


def report(tree: Tree) -> dict[str, Any]:
    """Return the figures."""
    rooms = {(room_of(a), room_of(b)) for a, b in tree.arrows if room_of(a) != room_of(b)}
    folders = {room_of(module.name) for module in tree.modules if "." in module.name}
    cycles = circles(rooms)
    sizes = [function.lines for function in tree.functions]
    return {
        "modules": len(tree.modules),
        "modules in the top folder": len({room_of(m.name) for m in tree.modules} - folders),
        "folders": len(folders),
        "lines": tree.lines,
        "imports between modules": len(tree.arrows),
        "imports between folders": sum(room_of(a) != room_of(b) for a, b in tree.arrows),
        "folders that import a folder": len(rooms),
        "import cycles of folders": cycles,
        "imports that run up": sum(
            room_of(a) != room_of(b) and any({room_of(a), room_of(b)} <= set(c) for c in cycles)
            for a, b in tree.arrows
        ),
        "import cycles of modules": circles(tree.arrows),
        "floors": floors(rooms),
        "largest modules": largest(tree.modules),
        "largest classes": largest(tree.classes),
        "largest functions": largest(tree.functions),
        "function, median lines": statistics.median(sizes),
        "functions above 50 lines": sum(size > 50 for size in sizes),
        "comments per 100 lines": round(100 * tree.comments / tree.lines, 2),
        "copied runs of statements": tree.copied,
    }


def largest(parts: Sequence[Part], count: int = 3) -> dict[str, int]:
    ordered = sorted(parts, key=lambda part: part.lines, reverse=True)
    return {part.name: part.lines for part in ordered[:count]}


def main(argv: Sequence[str]) -> int:
    source = Path(argv[0]) if argv else Path(__file__).parents[1] / "src"
    try:
        found = report(read(source))
    except FileNotFoundError as error:
        print(f"measure_house: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
