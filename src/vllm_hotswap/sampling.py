"""How a model's configuration changes the sampling parameters of a request.

vLLM takes defaults for a few parameters from `generation_config.json` and
`override_generation_config`; clients may override them. Here every parameter may have a default or
be forced, and parameters that a model has no use for may be dropped. A model without such settings
is served without any of this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_hotswap.model_routes import request_of

GENERATING_PATHS = frozenset(
    [
        "/cohere/v2/chat",
        "/invocations",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
    ]
)
"""Routes whose body has sampling parameters at its top level."""

LIMITS = frozenset(["max_tokens", "max_completion_tokens", "max_output_tokens"])
"""One parameter that has several names; which one counts depends on the route."""

NOT_SAMPLING = frozenset(["model", "messages", "prompt", "input", "stream"])
"""What a request is about; the configuration may not set it."""


def _only_sampling(names: Any) -> Any:
    for name in names:
        if name in NOT_SAMPLING:
            raise ValueError(f"{name!r} is not a sampling parameter")
    return names


Parameters = Annotated[dict[str, Any], AfterValidator(_only_sampling)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class SamplingPolicy:
    """The `sampling` section of a model."""

    defaults: Annotated[
        Parameters,
        Field(description="parameters set on a request where its client sends none of that name"),
    ] = Field(default_factory=dict)
    force: Annotated[
        Parameters,
        Field(description="parameters set on every request, whatever its client sends"),
    ] = Field(default_factory=dict)
    drop: Annotated[
        list[str],
        AfterValidator(_only_sampling),
        Field(description="parameters removed from every request"),
    ] = Field(default_factory=list)
    drop_unsupported: Annotated[
        bool,
        Field(
            description="remove parameters that the route does not know, and tools where the "
            "model has no tool parser; vLLM would ignore the former and refuse the latter"
        ),
    ] = False

    @property
    def is_empty(self) -> bool:
        return not (self.defaults or self.force or self.drop or self.drop_unsupported)

    def apply(
        self, body: Mapping[str, Any], known: frozenset[str] | None, limit: str = "max_tokens"
    ) -> dict[str, Any]:
        """Return the body of a request as the model gets it.

        Args:
            body: what the client sent.
            known: what the route knows and the model supports; None if that is unknown.
            limit: what the route calls `max_tokens`.
        """
        defaults, force = _renamed(self.defaults, limit), _renamed(self.force, limit)
        dropped = set(self.drop)
        if self.drop_unsupported and known is not None:
            dropped |= body.keys() - known
        if limit in force:
            dropped |= LIMITS
        kept = {name: value for name, value in body.items() if name not in dropped}
        if LIMITS & kept.keys():
            defaults.pop(limit, None)
        return {**defaults, **kept, **force}


def _renamed(parameters: Mapping[str, Any], limit: str) -> dict[str, Any]:
    return {limit if name in LIMITS else name: value for name, value in parameters.items()}


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
