"""Settings of each model on the real vLLM: its environment, its frontend, its sampling."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cores import ALL_CORES
from tests.helpers.ports import free_port
from tests.integration.processes import QUICKSTART_MODULE, ServerProcess
from vllm_hotswap.demo.quickstart import MODELS, WEATHER_TOOL

pytestmark = pytest.mark.all_cores
ROOT = Path(__file__).parent.parent.parent

CONFIGURATION = f"""\
defaults:
  max_model_len: 512
  enforce_eager: true
  kv_cache_memory_bytes: 16M
models:
  file:
    model: {MODELS}/llama
    quant_config: quant.json
    worker_cls: tests.integration.telling_worker.TellingWorker
    aliases: [quantised]
    max_logprobs: 1
    sampling: {{defaults: {{max_tokens: 3}}, force: {{temperature: 0}}, drop_unsupported: true}}
  cleared:
    model: {MODELS}/llama
    quant_config: null
    worker_cls: tests.integration.telling_worker.TellingWorker
    enable_prompt_tokens_details: true
    return_tokens_as_token_ids: true
    default_chat_template_kwargs: {{add_generation_prompt: true}}
  kept:
    model: {MODELS}/llama
    worker_cls: tests.integration.telling_worker.TellingWorker
    chat_template: shout.jinja
    sampling: {{force: {{max_tokens: 2}}}}
"""

SHOUT = "{% for message in messages %}{{ message.content | upper }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("per-model")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    """A server of three models of one checkpoint that differ in nothing but their settings."""
    (folder / "quant.json").write_text("{}")
    (folder / "shout.jinja").write_text(SHOUT)
    config = folder / "models.yaml"
    config.write_text(CONFIGURATION)
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HPU_MULTI_MODEL_CONFIG": str(config),
        "QUANT_CONFIG": "/at/the/start.json",
        "TOLD": str(folder / "told"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = ["-m", QUICKSTART_MODULE, "--allow", "code"]
    running = ServerProcess.start(command, free_port(), folder / "server.log", environment)
    yield running
    assert running.stop() == 0, running.log_tail()


@pytest.fixture(autouse=True)
def llama_is_active() -> None:
    """Do nothing: this module's server has no llama."""


def test_quant_config_depends_on_the_model_alone(server: ServerProcess, folder: Path) -> None:
    """`QUANT_CONFIG` at each load and step is the model's: set, cleared, or as at the start."""
    for alias in ("cleared", "file", "kept", "file", "cleared", "kept", "cleared", "file"):
        server.switch(alias)
        server.complete(alias, "Hello", max_tokens=1)
    for alias in ("kept", "cleared"):
        server.client.post(f"/admin/models/{alias}/unload").raise_for_status()
    server.client.post("/admin/models/kept/load").raise_for_status()
    server.complete("file", "Hello", max_tokens=1)
    for alias in ("kept", "cleared"):
        server.switch(alias)
        server.complete(alias, "Hello", max_tokens=1)

    told = {tuple(line.split()) for line in (folder / "told").read_text().splitlines()}
    expected = {
        "file": str(folder / "quant.json"),
        "cleared": "None",
        "kept": "/at/the/start.json",
    }

    assert told == {
        (alias, what, value) for alias, value in expected.items() for what in ("load", "step")
    }


def complete(server: ServerProcess, alias: str, **extra: Any) -> dict[str, Any]:
    body = {"model": alias, "prompt": "Who are you?", "ignore_eos": True, **extra}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def test_sampling_defaults_and_forced_parameters_count(server: ServerProcess) -> None:
    """Each model's default applies only where the client is silent; its forced value always."""
    server.switch("file")
    tokens = [
        complete(server, "file", **extra)["usage"]["completion_tokens"]
        for extra in ({}, {"max_tokens": 5})
    ]
    texts = {complete(server, "file", temperature=2, seed=n)["choices"][0]["text"] for n in (1, 2)}
    server.switch("kept")
    forced = complete(server, "kept", max_tokens=50)["usage"]["completion_tokens"]
    server.switch("cleared")
    free = complete(server, "cleared", max_tokens=50)["usage"]["completion_tokens"]

    assert [3, 5] == tokens
    assert 1 == len(texts)
    assert (2, 50) == (forced, free)


def test_unsupported_parameters_are_dropped_where_asked(server: ServerProcess) -> None:
    """Unsupported parameters are dropped where set; vLLM would refuse tools without a parser."""
    chat = {
        "messages": [{"role": "user", "content": "Hello"}],
        "tools": [WEATHER_TOOL],
        "tool_choice": "auto",
        "speed": 7,
    }
    server.switch("file")
    dropped = server.post("/v1/chat/completions", {"model": "file", **chat})
    server.switch("cleared")
    refused = server.post("/v1/chat/completions", {"model": "cleared", **chat})

    assert (200, 400) == (dropped.status_code, refused.status_code)


def test_frontend_settings_are_each_models_own(server: ServerProcess) -> None:
    """Logprobs, usage details, token ids and the chat template are each model's own."""
    asked = {"max_tokens": 1, "logprobs": 2}
    server.switch("file")
    too_many = server.post("/v1/completions", {"model": "file", "prompt": "Hi", **asked})
    server.switch("cleared")
    answer = complete(server, "cleared", **asked)
    again = complete(server, "cleared", max_tokens=1)

    assert 400 == too_many.status_code
    assert answer["choices"][0]["logprobs"]["tokens"][0].startswith("token_id:")
    assert again["usage"]["prompt_tokens_details"] is not None


def test_the_template_of_a_model_is_its_own(server: ServerProcess) -> None:
    """A model's template, from a file beside the YAML file, gives its own tokens."""
    messages = [{"role": "user", "content": "Hello you"}]

    def tokens(alias: str) -> list[int]:
        server.switch(alias)
        body = {"model": alias, "messages": messages, "add_special_tokens": False}
        result: list[int] = server.post("/tokenize", body).json()["tokens"]
        return result

    shouted, usual = tokens("kept"), tokens("cleared")
    plain = server.post(
        "/tokenize", {"model": "cleared", "prompt": "HELLO YOU", "add_special_tokens": False}
    ).json()["tokens"]

    assert shouted == plain
    assert shouted != usual


def test_io_threads_of_the_host_are_not_bound_to_the_compute_threads_core(
    server: ServerProcess,
) -> None:
    """The host's IO threads may use every core, although OpenMP binds the compute threads."""
    host = server.status()["host"]["pid"]  # type: ignore[index]
    tasks = list(Path(f"/proc/{host}/task").iterdir())
    names = {int(task.name): (task / "comm").read_text() for task in tasks}
    sockets = [tid for tid, name in names.items() if name.startswith("ZMQbg/IO")]

    assert sockets
    assert {ALL_CORES} == {frozenset(os.sched_getaffinity(tid)) for tid in sockets}
