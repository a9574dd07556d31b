"""OpenAI's error object, whole and as the last event of a stream."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from vllm_hotswap.errors import HotswapError


def error_body(error: HotswapError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: HotswapError) -> JSONResponse:
    """The one place where an error of ours becomes HTTP."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.allow is not None:
        headers["Allow"] = error.allow
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)


async def refuse(error: HotswapError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, or a WebSocket's handshake, with an error."""
    if scope["type"] == "websocket" and "websocket.http.response" not in scope["extensions"]:
        # All that this HTTP server can tell then: it answers with 403.
        await send({"type": "websocket.close", "code": 1008, "reason": error.message})
    else:
        await error_response(error)(scope, receive, send)


def error_event(error: HotswapError, path: str) -> bytes:
    """The last event of a stream that was cut, in the dialect of the route."""
    body = error_body(error)
    if path.endswith("/messages"):  # Anthropic's
        details = {"type": error.type, "message": error.message}
        return _event("error", {"type": "error", "error": details})
    if path.endswith("/responses"):
        return _event("error", {**body["error"], "type": "error"})
    return _event(None, body)


def _event(name: str | None, data: object) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()
