"""Errors as HTTP, whole and as the last event of a stream."""

from __future__ import annotations

import json

import pytest

from vllm_hotswap.api.errors import error_event, error_response
from vllm_hotswap.errors import DrainCut, HotswapError, QueueFull, Unauthorized, UnknownModel

CUT = DrainCut("llama", "qwen", 1.0)


def test_error_is_openais_object() -> None:
    """An error has OpenAI's message, type, param and code, and nothing else."""
    response = error_response(UnknownModel("gpt", ["llama"]))

    assert 404 == response.status_code
    assert {
        "error": {
            "message": "model 'gpt' is not configured; configured: llama",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    } == json.loads(bytes(response.body))


@pytest.mark.parametrize(
    ("error", "header", "value"),
    [
        (QueueFull("full", retry_after_s=3), "retry-after", "3"),
        (QueueFull("full"), "retry-after", None),
        (Unauthorized("no key"), "www-authenticate", "Bearer"),
        (QueueFull("full"), "www-authenticate", None),
    ],
)
def test_headers_say_what_to_do(error: HotswapError, header: str, value: str | None) -> None:
    """Errors carry `Retry-After` where the time is known, and `WWW-Authenticate` without a key."""
    assert value == error_response(error).headers.get(header)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_openai_stream_ends_with_the_error_object(path: str) -> None:
    """The last event of an OpenAI stream is the error object, without an event name."""
    event = error_event(CUT, path).decode()

    assert event.startswith("data: ")
    assert event.endswith("\n\n")
    assert "drain_timeout" == json.loads(event.removeprefix("data: "))["error"]["code"]


def test_anthropic_stream_ends_with_an_error_event() -> None:
    """`/v1/messages` has named events and Anthropic's error shape."""
    name, data = error_event(CUT, "/v1/messages").decode().strip().split("\n")

    assert "event: error" == name
    assert {
        "type": "error",
        "error": {"type": CUT.type, "message": CUT.message},
    } == json.loads(data.removeprefix("data: "))


def test_responses_stream_ends_with_an_error_event() -> None:
    """`/v1/responses` has events whose `type` is the event's name."""
    name, data = error_event(CUT, "/v1/responses").decode().strip().split("\n")

    assert "event: error" == name
    assert {
        "type": "error",
        "code": "drain_timeout",
        "message": CUT.message,
        "param": None,
    } == json.loads(data.removeprefix("data: "))
