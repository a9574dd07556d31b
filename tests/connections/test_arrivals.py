"""New connections on a real socket: which ones are looked at and set up, and in which order."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.api.test_refusals import AT_ONCE, FEW, WRONG, until
from tests.conftest import MakeServer
from tests.helpers.listening import Listening, Raw, listening_with
from tests.helpers.support import Server
from vllm_hotswap.access.roles import Access
from vllm_hotswap.connections import arrivals
from vllm_hotswap.connections.arrivals import PER_TURN, Arrival
from vllm_hotswap.connections.connections import Connection
from vllm_hotswap.tasks.steps import Steps


@pytest.fixture
async def at(server: Server) -> AsyncIterator[Listening]:
    async with listening_with(server) as listening:
        yield listening


class Standstill:
    """No admission of a connection ends before `go_on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(Steps, "_continue", lambda *_: None)

    def go_on(self, at: Listening) -> None:
        self._monkeypatch.undo()
        at.shared.door.steps._continue(asyncio.get_running_loop())


@pytest.fixture
def standstill(at: Listening, monkeypatch: pytest.MonkeyPatch) -> Standstill:
    return Standstill(monkeypatch)


async def test_no_more_is_accepted_than_can_be_looked_at(
    at: Listening, standstill: Standstill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only as many connections are accepted as can be examined; others use no descriptors."""
    at.shared.door.most_waiting = 3
    (acceptor,) = at.acceptors
    clients = [await Raw.connect(at.port) for _ in range(PER_TURN + 10)]
    await until(lambda: len(at.shared.door.steps) == 3)
    assert PER_TURN + 3 == len(acceptor.arrivals)
    standstill.go_on(at)
    for client in clients:
        assert 200 == (await client.get()).status
        await client.close()


async def test_who_has_gone_before_its_turn_has_none(at: Listening, standstill: Standstill) -> None:
    """A client that left before its turn gets none, and a server that stops leaves none behind."""
    (acceptor,) = at.acceptors
    clients = [await Raw.connect(at.port) for _ in range(PER_TURN + 3)]
    await until(lambda: len(at.shared.door.steps) == 3)
    acceptor.close()
    assert not acceptor.arrivals
    standstill.go_on(at)
    await until(lambda: not len(at.shared.door.steps))
    assert 0 == at.shared.places._all.count
    for client in clients:
        assert b"" == await client.rest()
        await client.close()


async def test_addresses_take_turns(
    at: Listening, standstill: Standstill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client at another address does not wait behind all earlier connections."""
    looked_at: list[str | None] = []
    begin = Arrival._begin

    def noted(self: Arrival) -> None:
        looked_at.append(self.address)
        begin(self)

    monkeypatch.setattr(Arrival, "_begin", noted)
    many = [await Raw.connect(at.port) for _ in range(5 * PER_TURN)]
    one = await Raw.connect(at.port, source="127.0.0.2")
    await until(lambda: len(at.shared.door.steps) == 4 * PER_TURN + 1)
    at.shared.door.steps._turn(asyncio.get_running_loop())

    assert "127.0.0.2" in looked_at[PER_TURN:][:2]
    for client in (*many, one):
        await client.close()


async def test_nothing_is_built_for_who_has_gone_since_it_was_heard(
    at: Listening, standstill: Standstill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that closed in the meantime gets no connection object at its turn."""
    built: list[Connection] = []
    make = Connection.__init__
    monkeypatch.setattr(
        Connection, "__init__", lambda self, *given: (built.append(self), make(self, *given))[1]
    )
    (acceptor,) = at.acceptors
    sock = socket.create_connection(("127.0.0.1", at.port))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await until(lambda: acceptor.arrivals)
    (arrival,) = acceptor.arrivals
    at.shared.door.steps._left = 0  # the turn is over
    sock.sendall(b"GET")
    await until(lambda: len(at.shared.door.steps) == 1)
    sock.close()
    await until(lambda: arrivals._has_data(arrival._sock) is False)
    standstill.go_on(at)
    await until(lambda: not acceptor.arrivals)

    assert not built


async def test_who_has_waited_for_its_debt_takes_its_turn(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address in debt does not come before others."""
    server = await make_server(access=Access(user_keys=["right"]))
    async with listening_with(server, FEW) as at:
        at.shared.door.refusals.charge(["127.0.0.1"], AT_ONCE + 2)
        client = await Raw.connect(at.port)
        await client.send(WRONG)
        await until(lambda: len(at.shared.door.wheel))
        Standstill(monkeypatch)
        at.shared.door.steps._left = 0
        await until(lambda: len(at.shared.door.steps) == 1)
        assert not at.state.connections
        monkeypatch.undo()
        at.shared.door.steps._continue(asyncio.get_running_loop())
        assert 401 == (await client.answer()).status
        await client.close()


async def test_nothing_is_built_for_who_has_closed(
    at: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection object is made for a closed client: it would not read the answer."""
    built: list[Connection] = []
    make = Connection.__init__
    monkeypatch.setattr(
        Connection, "__init__", lambda self, *given: (built.append(self), make(self, *given))[1]
    )
    at.shared.door.steps._left = 0  # the turn is over
    with monkeypatch.context() as patch:
        patch.setattr(Steps, "_continue", lambda *_: None)
        with socket.create_connection(("127.0.0.1", at.port)) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            await until(lambda: len(at.shared.door.steps) == 1)
        (acceptor,) = at.acceptors
        (arrival,) = acceptor.arrivals
        await until(lambda: arrivals._has_data(arrival._sock) is False)
    at.shared.door.steps._continue(asyncio.get_running_loop())
    await until(lambda: not acceptor.arrivals)

    assert not built


async def test_what_ends_while_it_is_built_is_told_nothing_wrong(
    at: Listening, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A client of a stopping server is not reported as one connection too many."""
    make = Connection.__init__

    def ended(self: Connection, *given: Any) -> None:
        make(self, *given)
        given[-1].close()

    monkeypatch.setattr(Connection, "__init__", ended)
    client = await Raw.connect(at.port)
    await client.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    with contextlib.suppress(ConnectionResetError):
        assert b"" == await client.rest()
    await until(lambda: not at.state.connections)

    assert "too_many_connections" not in caplog.text
    assert 0 == at.shared.places._all.count
    await client.close()
