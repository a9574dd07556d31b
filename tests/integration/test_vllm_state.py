"""vLLM's process-wide state belongs to one engine: on the real vLLM, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.processes import FROM_HERE, without_compilers
from vllm_hotswap.host.platforms import host_environment
from vllm_hotswap.host.vllm_state import is_known

# The first test waits for all programs, on a machine that may be busy.
pytestmark = pytest.mark.timeout(900)


class Told:
    """What the programs saw."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "programs.log"

    def run(self) -> None:
        """Run all programs. There is no compiler: an eager model needs none."""
        environment = {
            **os.environ,
            **FROM_HERE,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            **without_compilers(self._folder),
        }
        command = [sys.executable, "-m", "tests.integration.state_program", str(self._folder)]
        with self._log.open("wb") as log:
            subprocess.run(
                command, env=host_environment(environment), stdout=log, stderr=log, check=False
            )

    def by(self, program: str) -> Any:
        """Return what a program saw, or an error with the end of its log and its traceback."""
        told = self._folder / f"{program}.json"
        assert told.exists(), self._log.read_text(errors="replace")[-5000:]
        return json.loads(told.read_text())


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    told = Told(tmp_path_factory.mktemp("state"))
    told.run()
    return told


@pytest.fixture
def alone(told: Told) -> Any:
    """Return what plain vLLM answers, with one model in its process."""
    return {kind: told.by(kind) for kind in ("llama", "moe")}


@pytest.fixture
def seen(told: Told) -> Any:
    return told.by("orders")


@pytest.fixture
def watched(told: Told) -> Any:
    return told.by("changes")


def test_a_mixture_of_experts_loads_after_a_dense_model(seen: Any, alone: Any) -> None:
    """A mixture of experts loads after a dense model; both answer as in processes of their own."""
    assert alone["moe"]["greedy"] == seen["moe"]
    assert alone["llama"]["greedy"] == seen["llama"]


def test_a_model_answers_the_same_whatever_has_been_loaded_since(seen: Any) -> None:
    """A model answers the same after other loads, failed ones and its own."""
    first = {name: seen[name] for name in ("llama", "moe", "mamba")}

    assert first == seen["again"]
    assert "nothing" != seen["broken"]
    assert first == seen["after_failure"]
    assert first == seen["reloaded"]


def test_loading_again_and_again_leaves_nothing_behind(seen: Any) -> None:
    """Repeated loads leave no thread, open file or port of a process group."""
    before, after = seen["resources"]

    assert before == after


def test_unseeded_answers_are_those_of_a_process_of_its_own(told: Told, alone: Any) -> None:
    """Unseeded answers are those of a process of its own, after any sleeps and unloads."""
    drawn = told.by("draws")

    assert alone["llama"]["unseeded"][: len(drawn["llama"])] == drawn["llama"]
    assert alone["moe"]["unseeded"][: len(drawn["moe"])] == drawn["moe"]
    assert 1 < len({tuple(answer) for answer in alone["llama"]["unseeded"]})


def test_small_functions_need_no_compiler_beside_a_compiled_model(watched: Any) -> None:
    """Beside a compiled model, vLLM's small functions run on CPU as written, without a compiler."""
    assert [3, 1] == watched["ranks"]


def test_small_functions_need_no_compiler_in_a_worker_process(told: Told) -> None:
    """Small functions need no compiler in a worker, either, which has imports of its own."""
    assert [3, 1] == told.by("worker")


def test_every_piece_of_state_that_changes_is_listed(watched: Any) -> None:
    """Every piece of state that changes is in `host.vllm_state`'s `STATE`, with its owner."""
    changes = watched["changes"]

    unlisted = {
        place: name for name, places in changes.items() for place in places if not is_known(place)
    }

    assert {} == unlisted, "decide whose these are and list them in vllm_hotswap.host.vllm_state"
    assert "vllm.distributed.parallel_state:_EP" in changes["load moe"]


def test_every_piece_of_state_that_is_moved_exists(watched: Any) -> None:
    """Every piece of state that is moved exists: a renamed one would silently not be moved."""
    assert [] == watched["absent"]
