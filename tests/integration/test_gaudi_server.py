"""The quickstart's flow with the real vLLM Gaudi plugin, on a stand-in for Intel's runtime.

Runs under `make rehearse-gaudi`; elsewhere there is no `hpu`. All memory is counted to the byte,
so what a model gives back is compared exactly.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gaudi_standin.board import held_bytes, read
from tests.integration.processes import QUICKSTART_MODULE, ServerProcess
from tests.ports import free_port
from vllm_hotswap.demo import MODELS

pytestmark = [
    pytest.mark.wide,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("habana_frameworks", "vllm_gaudi")),
        reason="there is no Gaudi plugin and no device for it",
    ),
]

PAIR = ("llama", "qwen")
BLOCK = 128
BLOCKS = 24
"""KV blocks of each model: 512 tokens for 4 sequences, the null block, and some to spare."""

CONFIG = f"""
default_model: llama
memory:
  device: 0.8
  host: 2GiB
models:
  llama:
    model: {MODELS / "llama"}
    max_model_len: 512
    max_num_seqs: 2
    num_gpu_blocks_override: {BLOCKS}
    kv_cache_memory_bytes: 64M
    enforce_eager: true
  qwen:
    model: {MODELS / "qwen"}
    max_model_len: 512
    max_num_seqs: 2
    num_gpu_blocks_override: {BLOCKS}
    kv_cache_memory_bytes: 64M
    enforce_eager: true
    enable_auto_tool_choice: true
    tool_call_parser: hermes
"""


@pytest.fixture(autouse=True)
def llama_is_active() -> None:
    """This module's server has such a model, but not the usual ones."""


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("board")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, board: Path) -> Iterator[ServerProcess]:
    """Started as the quickstart says."""
    folder = tmp_path_factory.mktemp("gaudi")
    config = folder / "multi_models.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HPU_MULTI_MODEL_CONFIG": str(config),
        "FAKEHPU_BOARD": str(board),
        "FAKEHPU_MIB": "4096",
        "FAKEHPU_DIRTY": "1",
    }
    running = ServerProcess.start(
        ["-m", QUICKSTART_MODULE], free_port(), folder / "server.log", environment
    )
    yield running
    assert running.stop() == 0, running.log_tail()
    log = running.log.read_text(errors="replace")
    for wrong in ("Traceback", "event=tensors_left", "event=memory_kept"):
        assert wrong not in log


def post(server: ServerProcess, path: str, **body: Any) -> dict[str, Any]:
    response = server.client.post(path, json=body)
    assert 200 == response.status_code, response.text
    return dict(response.json())


def switch(server: ServerProcess, model: str) -> None:
    post(server, "/v1/models/switch", model=model, drain_timeout=60)


def other(model: str) -> str:
    return PAIR[model == PAIR[0]]


def tokens(server: ServerProcess, model: str) -> list[list[int]]:
    """Of a prompt in one block and of one that needs more, greedily."""
    answer = post(
        server,
        "/v1/completions",
        model=model,
        prompt=["Hello", "The quick brown fox jumps over the lazy dog. " * 6],
        max_tokens=12,
        temperature=0,
        ignore_eos=True,
        return_token_ids=True,
    )
    return [list(choice["token_ids"]) for choice in answer["choices"]]


def status(server: ServerProcess, model: str) -> dict[str, Any]:
    return dict(server.client.get("/admin/status").json()["models"][model])


@pytest.fixture(scope="module")
def expected(server: ServerProcess) -> dict[str, list[list[int]]]:
    """What both answer before anything has moved."""
    found = {}
    for model in PAIR:
        switch(server, model)
        found[model] = tokens(server, model)
    return found


def test_both_models_are_listed_and_loaded(server: ServerProcess, board: Path) -> None:
    """On the device, in one process."""
    listed = [card["id"] for card in server.client.get("/v1/models").json()["data"]]
    statuses = [status(server, model) for model in PAIR]

    assert list(PAIR) == listed
    assert ["active", "parked"] == [each["residency"] for each in statuses]
    assert 1 == len([counts for counts in read(board).values() if counts.held])
    assert held_bytes(board) > sum(each["kv_bytes"] for each in statuses) > 0


def test_the_quickstarts_question_is_answered(server: ServerProcess) -> None:
    switch(server, "qwen")
    answer = server.chat("qwen", "Explain Intel Gaudi in one sentence.")
    assert answer["content"]


def test_the_plugins_configuration_is_each_models_own(server: ServerProcess) -> None:
    """It prints it at a load: with the type of the first model, the second is run as the first."""
    log = server.log.read_text(errors="replace")
    kinds = [
        line.rpartition("model_type: ")[2] for line in log.splitlines() if "model_type: " in line
    ]
    assert ["llama", "qwen3"] == sorted({kind.strip() for kind in kinds})


def test_parked_switches_move_nothing(
    server: ServerProcess, board: Path, expected: dict[str, list[list[int]]]
) -> None:
    both = held_bytes(board)
    for model in PAIR * 10:
        switch(server, model)
        assert expected[model] == tokens(server, model)
        assert both == held_bytes(board)


def test_a_sleeping_model_gives_its_memory_back(
    server: ServerProcess, board: Path, expected: dict[str, list[list[int]]]
) -> None:
    """Its weights and its KV memory, by the plugin's own worker; and has both again."""
    both = held_bytes(board)
    for model in PAIR * 10:
        switch(server, other(model))
        awake = status(server, model)["held"]
        post(server, f"/admin/models/{model}/sleep", level=1)
        asleep = status(server, model)["held"]

        gone = both - held_bytes(board)
        assert gone >= status(server, model)["kv_bytes"]
        assert abs(awake["device_bytes"] - asleep["device_bytes"] - gone) <= 0.05 * gone
        assert asleep["host_bytes"] > 0
        switch(server, model)
        assert expected[model] == tokens(server, model)
        assert both == held_bytes(board)


def test_level_2_is_refused(server: ServerProcess) -> None:
    """The worker would take it for level 1."""
    switch(server, "llama")
    refused = server.client.post("/admin/models/qwen/sleep", json={"level": 2})
    assert 400 == refused.status_code, refused.text


def test_cold_switches_leave_nothing(
    server: ServerProcess, board: Path, expected: dict[str, list[list[int]]]
) -> None:
    """Of a model that is unloaded, awake or asleep: to the byte, over and over."""
    both, without = held_bytes(board), {}
    for round_, model in enumerate(PAIR * 10):
        switch(server, other(model))
        if round_ % 3 == 0:
            post(server, f"/admin/models/{model}/sleep", level=1)
        post(server, f"/admin/models/{model}/unload")
        assert without.setdefault(model, held_bytes(board)) == held_bytes(board)

        switch(server, model)

        assert expected[model] == tokens(server, model)
        assert both == held_bytes(board)
