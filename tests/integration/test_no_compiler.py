"""Eager models where there is no C++ compiler, and nothing that was compiled before."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.ports import free_port
from tests.integration.processes import ServerProcess, without_compilers
from vllm_hotswap.demo.quickstart import MODELS

pytestmark = pytest.mark.wide

CONFIGURATION = f"""\
default_model: llama
defaults: {{max_model_len: 512, enforce_eager: true, kv_cache_memory_bytes: 16M}}
models:
  llama: {{model: {MODELS}/llama}}
  guessing:
    model: {MODELS}/qwen
    speculative_config: {{method: ngram, num_speculative_tokens: 3, prompt_lookup_max: 3}}
  embed: {{model: {MODELS}/embed}}
"""

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}

REQUESTS: dict[str, dict[str, Any]] = {
    "chat": {},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "logprobs of several": {"logprobs": True, "top_logprobs": 3, "n": 3, "temperature": 1},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "sampling": {"temperature": 1, "top_p": 0.9, "top_k": 20, "seed": 1},
    "penalties": {"presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.1},
    "words": {"bad_words": ["the"], "min_tokens": 2, "stop": ["zzz"]},
    "regex": {"structured_outputs": {"regex": "[ab]{4}"}},
    "schema": {"response_format": {"type": "json_object"}},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("no-compiler")
    config = folder / "models.yaml"
    config.write_text(CONFIGURATION)
    environment = {"VLLM_SERVER_DEV_MODE": "1", **without_compilers(folder)}
    assert shutil.which("g++", path=environment["PATH"]) is None
    command = ["-m", "vllm_hotswap", "serve", str(config)]
    running = ServerProcess.start(command, free_port(), folder / "log", environment)
    yield running
    running.stop()


@pytest.fixture
def switched(server: ServerProcess, request: pytest.FixtureRequest) -> str:
    """Switch to the alias and return it."""
    answer = server.client.post("/v1/models/switch", json={"model": request.param})
    assert answer.status_code == 200, answer.text
    return str(request.param)


@pytest.mark.parametrize("switched", ["llama", "guessing"], indirect=True)
def test_every_kind_of_request_is_answered(server: ServerProcess, switched: str) -> None:
    """Every kind of request is answered, and none ends the engine."""
    answers = {
        name: server.client.post("/v1/chat/completions", json={"model": switched, **CHAT, **keys})
        for name, keys in REQUESTS.items()
    }

    assert {} == {name: a.text for name, a in answers.items() if a.status_code != 200}
    token = answers["logprobs"].json()["choices"][0]["logprobs"]["content"][0]
    assert 2 == len(token["top_logprobs"])
    assert 0 == engine_failures(server)


@pytest.mark.parametrize("switched", ["llama"], indirect=True)
def test_what_speculation_does_not_allow_is_answered(server: ServerProcess, switched: str) -> None:
    """Requests that speculation does not allow are answered by a model without it."""
    body = {"model": switched, **CHAT, "min_p": 0.01, "logit_bias": {"5": 2}}
    answer = server.client.post("/v1/chat/completions", json=body)

    assert answer.status_code == 200, answer.text
    assert 0 == engine_failures(server)


@pytest.mark.parametrize("switched", ["embed"], indirect=True)
def test_embeddings_are_computed(server: ServerProcess, switched: str) -> None:
    """Embeddings are computed: pooling compiles nothing either."""
    answer = server.client.post("/v1/embeddings", json={"model": switched, "input": ["a", "b"]})

    assert answer.status_code == 200, answer.text
    assert 0 == engine_failures(server)


def engine_failures(server: ServerProcess) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith("hotswap_engine_failures_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in counts)
