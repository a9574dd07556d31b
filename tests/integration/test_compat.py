"""The installed vLLM has everything where it is looked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest

from tests.test_architecture import imports, modules
from tools.vllm_seams.__main__ import main as check_vllm
from vllm_hotswap.compat.names import PLACES, find
from vllm_hotswap.compat.versions import vllm_version, warning


def imported_from_vllm() -> Iterator[str]:
    """Dotted names of all modules of vLLM, and of what is imported from them, in the package."""
    for _, path in modules():
        yield from (name for name in imports(path) if name.startswith("vllm."))


def is_there(name: str) -> bool:
    """Whether it is a module, or something in one."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return hasattr(importlib.import_module(module), attribute)
    return True


@pytest.mark.parametrize("name", PLACES)
def test_every_name_that_moved_is_found(name: str) -> None:
    """Under the name by which it is asked for, and callable."""
    found = find(name)

    assert name == found.__name__
    assert callable(found)


@pytest.mark.parametrize("name", sorted(set(imported_from_vllm())))
def test_everything_that_is_imported_is_there(name: str) -> None:
    """On every version: a name that has moved belongs into the table."""
    assert is_there(name)


def test_the_version_is_one_that_was_run() -> None:
    """`make test` never runs on a version that users are warned of."""
    assert warning(vllm_version()) is None


def test_the_installed_version_has_everything_that_is_used(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Read in its sources: the same check is made of versions that are not installed."""
    assert 0 == check_vllm([vllm_version().partition("+")[0]]), capfd.readouterr().out
