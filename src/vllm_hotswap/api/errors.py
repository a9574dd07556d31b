"""OpenAI's error object, whole and as the last event of a stream."""

from __future__ import annotations

import json

from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from vllm_hotswap.api.redaction import redact
from vllm_hotswap.api.refusals import hold_back
from vllm_hotswap.api.schemas import ErrorAnswer
from vllm_hotswap.errors import HotswapError, forget_frames

_POLICY, _TRY_AGAIN_LATER = 1008, 1013
"""Close codes of a WebSocket. https://www.iana.org/assignments/websocket"""

_MAX_REASON_BYTES = 123
"""The longest reason in a WebSocket's close frame."""


def error_body(error: HotswapError) -> ErrorAnswer:
    """Return OpenAI's error object."""
    return {
        "error": {
            "message": redact(error.message),
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: HotswapError) -> JSONResponse:
    """Turn an error of ours into an HTTP response. No other place does."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.allow is not None:
        headers["Allow"] = error.allow
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)


async def refuse(error: HotswapError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, or a WebSocket's handshake, with an error.

    An error of the client may have to wait: that bounds how fast a client can be refused.
    """
    if error.status < 500:
        forget_frames(error)  # the body may be in them
        await hold_back(scope)
    await send_error(error, scope, receive, send)


async def send_error(error: HotswapError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer as `refuse` does, but at once."""
    can_deny = "websocket.http.response" in (scope.get("extensions") or ())
    if scope["type"] == "websocket" and not can_deny:
        # All that this HTTP server can report then: it answers with 403.
        await send(close_message(error))
    else:
        await error_response(error)(scope, receive, send)


def close_message(error: HotswapError) -> Message:
    """Return a WebSocket's close, with as much of the error's message as its frame holds."""
    reason = redact(error.message).encode()[:_MAX_REASON_BYTES].decode(errors="ignore")
    code = _TRY_AGAIN_LATER if error.status >= 500 else _POLICY
    return {"type": "websocket.close", "code": code, "reason": reason}


def error_event(error: HotswapError, path: str) -> bytes:
    """Return the last event of a stream that was cut, in the dialect of the route."""
    body = error_body(error)
    if path.endswith("/messages"):  # Anthropic's
        details = {"type": error.type, "message": redact(error.message)}
        return _event("error", {"type": "error", "error": details})
    if path.endswith("/responses") or "/responses/" in path:
        return _event("error", {**body["error"], "type": "error"})
    return _event(None, body)


def answer_event(body: bytes) -> bytes:
    """Return an application's answer, an error object, as the last event of a stream."""
    try:
        content = json.loads(body)
    except ValueError:
        message = body.decode("utf-8", "replace")
        content = {"error": {"message": message, "type": "server_error"}}
    return _event(None, content)


def _event(name: str | None, data: object) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()
