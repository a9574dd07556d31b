"""A held refusal occupies nothing that other clients could use."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.api.test_refusals import COMPLETION, FEW, RIGHT, WRONG, held, post, until
from tests.conftest import MakeServer
from tests.helpers.listening import Listening, Raw, listening_with
from tests.helpers.support import Server
from vllm_hotswap.access.roles import Access
from vllm_hotswap.config.settings import LimitsConfig
from vllm_hotswap.connections.connections import Connection
from vllm_hotswap.tasks.deadlines import Wheel

ONE_PLACE = LimitsConfig(refusals_per_second=1, connections=1)

OWED = 4
"""Number of refusals after which the next one is held, with `FEW`."""

SHAKE = (
    b"GET /v1/realtime?model=nobody HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nAuthorization: Bearer right\r\n\r\n"
)

FRAME = b"\x81\xfe\x10\x00" + bytes(4) + b"x" * 4096
"""A message of a websocket."""

LARGE = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\n"
    b"Content-Length: 100000000\r\n\r\n"
)

INACTIVE = post("/v1/completions", b'{"model": "qwen", "prompt": "Hi"}', "application/json")


@pytest.fixture
async def keyed(make_server: MakeServer) -> Server:
    """A server with one user key and one admin key."""
    return await make_server(access=Access(user_keys=["right"], admin_keys=["admin"]))


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every wait from ending by itself."""
    monkeypatch.setattr(Wheel, "_set", lambda *_: None)


async def waiting(at: Listening, request: bytes) -> Raw:
    """Return a client whose refusal is held."""
    client = await Raw.connect(at.port)
    await client.get()
    at.shared.door.refusals.charge(["127.0.0.1"], OWED)
    await client.send(request)
    await until(lambda: len(at.shared.door.wheel) == 1)
    return client


def only(at: Listening) -> Any:
    """Return the only connection."""
    (connection,) = at.state.connections
    return connection


async def shut_down(at: Listening) -> None:
    """Shut down as the server does at its end."""
    for connection in list(at.state.connections):
        connection.shutdown()  # type: ignore[union-attr]


# --- places ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("endless")
async def test_what_is_sent_behind_a_held_refusal_keeps_no_place(keyed: Server) -> None:
    """A client that is being refused gets no place for a second request."""
    async with listening_with(keyed, ONE_PLACE) as at, held(at) as client:
        await client.send(WRONG)
        await until(lambda: only(at).pipeline)
        other = await Raw.connect(at.port, source="127.0.0.2")
        await other.send(RIGHT)
        assert 200 == (await other.answer()).status
        await other.close()


@pytest.mark.usefixtures("endless")
async def test_a_websocket_that_is_refused_keeps_no_place(keyed: Server) -> None:
    """A refused WebSocket keeps no place while its refusal is held."""
    async with listening_with(keyed, ONE_PLACE) as at:
        client = await waiting(at, SHAKE)
        other = await Raw.connect(at.port, source="127.0.0.2")
        await other.send(RIGHT)
        assert 200 == (await other.answer()).status
        assert b"" == await client.rest()
        await client.close()
        await other.close()
        await until(lambda: at.shared.places._all.count == 0)


async def test_what_is_served_behind_a_refusal_keeps_its_place(keyed: Server) -> None:
    """A request that is served behind a refusal keeps its place, and is not cut in the middle."""
    good = post("/v1/completions", COMPLETION, "application/json")
    async with listening_with(keyed, ONE_PLACE) as at:
        client = await waiting(at, WRONG + good[:-1])
        assert 401 == (await client.answer()).status
        other = await Raw.connect(at.port, source="127.0.0.2")
        await other.send(RIGHT)
        assert 503 == (await other.answer()).status
        await client.send(good[-1:])
        assert 200 == (await client.answer()).status
        await client.close()
        await other.close()


async def test_no_websocket_begins_before_the_answer_to_what_came_first(keyed: Server) -> None:
    """A handshake would come between; the connection closes behind that answer instead."""
    async with listening_with(keyed, FEW) as at:
        client = await waiting(at, WRONG + SHAKE)
        assert (401, True) == ((told := await client.answer()).status, told.ends)
        assert b"" == await client.rest()
        await client.close()


# --- memory ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("endless")
async def test_a_body_that_comes_with_a_refusal_is_dropped(keyed: Server) -> None:
    """A refused body is dropped, but still read, so that the client's departure is noticed."""
    async with listening_with(keyed, FEW) as at:
        client = await waiting(at, LARGE + b"x" * 300_000)
        for _ in range(20):
            await client.send(b"x" * 300_000)
        await until(lambda: client.unsent == 0)
        connection = only(at)
        assert (0, False) == (len(connection.cycle.body), connection.flow.read_paused)
        client.abort()
        await until(lambda: not at.state.connections and not at.state.tasks)

        assert 0 == len(at.shared.door.wheel)


