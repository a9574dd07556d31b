"""Connections and request heads: excess is refused, with an error in the usual form."""

from __future__ import annotations

import array
import asyncio
import fcntl
import itertools
import json
import random
import termios

import pytest
import websockets
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from tests.conftest import MakeServer
from tests.helpers.depth import examples
from tests.helpers.faults import RawClient
from tests.helpers.listening import (
    PATIENCE_S,
    Listening,
    Raw,
    exchange,
    listening,
    listening_to,
    listening_with,
)
from tests.helpers.support import Server, lease as lease_of
from vllm_hotswap.access.roles import Access
from vllm_hotswap.config.settings import LimitsConfig
from vllm_hotswap.connections import connections
from vllm_hotswap.models.registry import current_lease
from vllm_hotswap.testing.fake_settings import FakeSettings

HEAD = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
SMALL = LimitsConfig(head_bytes=4000, head_fields=20, url_bytes=1000)
ADMIN = "Authorization: Bearer the-key"


def chunked(path: bytes = b"/v1/models/switch", *fields: bytes) -> bytes:
    lines = [b"POST %s HTTP/1.1" % path, b"Host: 127.0.0.1", b"Transfer-Encoding: chunked"]
    return b"\r\n".join([*lines, *fields, b"", b""])


# --- heads ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (HEAD + b"X: " + b"x" * 5000 + b"\r\n\r\n", (431, "head_too_large")),
        (HEAD + b"X: " + b"x" * 5000, (431, "head_too_large")),
        (HEAD + b"a: b\r\n" * 40 + b"\r\n", (431, "head_too_large")),
        (HEAD + b"a: b\r\n" * 40, (431, "head_too_large")),
        (b"GET /" + b"x" * 2000 + b" HTTP/1.1\r\n\r\n", (414, "url_too_long")),
        (b"GET /" + b"x" * 2000, (414, "url_too_long")),
        (b"\r\n" * 3000, (431, "head_too_large")),
        (b"nonsense\r\n\r\n", (400, "malformed_request")),
        (b"\x16\x03\x01\x02\x00\x01\x00", (400, "malformed_request")),
        (b"GET /health HTTP/1.1\nHost: x\n\n", (400, "malformed_request")),
        (b"GET /health\r\n\r\n", (400, "malformed_request")),
        (b"GET /health HTTP/2.0\r\n\r\n", (400, "malformed_request")),
        (b"GET http://[::1 HTTP/1.1\r\n\r\n", (400, "malformed_request")),
    ],
)
async def test_a_head_beyond_a_bound_is_refused(
    server: Server, sent: bytes, expected: tuple[int, str]
) -> None:
    """A too large head, whole or not, gets OpenAI's error object, and the connection closes."""
    async with listening(server, SMALL) as port:
        told, rest = await exchange(port, sent)

    assert expected == (told.status, told.code)
    assert told.ends
    assert b"" == rest


async def test_a_head_within_its_bounds_is_answered_in_any_pieces(server: Server) -> None:
    """A head within its bounds may come byte by byte, with the next request behind it."""
    request = HEAD + b"a: " + b"b" * 300 + b"\r\n\r\n"
    async with listening(server, SMALL) as port:
        client = await Raw.connect(port)
        await client.send(*(request[n : n + 1] for n in range(len(request))))
        first = await client.answer()
        await client.send(request + request[:50], request[50:])
        more = [await client.answer(), await client.answer()]
        await client.close()

    assert [200, 200, 200] == [told.status for told in (first, *more)]


async def test_how_a_head_is_cut_does_not_matter(server: Server) -> None:
    """One piece and many pieces get the same answer, the one that the bounds require."""
    chance = random.Random(15)  # noqa: S311
    async with listening(server, SMALL) as port:
        for _ in range(examples(40)):
            url, size = chance.randrange(1, 1100), chance.randrange(4200)
            fields = chance.randrange(25)
            request = b"GET /%s HTTP/1.1\r\n" % (b"u" * url) + b"a: b\r\n" * fields
            request += b"x: " + b"y" * size + b"\r\n\r\n"
            is_large = fields >= 20 or url + 1 + 6 * fields + size + 5 > 4000
            expected = 414 if url + 1 > 1000 else 431 if is_large else 404

            assert {expected} == {
                await status_of(port, [request]),
                await status_of(port, cut(request, chance)),
            }


