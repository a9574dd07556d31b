"""Sampling parameters: what a model's configuration makes of them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vllm_hotswap.config.sampling import SamplingPolicy
from vllm_hotswap.engines.sampling_filter import SamplingFilter

CHAT = "/v1/chat/completions"
KNOWN = frozenset(["model", "messages", "temperature", "top_p"])


def test_a_default_fills_what_the_client_leaves_out() -> None:
    """A default replaces only a missing parameter: null is a value."""
    policy = SamplingPolicy(defaults={"temperature": 0.2, "top_p": 0.9})

    assert {"temperature": 1, "top_p": 0.9} == policy.apply({"temperature": 1}, None)
    assert {"temperature": None, "top_p": 0.9} == policy.apply({"temperature": None}, None)


def test_what_is_forced_counts_whatever_the_client_sends() -> None:
    """A forced value wins over the client's and over defaults."""
    policy = SamplingPolicy(defaults={"seed": 1}, force={"seed": 2, "temperature": 0})

    assert {"seed": 2, "temperature": 0, "n": 3} == policy.apply({"temperature": 1, "n": 3}, None)


def test_what_is_dropped_may_still_have_a_default() -> None:
    """A dropped parameter ignores the client's value, but may have a default."""
    policy = SamplingPolicy(defaults={"seed": 1}, drop=["seed", "logit_bias"])

    assert {"seed": 1} == policy.apply({"seed": 5, "logit_bias": {}}, None)


def test_unsupported_parameters_are_dropped_when_asked() -> None:
    """Parameters that the route does not know are dropped on demand; an unknown route keeps all."""
    body = {"temperature": 1, "best_of": 3}

    assert {"temperature": 1} == SamplingPolicy(drop_unsupported=True).apply(body, KNOWN)
    assert body == SamplingPolicy(drop_unsupported=True).apply(body, None)
    assert body == SamplingPolicy().apply(body, KNOWN)


@pytest.mark.parametrize("given", [{"defaults": {"messages": []}}, {"drop": ["model"]}])
def test_what_a_request_is_about_is_no_sampling_parameter(given: dict[str, Any]) -> None:
    """The content of a request can be neither set nor dropped as a sampling parameter."""
    with pytest.raises(ValidationError, match="is not a sampling parameter"):
        SamplingPolicy(**given)


@pytest.mark.parametrize(
    ("given", "is_empty"), [({}, True), ({"drop": ["seed"]}, False), ({"force": {"n": 1}}, False)]
)
def test_a_policy_without_rules_is_empty(given: dict[str, Any], is_empty: bool) -> None:
    """Without rules a policy is empty, and no request is inspected."""
    assert is_empty is SamplingPolicy(**given).is_empty


async def echo(request: Request) -> Response:
    body = await request.body()
    assert len(body) == int(request.headers["content-length"])
    return JSONResponse({"body": body.decode(), "left": await request.is_disconnected()})


async def ask(path: str, content: bytes, **policy: Any) -> str:
    """Return what an application behind the filter gets."""
    app = Starlette(routes=[Route("/{path:path}", echo, methods=["POST"])])
    behind = SamplingFilter(app, SamplingPolicy(**policy), {CHAT: KNOWN})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(behind), base_url="http://x") as c:
        return str((await c.post(path, content=content)).json()["body"])


async def test_generating_requests_are_rewritten() -> None:
    """Generating requests are rewritten, with their new length."""
    sent = json.dumps({"model": "a", "temperature": 1, "speed": 5}).encode()

    got = await ask(CHAT, sent, force={"temperature": 0}, drop_unsupported=True)

    assert {"model": "a", "temperature": 0} == json.loads(got)


@pytest.mark.parametrize("sent", ["not JSON", "[1, 2]", "", '"text"'])
async def test_what_is_no_json_object_passes_as_it_is(sent: str) -> None:
    """A body that is not a JSON object passes unchanged, for vLLM to refuse."""
    assert sent == await ask(CHAT, sent.encode(), force={"temperature": 0})


async def test_other_routes_are_left_alone() -> None:
    """Other routes are left alone: an embedding has no temperature."""
    assert "{}" == await ask("/v1/embeddings", b"{}", force={"temperature": 0})


@pytest.mark.parametrize("sent", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_the_limit_of_tokens_is_one_parameter_with_several_names(sent: str) -> None:
    """The token limit's names are one: a forced one wins, a default needs all to be absent."""
    forced = SamplingPolicy(force={"max_tokens": 2})
    default = SamplingPolicy(defaults={"max_completion_tokens": 3})

    assert {"max_output_tokens": 2} == forced.apply({sent: 500}, None, "max_output_tokens")
    assert {"max_tokens": 2} == forced.apply({sent: 500}, None)
    assert {sent: 500} == default.apply({sent: 500}, None)
    assert {"max_output_tokens": 3} == default.apply({}, None, "max_output_tokens")


async def test_a_body_too_deep_for_json_passes_as_it_is() -> None:
    """A body that is too deep for JSON passes unchanged, for vLLM to refuse."""
    sent = "[" * 100_000

    assert sent == await ask(CHAT, sent.encode(), force={"temperature": 0})
