"""Shared real servers: engines are slow to start, so all tests of a session use the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.cores import ALL_CORES, on_cores, share_of_cores
from tests.helpers.ports import free_port
from tests.integration.processes import (
    QUICKSTART_MODULE,
    ServerProcess,
    plain_server,
    still_there,
)
from vllm_hotswap.demo.quickstart import MODELS, write

MODEL_FLAGS = {"llama": 2048, "qwen": 2048, "embed": 512}
"""Maximum length per model, the same in the hot-swapping server and in the plain ones."""

EXTRA_MODELS = """\
  late:
    model: ./llama
    max_model_len: 1024
    enforce_eager: true
    load: on_demand
  broken:
    model: ./broken
    max_model_len: 512
    enforce_eager: true
    load: on_demand
"""


LONGEST = ("test_zoo", "test_residency", "test_vllm_state", "test_faults", "test_lora")
"""Modules that start first, so that no worker is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.vllm)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(900))  # the servers of these share the machine


@pytest.fixture(scope="module", autouse=True)
def some_cores(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give a module's servers this worker's cores, or all of them if it is marked `all_cores`."""
    wants_all = request.node.get_closest_marker("all_cores") is not None
    with on_cores(ALL_CORES if wants_all else share_of_cores()):
        yield


@pytest.fixture(scope="session")
def models_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's models, one that is loaded on demand, and one whose weights are broken."""
    folder = tmp_path_factory.mktemp("models")
    path = write(folder)
    shutil.copytree(MODELS / "llama", folder / "broken")
    weights = folder / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    path.write_text(path.read_text() + EXTRA_MODELS)
    return path


@pytest.fixture(scope="session")
def server(models_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server started as the quickstart says, with its three environment variables."""
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_HPU_MULTI_MODEL_CONFIG": str(models_yaml),
    }
    log = tmp_path_factory.mktemp("server") / "server.log"
    running = ServerProcess.start(["-m", QUICKSTART_MODULE], free_port(), log, environment)
    yield running
    children = running.descendants()
    assert running.stop() == 0, running.log_tail()
    assert still_there(children) == []


@pytest.fixture(scope="session")
def plain_answer(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, Callable[[ServerProcess], object]], object]:
    """Ask a plain vLLM server that serves one model alone, started for the request."""

    def ask(alias: str, question: Callable[[ServerProcess], object]) -> object:
        log = tmp_path_factory.mktemp(f"plain-{alias}") / "server.log"
        with plain_server(MODELS / alias, log, MODEL_FLAGS[alias]) as plain:
            return question(plain)

    return ask


@pytest.fixture(autouse=True)
def llama_is_active(request: pytest.FixtureRequest) -> None:
    """Start every test of the shared server with the default model active."""
    if "server" in request.fixturenames:
        request.getfixturevalue("server").switch("llama")


def events(lines: Iterator[str]) -> Iterator[object]:
    """Return the parsed `data:` fields of an event stream; the string "[DONE]" for the last."""
    for line in lines:
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)
