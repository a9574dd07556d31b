"""Refusals: a client may cause as many as it likes, but not at the expense of other clients."""

from __future__ import annotations

import asyncio
import errno
import shutil
import socket
import ssl
import struct
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import websockets
from starlette.datastructures import Headers

from tests.conftest import MakeServer
from tests.helpers.listening import PATIENCE_S, Listening, Raw, listening_with
from tests.helpers.support import Server
from tests.helpers.virtual import VirtualLoop
from vllm_hotswap.access.roles import Access
from vllm_hotswap.api import refusals
from vllm_hotswap.api.refusals import BURST_S, MAX_PAUSE_S, MOST_CLIENTS, KnownKey, Refusals
from vllm_hotswap.config.settings import LimitsConfig
from vllm_hotswap.connections import arrivals
from vllm_hotswap.connections.listen import ListenFlags
from vllm_hotswap.server import run as life
from vllm_hotswap.tasks.deadlines import PER_TURN, TICK_S, Deadlines, Wheel

FEW = LimitsConfig(refusals_per_second=1)
"""Three at once, then one per second."""

AT_ONCE = int(BURST_S)

WRONG = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer wrong\r\n\r\n"
RIGHT = WRONG.replace(b"wrong", b"right")
HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
NOWHERE = HEALTH.replace(b"health", b"nowhere")
COMPLETION = b'{"model": "llama", "prompt": "Hi", "max_tokens": 1}'


def post(path: str, body: bytes, kind: str) -> bytes:
    """Send a request with the user's key."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Authorization: Bearer right"]
    lines += [f"Content-Type: {kind}", f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


BROKEN = post("/v1/completions", b"[" * 100, "application/json")
"""A request that the model's own application refuses."""


class Time:
    """A clock's time."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


# --- the buckets ----------------------------------------------------------------------------


def test_a_few_mistakes_cost_no_wait() -> None:
    """A few refusals cost no wait: so many per second for ever, and three times that at once."""
    time = Time()
    refused = Refusals(20, time)

    assert {0} == {refused.charge(["A"]) for _ in range(60)}
    for _ in range(1000):
        time.now_s += 1 / 20
        assert 0 == pytest.approx(refused.charge(["A"]), abs=1e-6)


def test_what_is_beyond_them_takes_its_turn() -> None:
    """Refusals beyond them wait, each longer than the last, up to a limit; other clients do not."""
    refused = Refusals(20, Time())
    refused.charge(["A"], 60)

    waits = [refused.charge(["A"]) for _ in range(300)]

    assert [pytest.approx(n / 20) for n in range(1, 101)] == waits[:100]
    assert {MAX_PAUSE_S} == set(waits[100:])
    assert 0 == refused.charge(["B"])


def test_the_poorest_of_those_who_stand_for_a_client_counts() -> None:
    """Of a client's buckets, the emptiest counts; a key has one bucket for all its addresses."""
    refused, key = Refusals(20, Time()), KnownKey("a key")
    refused.charge([key], 80)

    assert pytest.approx(1.05) == refused.charge(["an address", key])
    assert 0 == refused.charge(["an address"])


def test_what_is_refused_to_known_keys_keeps_nobody_at_the_door() -> None:
    """A known key's refusals wait, but do not delay its address at the connection."""
    refused, key = Refusals(20, Time()), KnownKey("a key")
    refused.charge(["an address", key], 1000)

    assert 0 == refused.strangers_owe_s("an address")
    assert MAX_PAUSE_S == refused.charge(["an address"])


def test_keys_take_no_room_of_addresses() -> None:
    """Buckets of addresses stay, however many keys are refused."""
    refused = Refusals(20, Time())
    refused.charge(["an address"], 1000)
    for number in range(MOST_CLIENTS + 50):
        refused.charge([KnownKey(str(number))])

    assert MAX_PAUSE_S == refused.charge(["an address"])
    assert f"<Refusals clients=1 keys={MOST_CLIENTS}>" == repr(refused)