@pytest.mark.usefixtures("endless")
async def test_messages_of_a_websocket_that_is_refused_are_dropped(keyed: Server) -> None:
    """Messages of a refused WebSocket are dropped, but still read."""
    async with listening_with(keyed, FEW) as at:
        client = await waiting(at, SHAKE)
        for _ in range(100):
            await client.send(FRAME * 20)
        await until(lambda: client.unsent == 0)
        assert 1 == only(at).queue.qsize()  # its connect message
        client.abort()
        await until(lambda: not at.state.connections and not at.state.tasks)


@pytest.mark.usefixtures("endless")
async def test_nothing_is_held_of_a_body_that_breaks(keyed: Server) -> None:
    """A broken body is dropped at once; the answer follows, and the client's end is noticed."""
    head = LARGE.replace(b"wrong", b"right").replace(
        b"Content-Length: 100000000",
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked",
    )
    async with listening_with(keyed, FEW) as at:
        client = await waiting(at, head + b"4e20\r\n" + b"x" * 20_000 + b"\r\nzz\r\n")
        await until(lambda: not at.state.tasks)
        assert 0 == len(only(at).cycle.body) == keyed.app.router.bodies.held_bytes
        client.abort()
        await until(lambda: not at.state.connections)


# --- rates ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("endless")
async def test_a_call_that_is_not_admitted_counts_no_more_before_its_answer(
    make_server: MakeServer,
) -> None:
    """A held call does not count: another request with the same key is admitted."""
    limits = LimitsConfig(refusals_per_second=1, requests_per_minute=1)
    server = await make_server(access=Access(user_keys=["right"]), limits=limits)
    async with listening_with(server, limits) as at:
        client = await waiting(at, INACTIVE)
        other = await Raw.connect(at.port, source="127.0.0.2")
        await other.send(post("/v1/completions", COMPLETION, "application/json"))
        assert 200 == (await other.answer()).status
        await client.close()
        await other.close()


# --- the end of the server ------------------------------------------------------------------


@pytest.mark.usefixtures("endless")
async def test_refusals_that_begin_while_the_server_ends_are_not_held(keyed: Server) -> None:
    """Refusals that start while the server stops are sent at once, unchanged."""
    request = INACTIVE.replace(b"qwen", b"nope")
    async with listening_with(keyed, FEW) as at:
        client = await Raw.connect(at.port)
        await client.send(request[:-1])
        await until(lambda: at.state.tasks)
        at.shared.door.refusals.charge(["127.0.0.1"], OWED)
        await shut_down(at)
        await client.send(request[-1:])
        told = await client.answer()
        await client.close()

    assert (404, True) == (told.status, told.ends)


@pytest.mark.usefixtures("endless")
async def test_a_websocket_is_told_when_the_server_ends(keyed: Server) -> None:
    """At the server's stop, a held WebSocket gets the reason of its refusal."""
    async with listening_with(keyed, FEW) as at:
        client = await waiting(at, SHAKE)
        await shut_down(at)
        assert (404, "model_not_found") == ((told := await client.answer()).status, told.code)
        await client.close()


@pytest.mark.usefixtures("endless")
async def test_a_bad_head_is_told_when_the_server_ends(keyed: Server) -> None:
    """At the server's stop, a bad head gets its held answer, and its connection closes."""
    async with listening_with(keyed, FEW) as at:
        client = await waiting(at, b"nonsense\r\n\r\n")
        await shut_down(at)
        assert (400, "malformed_request") == ((told := await client.answer()).status, told.code)
        assert b"" == await client.rest()
        await client.close()


# --- clients that leave ---------------------------------------------------------------------


async def test_a_connection_that_was_reset_a_moment_ago_is_no_fault(
    keyed: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reset connection, to which uvloop refuses to write without warning, logs no error."""
    async with listening_with(keyed, FEW) as at:
        client = await waiting(at, b"nonsense\r\n\r\n")
        connection: Connection = only(at)

        class Reset:
            """Behaves like uvloop's transport between the reset and `connection_lost`."""

            is_closing = staticmethod(lambda: False)
            abort = staticmethod(connection.transport.abort)
            close = staticmethod(connection.transport.close)

            def write(self, _: bytes) -> None:
                raise RuntimeError("unable to perform operation; the handler is closed")

        monkeypatch.setattr(connection, "transport", Reset())
        await until(lambda: not at.state.connections)
        await client.close()

    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_websocket_that_is_refused_is_no_fault(
    keyed: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error is logged, whether the refusal is sent at once or held, or the client leaves."""
    async with listening_with(keyed, FEW) as at:
        for name in ("uvicorn", "uvicorn.error"):
            monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        told = await Raw.connect(at.port)
        await told.send(SHAKE)
        assert 404 == (await told.answer()).status
        held_back = await waiting(at, SHAKE)
        assert 404 == (await held_back.answer()).status
        gone = await waiting(at, SHAKE)
        gone.abort()
        await until(lambda: not at.state.connections and not at.state.tasks)
        await told.close()
        await held_back.close()

    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
