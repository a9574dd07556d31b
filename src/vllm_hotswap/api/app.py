"""The composition root: the one place that knows all parts, and the outer ASGI application."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_hotswap.access import Access, Role
from vllm_hotswap.api import errors as openai, media
from vllm_hotswap.api.bodies import Bodies, ClientGone
from vllm_hotswap.api.cross_site import CrossSite
from vllm_hotswap.api.feed import EventFeed
from vllm_hotswap.api.handlers.adapters import AdapterRoutes
from vllm_hotswap.api.handlers.leases import JobRoutes
from vllm_hotswap.api.handlers.residency import CALLER, MoveRoutes
from vllm_hotswap.api.handlers.status import Admin
from vllm_hotswap.api.openapi import describe
from vllm_hotswap.api.rates import Rates
from vllm_hotswap.api.refusals import KEY, KnownKey, Outlook
from vllm_hotswap.api.router import BODY_METHODS, Router
from vllm_hotswap.api.routes import for_admins, own_routes
from vllm_hotswap.api.vllm_routes import Route, RouteTable, vllm_routes
from vllm_hotswap.config import IsolationConfig, LimitsConfig, RecoveryConfig, SwitchingConfig
from vllm_hotswap.errors import HotswapError, InternalError, NotReady
from vllm_hotswap.events import Observer, Observers
from vllm_hotswap.models import EngineHost, ModelSettings, request_of
from vllm_hotswap.switching import Clock, Coordinator
from vllm_hotswap.system import log_of_clients
from vllm_hotswap.telemetry import SwitchMetrics


class HotswapApp:
    """Checks access, answers the server's own routes, and routes everything else by model."""

    def __init__(
        self,
        host: EngineHost,
        access: Access,
        switching: SwitchingConfig | None = None,
        observers: tuple[Observer, ...] = (),
        vllm_version: str = "none",
        model_settings: Mapping[str, ModelSettings] | None = None,
        adapter_folders: Sequence[Path] = (),
        clock: Clock = time.monotonic,
        limits: LimitsConfig | None = None,
        recovery: RecoveryConfig | None = None,
        cross_site: CrossSite | None = None,
        is_local: Callable[[], bool] = lambda: True,
        isolation: IsolationConfig | None = None,
        engine_metrics: Sequence[CollectorRegistry] = (),
    ) -> None:
        """Build all parts.

        Args:
            is_local: whether only programs on this machine can reach the server.
            engine_metrics: what `/metrics` shows besides the server's own metrics.
        """
        self.host = host
        self._cross_site = cross_site or CrossSite()
        self.recovery = recovery or RecoveryConfig()
        self.limits = limits or LimitsConfig()
        self.access = access
        self._vllm_version = vllm_version
        observer = Observers(observers)
        self.coordinator = Coordinator(
            host, observer, switching, model_settings, clock, limits, recovery
        )
        self.metrics = SwitchMetrics(self.coordinator.snapshot)
        observer.add(self.metrics)
        self._rates = Rates(self.limits, clock, is_local)
        isolation = isolation or IsolationConfig()
        self.router = Router(
            self.coordinator, access, self._rates, self.limits, isolation.prefix_cache
        )
        self.own_bodies = Bodies(self.limits, are_own=True)
        admin = Admin(self.coordinator, host, [self.metrics.registry, *engine_metrics])
        moves = MoveRoutes(self.coordinator)
        adapters = AdapterRoutes(self.coordinator, adapter_folders)
        self.feed = EventFeed(admin.status_answer)
        observer.add(self.feed)
        jobs = JobRoutes(self.coordinator)
        own = own_routes(
            admin, moves, adapters, jobs, self._version, self._events, self._description
        )
        if isolation.observers == "admins":
            own = map(for_admins, own)
        self.routes = RouteTable([*own, *vllm_routes()])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise RuntimeError("the server starts and stops the models; run with lifespan off")
        scope[KEY] = self._mark
        try:
            answer = await self._answer(scope, receive)
        except ClientGone:
            return
        except HotswapError as error:
            if error.status >= 500 and not isinstance(error, NotReady):  # clients get less detail
                code, kind = error.code, {"kind": error.code}
                log_of_clients.warning(
                    "event=request_failed code=%s cause=%r", code, error.message, extra=kind
                )
            await openai.refuse(error, scope, receive, send)
        except Exception:
            log_of_clients.exception("event=request_failed code=internal_error")
            await openai.refuse(InternalError(), scope, receive, send)
        else:
            await answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> ASGIApp:
        """Return the application that answers an authorised request."""
        (method, path), headers = request_of(scope), Headers(scope=scope)
        self._cross_site.check_host(method, path, headers)
        route, parameters = self.routes.find(method, path)
        if route.is_kept_from_other_sites or self._may_switch(route):
            self._cross_site.check_origin(method, path, headers)
        self.access.check(route.role, headers)
        if route.handler is None:
            return self.router
        if route.role is Role.PUBLIC:  # without a key, do not wait for a body
            return await route.handler(Request({**scope, "path_params": parameters}))
        account = self.access.account(headers)
        if route.role is Role.ADMIN and route.method != "GET":
            self._rates.switch(account)
        with self.own_bodies.hold(account) as held:
            body = await held.read(receive, headers) if scope["method"] in BODY_METHODS else b""
            if body:
                media.check_own_body(headers)
            own = {"path_params": parameters, CALLER: self.access.caller(headers)}
            request = Request({**scope, **own}, _replayed(body, receive))
            return await route.handler(request)

    def may_use_kept_place(self, scope: Scope) -> bool:
        """Whether a request may use a reserved connection: a health check, or one of an admin.

        Args:
            scope: only its `type`, `method`, `path`, `root_path` and `headers` are used.
        """
        try:
            route, _ = self.routes.find(*request_of(scope))
        except HotswapError:
            return False
        headers = Headers(scope=scope)
        if route.role is Role.PUBLIC:
            has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
            return not has_body
        return self.access.is_admin(headers)

    def outlook(self, scope: Scope) -> Outlook | KnownKey:
        """Predict from its route and its key whether a request will be refused.

        Args:
            scope: only its `type`, `method`, `path`, `root_path` and `headers` are used.
        """
        try:
            route, _ = self.routes.find(*request_of(scope))
            self.access.check(route.role, Headers(scope=scope))
        except HotswapError:
            return Outlook.REFUSED
        if route.role is Role.PUBLIC:
            return Outlook.LET_IN
        mark = self._mark(scope)
        return Outlook.IN_DOUBT if mark is None else KnownKey(mark)

    def _mark(self, scope: Scope) -> str | None:
        """Return the fingerprint of a request's key; None without a known key."""
        return self.access.mark(Headers(scope=scope))

    def _may_switch(self, route: Route) -> bool:
        """Whether a request on this route may cause a switch."""
        return route.handler is None and self.coordinator.is_automatic

    async def _events(self, request: Request) -> Response:
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        return StreamingResponse(self.feed.stream(), media_type="text/event-stream")

    async def _version(self, request: Request) -> Response:
        """Answer as vLLM does, without a lease: the answer does not depend on the active model."""
        return JSONResponse({"version": self._vllm_version})

    async def _description(self, request: Request) -> Response:
        return JSONResponse(self._described)

    @cached_property
    def _described(self) -> dict[str, Any]:
        """Return the OpenAPI description; made once, as that takes 0.2 s."""
        return describe(self.routes)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Replay a body that has been read, then pass on the client's further messages."""
    said: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return said.pop() if said else await receive()

    return receive_again


class CrossOrigin(CORSMiddleware):
    """Lets web pages of other origins read every answer, including errors and our own routes.

    vLLM puts the same middleware into each model's application. An answer from there already names
    the origin in `Vary`, and is passed on unchanged.
    """

    async def send(self, message: Message, send: Send, request_headers: Headers) -> None:
        if message["type"] == "http.response.start" and _varies_by_origin(message):
            await send(message)
        else:
            await super().send(message, send, request_headers)


def _varies_by_origin(start: Message) -> bool:
    values = Headers(raw=start.get("headers", [])).getlist("vary")
    return any("origin" in value.lower() for value in values)
