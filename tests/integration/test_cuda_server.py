"""A server on a CUDA device, with vLLM's build for it: two models, every residency, no growth.

The device may be the stand-in, whose kernels do nothing (`make rehearse-cuda`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda_standin.board import Board
from tests.helpers.faults import wait_until
from tests.helpers.ports import free_port
from tests.integration.processes import QUICKSTART_MODULE, ServerProcess
from vllm_hotswap.demo.quickstart import MODELS

pytestmark = [
    pytest.mark.wide,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

MIB = 1 << 20
PAIR = ("llama", "qwen")
WORKSPACE_BYTES = 40 * MIB
"""Matrix multiplications on one more stream; torch may have this workspace or not."""

START_S = 600
"""Kernels may have to be compiled first."""

GRAPHS = "{mode: 0, cudagraph_mode: FULL_DECODE_ONLY, cudagraph_capture_sizes: [1, 2, 4]}"


@pytest.fixture(autouse=True)
def llama_is_active() -> None:
    """Do nothing: this module's server has llama, but not the usual models."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of models with only a name and quicker graphs: memory settings are defaults."""
    folder = tmp_path_factory.mktemp("cuda")
    lines = [f"  {a}: {{model: {MODELS / a}, compilation_config: {GRAPHS}}}" for a in PAIR]
    config = folder / "models.yaml"
    config.write_text("\n".join(["models:", *lines]), encoding="utf-8")
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HOTSWAP_CONFIG": str(config)}
    running = ServerProcess.start(
        ["-m", QUICKSTART_MODULE], free_port(), folder / "server.log", environment, within_s=START_S
    )
    yield running
    assert running.stop() == 0, running.log_tail()
    log = running.log.read_text(errors="replace")
    for wrong in ("Traceback", "event=tensors_left", "event=memory_kept", "event=device_taken"):
        assert wrong not in log


def used_bytes() -> int:
    """Return the bytes of the device in use, by any process."""
    if board := os.environ.get("FAKEGPU_BOARD"):
        return Board(Path(board)).used
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def post(server: ServerProcess, path: str, **body: Any) -> dict[str, Any]:
    response = server.client.post(path, json=body)
    assert 200 == response.status_code, response.text
    return dict(response.json())


def switch(server: ServerProcess, model: str) -> None:
    post(server, "/v1/models/switch", model=model)


def other(model: str) -> str:
    return PAIR[model == PAIR[0]]


def tokens(server: ServerProcess, model: str) -> list[int]:
    answer = post(
        server,
        "/v1/completions",
        model=model,
        prompt="Hello",
        max_tokens=8,
        temperature=0,
        ignore_eos=True,
        return_token_ids=True,
    )
    return list(answer["choices"][0]["token_ids"])


def model_status(server: ServerProcess, model: str) -> dict[str, Any]:
    return dict(server.client.get("/admin/status").json()["models"][model])


@pytest.fixture(scope="module")
def expected(server: ServerProcess) -> dict[str, list[int]]:
    """Return what both models answer before anything has moved."""
    found = {}
    for model in PAIR:
        switch(server, model)
        found[model] = tokens(server, model)
    return found


def test_two_models_load_with_default_settings(server: ServerProcess) -> None:
    """Two models load with defaults and KV memory, though vLLM alone takes most of the device."""
    statuses = [model_status(server, model) for model in PAIR]

    assert {"active", "parked"} == {status["residency"] for status in statuses}
    assert all(status["kv_bytes"] > 0 for status in statuses)


def test_a_sleeping_model_gives_its_memory_back(
    server: ServerProcess, expected: dict[str, list[int]]
) -> None:
    """A sleeping model frees its memory and takes it again, repeatedly, with the same answers."""
    both = used_bytes()
    for model in PAIR * 4:
        switch(server, other(model))
        held = model_status(server, model)["held"]["device_bytes"]
        post(server, f"/admin/models/{model}/sleep", level=1)
        asleep = model_status(server, model)["held"]

        gone = held - asleep["device_bytes"]
        assert gone > 0
        assert abs(both - used_bytes() - gone) <= WORKSPACE_BYTES
        assert asleep["host_bytes"] > 0
        switch(server, model)
        assert expected[model] == tokens(server, model)
        assert abs(both - used_bytes()) <= WORKSPACE_BYTES


def test_an_announced_model_wakes_while_another_one_is_served(
    server: ServerProcess, expected: dict[str, list[int]]
) -> None:
    """An announced model wakes beside the active one; a wake that is given up frees its memory."""
    both = used_bytes()
    for model in PAIR * 2:
        switch(server, other(model))
        post(server, f"/admin/models/{model}/sleep", level=1)
        asleep = used_bytes()
        assert "begun" == post(server, "/admin/next", model=model)["wake"]
        wait_until(lambda model=model: is_awake_but_for_the_switch(server, model))
        assert expected[other(model)] == tokens(server, other(model))
        assert "asleep" == model_status(server, model)["residency"]
        assert abs(both - used_bytes()) <= WORKSPACE_BYTES

        post(server, "/admin/next", model=other(model))
        wait_until(lambda model=model: model_status(server, model)["waking"] is None)
        assert abs(asleep - used_bytes()) <= WORKSPACE_BYTES

        assert "begun" == post(server, "/admin/next", model=model)["wake"]
        switch(server, model)
        assert expected[model] == tokens(server, model)
        assert abs(both - used_bytes()) <= WORKSPACE_BYTES


def is_awake_but_for_the_switch(server: ServerProcess, model: str) -> bool:
    waking = model_status(server, model)["waking"]
    return bool(waking) and waking["done_bytes"] == waking["total_bytes"] > 0


def test_cold_switches_do_not_grow(server: ServerProcess, expected: dict[str, list[int]]) -> None:
    """Cold switches do not grow device memory, also if a model was unloaded asleep."""
    both = used_bytes()
    for round_, model in enumerate(PAIR * 6):
        switch(server, other(model))
        if round_ % 3 == 0:
            post(server, f"/admin/models/{model}/sleep", level=1)
        post(server, f"/admin/models/{model}/unload")
        assert used_bytes() < both - WORKSPACE_BYTES

        switch(server, model)

        assert expected[model] == tokens(server, model)
        assert abs(both - used_bytes()) <= WORKSPACE_BYTES
