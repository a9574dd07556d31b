"""Which routes a model's application has, read from it once, when it is built.

A model that generates has other routes than one that embeds. The lookup here tells whether a model
can answer a request, before the request waits for anything.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.types import Scope

WEBSOCKET = "WEBSOCKET"
"""Stands for the method of a WebSocket's request."""

MODEL_HEADER = "x-hotswap-model"
"""Response header: the alias of the model that answered, or changed; see `api.relay.in_header`."""


@dataclass(frozen=True, slots=True)
class ModelRoutes:
    """The tasks of one model, in its engine's words, and the routes of its application."""

    tasks: tuple[str, ...] = ()
    literal: frozenset[tuple[str, str]] = frozenset()
    """Methods with paths."""
    patterns: tuple[tuple[frozenset[str] | None, re.Pattern[str]], ...] = ()
    """Methods with patterns, of routes with parameters; None stands for every method."""

    @classmethod
    def of(
        cls, tasks: Iterable[str], routes: Iterable[BaseRoute], without: Container[str] = ()
    ) -> ModelRoutes:
        """Read the routes of an application, except the paths in `without`."""
        literal: set[tuple[str, str]] = set()
        patterns: list[tuple[frozenset[str] | None, re.Pattern[str]]] = []
        for route in routes:
            methods, path, pattern = _described(route)
            if path in without:
                continue
            if methods is None or path is None or "{" in path:
                patterns.append((methods, pattern))
            else:
                literal.update((method, path) for method in methods)
        return cls(tuple(tasks), frozenset(literal), tuple(patterns))

    def serve(self, method: str, path: str) -> bool:
        """Whether there is a route; `method` is `WEBSOCKET` for a WebSocket. A hot path."""
        if (method, path) in self.literal:
            return True
        if len(path) > 1 and path.endswith("/"):  # applications redirect to the path without it
            return self.serve(method, path.rstrip("/") or "/")
        return any(
            (methods is None or method in methods) and pattern.match(path)
            for methods, pattern in self.patterns
        )


@dataclass(frozen=True, slots=True)
class ForeseenRoutes:
    """What is known about a model's routes before it has an application."""

    tasks: tuple[str, ...]
    """Its tasks, as far as they are known."""
    absent: frozenset[str]
    """Paths that it will not have."""
    present: frozenset[str] = frozenset()
    """Paths that it will have; about all others nothing is known."""

    def serve(self, _method: str, path: str) -> bool:
        """Whether it may have the route."""
        return (path.rstrip("/") or "/") not in self.absent


def request_of(scope: Scope) -> tuple[str, str]:
    """Return method and path of a request, as routes are written.

    The path is the one below the prefix of a proxy, and without slashes at its end.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    method = WEBSOCKET if scope["type"] == "websocket" else scope["method"]
    below = path.removeprefix(root) if path.startswith(f"{root}/") else path
    return method, below.rstrip("/") or "/"


def _described(
    route: BaseRoute,
) -> tuple[frozenset[str] | None, str | None, re.Pattern[str]]:
    """Return methods, path, and a pattern of the path; the first two are None if any will do."""
    match route:
        case Route():
            methods = None if route.methods is None else frozenset(route.methods)
            return methods, route.path, route.path_regex
        case WebSocketRoute():
            return frozenset([WEBSOCKET]), route.path, route.path_regex
        case Mount():
            return None, None, route.path_regex
        case _:  # of a kind that cannot be inspected: the application will decide
            return None, None, re.compile("")
