"""The contents of a wheel: the package, with what its commands need, and no developer tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the files of a wheel that is built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=120)
    (wheel,) = folder.iterdir()
    with ZipFile(wheel) as opened:
        return opened.namelist()


def test_a_wheel_has_one_package(names: list[str]) -> None:
    """A wheel has the package alone: no benchmarks, no tools, no tests."""
    tops = {name.partition("/")[0] for name in names}

    assert ["vllm_hotswap"] == [top for top in tops if not top.endswith(".dist-info")]
    assert not [name for name in names if "bench" in name or "__pycache__" in name]


@pytest.mark.parametrize(
    "needed",
    [
        "py.typed",
        "config/models.schema.json",
        "testing/fake_server.py",
        "testing/fake_process_main.py",
        "demo/models/llama/model.safetensors",
        "demo/models/embed/1_Pooling/config.json",
    ],
)
def test_a_wheel_has_what_commands_need(names: list[str], needed: str) -> None:
    """A wheel has what `demo` and `serve --fake` need, and the schema for editors."""
    assert f"vllm_hotswap/{needed}" in names


def test_a_wheel_has_every_module(names: list[str]) -> None:
    """A wheel has every module of the tree."""
    package = ROOT / "src"
    modules = {str(file.relative_to(package)) for file in package.rglob("*.py")}

    assert modules == {name for name in names if name.endswith(".py")}
