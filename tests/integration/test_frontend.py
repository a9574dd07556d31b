"""What vLLM's application of one model needs of us, and how its errors are answered."""

from __future__ import annotations

import importlib.util
import json
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException as FastApiError
from starlette.exceptions import HTTPException
from vllm import SamplingParams
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from tests.helpers.support import lease as lease_of
from tests.integration.processes import ServerProcess
from vllm_hotswap.engines.frontend import complete
from vllm_hotswap.engines.stamps import StampedCore
from vllm_hotswap.models.registry import current_lease

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
HALF = "\ud83d"
"""Half of a surrogate pair, as `"\\ud83d"` of JSON is read."""


def sources() -> Iterator[str]:
    """Return the texts of all modules of vLLM's entrypoints except its multi-server supervisor."""
    spec = importlib.util.find_spec("vllm.entrypoints")
    assert spec is not None
    for folder in spec.submodule_search_locations or ():
        for path in Path(folder).rglob("*.py"):
            if path.name != "dp_supervisor.py":
                yield path.read_text()


def test_state_that_vllm_reads_is_what_somebody_sets() -> None:
    """State that vLLM reads and only its launcher sets, which does not run here, is set by us."""
    texts = list(sources())
    read = {n for t in texts for n in re.findall(r"\bapp\.state\.(\w+)\b(?!\s*=[^=])", t)}
    made = {
        n for t in texts for n in re.findall(r"(?<!app\.)\bstate\.(\w+)(?:: [^=\n]+)?\s*=[^=]", t)
    }

    app = FastAPI()
    complete(app)
    assert "server" in read
    assert read - made <= set(app.state._state)


def failing(error: Exception, cause: Exception | None = None) -> FastAPI:
    """Make an application with vLLM's error handlers, whose answers all fail."""
    app = FastAPI()
    init_exception_handler(app)
    app.state.args = Namespace(log_error_stack=False)
    app.state.engine_client = SimpleNamespace(errored=True, is_running=False)
    app.middleware_stack = app.build_middleware_stack()  # as vLLM's SageMaker part does
    complete(app)

    @app.post("/")
    async def fail() -> None:
        raise error from cause

    return app


async def asked(app: FastAPI) -> tuple[int, dict[str, Any]]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        answer = await client.post("/")
    return answer.status_code, answer.json()["error"]


@pytest.mark.parametrize(
    ("error", "cause", "status", "message"),
    [
        (EngineGenerateError(), RuntimeError("no more pages"), 500, "RuntimeError: no more pages"),
        (EngineGenerateError("told"), RuntimeError("hidden"), 500, "told"),
        (EngineGenerateError(), TypeError("TextEncodeInput must be"), 400, "the tokenizer cannot"),
        (TypeError("TextEncodeInput must be"), None, 400, "the tokenizer cannot read a text"),
        (TypeError("other"), None, 400, "other"),
        (EngineDeadError(), None, 500, "EngineCore encountered an issue"),
        (HTTPException(400, "no such body"), None, 400, "no such body"),
        (FastApiError(400, "no such body"), None, 400, "no such body"),
    ],
)
async def test_every_error_is_an_error_object_with_its_cause(
    error: Exception, cause: Exception | None, status: int, message: str
) -> None:
    """Every error is an error object with its cause, without vLLM's server or a bare `detail`."""
    code, told = await asked(failing(error, cause))

    assert status == code == told["code"]
    assert told["message"].startswith(message)


class Sent(Exception):
    """Raised when something was sent to the engine."""


class Core:
    """A client of an engine core."""

    async def add_request_async(self, request: Any) -> None:
        raise Sent


@pytest.mark.parametrize(
    ("sampling", "why"),
    [
        (
            SamplingParams(stop=[HALF]),
            r"contains \\ud83d, half of a surrogate pair, which is not a character",
        ),
        (SamplingParams(stop_token_ids=[1 << 64]), "does not fit into 64 bits"),
    ],
)
async def test_what_cannot_be_encoded_is_refused_before_it_waits(
    sampling: SamplingParams, why: str
) -> None:
    """What cannot be encoded is refused before it waits or switches, with a client's message."""
    asked_for = []

    async def ask(tokens: int) -> None:
        asked_for.append(tokens)

    lease = lease_of("llama", 1, wait_for_turn=ask)
    current_lease.set(lease)

    with pytest.raises(VLLMClientError, match=why):
        await StampedCore("llama", Core()).add_request_async(
            SimpleNamespace(request_id="a", sampling_params=sampling)
        )
    assert ([], set()) == (asked_for, lease.requests)


@pytest.mark.parametrize("name", ["request_id", "session_id", "cache_salt"])
async def test_half_surrogate_in_any_field_is_refused(name: str) -> None:
    """Half a surrogate in any field, also the request's name, is refused: nothing is sent."""
    given = {"request_id": "a", "sampling_params": None, name: HALF}

    with pytest.raises(VLLMClientError, match="half of a surrogate pair"):
        await StampedCore("llama", Core()).add_request_async(SimpleNamespace(**given))


async def test_what_can_be_encoded_is_sent() -> None:
    """What can be encoded is sent, even values such as structured outputs that are not plain."""
    sampling = SamplingParams(
        stop=["\n", "模"], structured_outputs=StructuredOutputsParams(json={"type": "object"})
    )

    with pytest.raises(Sent):
        await StampedCore("llama", Core()).add_request_async(
            SimpleNamespace(request_id="a", sampling_params=sampling)
        )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "stop": [HALF]}),
        ("/v1/chat/completions", {**CHAT, "stop": [HALF], "stream": True}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 4, "stop": HALF}),
        ("/v1/messages", {**CHAT, "stop_sequences": [HALF]}),
    ],
)
def test_half_surrogate_in_stop_is_a_mistake_of_the_client(
    server: ServerProcess, path: str, body: dict[str, Any]
) -> None:
    """Half a surrogate in `stop` is the client's error on every route, and the message says why."""
    server.switch("llama")
    raw = json.dumps({"model": "llama", **body})  # which writes it as JavaScript does
    headers = {"content-type": "application/json"}
    answer = server.client.post(path, content=raw, headers=headers)

    assert "half of a surrogate pair" in answer.text
    assert 400 == answer.status_code


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "llama", "x": "\xff"}',
        b'{"model": "llama", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"model": "llama"',
    ],
    ids=["no UTF-8", "too deep", "cut"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_body_that_cannot_be_parsed_gets_an_error_object(
    server: ServerProcess, path: str, body: bytes
) -> None:
    """A body that cannot be parsed gets an error object, not starlette's `detail`."""
    server.switch("llama")
    headers = {"content-type": "application/json"}
    answer = server.client.post(path, content=body, headers=headers)

    assert 400 == answer.status_code
    assert answer.json()["error"]["message"]
