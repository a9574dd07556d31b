"""The server takes a model's application to have exactly the routes that it has."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Host, Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from vllm_hotswap.models.routes import WEBSOCKET, ModelRoutes, request_of


async def answer(request: Request) -> Response:
    return PlainTextResponse("")


async def talk(connection: WebSocket) -> None:
    await connection.close()


APP = Starlette(
    routes=[
        Route("/chat", answer, methods=["POST"]),
        Route("/kept/{name}", answer),
        Route("/kept/{name}/cancel", answer, methods=["POST"]),
        Route("/any", Starlette()),
        WebSocketRoute("/talk", talk),
        Mount("/static", Starlette()),
        Route("/gone", answer),
    ]
)
ROUTES = ModelRoutes.of(("generate",), APP.routes, without={"/gone"})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/chat"),
        ("POST", "/chat/"),
        ("POST", "/chat//"),
        ("GET", "/kept/a"),
        ("HEAD", "/kept/a"),
        ("POST", "/kept/a/cancel"),
        ("POST", "/kept/a/cancel/"),
        ("PATCH", "/any"),
        (WEBSOCKET, "/talk"),
        ("GET", "/static/a/b.js"),
    ],
)
def test_route_that_the_application_has_is_known(method: str, path: str) -> None:
    """Routes of every kind are known; the application redirects away a slash at the end."""
    assert ROUTES.serve(method, path)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/chat"),
        ("POST", "/chat/completions"),
        ("POST", "/kept/a"),
        ("GET", "/kept/"),
        ("GET", "/kept/a/b"),
        ("GET", "/talk"),
        (WEBSOCKET, "/chat"),
        ("GET", "/gone"),
        ("GET", "/"),
        ("GET", ""),
    ],
)
def test_route_that_the_application_does_not_have_is_not(method: str, path: str) -> None:
    """A route that the application lacks, or was told to leave out, is unknown."""
    assert not ROUTES.serve(method, path)


def test_route_that_cannot_be_looked_into_is_left_to_the_application() -> None:
    """A route that cannot be inspected is left to the application: it might answer anything."""
    routes = ModelRoutes.of((), [Host("api.example", Starlette())])

    assert routes.serve("POST", "/whatever")


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ({"type": "http", "method": "GET", "path": "/a"}, ("GET", "/a")),
        ({"type": "websocket", "path": "/a"}, (WEBSOCKET, "/a")),
        ({"type": "http", "method": "GET", "path": "/p/a", "root_path": "/p"}, ("GET", "/a")),
        ({"type": "http", "method": "GET", "path": "/pa", "root_path": "/p"}, ("GET", "/pa")),
        ({"type": "http", "method": "GET", "path": "/p/a/", "root_path": "/p/"}, ("GET", "/a")),
        ({"type": "http", "method": "GET", "path": "/a//"}, ("GET", "/a")),
        ({"type": "http", "method": "GET", "path": "/"}, ("GET", "/")),
    ],
)
def test_request_is_told_by_its_method_and_its_path(
    scope: dict[str, str], expected: tuple[str, str]
) -> None:
    """A request is matched by method and path, without the prefix of a proxy."""
    assert expected == request_of(scope)
