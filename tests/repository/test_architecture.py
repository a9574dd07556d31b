"""The folders of the package, and what each may import; docs/internals/design.md has the table."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "vllm_hotswap"

FOLDERS = {
    "hints": "",
    "errors": "hints",
    "states": "errors",
    "events": "states",
    "start_folder": "",
    "system": "errors",
    "failpoints": "errors system",
    "tasks": "system",
    "text": "tasks",
    "scheduling": "errors states",
    "models": "errors states events system scheduling",
    "access": "errors system scheduling",
    "config": "hints errors states system access",
    "simulation": "errors states events scheduling config",
    "residency": "errors states events system models config",
    "switching": "errors states events system failpoints tasks scheduling models config residency",
    "telemetry": "events system switching",
    "host": "errors states system failpoints tasks models",
    "launch": "hints errors system tasks models config host",
    "engines": "errors states system failpoints tasks text models config host launch",
    "api": (
        "errors states events system tasks text scheduling models access config residency "
        "switching telemetry"
    ),
    "connections": "errors system tasks config api",
    "server": (
        "errors system failpoints tasks models access config simulation telemetry host "
        "launch engines api connections"
    ),
    "testing": "errors states failpoints models config host launch engines connections server",
    "demo": "hints errors system config telemetry launch server testing",
    "cli": (
        "hints errors states system tasks access config simulation telemetry host launch "
        "engines connections server testing demo"
    ),
    "entrypoints": "start_folder config cli",
    "__main__": "start_folder cli",
}
"""Each folder, or module beside the folders, with what it may import. It lies above all of that."""

ON_VLLM = {"engines", "host", "launch"}
"""The folders that may import vLLM."""

FOR_PLUGINS = {
    "scheduling": {
        "ActiveView",
        "Policy",
        "PolicyFactory",
        "QueueView",
        "ServeOn",
        "Snapshot",
    }
}
"""What a door offers to other packages: those that bring a policy."""


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def folder_of(path: Path) -> str:
    """Return the folder of a file, or its module if it lies beside the folders."""
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


@cache
def imported(path: Path) -> list[str]:
    """Return everything that a file imports, anywhere in it, as dotted names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def imported_from_us(path: Path) -> Iterator[list[str]]:
    """Yield what a file imports of this package: folder or module first, then what is in it."""
    for name in imported(path):
        package, *rest = name.split(".")
        if package == "vllm_hotswap" and rest[0] in FOLDERS and rest[0] != folder_of(path):
            yield rest


def door(folder: str) -> set[str]:
    """Return the names that a folder offers to others: `__all__` of its `__init__.py`."""
    for node in ast.parse((SOURCE / folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_every_folder_is_in_the_table() -> None:
    """The table has each folder and each module beside the folders, and nothing else."""
    assert set(FOLDERS) | {"__init__"} == {folder_of(path) for path in files()}


def test_folders_import_what_the_table_says() -> None:
    """Between folders there are these imports, no others, and none of them is unused."""
    found = defaultdict(set)
    for path in files():
        found[folder_of(path)] |= {name for name, *_ in imported_from_us(path)}

    assert {name: set(allowed.split()) for name, allowed in FOLDERS.items()} == {
        name: found[name] for name in FOLDERS
    }


def test_imports_go_down() -> None:
    """A folder imports only what stands above it in the table, so there are no circles."""
    seen: set[str] = set()
    for name, allowed in FOLDERS.items():
        assert set(allowed.split()) <= seen, name
        seen.add(name)


@pytest.mark.parametrize("folder", [name for name in FOLDERS if (SOURCE / name).is_dir()])
def test_a_folder_is_entered_by_its_door(folder: str) -> None:
    """A folder offers, in its `__init__.py`, exactly what other folders and plugins import."""
    used = set()
    for path in files():
        for name, *rest in imported_from_us(path):
            if name == folder:
                used.add(".".join(rest))

    assert door(folder) == used | FOR_PLUGINS.get(folder, set())


def test_three_folders_import_vllm() -> None:
    """What depends on vLLM is in three folders."""
    found = {
        folder_of(path)
        for path in files()
        if any(name == "vllm" or name.startswith("vllm.") for name in imported(path))
    }

    assert ON_VLLM == found


def test_the_design_page_has_the_table() -> None:
    """The design page lists the same folders, in the same order, with what each imports."""
    page = (ROOT / "docs" / "internals" / "design.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    drawn = {cell[0].strip("`/"): cell[-1].replace("`", "").replace(",", "") for cell in cells}

    assert [*FOLDERS.items()] == [item for item in drawn.items() if item[0] in FOLDERS]
