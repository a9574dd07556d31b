"""A compiled model that is loaded again and again, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_hotswap.demo.quickstart import MODELS
from vllm_hotswap.host.platforms import host_environment

PROGRAM = Path(__file__).with_name("reloading_engine.py")

# The first test waits for a model's first compilation, on a machine that may be busy.
pytestmark = [pytest.mark.timeout(900), pytest.mark.wide]


def run(program: str, folder: Path) -> Any:
    """Return what the program saw; it finds nothing that other tests have compiled."""
    result = subprocess.run(
        [sys.executable, str(PROGRAM), program, str(folder)],
        env=host_environment({**os.environ, "VLLM_CACHE_ROOT": str(folder.parent / "cache")}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose class inherits from another one that is compiled, too."""
    folder = tmp_path_factory.mktemp("compiled") / "qwen"
    shutil.copytree(MODELS / "qwen", folder)
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> Any:
    return run("cycles", folder)


@pytest.fixture(scope="module")
def seen_later(seen: Any, folder: Path) -> Any:
    """Return what a second process saw, which finds the first one's saved code."""
    return run("once", folder)


def test_only_the_first_load_compiles(seen: Any) -> None:
    """Sixteen reloads run the code of the first load."""
    assert 1 == seen["compilations"]
    assert 1 == seen["compilations_in_all"]


def test_answers_stay_the_same(seen: Any) -> None:
    """Answers stay the same after every reload, and so do those of an engine that stayed loaded."""
    assert seen["first_eager"] == seen["first"]
    assert [seen["first"]] * len(seen["after_cycles"]) == seen["after_cycles"]
    assert seen["first_eager"] == seen["of_other_engine"]


def test_the_process_does_not_grow(seen: Any) -> None:
    """The process does not grow in memory, threads, open files, child processes or hooks."""
    before, after = seen["resources"]
    assert before == after
    assert seen["growth_bytes"] < 5 << 20


def test_the_code_keeps_no_weights(seen: Any) -> None:
    """The code keeps no weights, nor does Dynamo keep the module for its hooks."""
    assert 0 == seen["weights_alive"]
    assert 0 == seen["hooks_after_unload"]


def test_the_code_computes_with_the_weights_of_the_model_that_is_loaded(seen: Any) -> None:
    """A checkpoint changed between two loads answers with its new weights, as in eager mode."""
    assert seen["changed_eager"] == seen["changed"]
    assert seen["first"] != seen["changed"]


def test_another_process_compiles_nothing(seen: Any, seen_later: Any) -> None:
    """Another process compiles nothing: it reads the code that the first one saved."""
    assert 0 == seen_later["compilations"]
    assert seen["changed"] == seen_later["tokens"]
