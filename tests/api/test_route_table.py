"""Which routes are reached, by which methods, and with which key; everything else is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.conftest import MakeServer
from tests.helpers.support import Server
from vllm_hotswap.access.roles import Access, Role
from vllm_hotswap.api.app import HotswapApp
from vllm_hotswap.api.vllm_routes import (
    VLLM_ADMIN_ROUTES,
    VLLM_USER_ROUTES,
    WEBSOCKET,
    Route,
    RouteTable,
)
from vllm_hotswap.errors import MethodNotAllowed, UnknownRoute
from vllm_hotswap.testing.fake_host import FakeHost

KEYS = Access(user_keys=("user",), admin_keys=("admin",))
CALLERS: dict[str, dict[str, str]] = {
    "nobody": {},
    "stranger": {"authorization": "Bearer wrong"},
    "user": {"authorization": "Bearer user"},
    "admin": {"authorization": "Bearer admin"},
}
PASSES = {
    Role.PUBLIC: ["nobody", "stranger", "user", "admin"],
    Role.USER: ["user", "admin"],
    Role.ADMIN: ["admin"],
}

OWN_ROUTES = [route for route in HotswapApp(FakeHost(("llama",)), Access()).routes if route.handler]

NEVER = (
    "POST /collective_rpc",
    "POST /update_weights",
    "POST /sleep",
    "POST /wake_up",
    "POST /reset_prefix_cache",
    "GET /server_info",
    "GET /is_sleeping",
    "POST /scale_elastic_ep",
    "POST /adapters",
    "DELETE /adapters/a",
    "GET /nowhere",
    "GET /",
    "POST /v1/files",
    "POST /v1/responses/a/b/cancel",
    "GET /v1/responses/a/b",
    "GET /metrics/x",
    "POST /admin",
    "POST /admin/models/llama",
    "POST /admin/models/llama/fly",
    "POST /admin/models//load",
    "POST //v1/chat/completions",
    "POST /V1/chat/completions",
    "GET /v1/realtime",
)


def example(path: str) -> str:
    """Return a path that a pattern matches."""
    for name in ("{alias:path}", "{response_id}", "{file:path}", "{id}"):
        path = path.replace(name, "llama")
    return path


async def ask(server: Server, method: str, path: str, caller: str) -> httpx.Response:
    body = {"json": {"model": "llama", "max_tokens": 1}} if method == "POST" else {}
    return await server.call(method, path, headers=CALLERS[caller], **body)


BY_THE_ROUTER = (
    "model_not_found",
    "adapter_not_found",
    "response_not_found",
    "lease_not_found",
    "wrong_task",
)


def refusal(response: httpx.Response) -> tuple[int, str] | None:
    """Return status and code of a refusal by the outer application, None if the caller passed."""
    if response.status_code not in (401, 403, 404, 405):
        return None
    if not response.headers["content-type"].startswith("application/json"):
        return None  # the fake frontend's own words
    code = response.json()["error"]["code"]
    return None if code in BY_THE_ROUTER else (response.status_code, code)


async def refusals(server: Server, method: str, path: str) -> dict[str, tuple[int, str]]:
    """Return how each caller is refused."""
    answers = {caller: refusal(await ask(server, method, path, caller)) for caller in CALLERS}
    return {caller: answer for caller, answer in answers.items() if answer is not None}


REFUSED = {
    Role.PUBLIC: {},
    Role.USER: {"nobody": (401, "invalid_api_key"), "stranger": (401, "invalid_api_key")},
    Role.ADMIN: {
        "nobody": (401, "invalid_api_key"),
        "stranger": (401, "invalid_api_key"),
        "user": (403, "switch_not_allowed"),
    },
}


@pytest.mark.parametrize(
    "route",
    [route for route in OWN_ROUTES if route.path != "/admin/events"],
    ids=lambda route: f"{route.method} {route.path}",
)
async def test_own_route_lets_in_whom_its_role_lets_in(
    make_server: MakeServer, route: Route
) -> None:
    """Public routes accept every caller, the user's routes a key, the admin's the admin key."""
    server = await make_server(access=KEYS)

    assert REFUSED[route.role] == await refusals(server, route.method, example(route.path))


@pytest.mark.parametrize("line", [line for line in VLLM_USER_ROUTES if "POST" in line])
async def test_inference_route_of_vllm_is_any_users(make_server: MakeServer, line: str) -> None:
    """An inference route of vLLM reaches the model's application with a user's key, only."""
    server = await make_server(access=KEYS)
    method, path = line.split()

    assert REFUSED[Role.USER] == await refusals(server, method, example(path))


@pytest.mark.parametrize("line", VLLM_ADMIN_ROUTES)
async def test_route_of_vllm_that_is_not_for_users_needs_the_admin_key(
    make_server: MakeServer, line: str
) -> None:
    """A route of vLLM that is not for users needs the admin key, whether vLLM mounts it or not."""
    server = await make_server(access=KEYS)
    method, path = line.split()

    assert REFUSED[Role.ADMIN] == await refusals(server, method, path)


@pytest.mark.parametrize("line", NEVER)
async def test_route_that_is_not_in_the_table_is_refused_whatever_the_key(
    make_server: MakeServer, line: str
) -> None:
    """A route outside the table, as vLLM's development routes, gets OpenAI's 404 with any key."""
    server = await make_server(access=KEYS)
    method, path = line.split()

    assert dict.fromkeys(CALLERS, (404, "unknown_route")) == await refusals(server, method, path)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
        ("QUERY", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/v1/models/llama", "GET, HEAD"),
        ("DELETE", "/v1/models/switch", "POST"),
        ("PATCH", "/ping", "GET, HEAD, POST"),
        ("POST", "/load", "GET"),
        ("DELETE", "/v1/responses/resp_1", "GET"),
        ("GET", "/admin/models/a/b/load", "POST"),
    ],
)
async def test_method_that_a_path_does_not_take_is_refused_with_those_that_it_takes(
    server: Server, method: str, path: str, allowed: str
) -> None:
    """A wrong method gets 405 with `Allow`, in OpenAI's form."""
    response = await server.call(method, path)

    assert (405, allowed) == (response.status_code, response.headers["allow"])
    assert "method_not_allowed" == response.json()["error"]["code"]


