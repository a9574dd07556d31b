"""Applies a model's sampling settings to the requests that it gets."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_hotswap.config import GENERATING_PATHS, SamplingPolicy
from vllm_hotswap.models import request_of


class SamplingFilter:
    """An ASGI application that rewrites the bodies of generating requests for another one.

    `known` has, for each path, the top-level keys that may stay. A body that is not a JSON object
    passes as it is; the application behind refuses it.
    """

    def __init__(
        self, app: ASGIApp, policy: SamplingPolicy, known: Mapping[str, frozenset[str]]
    ) -> None:
        self._app = app
        self._policy = policy
        self._known = known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, path = request_of(scope)
        if path in GENERATING_PATHS:
            scope, receive = await self._rewritten(path, scope, receive)
        await self._app(scope, receive, send)

    async def _rewritten(self, path: str, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """Rewrite the first message; the router passes a body in one piece."""
        first: Message | None = await receive()
        assert first is not None
        if first["type"] == "http.request":
            body = self._rewrite(path, first.get("body", b""))
            first = {**first, "body": body}
            scope = {**scope, "headers": _with_length(scope["headers"], len(body))}

        async def replay() -> Message:
            nonlocal first
            message, first = first, None
            return message if message is not None else await receive()

        return scope, replay

    def _rewrite(self, path: str, body: bytes) -> bytes:
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            return body
        if not isinstance(parsed, dict):
            return body
        limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        return json.dumps(self._policy.apply(parsed, self._known.get(path), limit)).encode()


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    others = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*others, (b"content-length", str(length).encode())]
