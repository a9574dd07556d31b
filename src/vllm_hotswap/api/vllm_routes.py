"""Every route that is served, and what it requires of its caller. All others are refused.

The composition root adds our own routes. vLLM's are listed here, method by method, as the
applications of version 0.32.0 have them. So a later vLLM, or a plugin, opens no route by itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from vllm_hotswap.access import Role
from vllm_hotswap.api.cross_site import SAFE_METHODS
from vllm_hotswap.errors import HotswapError, MethodNotAllowed, UnknownRoute
from vllm_hotswap.models import WEBSOCKET

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class RouteDoc:
    """What the API description says about one of our routes."""

    summary: str
    answer: Any = None
    """The type of its response; None: text."""
    body: type[BaseModel] | None = None
    needs_body: bool = False
    query: type[BaseModel] | None = None
    errors: tuple[type[HotswapError], ...] = ()
    """Errors that it may return, besides those of its role."""
    media_type: str = "application/json"
    """Empty: the response has no body."""


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path."""

    method: str
    path: str
    """`{name}` stands for one segment, `{name:path}` for any number of them."""
    role: Role
    handler: Handler | None = None
    """None: the application of the model that the request names answers it."""
    doc: RouteDoc | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """Our own GET routes answer HEAD, too; vLLM's do where they are listed with it."""
        return ("GET", "HEAD") if self.method == "GET" and self.handler else (self.method,)

    @property
    def is_kept_from_other_sites(self) -> bool:
        """Whether web pages of other origins are kept from it, in any mode.

        Ours that change state are, and so are WebSockets, which no CORS keeps a page from reading.
        """
        is_changing = self.handler is not None and self.method not in SAFE_METHODS
        return is_changing or self.method == WEBSOCKET


class RouteTable:
    """Finds the route of a request, or refuses it."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes = tuple(routes)
        by_path: dict[str, dict[str, Route]] = defaultdict(dict)
        for route in self._routes:
            for method in route.methods:
                if method in by_path[route.path]:
                    raise ValueError(f"{method} {route.path} is in the table twice")
                by_path[route.path][method] = route
        self._plain = {path: routes for path, routes in by_path.items() if "{" not in path}
        self._patterns = [(_pattern(path), by_path[path]) for path in by_path if "{" in path]

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes)

    def find(self, method: str, path: str) -> tuple[Route, Mapping[str, str]]:
        """Return the route, and the values of its parts in braces.

        Raises:
            UnknownRoute: there is no such path.
            MethodNotAllowed: there is, for other methods.
        """
        path = path.rstrip("/") or "/"
        allowed: set[str] = set()
        for routes, parts in self._matches(path):
            if method in routes:
                return routes[method], parts
            allowed |= routes.keys() - {WEBSOCKET}
        if method == WEBSOCKET or not allowed:
            raise UnknownRoute(method, path)
        raise MethodNotAllowed(method, path, allowed)

    def _matches(self, path: str) -> Iterator[tuple[Mapping[str, Route], Mapping[str, str]]]:
        """Yield the routes of a plain path alone, else those of every pattern that matches."""
        if path in self._plain:
            yield self._plain[path], {}
            return
        for pattern, routes in self._patterns:
            if match := pattern.fullmatch(path):
                yield routes, match.groupdict()


def _pattern(path: str) -> re.Pattern[str]:
    several = re.sub(r"\{(\w+):path\}", r"(?P<\1>.+?)", path)
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", several), re.DOTALL)


VLLM_USER_ROUTES = (
    # inference
    "POST /classify",
    "POST /cohere/v2/chat",
    "POST /cohere/v2/chat/render",
    "POST /detokenize",
    "POST /generative_scoring",
    "POST /inference/v1/generate",
    "POST /invocations",
    "POST /pooling",
    "POST /rerank",
    "POST /score",
    "POST /tokenize",
    "POST /v1/audio/transcriptions",
    "POST /v1/audio/translations",
    "POST /v1/chat/completions",
    "POST /v1/chat/completions/batch",
    "POST /v1/chat/completions/derender",
    "POST /v1/chat/completions/render",
    "POST /v1/completions",
    "POST /v1/completions/derender",
    "POST /v1/completions/render",
    "POST /v1/decisions",
    "POST /v1/embeddings",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /v1/messages/render",
    f"{WEBSOCKET} /v1/realtime",
    "POST /v1/rerank",
    "POST /v1/responses",
    "POST /v1/responses/render",
    "GET /v1/responses/{response_id}",
    "POST /v1/responses/{response_id}/cancel",
    "POST /v1/score",
    "POST /v1/systemone",
    "POST /v2/embed",
    "POST /v2/rerank",
    # reading
    "GET /load",
    "GET /tokenizer_info",
    # documentation of a model's application
    "GET /docs",
    "HEAD /docs",
    "GET /docs/oauth2-redirect",
    "HEAD /docs/oauth2-redirect",
    "GET /openapi.json",
    "HEAD /openapi.json",
    "GET /redoc",
    "HEAD /redoc",
    "GET /static/{file:path}",
    "HEAD /static/{file:path}",
)

VLLM_ADMIN_ROUTES = (
    "POST /inference/v1/abort_requests",  # of any client
    "GET /kv_event_sources",  # addresses inside the machine
    "POST /start_profile",
    "POST /stop_profile",
)

VLLM_REFUSED = frozenset(
    [
        # for data parallelism, which is not supported
        "POST /fault_tolerance/apply",
        "GET /fault_tolerance/status",
        "POST /is_scaling_elastic_ep",
        "POST /scale_elastic_ep",
        # for SageMaker; adapters have routes of their own
        "POST /adapters",
        "DELETE /adapters/{adapter_name}",
        # for development, and for reinforcement learning
        "POST /abort_requests",
        "POST /collective_rpc",
        "POST /finish_weight_update",
        "GET /get_world_size",
        "POST /init_weight_transfer_engine",
        "GET /is_paused",
        "GET /is_sleeping",
        "POST /pause",
        "POST /release_kv_cache_memory",
        "POST /reset_encoder_cache",
        "POST /reset_mm_cache",
        "POST /reset_prefix_cache",
        "POST /resume",
        "GET /server_info",
        "POST /shutdown_weight_transfer_engine",
        "POST /sleep",
        "POST /start_draft_weight_update",
        "POST /start_weight_update",
        "POST /update_weight_version",
        "POST /update_weights",
        "POST /wake_up",
        "POST /weight_checker",
        "GET /weight_info",
    ]
)
"""Routes of vLLM that are refused on purpose. A new vLLM's new routes need a decision, too."""

OWN_IN_PLACE = (
    "GET /health",
    "GET /metrics",
    "GET /ping",
    "POST /ping",
    "GET /ready",
    "GET /readyz",
    "GET /v1/models",
    "POST /v1/load_lora_adapter",
    "POST /v1/unload_lora_adapter",
    "GET /version",
)
"""Routes of vLLM that our own routes, or a 404, replace."""


def vllm_routes() -> Iterator[Route]:
    for role, lines in ((Role.USER, VLLM_USER_ROUTES), (Role.ADMIN_KEY, VLLM_ADMIN_ROUTES)):
        for line in lines:
            method, _, path = line.partition(" ")
            yield Route(method, path, role)
