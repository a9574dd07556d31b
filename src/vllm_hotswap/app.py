"""The composition root: the one place that knows all parts, and the outer ASGI application."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from vllm_hotswap import openai, operations
from vllm_hotswap.access import Access, Role, vllm_role
from vllm_hotswap.admin import Admin
from vllm_hotswap.coordinator import Coordinator
from vllm_hotswap.engines.base import EngineHost
from vllm_hotswap.errors import HotswapError, UnknownRoute
from vllm_hotswap.events import Observer, Observers
from vllm_hotswap.feed import EventFeed
from vllm_hotswap.metrics import SwitchMetrics
from vllm_hotswap.operations import Operations
from vllm_hotswap.registry import ModelPolicy
from vllm_hotswap.routing import Router
from vllm_hotswap.settings import SwitchingConfig

log = logging.getLogger("vllm_hotswap")

Handler = Callable[[Request], Awaitable[Response]]


class HotswapApp:
    """Checks access, answers the server's own routes, and routes everything else by model."""

    def __init__(
        self,
        host: EngineHost,
        access: Access,
        switching: SwitchingConfig | None = None,
        observers: tuple[Observer, ...] = (),
        vllm_version: str = "none",
        policies: Mapping[str, ModelPolicy] | None = None,
    ) -> None:
        self.host = host
        self._access = access
        self._vllm_version = vllm_version
        observer = Observers(observers)
        self.coordinator = Coordinator(host, observer, switching, policies)
        self.metrics = SwitchMetrics(
            active=lambda: self.coordinator.active,
            epoch=lambda: self.coordinator.epoch,
            in_flight=lambda: {m.alias: len(m.leases) for m in self.coordinator.registry},
            waiting=lambda: self.coordinator.waiting,
            held=lambda: {
                m.alias: m.engine.footprint.at(m.residency).device
                for m in self.coordinator.registry
            },
            budget=lambda: self.coordinator.ladder.budget.device,
            aliases=self.coordinator.registry.aliases,
        )
        observer.add(self.metrics)
        self._router = Router(self.coordinator)
        admin = Admin(self.coordinator, host, self.metrics.registry)
        moves = Operations(self.coordinator)
        self.feed = EventFeed(admin.snapshot)
        observer.add(self.feed)
        self._model = admin.model
        self._operate = moves.operate
        self._routes: dict[tuple[str, str], tuple[Role, Handler]] = {
            ("GET", "/health"): (Role.PUBLIC, admin.health),
            ("GET", "/ping"): (Role.PUBLIC, admin.health),
            ("POST", "/ping"): (Role.PUBLIC, admin.health),
            ("GET", "/version"): (Role.PUBLIC, self._version),
            ("GET", "/metrics"): (Role.USER, admin.metrics),
            ("GET", "/v1/models"): (Role.USER, admin.models),
            ("GET", "/models"): (Role.USER, admin.models),
            ("POST", "/v1/models/switch"): (Role.ADMIN, admin.switch),
            ("GET", "/admin/status"): (Role.USER, admin.status),
            ("GET", "/admin/plan"): (Role.USER, moves.plan),
            ("GET", "/admin/events"): (Role.USER, self._events),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise RuntimeError("the server starts and stops the models; run with lifespan off")
        role, handler = self._find(scope)
        try:
            self._access.check(role, Headers(scope=scope))
            answer = await handler(Request(scope, receive)) if handler else self._router
        except HotswapError as error:
            answer = openai.error_response(error)
        await answer(scope, receive, send)

    def _find(self, scope: Scope) -> tuple[Role, Handler | None]:
        """The role and, for what the router does not get, the handler of a request."""
        if scope["type"] == "websocket":
            return Role.USER, None
        method, path = scope["method"], _path(scope)
        key = ("GET" if method == "HEAD" else method, path.rstrip("/") or "/")
        if key in self._routes:
            return self._routes[key]
        if key[0] == "GET" and path.startswith("/v1/models/"):
            return Role.USER, self._model
        if key[0] == "POST" and path.startswith(operations.PREFIX):
            return Role.ADMIN, self._operate
        if path.startswith("/admin/"):
            return Role.USER, _refuse
        role = vllm_role(*key)
        return (Role.USER, _refuse) if role is None else (role, None)

    async def _events(self, request: Request) -> Response:
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        return StreamingResponse(self.feed.stream(), media_type="text/event-stream")

    async def _version(self, request: Request) -> Response:
        """vLLM's answer, without a lease: it is the same whatever model is active."""
        return JSONResponse({"version": self._vllm_version})


class CrossOrigin(CORSMiddleware):
    """Lets web pages of other origins read every answer, errors and our own routes included.

    vLLM puts the same middleware into each model's application. An answer that comes from there
    names the origin in `Vary` already, and is passed on as it is.
    """

    async def send(self, message: Message, send: Send, request_headers: Headers) -> None:
        if message["type"] == "http.response.start" and _varies_by_origin(message):
            await send(message)
        else:
            await super().send(message, send, request_headers)


def _varies_by_origin(start: Message) -> bool:
    values = Headers(raw=start.get("headers", [])).getlist("vary")
    return any("origin" in value.lower() for value in values)


async def _refuse(request: Request) -> Response:
    raise UnknownRoute(request.method, request.url.path)


def _path(scope: Scope) -> str:
    """The path below the proxy's prefix, as starlette computes it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path
