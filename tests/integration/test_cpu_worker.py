"""The CPU worker that sleeps, in a process of its own, on a real model."""

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

PROGRAM = Path(__file__).with_name("sleeping_worker.py")

# Each setting is a process that imports vLLM, and one of them compiles; machines may be busy.
pytestmark = pytest.mark.timeout(900)

SETTINGS = {
    # bfloat16 is packed only by processors with AVX-512 or AMX, float32 by all that have oneDNN.
    "eager": {"enforce_eager": True, "dtype": "bfloat16"},
    "compiled": {"enforce_eager": False, "dtype": "float32"},
    # Its multiplication reads the scales through a pointer.
    "quantised": {"enforce_eager": True, "dtype": "float32", "quantise": True},
}


QUICK = {"eager"}
"""What every run starts; the others take minutes."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.wide) for name in SETTINGS
    ],
)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what the program saw."""
    folder = tmp_path_factory.mktemp("worker") / "llama"
    shutil.copytree(MODELS / "llama", folder)
    result = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), json.dumps(SETTINGS[request.param])],
        env=host_environment({**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_kv_memory_comes_from_the_arena(seen: Any) -> None:
    """All KV memory comes from the arena, so that sleeping gives all of it back."""
    assert 255 << 20 < seen["kv_bytes"] <= 256 << 20


def test_level_1_empties_the_kv_memory_and_nothing_else(seen: Any) -> None:
    """Level 1 empties only the KV memory; the next answer is the same, from new KV memory."""
    assert seen["kv_is_zero"]
    assert seen["first"] == seen["after_level_1"]


def test_level_2_drops_every_weight(seen: Any) -> None:
    """Level 2 drops every weight: no parameter has memory, and no packed copy is left."""
    assert [True] == seen["supports_discard"]
    assert seen["weights_used"] > 100_000
    assert 0 == seen["weights_left"]
    assert "<DroppedWeights tensors=" in seen["repr"]


def test_what_level_2_gives_back_is_known_before(seen: Any) -> None:
    """What level 2 frees is known before: a layer's packed copy is as large as its weight."""
    assert seen["gives_back"] > 100_000
    assert 0 == seen["gives_back_no_more"]


def test_waking_the_kv_memory_alone_reads_no_weights(seen: Any) -> None:
    """A wake of the KV memory alone reads no weights, as vLLM's tags say."""
    assert 0 == seen["weights_left_by_kv_tag"]


@pytest.mark.parametrize("defect", ["truncated", "missing", "reshaped"])
def test_a_checkpoint_that_was_spoiled_is_an_error_that_names_the_model(
    seen: Any, defect: str
) -> None:
    """A spoiled checkpoint is an error that names the model, not a model with some weights."""
    assert seen[defect].startswith("RuntimeError: the weights of ")
    assert "llama could not be read again: " in seen[defect]


def test_a_wake_that_failed_can_be_tried_again(seen: Any) -> None:
    """A failed wake leaves the model discarded, and works once its files are whole."""
    assert seen["first"] == seen["after_failures"]


def test_five_times_discarded_and_read_again_is_as_good_as_never(seen: Any) -> None:
    """After five discards and reads, greedy tokens are identical, and the process has not grown."""
    assert [seen["first"]] * 5 == seen["after_cycles"]
    assert seen["growth_bytes"] < 16 << 20
