"""Requests generated from the description of our own routes: none breaks the server.

schemathesis checks each answer: no status, content type or shape that the description does not
promise, no route that a missing key opens, and nothing but OpenAI's object for an error.
"""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case, Response, checks
from starlette.types import Receive, Scope, Send

from tests.helpers.support import Server
from vllm_hotswap.access.roles import Access
from vllm_hotswap.models.footprint import Usage

pytestmark = pytest.mark.slow

ADMIN = {"authorization": "Bearer admin"}
KEYS = Access(user_keys=("user",), admin_keys=("admin",))
MIB = 1 << 20
EXAMPLES = 12
"""Requests for each route, besides schemathesis's edge cases for each of its parameters."""


class Living:
    """A server on fake engines that starts and stops with the client's event loop."""

    def __init__(self, *, dies: bool = False) -> None:
        self._dies = dies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._server.app(scope, receive, send)
            return
        await receive()
        # Two of the three models fit, so that a load has to make room.
        self._server = await Server(access=KEYS, budget=Usage(5 * MIB, 5 * MIB)).start()
        if self._dies:
            self._server.host.kill()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._server.stop()
        await send({"type": "lifespan.shutdown.complete"})


def schema_of(app: Living) -> Any:
    schema = schemathesis.openapi.from_asgi("/admin/openapi.json", app, headers=ADMIN)
    return schema.exclude(path="/admin/events")  # its answer ends only with the server


NOT_CHECKED = [
    checks.not_a_server_error,  # 503 is fine where the description has it
    checks.positive_data_acceptance,  # 1.0 is an integer for JSON Schema, and not for us
    checks.ignored_auth,  # tests of the route table use every kind of key
]

WELL = schema_of(Living())
DEAD = schema_of(Living(dies=True))

made_up = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def is_openais_error(response: Response) -> None:
    """Check that an error is OpenAI's object, complete."""
    if response.status_code >= 400:
        assert "application/json" == response.headers["content-type"][0]
        error: dict[str, Any] = response.json()["error"]
        assert {"message", "type", "param", "code"} == set(error)
        assert error["message"]


@WELL.parametrize()
@made_up
def test_no_request_breaks_the_server(case: Case) -> None:
    """Whatever an admin sends, the answer is one that the description promises."""
    response = case.call_and_validate(headers=ADMIN, excluded_checks=NOT_CHECKED)

    is_openais_error(response)


@DEAD.parametrize()
@made_up
def test_no_request_breaks_a_server_whose_engine_host_is_dead(case: Case) -> None:
    """No request breaks the server even when its engine host is dead."""
    response = case.call_and_validate(headers=ADMIN, excluded_checks=NOT_CHECKED)

    is_openais_error(response)