def test_nothing_is_owed_for_long() -> None:
    """Debts are forgotten after a while, however many there were."""
    time = Time()
    refused = Refusals(20, time)
    refused.charge(["A"], 1_000_000)

    assert pytest.approx(2 * MAX_PAUSE_S) == refused.owed_s("A")
    time.now_s += 2 * MAX_PAUSE_S
    assert 0 == refused.owed_s("A")
    time.now_s += BURST_S
    assert 0 == refused.charge(["A"], 60)


def test_a_request_that_is_served_makes_up_for_a_refusal() -> None:
    """Served requests make up for refusals, so a shared address has no debt if most succeed."""
    refused = Refusals(20, Time())
    for _ in range(1000):
        refused.charge(["A"])
        refused.note_served("A")

    assert 0 == refused.owed_s("A")


def test_few_clients_are_remembered() -> None:
    """Only a limited number of clients is remembered, so many addresses fill no memory."""
    refused = Refusals(20, Time())
    for number in range(MOST_CLIENTS + 50):
        refused.charge([number], 200)

    assert f"<Refusals clients={MOST_CLIENTS} keys=0>" == repr(refused)
    assert 0 == refused.owed_s(49)
    assert refused.owed_s(50)


def test_waits_of_any_length_share_one_timer() -> None:
    """Waits of any length share one timer; each ends in its turn, unless it is withdrawn."""

    async def waits() -> list[str]:
        loop, wheel, called = asyncio.get_running_loop(), Wheel(), list[str]()
        began_s = loop.time()

        def call(name: str) -> Callable[[], None]:
            return lambda: called.append(f"{name} {loop.time() - began_s >= float(name)}")

        def fail() -> None:
            raise RuntimeError("it is closed")

        for name in ("3", "0.2", "1", "0.1"):
            wheel.call_later(float(name), call(name))
        wheel.call_later(0.5, fail)
        wheel.call_later(0.5, call("0.5"))
        take_back = wheel.call_later(2, call("2"))
        take_back()
        assert 1 == loop.timers  # type: ignore[attr-defined]
        await asyncio.sleep(3 + 2 * TICK_S)
        take_back()
        assert 0 == len(wheel)
        return called

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        called = runner.run(waits())

    assert ["0.1 True", "0.2 True", "0.5 True", "1 True", "3 True"] == called


@dataclass(eq=False)
class Waiter:
    """Wait, and call back when the time is over."""

    loop: asyncio.AbstractEventLoop
    end: Callable[[], None]
    client: object = None


def of_a_wheel(end: Callable[[], None]) -> None:
    """Start many waits that end together."""
    wheel = Wheel()
    for _ in range(10 * PER_TURN):
        wheel.call_later(1, end)


def of_deadlines(end: Callable[[], None]) -> None:
    """Start the deadlines of many connections that end together."""
    deadlines = Deadlines[Waiter](1, lambda waiter: waiter.end())
    for _ in range(10 * PER_TURN):
        deadlines.begin(Waiter(asyncio.get_running_loop(), end))


@pytest.mark.parametrize("begin", [of_a_wheel, of_deadlines])
def test_waits_that_end_together_end_in_turns(
    begin: Callable[[Callable[[], None]], None],
) -> None:
    """Waits that end together end over several turns, so that others are not delayed."""

    async def turns() -> list[int]:
        loop, found, turn = asyncio.get_running_loop(), list[int](), 0

        def end() -> None:
            if not found:
                loop.call_soon(step)
            found.append(turn)

        def step() -> None:
            nonlocal turn
            turn += 1
            if turn < 100:
                loop.call_soon(step)

        begin(end)
        await asyncio.sleep(2)
        return found

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        found = Counter(runner.run(turns()))

    assert [PER_TURN] * 10 == list(found.values())


# --- requests -------------------------------------------------------------------------------


@pytest.fixture
async def keyed(make_server: MakeServer) -> Server:
    """A server with one user key, and one admin key."""
    return await make_server(access=Access(user_keys=["right"], admin_keys=["admin"]))


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep waits from ending by themselves."""
    monkeypatch.setattr(Wheel, "_set", lambda *_: None)


async def until(condition: Callable[[], object]) -> None:
    """Wait for a state."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # what changes it has no event
            await asyncio.sleep(0.01)