def cut(data: bytes, chance: random.Random) -> list[bytes]:
    """Split into at most six pieces, at random places."""
    places = sorted(chance.sample(range(1, len(data)), 5))
    return [data[a:b] for a, b in itertools.pairwise([0, *places, len(data)])]


async def status_of(port: int, pieces: list[bytes]) -> int:
    client = await Raw.connect(port)
    await client.send(*pieces)
    told = await client.answer()
    await client.close()
    return told.status


async def test_vllms_flags_for_heads_count_where_they_are_smaller(server: Server) -> None:
    """`--h11-max-*` set the same bounds as ours, and the smaller ones count."""
    small = {"h11_max_incomplete_event_size": 500, "h11_max_header_count": 5}
    async with listening(server, **small) as port:
        long, _ = await exchange(port, HEAD + b"a: " + b"b" * 600 + b"\r\n\r\n")
        many, _ = await exchange(port, HEAD + b"a: b\r\n" * 5 + b"\r\n")

    assert [431, 431] == [long.status, many.status]
    assert "more than 500 bytes" in json.loads(long.body)["error"]["message"]
    assert "more than 5 header fields" in json.loads(many.body)["error"]["message"]


async def test_a_head_in_many_pieces_is_parsed_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head in many pieces is given to the parser in few, as each copies the field so far."""
    seen: list[int] = []

    def counting(self: connections.Connection, shared: object, *rest: object) -> None:
        original(self, shared, *rest)  # type: ignore[arg-type]
        parser = self.parser

        class Counting:
            def feed_data(self, data: bytes) -> None:
                seen.append(len(data))
                parser.feed_data(data)

            def __getattr__(self, name: str) -> object:
                return getattr(parser, name)

        self.parser = Counting()

    original = connections.Connection.__init__
    monkeypatch.setattr(connections.Connection, "__init__", counting)
    request = HEAD + b"a: " + b"b" * 2000 + b"\r\n\r\n"
    async with listening(server) as port:
        client = await Raw.connect(port)
        await client.send(*(request[n : n + 10] for n in range(0, len(request), 10)))
        told = await client.answer()
        await client.close()

    assert 200 == told.status
    assert len(request) == sum(seen)
    assert len(seen) <= 2


async def test_what_follows_a_refused_head_is_not_read(server: Server) -> None:
    """Whatever follows a refused head, one answer comes back, and the connection closes."""
    async with listening(server, SMALL) as port:
        told, rest = await exchange(port, b"GET /" + b"x" * (1 << 22), HEAD + b"\r\n")

    assert 414 == told.status
    assert b"" == rest


async def test_requests_ahead_of_a_bad_one_are_answered(server: Server) -> None:
    """A later head's error does not replace the answers to requests before it."""
    async with listening(server, SMALL) as port:
        for bad in (b"nonsense\r\n\r\n", b"GET http://[::1 HTTP/1.1\r\n\r\n", b"G" * 9):
            client = await Raw.connect(port)
            await client.send((HEAD + b"\r\n") * 2 + bad)
            told = [await client.answer(), await client.answer()]
            rest = await client.rest()
            await client.close()

            assert [200, 200] == [answer.status for answer in told]
            assert b"HTTP/1.1 200" not in rest


