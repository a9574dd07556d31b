"""The quickstart's online flow, request by request, on the real vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.ports import free_port
from tests.integration.processes import QUICKSTART_MODULE, ServerProcess
from vllm_hotswap.demo.quickstart import MODELS, QUESTION, WEATHER_TOOL


def test_every_configured_alias_is_listed_with_its_status(server: ServerProcess) -> None:
    """`GET /v1/models` lists loaded and unloaded models alike, and shows which one is active."""
    listed = server.client.get("/v1/models").json()["data"]

    assert ["llama", "qwen", "embed", "late", "broken"] == [card["id"] for card in listed]
    assert {"value": "loaded", "residency": "active", "active": True} == listed[0]["status"]
    assert {"value": "loaded", "residency": "parked", "active": False} == listed[1]["status"]
    assert "unloaded" == listed[4]["status"]["value"]
    assert 2048 == listed[0]["max_model_len"]


def test_the_default_model_answers_then_the_other_one_after_a_switch(
    server: ServerProcess,
) -> None:
    """Generate, switch, generate: the whole flow works in one process."""
    first = server.chat("llama", QUESTION)
    switched = server.switch("qwen", drain_timeout=60)
    second = server.chat("qwen", QUESTION)

    assert "llama" in str(first["content"])
    assert "qwen" in str(second["content"])
    assert ("llama", "qwen", True) == tuple(
        switched[key] for key in ("previous_model", "current_model", "switched")
    )
    # After a load, perhaps an earlier switch's, `verify` is among them.
    phases = set(switched["phases"]) - {"verify"}  # type: ignore[call-overload]
    assert {"validate", "drain", "make_room", "bring_up", "activate"} == phases


def test_only_the_model_that_is_configured_for_tools_calls_them(server: ServerProcess) -> None:
    """Only the model configured for tools calls them: parser and choice are its frontend's."""
    question = "What is the weather in Paris?"
    refused = server.post(
        "/v1/chat/completions",
        {
            "model": "llama",
            "messages": [{"role": "user", "content": question}],
            "tools": [WEATHER_TOOL],
        },
    )
    server.switch("qwen")
    message = server.chat("qwen", question, tools=[WEATHER_TOOL])

    call = message["tool_calls"][0]["function"]  # type: ignore[index]
    assert 400 == refused.status_code
    assert ("get_weather", '{"city": "Paris"}') == (call["name"], call["arguments"])


def test_a_model_that_is_not_active_is_refused_with_the_way_to_it(server: ServerProcess) -> None:
    """An inactive model gets an error that names the active model and how to switch."""
    response = server.post("/v1/completions", {"model": "qwen", "prompt": "Hello"})

    error = response.json()["error"]
    assert (404, "model_not_active") == (response.status_code, error["code"])
    assert "'llama'" in error["message"]
    assert "/v1/models/switch" in error["message"]


def test_an_unknown_alias_is_refused_with_the_configured_ones(server: ServerProcess) -> None:
    """An unknown alias gets an error that lists the available ones."""
    response = server.post("/v1/completions", {"model": "gpt-4", "prompt": "Hello"})

    error = response.json()["error"]
    assert (404, "model_not_found") == (response.status_code, error["code"])
    assert "llama, qwen, embed" in error["message"]


def test_development_routes_of_vllm_are_not_mounted(server: ServerProcess) -> None:
    """`VLLM_SERVER_DEV_MODE=1` mounts none of vLLM's development routes."""
    paths = ["/collective_rpc", "/sleep", "/wake_up", "/reset_prefix_cache", "/update_weights"]

    assert [404] * len(paths) == [server.post(path, {}).status_code for path in paths]
    assert 404 == server.client.get("/server_info").status_code


@pytest.mark.wide
def test_without_the_variable_it_is_the_standard_server(tmp_path: Path) -> None:
    """Without the variable it is the standard server: one model, vLLM's own list, no switching."""
    command = ["-m", QUICKSTART_MODULE, "--model", str(MODELS / "llama"), "--enforce-eager"]
    command += ["--served-model-name", "alone", "--max-model-len", "512"]
    command += ["--kv-cache-memory-bytes", "16M"]
    plain = ServerProcess.start(
        command, free_port(), tmp_path / "server.log", {"VLLM_SERVER_DEV_MODE": "1"}
    )
    try:
        (card,) = plain.client.get("/v1/models").json()["data"]
        answer = plain.chat("alone", QUESTION)
        switch = plain.post("/v1/models/switch", {"model": "alone"})
    finally:
        plain.stop()

    assert "alone" == card["id"]
    assert "status" not in card
    assert "llama" in str(answer["content"])
    assert 404 == switch.status_code