@asynccontextmanager
async def held(
    at: Listening, request: bytes = WRONG, source: str | None = None
) -> AsyncIterator[Raw]:
    """Return a client that has had its first refusals, and waits for one more."""
    client = await Raw.connect(at.port, source=source)
    for _ in range(AT_ONCE):
        await client.send(request)
        assert 400 <= (await client.answer()).status < 500
    waiting = len(at.shared.door.wheel)
    await client.send(request)
    await until(lambda: len(at.shared.door.wheel) > waiting)
    yield client
    await client.close()


async def test_an_answer_that_waits_is_the_same(keyed: Server) -> None:
    """A delayed refusal is the same response, and its connection stays open."""
    async with listening_with(keyed, LimitsConfig(refusals_per_second=20)) as at:
        client = await Raw.connect(at.port)
        told = []
        for _ in range(65):
            await client.send(WRONG)
            told.append(await client.answer())
        last = await client.send(RIGHT)
        assert 200 == (await last.answer()).status
        await client.close()

    assert {(401, "invalid_api_key", told[0].body)} == {(t.status, t.code, t.body) for t in told}


@pytest.mark.parametrize(
    "request_",
    [
        WRONG,
        b"GET /nowhere HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\n\r\n",
        b"PUT /health HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        post("/v1/models/switch", b"{}", "application/json"),
        post("/v1/completions", b"x", "text/plain"),
        BROKEN,
    ],
    ids=["401", "404", "405", "403", "415", "400 of the model"],
)
async def test_whoever_is_refused_again_and_again_waits(keyed: Server, request_: bytes) -> None:
    """Repeated refusals delay one client and no other at its address, on any connection."""
    async with listening_with(keyed, FEW) as at:
        before = await Raw.connect(at.port)
        await before.get()
        async with held(at, request_):
            later = await Raw.connect(at.port)
            for other in (before, later):
                await other.send(RIGHT)
                assert 200 == (await other.answer()).status
                await other.close()
            assert 1 == len(at.shared.door.wheel)


@asynccontextmanager
async def beyond_its_rate(make_server: MakeServer) -> AsyncIterator[tuple[Listening, bytes]]:
    """A server of two keys, one of which may make no more calls, and its next call."""
    limits = LimitsConfig(refusals_per_second=1, requests_per_minute=1)
    server = await make_server(access=Access(user_keys=["right", "other"]), limits=limits)
    request = post("/v1/completions", COMPLETION, "application/json")
    async with listening_with(server, limits) as at:
        first = await Raw.connect(at.port)
        await first.send(request)
        assert 200 == (await first.answer()).status
        yield at, request
        await first.close()


async def test_a_key_beyond_its_rate_waits_wherever_it_comes_from(make_server: MakeServer) -> None:
    """Refusals of a key beyond its rate share one bucket, from any address; other keys' do not."""
    async with beyond_its_rate(make_server) as (at, request), held(at, request):
        elsewhere = await Raw.connect(at.port, source="127.0.0.2")
        await elsewhere.send(request)
        await until(lambda: len(at.shared.door.wheel) == 2)
        other = await Raw.connect(at.port, source="127.0.0.3")
        await other.send(request.replace(b"right", b"other"))
        assert 200 == (await other.answer()).status
        for client in (elsewhere, other):
            await client.close()


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("known", [[], ["right"]], ids=["no keys", "a wrong key"])
async def test_a_key_that_is_nobodys_is_no_client(
    make_server: MakeServer, known: list[str]
) -> None:
    """An unknown key has no bucket, so strangers who send the same one do not share a wait."""
    request = NOWHERE if not known else WRONG
    request = request.replace(b"Host", b"Authorization: Bearer EMPTY\r\nHost")
    server = await make_server(access=Access(user_keys=known))
    async with listening_with(server, FEW) as at, held(at, request):
        other = await Raw.connect(at.port, source="127.0.0.2")
        await other.send(request)
        assert (401 if known else 404) == (await other.answer()).status
        await other.close()