async def test_head_is_no_method_of_a_route_that_has_no_get(server: Server) -> None:
    """HEAD is refused on a route without GET, and on vLLM's routes where vLLM lacks it."""
    answers = [await server.call("HEAD", path) for path in ("/v1/chat/completions", "/load")]

    assert [(405, "POST"), (405, "GET")] == [(a.status_code, a.headers["allow"]) for a in answers]


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/admin/events", "/metrics"])
async def test_own_reading_route_answers_head(server: Server, path: str) -> None:
    """Our own GET routes answer HEAD, which monitors use."""
    assert 200 == (await server.call("HEAD", path)).status_code


@pytest.mark.parametrize("path", ["/v1/models/", "/health//", "/v1/models/llama/"])
async def test_slash_at_the_end_does_not_matter(server: Server, path: str) -> None:
    """A slash at the end does not matter, as with vLLM, which would redirect."""
    assert 200 == (await server.get(path)).status_code


@pytest.mark.parametrize(
    ("path", "status"),
    [("/api/v1/models", 200), ("/v1/models", 200), ("/apix/v1/models", 404), ("/api", 404)],
)
async def test_prefix_of_a_proxy_is_left_out(server: Server, path: str, status: int) -> None:
    """A proxy's prefix is ignored, whether the proxy removed it or not, as in starlette."""
    answer = await server.request("GET", path, b"", root_path="/api").finish()

    assert status == answer.status


async def test_alias_may_contain_slashes(make_server: MakeServer) -> None:
    """An alias may contain slashes, in the card's route and before an operation of its name."""
    server = await make_server(aliases=("llama", "org/load"), load=("llama",))

    card = await server.get("/v1/models/org/load")
    moved = await server.operate("org/load", "load")

    assert "org/load" == card.json()["id"] == moved.json()["model"]


# --- web sockets ------------------------------------------------------------------------------