async def test_requests_that_are_sent_at_once_are_answered_up_to_a_number(server: Server) -> None:
    """Pipelined requests are answered up to a number; beyond it the connection closes."""
    async with listening(server) as port:
        client = await Raw.connect(port)
        await client.send((HEAD + b"\r\n") * 5000)
        rest = await client.rest()
        await client.close()

    assert connections.PIPELINED + 1 == rest.count(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    ("fields", "together"),
    [(b"a: b\r\n" * 250, 2), (b"a: " + b"b" * 20_000 + b"\r\n", 4), (b"a: b\r\n", 16)],
    ids=["many", "long", "small"],
)
async def test_heads_that_are_sent_at_once_hold_no_more_than_one_may(
    fields: bytes, together: int
) -> None:
    """Pipelined heads count together, text and fields; beyond the bound the connection closes."""
    goes_on = asyncio.Event()

    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        await goes_on.wait()
        await sized({**scope, "path": "/0"}, receive, send)

    request = HEAD + fields + b"\r\n"
    async with listening_to(answers) as at, asyncio.timeout(PATIENCE_S):
        client = await Raw.connect(at.port)
        await client.send(request * (together + 2))
        connection = await connection_of(at)
        while not connection._ignores_input:
            connection.flow.resume_reading()  # as whenever the application reads
            await asyncio.sleep(0.001)
        goes_on.set()
        rest = await client.rest()
        await client.close()

    assert 1 + together == rest.count(b"HTTP/1.1 200 OK")


async def test_a_request_knows_nothing_of_the_one_before() -> None:
    """A request never sees its predecessor's context, whether it waited or is read later."""
    found: list[str | None] = []

    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        before = current_lease.get()
        found.append(before.alias if before else None)
        current_lease.set(lease_of(scope["path"], 1))
        while (await receive()).get("more_body", False):
            pass
        await sized({**scope, "path": "/0"}, receive, send)

    request = HEAD + b"\r\n"
    body = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % MIB + bytes(MIB)
    async with listening_to(answers) as at, asyncio.timeout(PATIENCE_S):
        client = await Raw.connect(at.port)
        await client.send(request + request)
        await client.answer()
        await client.answer()
        await client.send(body)
        await client.answer()
        await client.send(request)
        await client.answer()
        await client.close()

    assert [None] * 4 == found


async def connection_of(at: Listening) -> connections.Connection:
    """Return the only connection, as soon as it exists."""
    while not at.state.connections:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    (connection,) = at.state.connections
    assert isinstance(connection, connections.Connection)
    return connection


async def test_bodies_that_wait_are_bounded() -> None:
    """A body that is too large is dropped; after the earlier answers the connection closes."""
    goes_on = asyncio.Event()

    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        await goes_on.wait()
        await sized({**scope, "path": "/0"}, receive, send)

    post = b"POST /later HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    async with listening_to(answers) as at, asyncio.timeout(PATIENCE_S):
        client = await Raw.connect(at.port)
        await client.send(HEAD + b"\r\n" + post % 10 + bytes(10))
        connection = await connection_of(at)
        await client.send(post % (8 * MIB) + bytes(8 * MIB))
        while not connection._ignores_input or client.unsent or unread(connection):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        waiting = sum(len(cycle.body) for cycle, _ in connection.pipeline)
        goes_on.set()
        rest = await client.rest()
        await client.close()

    assert 10 == waiting
    assert 2 == rest.count(b"HTTP/1.1 200 OK")
    assert 1 == rest.count(b"connection: close")


def unread(connection: connections.Connection) -> int:
    """Return the number of bytes that have arrived and that the server has not read yet."""
    found = array.array("i", [0])
    fcntl.ioctl(connection.transport.get_extra_info("socket").fileno(), termios.FIONREAD, found)
    return found[0]