async def test_one_request_is_one_client(keyed: Server) -> None:
    """A request counts as one client however many keys it has, so it cannot evict many buckets."""
    async with listening_with(keyed) as at:
        client = await Raw.connect(at.port)
        keys = [f"X-API-Key: {number}" for number in range(100)]
        assert 401 == (await client.get("/v1/models", *keys)).status
        assert "<Refusals clients=1 keys=0>" == repr(at.shared.door.refusals)
        assert 404 == (await client.get("/nowhere", *keys, "Authorization: Bearer right")).status
        assert "<Refusals clients=1 keys=1>" == repr(at.shared.door.refusals)
        await client.close()


async def test_clients_of_a_trusted_proxy_have_a_bucket_each(keyed: Server) -> None:
    """Clients of a trusted proxy have a bucket each; the proxy has none."""
    trusted = ListenFlags(forwarded_allow_ips=["127.0.0.1"])
    from_a = WRONG.replace(b"Host", b"X-Forwarded-For: 192.0.2.1\r\nHost")
    from_b = from_a.replace(b"192.0.2.1", b"192.0.2.2").replace(b"wrong", b"mistyped")
    async with listening_with(keyed, FEW, trusted) as at, held(at, from_a):
        client = await Raw.connect(at.port)
        await client.send(from_b)
        assert 401 == (await client.answer()).status
        await client.close()
        assert 1 == len(at.shared.door.wheel)


@pytest.mark.usefixtures("endless")
async def test_a_client_that_goes_is_not_waited_for(keyed: Server) -> None:
    """A refusal's wait ends when its client leaves; nothing is left of the request."""
    async with listening_with(keyed, FEW) as at:
        async with held(at):
            pass
        await until(lambda: not at.state.connections and not at.state.tasks)

        assert 0 == len(at.shared.door.wheel)


async def test_what_a_model_answers_makes_up_for_refusals(keyed: Server) -> None:
    """What a model answers makes up for refusals; routes without a key do not."""
    async with listening_with(keyed) as at:
        refused = at.shared.door.refusals
        refused._clock = lambda: 1000.0
        refused.charge(["127.0.0.1"], 40)
        owed_s = refused.owed_s("127.0.0.1")
        client = await Raw.connect(at.port)
        assert 200 == (await client.get()).status
        assert owed_s == refused.owed_s("127.0.0.1")
        await client.send(post("/v1/completions", COMPLETION, "application/json"))
        assert 200 == (await client.answer()).status
        await client.close()

    assert pytest.approx(owed_s - 1 / 10) == refused.owed_s("127.0.0.1")


async def test_who_waits_for_a_refusal_gives_way(keyed: Server) -> None:
    """A connection that waits for a refusal gives up its place to others."""
    limits = LimitsConfig(refusals_per_second=1, connections=1)
    async with listening_with(keyed, limits) as at, held(at) as waiting:
        other = await Raw.connect(at.port)
        await other.send(RIGHT)
        assert 200 == (await other.answer()).status
        assert b"" == await waiting.rest()
        await other.close()


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("model", ["nobody", "qwen", ""], ids=["unknown", "not active", "broken"])
async def test_nothing_is_held_for_a_refusal_that_waits(keyed: Server, model: str) -> None:
    """A waiting refusal holds neither its body nor a lease, for which a switch would wait."""
    body = b'{"model": "%s", "prompt": "%s"}' % (model.encode(), b"x" * 10_000)
    request = post("/v1/completions", body, "application/json") if model else BROKEN
    async with listening_with(keyed, FEW) as at, held(at, request):
        assert 0 == keyed.app.router.bodies.held_bytes
        assert {0} == {len(model.leases) for model in keyed.coordinator.registry}


async def test_a_refusal_of_the_model_that_waits_is_the_same(keyed: Server) -> None:
    """A delayed refusal of a model is the same except for the times in it."""
    async with listening_with(keyed, LimitsConfig(refusals_per_second=20)) as at:
        client = await Raw.connect(at.port)
        told = []
        for _ in range(65):
            await client.send(BROKEN)
            told.append(await client.answer())
        await client.close()

    changing = ("date", "x-hotswap-waited")
    for one in told:
        for name in changing:
            one.headers.pop(name, None)
    assert [told[0]] * 65 == told
    assert 400 == told[0].status


