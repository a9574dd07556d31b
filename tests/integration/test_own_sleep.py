"""The residency ladder on a third-party platform whose worker sleeps by its own means.

As on Intel Gaudi: a plugin brings the platform, and its worker's `sleep` moves the weights away,
whatever the level. The plugin is `away_platform`; its worker logs what it does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import medium
from tests.helpers.ports import free_port
from tests.integration.processes import QUICKSTART_MODULE, ServerProcess
from vllm_hotswap.demo.quickstart import MODELS
from vllm_hotswap.engines.base_memory import expected_memory
from vllm_hotswap.host.devices import CpuDevice

pytestmark = pytest.mark.wide

PLUGIN = Path(__file__).with_name("away_platform")

MIB = 1 << 20
SIZES = {**medium.SIZES, "hidden_size": 640, "intermediate_size": 1280, "vocab_size": 131072}
LAYERS = {"one": 2, "two": 1}
"""Models with random weights of about 350 MB, nearly all of them in embeddings: soon computed."""

FOLDERS = {"one": "one", "two": "two", "twin": "one"}
"""`twin` has the shapes of `one`, so vLLM would make both share what depends on shapes alone."""

PROMPT = "The quick brown fox. " * 16
"""Longer than a block of the KV cache, so that a prefix of it would be found there again."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the plugin on its path."""
    folder = tmp_path_factory.mktemp("own-sleep")
    for name, layers in LAYERS.items():
        medium.make(MODELS / "qwen", folder / name, {**SIZES, "num_hidden_layers": layers})
    # Room for one that is awake, beside what the host itself holds on this machine.
    weights = (folder / "one" / "model.safetensors").stat().st_size
    budget = expected_memory(CpuDevice(), lambda _: None).held + weights * 7 // 4
    flags = f"max_model_len: 256, enforce_eager: true, kv_cache_memory_bytes: {16 * MIB}"
    models = [f"  {alias}: {{model: {folder / name}, {flags}}}" for alias, name in FOLDERS.items()]
    config = folder / "models.yaml"
    config.write_text(
        "\n".join([f"memory: {{device: {budget}}}", "models:", *models]), encoding="utf-8"
    )
    path = [str(PLUGIN), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HOTSWAP_CONFIG": str(config),
    }
    running = ServerProcess.start(
        ["-m", QUICKSTART_MODULE], free_port(), folder / "server.log", environment
    )
    yield running
    assert running.stop() == 0, running.log_tail()


@pytest.fixture(autouse=True)
def llama_is_active() -> None:
    """Do nothing: this module's server has no llama."""


@dataclass(frozen=True)
class Told:
    """What the plugin's worker logged of one move."""

    move: str
    numbers: dict[str, int]


def told(server: ServerProcess) -> list[Told]:
    """Return all moves that the plugin's workers have made, in order."""
    lines = re.findall(r"^away: (\w+) model=\S+ (.+)$", log_of(server), re.MULTILINE)
    return [
        Told(move, {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", numbers)})
        for move, numbers in lines
    ]


def log_of(server: ServerProcess) -> str:
    return server.log.read_text(errors="replace")


def answer(server: ServerProcess, alias: str) -> str:
    """Return what a model answers, once it is active."""
    server.switch(alias)
    return server.complete(alias, PROMPT, max_tokens=8)


def state(server: ServerProcess, alias: str) -> dict[str, Any]:
    models: Any = server.status()["models"]
    status: dict[str, Any] = models[alias]
    return status


def test_the_platform_of_the_plugin_is_the_one_in_use(server: ServerProcess) -> None:
    """Server and engine host use the plugin's platform: none of our code assumes the CPU."""
    host: Any = server.status()["host"]
    processes = re.findall(r"^away: platform of process (\d+)$", log_of(server), re.MULTILINE)

    assert {str(server.process.pid), str(host["pid"])} <= {*processes}


def test_switches_put_models_to_sleep_through_their_own_workers(server: ServerProcess) -> None:
    """Switches use the workers' own sleep: one model is awake at a time, with the same answers."""
    before = {alias: answer(server, alias) for alias in FOLDERS}
    moves = len(told(server))
    after = {alias: answer(server, alias) for alias in FOLDERS}

    assert before == after
    assert before["one"] == before["twin"] != before["two"]
    assert ["sleep", "wake_up"] * len(FOLDERS) == [move.move for move in told(server)[moves:]]
    assert "active" == state(server, "twin")["residency"]
    assert {"asleep"} == {state(server, alias)["residency"] for alias in ("one", "two")}


def test_a_sleeping_model_has_given_everything_to_the_store(server: ServerProcess) -> None:
    """A sleeping model's worker was called with level 1, and holds no weights or KV cache."""
    answer(server, "one")
    answer(server, "two")
    slept = [move.numbers for move in told(server) if move.move == "sleep"]

    assert {1} == {numbers["level"] for numbers in slept}
    assert {0} == {numbers["left"] for numbers in slept}
    assert min(numbers["stored"] for numbers in slept) >= state(server, "two")["weights_bytes"]
    assert min(numbers["kv"] for numbers in slept) > 8 * MIB


def test_weights_asleep_count_as_host_memory(server: ServerProcess) -> None:
    """Sleeping weights count as host memory, not device memory, and status says so."""
    answer(server, "one")
    answer(server, "two")
    asleep, awake = state(server, "one"), state(server, "two")

    assert "asleep" == asleep["residency"]
    assert asleep["weights_bytes"] == asleep["held"]["host_bytes"]
    assert asleep["held"]["device_bytes"] < asleep["weights_bytes"] / 2
    assert 0 == awake["held"]["host_bytes"]
    assert awake["held"]["device_bytes"] >= awake["weights_bytes"]


def test_a_level_that_the_worker_does_not_have_is_refused(server: ServerProcess) -> None:
    """A level that the worker lacks is refused with the existing ones, and never sent to it."""
    answer(server, "two")
    moves = told(server)
    refused = server.post("/admin/models/one/sleep", {"level": 2})

    error = refused.json()["error"]
    assert (400, "level") == (refused.status_code, error["param"])
    assert "no sleep level 2 on this platform; levels: 1" in error["message"]
    assert moves == told(server)


def test_a_sleeping_model_can_be_unloaded_and_loaded_again(server: ServerProcess) -> None:
    """A sleeping model is unloaded with its stored weights, and answers the same once loaded."""
    before = answer(server, "one")
    answer(server, "two")
    unloaded = server.post("/admin/models/one/unload", {})

    assert ("asleep", "cold") == (unloaded.json()["before"], unloaded.json()["residency"])
    assert {"device_bytes": 0, "host_bytes": 0} == state(server, "one")["held"]
    assert before == answer(server, "one")