@pytest.mark.parametrize(
    "ahead",
    [
        HEAD + b"\r\n",
        (HEAD + b"\r\n") * 50,
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + bytes(90_000),
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
        b"",
    ],
    ids=["one", "too-many", "too-large", "unfinished", "none"],
)
async def test_a_client_that_goes_is_noticed_whatever_it_has_sent_ahead(ahead: bytes) -> None:
    """A client's departure is noticed, whatever it has sent ahead; its request stops then."""
    begun, told = asyncio.Event(), asyncio.Queue[str]()

    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        begun.set()
        told.put_nowait((await receive())["type"])

    async with listening_to(answers) as at, asyncio.timeout(PATIENCE_S):
        client = await Raw.connect(at.port)
        await client.send(HEAD + b"\r\n")
        await begun.wait()
        connection = await connection_of(at)
        await client.send(ahead)
        while ahead and not connection.pipeline and not connection._ignores_input:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await client.close()

        assert await told.get() == "http.disconnect"


# --- trailers -------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False])
async def test_trailers_never_become_headers(make_server: MakeServer, together: bool) -> None:
    """An admin key at the end of a body authorises nothing."""
    server = await make_server(access=Access(admin_keys=["the-key"]))
    body = b'{"model": "qwen"}'
    end = b"%x\r\n%s\r\n0\r\n%s\r\n\r\n" % (len(body), body, ADMIN.encode())
    async with listening(server) as port:
        client = await Raw.connect(port)
        await client.send(*([chunked() + end] if together else [chunked(), end]))
        in_trailer = await client.answer()
        again = await client.get()
        await client.send(chunked(b"/v1/models/switch", ADMIN.encode()), end)
        in_head = await client.answer()
        await client.close()

    assert (403, "switch_not_allowed") == (in_trailer.status, in_trailer.code)
    assert 200 == again.status
    assert 200 == in_head.status


@pytest.mark.parametrize(
    "end",
    [
        b"0\r\n" + b"a: b\r\n" * 4000,
        b"0\r\na: " + b"b" * 20_000,
        b"0\r\na: " + b"b" * 20_000 + b"\r\n\r\n",
        b"1;" + b"x" * 20_000,
        b"0" * 20_000,
    ],
)
async def test_trailers_and_extensions_of_chunks_are_bounded(server: Server, end: bytes) -> None:
    """Trailers and chunk extensions are bounded, whether or not they are whole."""
    async with listening(server) as port:
        client = await Raw.connect(port)
        pieces = [end[n : n + 3000] for n in range(0, len(end), 3000)]
        await client.send(chunked(), *pieces)
        told = await client.answer()
        await client.rest()
        await client.close()

    assert (431, "head_too_large") == (told.status, told.code)
    assert told.ends


WANTS_MORE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_body_is_never_taken_for_a_request(server: Server, pieces: int) -> None:
    """After a request to upgrade, the parser would look for the other protocol in the body."""
    hidden = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"POST /seen HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(hidden)
    sent = [head + WANTS_MORE + b"\r\n", hidden]
    async with listening(server) as port:
        told, rest = await exchange(port, *(sent if pieces == 2 else [b"".join(sent)]))

    assert (400, "upgrade_with_body", b"") == (told.status, told.code, rest)


async def test_a_request_behind_one_for_another_protocol_is_answered(server: Server) -> None:
    """A request behind one for another protocol is answered in HTTP/1.1, even in one piece."""
    one = b"GET /ping HTTP/1.1\r\nHost: x\r\n"
    async with listening(server) as port:
        told, rest = await exchange(
            port, 2 * (one + WANTS_MORE + b"\r\n") + one + b"Connection: close\r\n\r\n"
        )

    assert 200 == told.status
    assert 2 == rest.count(b"HTTP/1.1 200 OK")


async def test_a_broken_body_is_told_in_the_form_of_every_error(server: Server) -> None:
    """A broken body gets an error in the usual form, not as plain text."""
    async with listening(server) as port:
        told, rest = await exchange(port, chunked(), b"zz\r\n")

    assert (400, "malformed_request", b"") == (told.status, told.code, rest)
    assert 0 == server.app.router.bodies.held_bytes


# --- deadlines ------------------------------------------------------------------------------


async def test_a_connection_that_says_nothing_is_closed(server: Server) -> None:
    """A silent connection is closed without an answer, because nothing was requested."""
    async with listening(server, LimitsConfig(head_timeout=0.2)) as port:
        client = await Raw.connect(port)
        rest = await client.rest()
        await client.close()

    assert b"" == rest