@pytest.mark.usefixtures("endless")
async def test_a_server_that_stops_waits_for_no_refusal(keyed: Server) -> None:
    """A server that stops answers waiting refusals at once."""
    async with listening_with(keyed, FEW) as at, held(at) as client:
        for connection in list(at.state.connections):
            connection.shutdown()  # type: ignore[union-attr]
        told = await client.answer()

    assert (401, True) == (told.status, told.ends)


async def test_a_head_that_is_refused_may_have_to_wait_for_its_answer(server: Server) -> None:
    """A refused head may have to wait on its own connection, and gets its answer in the end."""
    async with listening_with(server, FEW) as at:
        for _ in range(AT_ONCE):
            client = await Raw.connect(at.port)
            await client.send(b"nonsense\r\n\r\n")
            assert 400 == (await client.answer()).status
            await client.close()
        client = await Raw.connect(at.port)
        await client.send(b"nonsense\r\n\r\n")
        await until(lambda: len(at.shared.door.wheel) == 1)
        assert 400 == (await client.answer()).status
        await client.close()


async def test_the_refusal_of_a_websocket_may_have_to_wait(make_server: MakeServer) -> None:
    """A refused WebSocket handshake may have to wait, like a request."""
    server = await make_server()
    async with listening_with(server, FEW) as at:
        address = f"ws://127.0.0.1:{at.port}/v1/realtime?model=nobody"
        for _ in range(AT_ONCE):
            with pytest.raises(websockets.InvalidStatus):
                await websockets.connect(address, proxy=None)
        last = asyncio.create_task(asyncio.wait_for(websockets.connect(address, proxy=None), 30))
        await until(lambda: len(at.shared.door.wheel) == 1)
        with pytest.raises(websockets.InvalidStatus) as refused:
            await last

    assert 404 == refused.value.response.status_code


