"""Connection places: for all, for each address, and those that are reserved."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.conftest import MakeServer
from tests.helpers.listening import Raw, exchange, listening, listening_with
from tests.helpers.support import Server
from vllm_hotswap.access.roles import Access
from vllm_hotswap.config.settings import LimitsConfig
from vllm_hotswap.connections.listen import ListenFlags
from vllm_hotswap.connections.places import Place, Places
from vllm_hotswap.system.addresses import network_of
from vllm_hotswap.testing.fake_settings import FakeSettings

A, B, C = "192.0.2.1", "192.0.2.2", "2001:db8::1"
ADMIN = "Authorization: Bearer the-key"


@dataclass(eq=False)
class Client:
    """A connection, and whether it has given way."""

    places: Places
    address: str | None
    is_closed: bool = False
    place: Place = field(init=False)

    def yield_place(self) -> None:
        self.is_closed = True

    def comes(self) -> bool:
        place = self.places.take(self, self.address)
        if place is not None:
            self.place = place
        return place is not None


def busy(places: Places, address: str | None, count: int) -> list[Client]:
    """Open so many connections with a request each."""
    clients = [Client(places, address) for _ in range(count)]
    for client in clients:
        assert client.comes()
        client.place.set_busy()
    return clients


def test_who_has_waited_longest_gives_way() -> None:
    """The connection that has waited longest gives way, never one with a request under way."""
    places = Places(4)
    (first,) = busy(places, A, 1)
    second, third, fourth = (Client(places, address) for address in (A, B, B))
    assert all(client.comes() for client in (second, third, fourth))
    second.place.set_busy()
    second.place.set_waiting()

    assert Client(places, C).comes()

    assert [False, False, True, False] == [c.is_closed for c in (first, second, third, fourth)]


def test_no_address_has_all_places() -> None:
    """An address cannot fill all places: its own connections give way, not those of others."""
    places = Places(6)
    other = Client(places, B)
    assert other.comes()
    mine = [Client(places, A) for _ in range(4)]

    assert all(client.comes() for client in mine)

    assert [True, False, False, False] == [client.is_closed for client in mine]
    assert not other.is_closed


def test_an_address_whose_connections_are_busy_gets_no_more() -> None:
    """An address whose connections are all busy gets no more until one ends; others are served."""
    places = Places(6)
    clients = busy(places, A, 3)

    assert not Client(places, A).comes()
    assert Client(places, B).comes()
    clients[0].place.leave()
    assert Client(places, A).comes()


def test_a_proxy_and_a_local_socket_have_no_bound_of_their_own() -> None:
    """A proxy and a local socket have no limit of their own: they stand for many clients."""
    places = Places(6, per_address=1, is_proxy=lambda address: address == A)

    busy(places, A, 3)
    busy(places, None, 3)

    assert not Client(places, None).comes()


def test_few_places_are_kept_and_no_address_has_them_all() -> None:
    """Few places are reserved, no address gets them all, and a connection knows if it has one."""
    places = Places(64)
    busy(places, A, 28)
    busy(places, B, 28)

    kept = [*busy(places, A, 2), *busy(places, B, 2), *busy(places, C, 2)]

    assert all(client.place.is_kept for client in kept)
    assert not Client(places, A).comes()
    assert Client(places, "192.0.2.3").comes()


def test_a_place_is_given_back_once() -> None:
    """A place is given back once, however often its connection is told to end."""
    places = Places(2)
    (client,) = busy(places, A, 1)

    client.place.leave()
    client.place.set_waiting()
    client.place.leave()

    assert "<Places 0 of 2, waiting=0, kept 0 of 0>" == repr(places)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_a_client_is_an_address_or_a_network_of_ipv6(one: str, other: str, same: bool) -> None:
    """A client is an IPv4 address or an IPv6 network, in which it can choose its address."""
    assert same is (network_of(one) == network_of(other))


# --- through a real listener ----------------------------------------------------------------

REQUEST = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


async def occupied(server: Server, port: int, count: int) -> list[Raw]:
    """Open so many connections with a request that does not end."""
    clients = []
    for _ in range(count):
        clients.append(await Raw.connect(port))
        body = b'{"model": "llama"}'
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        await clients[-1].send(head + body)
    while server.in_flight["llama"] < count:
        await server.settled()
    return clients


@pytest.fixture
async def slow(make_server: MakeServer) -> Server:
    """A server whose llama answers no request."""
    return await make_server(
        settings={"llama": FakeSettings(token_s=3600)}, access=Access(admin_keys=["the-key"])
    )


async def test_health_checks_and_admins_are_served_where_all_connections_are_busy(
    slow: Server,
) -> None:
    """If all connections are busy, health checks and admins are served; others get 503."""
    limits = LimitsConfig(connections=16, connections_per_address=14)
    async with listening(slow, limits) as port:
        clients = await occupied(slow, port, 14)
        refused, rest = await exchange(port, REQUEST)
        served = []
        for path, *fields in [("/health",), ("/ping",), ("/admin/status", ADMIN)]:
            client = await Raw.connect(port)
            served.append(await client.get(path, *fields))
            await client.rest()
            await client.close()
        unknown, _ = await exchange(port, b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
        for client in clients:
            await client.close()

    assert (503, "too_many_connections", b"") == (refused.status, refused.code, rest)
    assert "1" == refused.headers["retry-after"]
    assert [200, 200, 200] == [told.status for told in served]
    assert all(told.ends for told in served)
    assert 503 == unknown.status


PING = b"POST /ping HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\nx"


async def test_nobody_is_waited_for_who_needs_no_key(server: Server) -> None:
    """A route that needs no key is answered before its body, whose rest is not read for long."""
    async with listening(server) as port:
        client = await Raw.connect(port)
        await client.send(PING)
        told = await client.answer()
        await client.close()

    assert 200 == told.status


async def test_kept_places_are_not_for_bodies_of_strangers(slow: Server) -> None:
    async with listening(slow, LimitsConfig(connections=16, connections_per_address=14)) as port:
        clients = await occupied(slow, port, 14)
        told, _ = await exchange(port, PING)
        for client in clients:
            await client.close()

    assert (503, "too_many_connections") == (told.status, told.code)


async def test_connections_that_wait_shut_nobody_out(server: Server) -> None:
    """Any number of silent, half-sent and answered connections leave room for others."""
    async with listening_with(server, LimitsConfig(connections=8)) as at:
        clients = []
        for number in range(40):
            client = await Raw.connect(at.port)
            clients.append(client)
            if number % 3 == 1:
                await client.send(REQUEST[:30])
            if number % 3 == 2:
                await client.get()
        last = await Raw.connect(at.port)
        told = await last.get("/v1/models")

        assert len(at.state.connections) <= 8
        for client in [*clients, last]:
            await client.close()

    assert 200 == told.status


async def test_a_refused_client_is_told_where_even_kept_places_are_taken(slow: Server) -> None:
    """Where even reserved places are taken, a client is refused before it sends anything."""
    async with listening(slow, LimitsConfig(connections=1)) as port:
        clients = await occupied(slow, port, 1)
        told, rest = await exchange(port)
        await clients[0].close()

    assert (503, "too_many_connections", b"") == (told.status, told.code, rest)


async def test_a_proxy_that_is_trusted_has_more_than_one_address(slow: Server) -> None:
    """A trusted proxy gets more places than one address: it stands for many clients."""
    limits = LimitsConfig(connections=8, connections_per_address=1)
    trusted = ListenFlags(forwarded_allow_ips=["127.0.0.0/8"])
    async with listening_with(slow, limits, trusted) as at:
        clients = await occupied(slow, at.port, 4)
        told, _ = await exchange(
            at.port, REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        )
        for client in clients:
            await client.close()

    assert 200 == told.status