@pytest.mark.parametrize("before", [b"", HEAD + b"\r\n"])
async def test_a_head_has_to_arrive_in_time(server: Server, before: bytes) -> None:
    """A head's time is limited, however steadily it comes, on a new connection or a used one."""
    async with listening(server, LimitsConfig(head_timeout=0.3)) as port:
        client = await Raw.connect(port)
        if before:
            await client.send(before)
            await client.answer()

        async def trickle() -> None:
            await client.send(HEAD)
            while True:
                await client.send(b"a: b\r\n")
                await asyncio.sleep(0.02)

        trickling = asyncio.create_task(trickle())
        told = await client.answer()
        rest = await client.rest()
        trickling.cancel()
        await client.close()

    assert (408, "head_timeout") == (told.status, told.code)
    assert told.ends
    assert b"" == rest


async def test_a_head_that_came_too_early_has_its_time_after_the_answer(
    make_server: MakeServer,
) -> None:
    """An early start of the next head does not disturb the request under way."""
    server = await make_server(settings={"llama": FakeSettings(token_s=0.1)})
    body = json.dumps({"model": "llama", "max_tokens": 8}).encode()
    ask = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    async with listening(server, LimitsConfig(head_timeout=0.2)) as port:
        client = await Raw.connect(port)
        await client.send(ask + b"Content-Length: %d\r\n\r\n%s" % (len(body), body) + HEAD)
        answer = await client.answer()
        late = await client.answer()
        await client.rest()
        await client.close()

    assert 200 == answer.status
    assert (408, "head_timeout") == (late.status, late.code)


async def test_an_idle_connection_is_closed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle connection is closed after `VLLM_HTTP_TIMEOUT_KEEP_ALIVE`, early answers included."""
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "1")
    early = b"POST /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\n"
    async with listening(server) as port:
        client = await Raw.connect(port)
        await client.get()
        await client.send(early)
        told = await client.answer()
        await client.send(b"0123456789")
        rest = await client.rest()
        await client.close()

    assert 404 == told.status
    assert b"" == rest


async def test_a_body_that_goes_on_after_its_answer_is_cut(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that got 401 has limited time to send the rest."""
    monkeypatch.setattr(connections, "REST_S", 0.3)
    server = await make_server(access=Access(["a-key"]))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n"
    async with listening(server) as port:
        client = await Raw.connect(port)
        await client.send(head)
        told = await client.answer()

        async def go_on() -> None:
            while True:
                await client.send(b"x")
                await asyncio.sleep(0.01)

        going_on = asyncio.create_task(go_on())
        rest = await client.rest()
        going_on.cancel()
        await client.close()

    assert 401 == told.status
    assert b"" == rest


async def test_the_rest_of_a_body_may_come_in_time(make_server: MakeServer) -> None:
    """If the rest of a body comes in time, the connection can be used again."""
    server = await make_server(access=Access(["a-key"]))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n"
    async with listening(server) as port:
        client = await Raw.connect(port)
        await client.send(head)
        refused = await client.answer()
        await client.send(b"x" * 100_000 + HEAD + b"\r\n")
        told = await client.answer()
        await client.close()

    assert [401, 200] == [refused.status, told.status]


async def test_a_client_that_takes_no_answer_is_let_go(server: Server) -> None:
    """A client that does not read is disconnected, even with no model and so no drain involved."""
    asked = b"GET /admin/openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    async with listening_with(server, LimitsConfig(client_timeout=0.1)) as at:
        with RawClient(at.port, receive_bytes=1024) as client:
            while not at.state.connections or not stuck(at.state):
                client.send(asked)
                await asyncio.sleep(0.01)
            async with asyncio.timeout(PATIENCE_S):
                while at.state.connections:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)