@pytest.mark.usefixtures("endless")
async def test_a_websocket_that_goes_while_it_waits_is_no_fault(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A WebSocket that leaves while it waits leaves no trace, and no stack trace in the log."""
    server = await make_server()
    shake = b"GET /v1/realtime?model=nobody HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
    shake += b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    shake += b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    async with listening_with(server, FEW) as at:
        at.shared.door.refusals.charge(["127.0.0.1"], 4)
        client = await Raw.connect(at.port)
        await client.send(shake)
        await until(lambda: len(at.shared.door.wheel) == 1)
        await client.close()
        await until(lambda: not at.state.tasks)

        assert 0 == len(at.shared.door.wheel)
    assert not [record for record in caplog.records if record.exc_info]


async def test_requests_that_were_sent_ahead_in_vain_count_each(server: Server) -> None:
    """Pipelined requests on a connection that broke a limit count each, if work was done."""
    async with listening_with(server) as at:
        client = await Raw.connect(at.port)
        await client.send(HEALTH * 64)
        await client.rest()
        await client.close()
        paid_s = at.shared.door.refusals._paid_s["127.0.0.1"] - asyncio.get_running_loop().time()

    assert 10 < paid_s * LimitsConfig().refusals_per_second <= 17


# --- new connections ------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return the connections that have more than a socket."""
    found: list[object] = []

    class Noted(life.Connection):
        def __init__(self, *args: object) -> None:
            found.append(self)
            super().__init__(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(life, "Connection", Noted)
    return found


def reset(port: int) -> None:
    """Open a connection and reset it at once."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def test_nothing_is_built_for_a_connection_that_is_dead(
    server: Server, built: list[object]
) -> None:
    """Dead connections cost nothing: a client behind a thousand of them is answered."""
    async with listening_with(server) as at:
        for _ in range(1000):
            reset(at.port)
        client = await Raw.connect(at.port)
        assert 200 == (await client.get()).status
        await client.close()

    assert 1 == len(built)


async def test_what_is_left_of_a_connection_that_was_reset_is_not_answered(
    server: Server, built: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection reset while it waited with a request is dropped unanswered."""
    monkeypatch.setattr(arrivals, "MAX_PAUSE_S", 0.5)
    async with listening_with(server) as at:
        at.shared.door.refusals.charge(["127.0.0.1"], 10_000)
        sock = socket.create_connection(("127.0.0.1", at.port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.sendall(NOWHERE)
        await until(lambda: len(at.shared.door.wheel) == 1)
        sock.close()
        await until(lambda: at.shared.places._all.count == 0)

    assert [] == built


async def test_nothing_is_built_before_the_first_byte(server: Server, built: list[object]) -> None:
    """A silent connection has a place and a deadline; nothing is built before its first byte."""
    async with listening_with(server, LimitsConfig(head_timeout=0.2)) as at:
        silent = [await Raw.connect(at.port) for _ in range(3)]
        gone = await Raw.connect(at.port)
        await until(lambda: at.shared.places._all.count == 4)
        await gone.close()
        assert [b"", b"", b""] == [await client.rest() for client in silent]
        await until(lambda: at.shared.places._all.count == 0)
        for client in silent:
            await client.close()

    assert [] == built


async def test_who_has_gone_meanwhile_is_known(
    keyed: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that resets its connection is still charged for the work that it caused."""
    said, sock = arrivals._has_data, socket.socket()

    looks: list[bool | None] = []

    def said_and_gone(theirs: socket.socket) -> bool | None:
        looks.append(said(theirs))
        if looks[-1]:  # the last look before it is built
            sock.close()
        return looks[-1]

    monkeypatch.setattr(arrivals, "_has_data", said_and_gone)
    async with listening_with(keyed) as at:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.connect(("127.0.0.1", at.port))
        sock.sendall(WRONG)
        paid_s = at.shared.door.refusals._paid_s
        await until(lambda: paid_s)

    assert "127.0.0.1" in paid_s
    assert None not in paid_s


async def test_connections_that_come_at_once_are_all_served(server: Server) -> None:
    """All simultaneous connections are served, though only some are accepted per turn."""
    async with listening_with(server) as at:
        clients = await asyncio.gather(*(Raw.connect(at.port) for _ in range(100)))
        told = [await client.get() for client in clients]
        for client in clients:
            await client.close()

    assert {200} == {answer.status for answer in told}


async def test_an_address_that_owes_much_comes_in_late(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address with large debts is let in late, and others do not wait for it."""
    for module in (arrivals, refusals):
        monkeypatch.setattr(module, "MAX_PAUSE_S", 0.5)
    async with listening_with(server) as at:
        at.shared.door.refusals.charge(["127.0.0.1"], 10_000)
        client = await Raw.connect(at.port)
        await client.send(NOWHERE)
        await until(lambda: len(at.shared.door.wheel) == 1)
        other = await Raw.connect(at.port, source="127.0.0.2")
        assert 200 == (await other.get()).status
        assert 404 == (await client.answer()).status
        await client.close()
        await other.close()


def owe(at: Listening) -> None:
    """Put the clients' address deep into debt for good."""
    at.shared.door.refusals._clock = Time()
    at.shared.door.refusals.charge(["127.0.0.1"], 10_000)


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize(
    "request_",
    [
        HEALTH,
        HEALTH.replace(b"health", b"ready"),
        RIGHT,
        WRONG.replace(b"wrong", b"admin"),
        WRONG.replace(b"Authorization: Bearer wrong", b"X-API-Key: right"),
        post("/v1/completions", COMPLETION, "application/json"),
        HEALTH + WRONG,
    ],
    ids=["health", "ready", "user", "admin", "x-api-key", "completion", "ahead"],
)
async def test_who_is_let_in_does_not_wait_at_the_door(keyed: Server, request_: bytes) -> None:
    """A client that will be admitted does not wait, whatever strangers at its address owe."""
    async with listening_with(keyed) as at:
        owe(at)
        stranger = await Raw.connect(at.port)
        await stranger.send(WRONG)
        await until(lambda: len(at.shared.door.wheel) == 1)
        client = await Raw.connect(at.port)
        await client.send(request_)
        assert 200 == (await client.answer()).status
        await client.close()
        await stranger.close()


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize(
    "request_",
    [
        WRONG,
        NOWHERE,
        RIGHT.replace(b"GET", b"PUT"),
        post("/v1/models/switch", b"{}", "application/json"),
        HEALTH.replace(b"health", b"v1/realtime").replace(
            b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        ),
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01",
    ],
    ids=["401", "404", "405", "403", "websocket", "nonsense", "tls"],
)
async def test_who_is_going_to_be_refused_waits_at_the_door(
    keyed: Server, built: list[object], request_: bytes
) -> None:
    """A client that will be refused waits before anything is built for it."""
    async with listening_with(keyed) as at:
        owe(at)
        client = await Raw.connect(at.port)
        await client.send(request_)
        await until(lambda: len(at.shared.door.wheel) == 1)
        await client.close()

    assert [] == built


async def test_a_key_beyond_its_rate_keeps_no_other_at_the_door(make_server: MakeServer) -> None:
    """A key beyond its rate delays no other key of the same address, as behind a gateway."""
    async with beyond_its_rate(make_server) as (at, request):
        clients = [await Raw.connect(at.port) for _ in range(10)]
        for client in clients:
            await client.send(request)
        await until(lambda: len(at.shared.door.wheel) == 10 - AT_ONCE)
        assert 0 == at.shared.door.refusals.strangers_owe_s("127.0.0.1")
        other = await Raw.connect(at.port)
        await other.send(request.replace(b"right", b"other"))
        assert 200 == (await other.answer()).status
        assert 10 - AT_ONCE == len(at.shared.door.wheel)
        for client in [other, *clients]:
            await client.close()


async def comes_in_later(at: Listening, built: list[object]) -> None:
    """Check that a client with a valid call waits for entry, and is served then."""
    client = await Raw.connect(at.port)
    await client.send(RIGHT)
    await until(lambda: len(at.shared.door.wheel) == 1)
    assert [] == built
    assert 200 == (await client.answer()).status
    await client.close()


async def test_a_key_in_debt_waits_a_moment(keyed: Server, built: list[object]) -> None:
    """A key in debt waits a moment even with a valid call; a client gone by then cost little."""
    async with listening_with(keyed) as at:
        owe(at)
        mark = keyed.app.access.mark(Headers({"x-api-key": "right"}))
        at.shared.door.refusals.charge([KnownKey(mark or "")], 10_000)
        await comes_in_later(at, built)


async def test_without_keys_everybody_waits_a_moment(
    server: Server, built: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without keys every client waits a moment, except on routes that never need a key."""
    monkeypatch.setattr(arrivals, "MAX_PAUSE_S", 1000.0)
    async with listening_with(server) as at:
        owe(at)
        await comes_in_later(at, built)


async def test_a_head_that_comes_in_pieces_is_looked_at_again(
    keyed: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that comes in pieces is inspected again until it is whole; then it decides."""
    monkeypatch.setattr(arrivals, "MAX_PAUSE_S", 1000.0)
    looks: list[object] = []
    look = arrivals.first_head
    monkeypatch.setattr(arrivals, "first_head", lambda said: looks.append(said) or look(said))
    async with listening_with(keyed) as at:
        owe(at)
        client = await Raw.connect(at.port)
        await client.send(RIGHT[:30])
        await until(lambda: len(looks) == 2)
        await client.send(RIGHT[30:])
        assert 200 == (await client.answer()).status
        await client.close()

    assert [RIGHT[:30], RIGHT[:30]] == looks[:2]


async def test_a_head_too_long_to_be_looked_at_waits_a_moment(
    keyed: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head too long to inspect waits a moment: it may belong to a client that is let in."""
    monkeypatch.setattr(arrivals, "MAX_PAUSE_S", 1000.0)
    async with listening_with(keyed) as at:
        owe(at)
        client = await Raw.connect(at.port)
        field = b"X-Long: " + b"x" * arrivals.PEEK_BYTES
        await client.send(RIGHT.replace(b"Host", field + b"\r\nHost"))
        assert 200 == (await client.answer()).status
        await client.close()


async def test_a_connection_that_said_nothing_after_all_has_its_deadline(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection without data has its deadline, even if the system reported data to read."""
    said, looks = arrivals._has_data, list[bool | None]()

    def nothing_at_first(sock: socket.socket) -> bool | None:
        looks.append(None if len(looks) < 2 else said(sock))
        return looks[-1]

    monkeypatch.setattr(arrivals, "_has_data", nothing_at_first)
    async with listening_with(server) as at:
        client = await Raw.connect(at.port)
        await until(lambda: at.shared.places._all.count)
        [acceptor] = at.acceptors
        [arrival] = acceptor.arrivals
        arrival._readable()
        assert [None, None] == looks
        assert arrival in at.shared.door.silent
        assert 200 == (await client.get()).status
        await client.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_a_system_with_nothing_left_is_not_asked_again_and_again(
    server: Server, code: int
) -> None:
    """Without free resources, accepting pauses; waiting clients are served once there are some."""
    async with listening_with(server) as at:
        [acceptor] = at.acceptors
        sock, asked = acceptor._sock, list[int]()

        class Exhausted:
            def accept(self) -> tuple[socket.socket, object]:
                asked.append(code)
                raise OSError(code, "nothing left")

            def fileno(self) -> int:
                return sock.fileno()

        acceptor._sock = Exhausted()  # type: ignore[assignment]
        client = await Raw.connect(at.port)
        await client.send(HEALTH)
        await until(lambda: asked)
        assert acceptor._pause_timer is not None
        assert not asyncio.get_running_loop().remove_reader(sock)
        acceptor._sock = sock
        assert 200 == (await client.answer()).status
        await client.close()


@pytest.fixture
def certified(tmp_path: Path) -> tuple[dict[str, str], ssl.SSLContext]:
    """Return flags for a server with TLS, and the matching settings of its clients."""
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x"]
    command += ["-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    return {"ssl_keyfile": key, "ssl_certfile": certificate}, context


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
async def test_with_tls_everybody_waits_a_moment(
    keyed: Server,
    certified: tuple[dict[str, str], ssl.SSLContext],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With TLS every client waits a moment: refusals cannot be foreseen."""
    monkeypatch.setattr(arrivals, "MAX_PAUSE_S", 1000.0)
    given, context = certified
    async with listening_with(keyed, **given) as at:
        owe(at)
        client = Raw(*await asyncio.open_connection("127.0.0.1", at.port, ssl=context))
        await client.send(RIGHT)
        assert 200 == (await client.answer()).status
        await client.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
async def test_tls_handshakes_have_places_and_an_end(
    server: Server, certified: tuple[dict[str, str], ssl.SSLContext]
) -> None:
    """TLS handshakes have places and a deadline, so silent ones do not block other clients."""
    given, context = certified
    limits = LimitsConfig(head_timeout=2, connections=3, connections_per_address=3)
    async with listening_with(server, limits, **given) as at:
        begun = [await Raw.connect(at.port) for _ in range(5)]
        for client in begun:
            await client.send(b"\x16\x03\x01\x02\x00")
        await until(lambda: at.shared.places._all.count == 3)
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port, ssl=context)
        served = Raw(reader, writer)
        assert 200 == (await served.get()).status
        for client in begun:
            await client.rest()
            await client.close()
        await served.close()
        await until(lambda: at.shared.places._all.count == 0)


@pytest.mark.usefixtures("endless")
async def test_a_proxy_comes_in_at_once(server: Server) -> None:
    """A proxy enters at once, because it stands for many clients."""
    trusted = ListenFlags(forwarded_allow_ips=["127.0.0.1"])
    async with listening_with(server, None, trusted) as at:
        at.shared.door.refusals.charge([None, "127.0.0.1"], 10_000)
        client = await Raw.connect(at.port)
        assert 200 == (await client.get()).status
        await client.close()


async def test_connections_that_have_not_begun_end_with_the_server(server: Server) -> None:
    """When the server stops, silent connections and those that wait for their debts end."""
    async with listening_with(server) as at:
        silent = await Raw.connect(at.port)
        await until(lambda: at.shared.places._all.count == 1)
        at.shared.door.refusals.charge(["127.0.0.1"], 10_000)
        late = await Raw.connect(at.port)
        await late.send(NOWHERE)
        await until(lambda: len(at.shared.door.wheel) == 1)
    assert [b"", b""] == [await silent.rest(), await late.rest()]
    await silent.close()
    await late.close()

    assert 0 == at.shared.places._all.count
