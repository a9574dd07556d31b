"""The outer application: which routes can be reached, and by web pages of which origins."""

from __future__ import annotations

import httpx
import pytest
from starlette.middleware.cors import CORSMiddleware

from tests.conftest import MakeServer
from tests.helpers.support import CHAT, Server
from vllm_hotswap.access.roles import Access
from vllm_hotswap.api.app import CrossOrigin, HotswapApp
from vllm_hotswap.testing.fake_host import FakeHost

PAGE = "https://page.example"
PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST"}
KEYS = Access(user_keys=("user",))


def browser(server: Server) -> httpx.AsyncClient:
    """A client of a server with `--allowed-origins '["https://page.example"]'`."""
    app = CrossOrigin(server.app, allow_origins=[PAGE], allow_methods=["*"], allow_headers=["*"])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


@pytest.mark.parametrize("path", ["/nowhere", "/v1/files"])
async def test_post_to_a_route_that_is_not_known_is_refused(server: Server, path: str) -> None:
    """A POST to an unknown route gets 404 that says what lists the routes, and reaches no model."""
    response = await server.post(path, json={"model": "llama"})

    error = response.json()["error"]
    assert (404, "unknown_route") == (response.status_code, error["code"])
    assert f"POST {path}" in error["message"]
    assert "GET /admin/openapi.json" in error["message"]


async def test_version_is_told_while_nothing_can_be_served() -> None:
    """`/version` is vLLM's, needs no key, and works before any load and after the host's death."""
    app = HotswapApp(FakeHost(("llama",)), KEYS, vllm_version="0.32.0")
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        response = await client.get("/version")

    assert (200, {"version": "0.32.0"}) == (response.status_code, response.json())


async def test_preflight_needs_no_key(make_server: MakeServer) -> None:
    """A preflight needs no key, because browsers never send one with it."""
    server = await make_server(access=KEYS)
    async with browser(server) as client:
        response = await client.options(CHAT, headers=PREFLIGHT)

    assert 200 == response.status_code
    assert PAGE == response.headers["access-control-allow-origin"]


async def test_preflight_of_another_origin_is_refused(make_server: MakeServer) -> None:
    """Preflights are accepted only from the origins of `--allowed-origins`."""
    server = await make_server(access=KEYS)
    async with browser(server) as client:
        response = await client.options(CHAT, headers={**PREFLIGHT, "origin": "https://evil"})

    assert 400 == response.status_code


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/models", 200), ("/v1/models/gpt", 404), ("/nowhere", 404)]
)
async def test_page_of_an_allowed_origin_can_read_our_own_answers(
    server: Server, path: str, status: int
) -> None:
    """Pages of an allowed origin can read our errors, which browsers hide without the header."""
    async with browser(server) as client:
        response = await client.get(path, headers={"origin": PAGE})

    assert (status, PAGE) == (response.status_code, response.headers["access-control-allow-origin"])


async def test_page_can_read_that_its_model_is_not_active(server: Server) -> None:
    """An error of the router has the header, as vLLM's own errors do."""
    async with browser(server) as client:
        response = await client.post(CHAT, json={"model": "qwen"}, headers={"origin": PAGE})

    assert (404, PAGE) == (response.status_code, response.headers["access-control-allow-origin"])


async def test_headers_of_a_models_own_application_are_not_doubled(server: Server) -> None:
    """Headers appear once, although vLLM adds the same middleware to each model's application."""
    server.host.engines["llama"].app.add_middleware(CORSMiddleware, allow_origins=[PAGE])
    async with browser(server) as client:
        response = await client.post(CHAT, json={"model": "llama"}, headers={"origin": PAGE})

    assert [PAGE] == response.headers.get_list("access-control-allow-origin")
    assert ["Origin"] == response.headers.get_list("vary")