def stuck(state: ServerState) -> bool:
    """Whether the one connection has more to send than it can at present."""
    (connection,) = state.connections
    return bool(connection.flow.write_paused)  # type: ignore[union-attr]


MIB = 1 << 20


async def sized(scope: Scope, _: Receive, send: Send) -> None:
    """Answer with as many MiB as the path says, in one piece.

    With `?last` in the URL, the connection is closed after the answer.
    """
    body = bytes(int(scope["path"][1:]) * MIB)
    fields = [(b"content-length", b"%d" % len(body))]
    if scope["query_string"] == b"last":
        fields.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def large(reader: asyncio.StreamReader, step_s: float = 0) -> int:
    """Read an answer in pieces, with a pause after each, and return the length of its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    size = missing = int(head.partition(b"content-length: ")[2].split()[0])
    while missing:
        piece = await reader.read(min(missing, 256 << 10))
        assert piece, f"the connection ended, {missing} of {size} bytes are missing"
        missing -= len(piece)
        await asyncio.sleep(step_s)
    return size


async def test_a_client_that_has_taken_an_answer_has_all_its_time_for_the_next() -> None:
    """A client's time for an answer is not reduced by data left unsent in the one before."""
    async with listening_to(sized, LimitsConfig(client_timeout=0.3)) as at:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.write(b"GET /12 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        first = await large(reader)
        writer.write(b"GET /48 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        second = await large(reader, step_s=0.01)  # 1.9 s or more; the first watch lasts 0.9 s
        writer.close()

    assert [12 * MIB, 48 * MIB] == [first, second]


async def test_a_client_that_stops_behind_its_last_answer_is_let_go() -> None:
    """A client that stops reading its last answer is disconnected, whatever it read before."""
    async with listening_to(sized, LimitsConfig(client_timeout=0.2)) as at:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.write(b"GET /0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await large(reader)
        (connection,) = at.state.connections
        limits = {"high": 32 * MIB, "low": 24 * MIB}
        connection.transport.set_write_buffer_limits(**limits)  # type: ignore[union-attr]
        writer.write(b"GET /64?last HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        assert stuck(at.state)
        while stuck(at.state):
            await reader.readexactly(64 << 10)
        assert connection.transport.get_write_buffer_size() > MIB  # type: ignore[union-attr]
        async with asyncio.timeout(PATIENCE_S):
            while at.state.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        writer.close()


async def test_a_client_that_stops_in_an_answer_that_broke_is_let_go() -> None:
    """A client that stops reading a broken answer is disconnected, even if all of it was sent."""

    async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/0":
            return await sized(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(32 * MIB), "more_body": True})
        raise OSError("the model is gone")

    async with listening_to(breaks, LimitsConfig(client_timeout=0.1)) as at:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.write(b"GET /0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await large(reader)
        (connection,) = at.state.connections
        connection.transport.set_write_buffer_limits(64 * MIB)  # type: ignore[union-attr]
        writer.write(b"GET /1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            while at.state.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        writer.close()


async def test_a_late_head_adds_nothing_to_a_last_answer() -> None:
    """A late head gets no answer behind a last one, which told the client of the close."""
    async with listening_to(sized, LimitsConfig(head_timeout=0.2)) as at:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port, limit=64 << 10)
        writer.write(b"GET /64?last HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /he")
        head = await reader.readuntil(b"\r\n\r\n")
        (connection,) = at.state.connections
        heads = connection._shared.heads  # type: ignore[union-attr]
        async with asyncio.timeout(PATIENCE_S):
            while connection in heads:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            rest = await reader.read()
        writer.close()

    assert b"connection: close" in head
    assert 64 * MIB == len(rest)


async def test_a_deadline_that_fails_costs_no_other_connection_its_own(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A failing deadline of one connection costs others neither simultaneous nor later ones."""
    failed: list[connections.Connection] = []

    def late(self: connections.Connection) -> None:
        if not failed:
            failed.append(self)
            raise RuntimeError("the handle is closed")
        original(self)

    original = connections.Connection.on_head_timeout
    monkeypatch.setattr(connections.Connection, "on_head_timeout", late)
    async with listening(server, LimitsConfig(head_timeout=0.2)) as port:
        clients = [await (await Raw.connect(port)).send(b"G") for _ in range(4)]
        told = [await client.answer() for client in clients[1:]]
        for client in clients:
            await client.close()

    assert [408, 408, 408] == [answer.status for answer in told]
    assert 1 == len(failed)
    assert ["event=deadline_failed"] == [r.getMessage().split()[0] for r in caplog.records]


# --- websockets -----------------------------------------------------------------------------


UPGRADE = (
    "GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@pytest.mark.parametrize(
    "fields",
    [
        "Content-Length: 5\r\n",
        "Transfer-Encoding: chunked\r\n",
        f"X-Long: {'x' * 9000}\r\n",
        "".join(f"X-{number}: y\r\n" for number in range(200)),
    ],
    ids=["length", "chunked", "long", "many"],
)
async def test_a_websocket_that_cannot_begin_is_refused(server: Server, fields: str) -> None:
    """A WebSocket that cannot start is refused at once, and its place is free again."""
    async with listening(server) as port:
        told, _ = await exchange(port, f"{UPGRADE}{fields}\r\n".encode())

    assert (400, "malformed_request") == (told.status, told.code)


async def test_a_websocket_outlives_the_deadlines_of_heads(make_server: MakeServer) -> None:
    """A WebSocket outlives the deadlines of heads, and its place is free when it closes."""
    speech = FakeSettings(tasks=("realtime",))
    server = await make_server(settings={"llama": speech})
    limits = LimitsConfig(head_timeout=0.1, connections=1)
    async with listening(server, limits) as port:
        address = f"ws://127.0.0.1:{port}/v1/realtime?model=llama"
        async with websockets.connect(address, proxy=None) as client:
            await client.recv()
            full, _ = await exchange(port, HEAD + b"\r\n")
            await asyncio.sleep(0.3)
            await client.send("word")
            assert "delta" in json.loads(await client.recv())
        other = await Raw.connect(port)
        after = await other.get()
        await other.close()

    assert 503 == full.status
    assert 200 == after.status


async def test_a_client_that_waits_for_100_is_told_to_go_on(server: Server) -> None:
    """A client that waits for 100 gets it before it sends its body."""
    body = b'{"model": "qwen"}'
    head = chunked(b"/v1/models/switch", b"Expect: 100-Continue")
    async with listening(server) as port:
        client = await Raw.connect(port)
        await client.send(head)
        first = await client.answer()
        await client.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        told = await client.answer()
        await client.close()

    assert [100, 200] == [first.status, told.status]


async def test_a_body_of_many_small_chunks_is_refused(server: Server) -> None:
    """Many small chunks are refused, because each costs as much as many bytes."""
    async with listening(server) as port:
        told, rest = await exchange(
            port, chunked(b"/v1/completions"), b"1\r\nx\r\n" * 2 * connections.FREE_CHUNKS
        )

    assert (400, "chunks_too_small", b"") == (told.status, told.code, rest)


async def test_a_body_of_chunks_that_are_not_small_is_read(server: Server) -> None:
    """A body may have any number of chunks that are not small, and a few small ones."""
    content = json.dumps({"model": "llama", "prompt": "x" * 400_000}).encode()
    pieces = [
        content[at : at + connections.CHUNK_BYTES]
        for at in range(0, len(content), connections.CHUNK_BYTES)
    ]
    assert len(pieces) > connections.FREE_CHUNKS
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    head = chunked(b"/v1/completions", b"Content-Type: application/json")
    async with listening(server) as port:
        client = await Raw.connect(port)
        await client.send(
            head + b"1\r\n \r\n" * (connections.FREE_CHUNKS - 1) + body + b"0\r\n\r\n"
        )
        assert 200 == (await client.answer()).status
        await client.close()
