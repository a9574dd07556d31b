"""The OpenAPI description of our own routes."""

from __future__ import annotations

import re

from tests.conftest import MakeServer
from tests.helpers.support import Server
from vllm_hotswap.access.roles import Access


async def test_description_lists_exactly_our_own_routes(server: Server) -> None:
    """The description has all methods and paths of the table that are not vLLM's, and no others."""
    description = (await server.get("/admin/openapi.json")).json()

    described = {
        (method.upper(), path)
        for path, methods in description["paths"].items()
        for method in methods
    }
    own = {
        (route.method, re.sub(r":path}", "}", route.path))
        for route in server.app.routes
        if route.handler is not None
    }
    assert own == described
    assert ("POST", "/v1/models/switch") in described


async def test_description_tells_roles_bodies_and_errors(server: Server) -> None:
    """Bodies come from the models that check the requests, errors from the errors themselves."""
    description = (await server.get("/admin/openapi.json")).json()

    sleep = description["paths"]["/admin/models/{alias}/sleep"]["post"]
    schemas = description["components"]["schemas"]
    assert ["admin"] == sleep["tags"]
    assert (1, 2) == tuple(
        schemas["SleepOptions"]["properties"]["level"][key] for key in ("minimum", "maximum")
    )
    assert {"200", "400", "401", "403", "404", "409", "503"} == set(sleep["responses"])
    for code in ("model_in_use", "no_room"):
        assert f"`{code}`" in sleep["responses"]["409"]["description"]
    assert "security" not in description["paths"]["/health"]["get"]


async def test_every_operation_has_an_id_of_its_own(server: Server) -> None:
    """Every operation has its own id, of which client generators make names."""
    paths = (await server.get("/admin/openapi.json")).json()["paths"]
    ids = [operation["operationId"] for methods in paths.values() for operation in methods.values()]

    assert len(ids) == len(set(ids))
    assert {"post_admin_leases", "post_admin_leases_by_id"} < set(ids)


async def test_description_is_the_users(make_server: MakeServer) -> None:
    """The description needs a user key."""
    server = await make_server(access=Access(user_keys=["user"]))

    assert 401 == (await server.get("/admin/openapi.json")).status_code