async def handshake(
    app: Any, path: str, key: str | None, extensions: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return what the application sends to a WebSocket that connects."""
    said: list[dict[str, Any]] = []
    heard = asyncio.Queue[dict[str, Any]]()
    heard.put_nowait({"type": "websocket.connect"})

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    scope = {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "path": path,
        "root_path": "",
        "query_string": b"model=llama",
        "headers": headers,
        "subprotocols": [],
        "extensions": extensions,
    }
    await app(scope, heard.get, send)
    return said


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/v1/realtime", None, 401),
        ("/v1/realtime", "wrong", 401),
        ("/v1/other", "admin", 404),
        ("/v1/chat/completions", "admin", 404),
    ],
)
async def test_web_socket_is_refused_as_a_request_is(
    make_server: MakeServer, path: str, key: str | None, status: int
) -> None:
    """A refused WebSocket gets status and OpenAI's object where the HTTP server can send them."""
    server = await make_server(access=KEYS)

    start, body = await handshake(server.app, path, key, {"websocket.http.response": {}})

    assert ("websocket.http.response.start", status) == (start["type"], start["status"])
    assert b'"error"' in body["body"]


async def test_web_socket_is_closed_where_no_answer_can_be_given(make_server: MakeServer) -> None:
    """Where no response can be sent, a WebSocket is closed as a policy violation, with reason."""
    server = await make_server(access=KEYS)

    (close,) = await handshake(server.app, "/v1/other", "admin", {})

    assert ("websocket.close", 1008) == (close["type"], close["code"])
    assert "unknown route: WEBSOCKET /v1/other" in close["reason"]


async def test_web_socket_of_vllm_reaches_the_model(make_server: MakeServer) -> None:
    """A user's WebSocket reaches its model; the fake model, which has no such route, is named."""
    server = await make_server(access=KEYS)

    (close,) = await handshake(server.app, "/v1/realtime", "user", {})

    assert ("websocket.close", 1008) == (close["type"], close["code"])
    assert "model 'llama' does not support WEBSOCKET /v1/realtime" in close["reason"]


# --- the table --------------------------------------------------------------------------------


def test_table_refuses_a_route_that_is_given_twice() -> None:
    """The table refuses a route that is given twice, because one would never be used."""
    with pytest.raises(ValueError, match="GET /a is in the table twice"):
        RouteTable([Route("GET", "/a", Role.USER), Route("GET", "/a", Role.ADMIN)])


def test_a_plain_path_hides_patterns_and_the_first_pattern_with_the_method_counts() -> None:
    """A plain path hides patterns for any method; else the first pattern with the method wins."""
    table = RouteTable(
        [
            Route("GET", "/a/{rest:path}/x", Role.USER),
            Route("GET", "/a/{rest:path}", Role.ADMIN),
            Route("POST", "/a/b", Role.PUBLIC),
        ]
    )

    found = [table.find("GET", path) for path in ("/a/b/c/x", "/a/b/c")]

    assert [(Role.USER, {"rest": "b/c"}), (Role.ADMIN, {"rest": "b/c"})] == [
        (route.role, parts) for route, parts in found
    ]
    with pytest.raises(MethodNotAllowed, match=r"GET is not allowed on /a/b; allowed: POST$"):
        table.find("GET", "/a/b")


def test_an_adapter_may_be_called_like_an_operation() -> None:
    """An adapter that is called like an operation can be added and removed."""
    table = RouteTable(
        [
            Route("POST", "/m/{alias:path}/pin", Role.ADMIN),
            Route("DELETE", "/m/{alias:path}/adapters/{name:path}", Role.ADMIN),
        ]
    )

    _, parts = table.find("DELETE", "/m/org/llama/adapters/org/adapters/pin")

    assert {"alias": "org/llama", "name": "org/adapters/pin"} == parts


@pytest.mark.parametrize("path", ["/a/", "/a/b/c", "/b", "/a/b\n/c"])
def test_one_part_of_a_path_is_one_segment(path: str) -> None:
    """A path parameter matches exactly one segment."""
    with pytest.raises(UnknownRoute):
        RouteTable([Route("GET", "/a/{one}", Role.USER)]).find("GET", path)


def test_web_socket_is_no_method_to_try() -> None:
    """`Allow` lists methods only, and no WebSocket."""
    table = RouteTable([Route(WEBSOCKET, "/a", Role.USER), Route("GET", "/a", Role.USER)])

    with pytest.raises(MethodNotAllowed, match=r"POST is not allowed on /a; allowed: GET$"):
        table.find("POST", "/a")
