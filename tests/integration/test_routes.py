"""vLLM's routes, through the router, for whichever model is active."""

from __future__ import annotations

import json
import re

import pytest

from tests.integration.conftest import events
from tests.integration.processes import ServerProcess

CHAT = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}


@pytest.mark.parametrize("alias", ["llama", "qwen"])
def test_generation_routes_answer_for_the_active_model(server: ServerProcess, alias: str) -> None:
    """Chat, completions, responses and Anthropic's messages name the active model and its words."""
    server.switch(alias)
    message = {"model": alias, "messages": CHAT["messages"], "max_tokens": 40, "temperature": 0}
    chat = server.post("/v1/chat/completions", message)
    anthropic = server.post("/v1/messages", message)
    body = {"model": alias, "input": "Who are you?", "max_output_tokens": 40, "temperature": 0}
    response = server.post("/v1/responses", body)

    assert [200, 200, 200] == [r.status_code for r in (chat, anthropic, response)]
    assert [alias] * 3 == [r.json()["model"] for r in (chat, anthropic, response)]
    assert alias in chat.json()["choices"][0]["message"]["content"]
    assert alias in anthropic.json()["content"][0]["text"]
    assert alias in json.dumps(response.json()["output"])


@pytest.mark.parametrize("alias", ["llama", "qwen"])
def test_a_chat_streams_the_same_words_as_it_answers(server: ServerProcess, alias: str) -> None:
    """A streamed chat has the same words as a whole one: streaming passes through unchanged."""
    server.switch(alias)
    body = {"model": alias, "stream": True, "max_tokens": 40, **CHAT}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as stream:
        received = list(events(stream.iter_lines()))

    deltas = [event["choices"][0]["delta"].get("content") or "" for event in received[:-1]]  # type: ignore[index]
    whole = server.chat(alias, "Who are you?", max_tokens=40)["content"]
    assert whole == "".join(deltas)
    assert "[DONE]" == received[-1]


def test_each_model_tokenizes_with_its_own_vocabulary(server: ServerProcess) -> None:
    """Tokenisation, and back, uses the active model's vocabulary."""
    text = "Hello, what is the weather in Paris?"
    tokens = {}
    for alias in ("llama", "qwen"):
        server.switch(alias)
        body = {"model": alias, "prompt": text, "add_special_tokens": False}
        tokens[alias] = server.post("/tokenize", body).json()["tokens"]
        back = server.post("/detokenize", {"model": alias, "tokens": tokens[alias]})
        assert text == back.json()["prompt"]

    assert tokens["llama"] != tokens["qwen"]


def test_an_embedding_model_has_its_own_routes(server: ServerProcess) -> None:
    """An active embedding model embeds, and refuses chat with an OpenAI error."""
    server.switch("embed")
    cat = server.embed("embed", "a cat sits on the mat")
    same = server.embed("embed", "the cat is sitting on a mat")
    other = server.embed("embed", "stock prices fell sharply today")
    chat = server.post("/v1/chat/completions", {"model": "embed", **CHAT})

    assert dot(cat, same) > dot(cat, other)
    assert 0 == server.status()["models"]["embed"]["kv_bytes"]  # type: ignore[index]
    assert 400 <= chat.status_code < 500


def test_a_request_without_a_model_goes_to_the_active_one(server: ServerProcess) -> None:
    """A request without a model goes to the active one, as vLLM's server uses its only model."""
    server.switch("qwen")
    response = server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 8})

    assert (200, "qwen") == (response.status_code, response.json()["model"])


def test_metrics_report_every_model_under_its_own_name(server: ServerProcess) -> None:
    """Metrics count tokens for the model that made them, and list no family twice."""
    before = {alias: generated(server, alias) for alias in ("llama", "qwen")}
    server.complete("llama", "Hello", max_tokens=5)
    server.switch("qwen")
    server.complete("qwen", "Hello", max_tokens=3)

    text = server.client.get("/metrics").text
    families = [line for line in text.splitlines() if line.startswith("# TYPE")]
    made = {alias: generated(server, alias) - before[alias] for alias in ("llama", "qwen")}
    assert {"llama": 5.0, "qwen": 3.0} == made
    assert len(families) == len(set(families))
    assert 'hotswap_switches_total{result="switched",target="qwen"}' in text
    for alias in ("llama", "qwen"):
        assert f'handler="/v1/completions",method="POST",model_name="{alias}"' in text


def test_a_route_that_is_not_known_is_refused(server: ServerProcess) -> None:
    """An unknown route gets an error of OpenAI's form, unlike vLLM's own 404."""
    response = server.post("/v1/files", {"model": "llama"})

    assert (404, "unknown_route") == (response.status_code, response.json()["error"]["code"])


def test_the_version_is_vllms(server: ServerProcess) -> None:
    """The version is vLLM's, as its own server reports it."""
    assert ["version"] == list(server.client.get("/version").json())
    assert re.match(r"\d+\.\d+", server.client.get("/version").json()["version"])


def generated(server: ServerProcess, alias: str) -> float:
    name = f'vllm:generation_tokens_total{{engine="0",model_name="{alias}"}}'
    lines = server.client.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
