"""One client's connection, with limits: uvicorn's protocol for httptools, made to refuse.

httptools and uvicorn limit neither the size of a head nor the time it takes, merge the trailers of
a body with the headers, and answer some mistakes with plain text. Parsing, and sending of answers,
stay theirs. Checked on uvicorn 0.54.0 and httptools 0.9.0.

Relies on:

- `HttpToolsProtocol` with its parser callbacks, `headers`, `expect_100_continue`, `pipeline`
  (newest first), `cycle` (the newest) and `flow`, whose `resume_reading` resumes paused reading;
- `_start_asgi_task`, which begins to answer a request;
- `on_response_complete` and `_unset_keepalive_if_required`, which are replaced;
- `handshake_initiated` of its WebSocket protocol. That has a `scope` before `run_asgi` runs its
  `app`. `run_asgi` takes `close_sent` for the end and `handshake_complete` for an answer;
- `RequestResponseCycle` with `body`, `response_started`, `response_complete`, `keep_alive`,
  `disconnected` and `message_event`;
- an error that a callback raises ends the parser's `feed_data` with an `HttpParserError`;
- a head, and trailers, end with an empty line;
- of a server, uvicorn needs only `close` and `wait_closed`.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import httptools
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from vllm_hotswap.api import DOOR, Refusals, address_of, clients_of, errors as openai
from vllm_hotswap.config import LimitsConfig
from vllm_hotswap.connections.arrivals import Arrival, Door
from vllm_hotswap.connections.places import Place, Places
from vllm_hotswap.errors import (
    ChunksTooSmall,
    HeadTimeout,
    HeadTooLarge,
    HotswapError,
    MalformedRequest,
    TooManyConnections,
    UpgradeWithBody,
    UrlTooLong,
)
from vllm_hotswap.system import log_of_clients
from vllm_hotswap.tasks import Deadlines, Pause, Wheel

VERSIONS = frozenset(["1.0", "1.1"])
"""HTTP versions that are answered. A request line without one is 0.9, without header fields."""

TRAILER_BYTES = 8 << 10
"""Most bytes of a chunked body, in one go, that are not its content: trailers, extensions."""

FREE_CHUNKS = 4096
"""Chunks of one body that may be of any size."""

CHUNK_BYTES = 64
"""Least average size of additional chunks. A chunk costs as much as this many bytes."""

PIPELINED = 16
"""Most requests of one connection that wait for an earlier answer. Additional ones are dropped."""

AHEAD_BYTES = 64 << 10
"""Most bytes of the bodies of requests that wait for an earlier answer, together."""

FIELD_BYTES = 128
"""Memory of a header field besides its text: two Python objects and their pair."""

REST_S = 5.0
"""Longest time for the rest of a body once its request has been answered."""

LINGER_S = 2.0
"""How long a refused connection stays open, so that the answer arrives.

A connection that is closed while data comes in is reset, and the client may lose the answer.
"""

EVICTED_AFTER = 3
"""A client that reads nothing is disconnected after this many times `limits.client_timeout`.

Its requests are aborted before that.
"""

KEEP_ALIVE_S = 5.0
"""How long a connection may be idle, unless uvicorn's configuration says otherwise."""


def deny_kept_place(_: Scope) -> bool:
    """Let no request use a reserved place."""
    return False


@dataclass(slots=True)
class Connections:
    """State that all connections share: limits, places and deadlines."""

    places: Places
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    may_use_kept: Callable[[Scope], bool] = deny_kept_place
    """Whether a request may use a reserved place, by the `type`, `method`, `path`, `root_path` and
    `headers` of its scope."""
    upgraded: dict[asyncio.BaseTransport, Place] = field(default_factory=dict)
    """Places of connections that have become WebSockets."""
    door: Door = field(init=False)
    """How connections are accepted, and how many refusals their clients may get."""
    heads: Deadlines[Connection] = field(init=False)
    """Connections that are to send a head, or the rest of one."""
    idle: Deadlines[Connection] = field(init=False)
    """Connections whose requests are answered, and which have not sent anything since."""
    readers: Deadlines[Connection] = field(init=False)
    """Connections whose clients have to read before more can be sent."""
    is_stopping: bool = False
    """Whether the server is stopping: then refusals are sent at once."""

    def __post_init__(self) -> None:
        patience_s = EVICTED_AFTER * self.limits.client_timeout
        refusals = Refusals(self.limits.refusals_per_second, time.monotonic)
        silent = Deadlines(self.limits.head_timeout, Arrival.on_timeout)
        self.door = Door(self.places, refusals, Wheel(), silent)
        self.heads = Deadlines(self.limits.head_timeout, Connection.on_head_timeout)
        self.readers = Deadlines(patience_s, Connection.check_reader)
        self.keep_alive(KEEP_ALIVE_S)

    def keep_alive(self, seconds: float) -> None:
        """Set how long a connection may be idle."""
        self.idle = Deadlines(seconds, Connection.timeout_keep_alive_handler)

    def charge(self, clients: Iterable[Hashable], count: int = 1) -> float:
        """Charge refusals to clients. Return for how many seconds to hold the answer back."""
        pause_s = self.door.refusals.charge(clients, count)
        return 0.0 if self.is_stopping else pause_s

    def note_served(self, scope: Scope) -> None:
        """Note that a request is served."""
        self.door.refusals.note_served(address_of(scope))

    def counted(self, websockets: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
        """Combine uvicorn's WebSocket class with `Upgraded`."""
        return cast(
            "type[asyncio.Protocol]", type("Counted", (Upgraded, websockets), {"shared": self})
        )


class Upgraded(asyncio.Protocol):
    """A connection that has become a WebSocket: a mixin before uvicorn's class for one.

    Its state is the refusal of its handshake that is held back, if any.
    """

    shared: Connections
    transport: asyncio.Transport
    scope: dict[str, Any]
    app: Any
    _pause: Pause | None = None

    async def run_asgi(self) -> None:
        self.scope[DOOR] = weakref.ref(self)
        if (place := self._place) is not None:
            self.scope["client"] = cast("Connection", place.holder).client
        app = self.app

        async def answered(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope, receive, send)
            if getattr(self, "close_sent", False):
                self.handshake_complete = True  # uvicorn does not count a refusal

        self.app = answered
        try:
            await super().run_asgi()  # type: ignore[misc]
        finally:
            self.app = app  # or `answered` and this object would form a reference cycle

    async def hold_back_refusal(self, scope: Scope) -> None:
        """Hold back the refusal of the handshake. Its place may go to another connection."""
        pause_s = self.shared.charge(clients_of(scope))
        if not pause_s or self.transport.is_closing():
            return
        if (place := self._place) is not None:
            place.set_waiting()
        self._pause = Pause()
        with suppress(RuntimeError):  # as in `Connection._resume_reading`
            self.transport.resume_reading()
        await self._pause.wait(self.shared.door.wheel, pause_s)

    def note_refusal(self, scope: Scope) -> None:
        """Note a refusal that is sent at once."""
        self.shared.charge(clients_of(scope))

    def note_served(self, scope: Scope) -> None:
        """Note that the handshake is accepted."""
        self.shared.note_served(scope)

    def data_received(self, data: bytes) -> None:
        if self._pause is None:  # data behind a refused handshake is dropped
            super().data_received(data)

    def shutdown(self) -> None:
        """Stop the connection. A refusal that is held back is sent, which ends it."""
        self.shared.is_stopping = True
        if self._pause is None:
            super().shutdown()  # type: ignore[misc]
        else:
            self._pause.end()

    def connection_lost(self, exc: Exception | None) -> None:
        if place := self.shared.upgraded.pop(self.transport, None):
            place.leave()
        if self._pause is not None:
            self._pause.end()
        super().connection_lost(exc)

    @property
    def _place(self) -> Place | None:
        return self.shared.upgraded.get(self.transport)


class Connection(HttpToolsProtocol):
    """One connection.

    Its state, besides uvicorn's:

    - `_head_next`, `_in_message`: whether a head is next; whether bytes of a request are under way;
    - `_ahead`: bytes of the heads of requests that wait for an earlier answer, newest first, as in
      `pipeline`;
    - `_answered`: the request that is being answered; not the newest one if some wait;
    - `_raw`: bytes of the head that have arrived; the parser has not seen those in `_held`;
    - its entries in the shared deadlines, and `_timer`: when to stop reading what is dropped;
    - `_ignores_input`: whether it was refused, so that nothing more is read.

    The parser changes the first three, from within `data_received`.
    """

    _place: Place | None = None
    _pause: Pause | None = None
    """The wait of a refusal that is held back."""
    _dropped: RequestResponseCycle | None = None
    """The request whose refusal is or was held back: its body is dropped."""
    _pending_error: tuple[HotswapError, Callable[[], None]] | None = None
    """An error to send later, and what cancels that."""
    _context: Context
    """The connection's own; each of its requests has a copy."""
    _timer: asyncio.TimerHandle | None = None
    _unsent = 0
    _ignores_input = False
    _fault: HotswapError | None = None
    _answered: RequestResponseCycle | None = None
    _head_next, _in_message = True, False
    _raw = _parsed = _overhead = _trailers = 0
    _chunks = _chunk_bytes = 0
    _moved = False
    _held = bytearray()
    """An empty buffer that the class shares: replaced, and never changed, before it is filled."""
    _tail = b""

    def __init__(
        self,
        shared: Connections,
        config: uvicorn.Config,
        server_state: Any,
        app_state: dict[str, Any],
        arrival: Arrival,
    ) -> None:
        super().__init__(config, server_state, app_state, arrival.loop)
        limits = shared.limits
        self._shared = shared
        self._arrival: Arrival | None = arrival
        self._client = arrival.key
        self._head_bytes, self._head_fields = limits.head_bytes, limits.head_fields
        self._url_bytes = limits.url_bytes
        self._ahead: deque[int] = deque()

    # --- the connection -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._context = copy_context()
        assert self._arrival is not None
        self.client = self._arrival.client  # the transport knows no address if the client has gone
        self._place = self._arrival.hand_over()
        has_ended = self._arrival.has_ended
        self._arrival = None
        if has_ended:
            self._ignores_input = True
            self.transport.abort()
        elif self._place is None:
            self._refuse(TooManyConnections())
        else:
            self._place.holder = self
            self._shared.heads.begin(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._place is not None:
            self._place.leave()
            self._place = None  # breaks a reference cycle, which would wait for the collector
        self._stop_timers()
        self._end_pause()
        if self._pending_error is not None:
            _, take_back = self._pending_error
            take_back()
        super().connection_lost(exc)
        if (answered := self._answered) is not None and not answered.response_complete:
            answered.disconnected = True  # uvicorn notifies only the newest one
            answered.message_event.set()
        self._answered = None

    def yield_place(self) -> None:
        """Close the connection, which waits: another one needs its place."""
        self._ignores_input = True
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._ignores_input:
            return
        self._unset_keepalive_if_required()
        if self._head_next:
            self._raw += len(data)
            if self._raw != len(data) and not (data := self._gathered(data)):
                return
        self._moved = False
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    if self._should_upgrade():
                        self.handle_websocket_upgrade()
                        return
                    # A client that asks for another protocol, such as HTTP/2, is answered in
                    # HTTP/1.1: RFC 9110, 7.8. The parser has stopped behind that request.
                    data = data[upgrade.args[0] :]
        except httptools.HttpParserError:
            self._refuse(self._fault or MalformedRequest())
            return
        if self._head_next:
            self._check_head(data)
        elif self._moved:
            self._overhead = 0
        else:
            self._overhead += len(data)
            if self._overhead > TRAILER_BYTES:
                self._refuse(HeadTooLarge(f"{TRAILER_BYTES} bytes of trailers"))

    def handle_websocket_upgrade(self) -> None:
        self._stop_timers()
        if self._place is not None:
            self._place.set_busy()
            self._shared.upgraded[self.transport] = self._place
        self._context.run(super().handle_websocket_upgrade)
        if not getattr(self.transport.get_protocol(), "handshake_initiated", True):
            # `websockets` refused the head, and uvicorn would send no answer.
            self._send_error(MalformedRequest())

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader_anew()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch_reader_anew()  # a new deadline for what is sent from now on

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_reader()

    def shutdown(self) -> None:
        self._shared.is_stopping = True
        if self._pending_error is not None:
            error, take_back = self._pending_error
            take_back()
            self._send_error(error)
        super().shutdown()
        self._end_pause()
        self._watch_reader()

    # --- what the parser says -------------------------------------------------------------

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= PIPELINED:
            self._fail(MalformedRequest())
        self._moved = self._in_message = True
        self._parsed = self._trailers = self._chunks = self._chunk_bytes = 0
        super().on_message_begin()
        self.scope[DOOR] = weakref.ref(self)  # type: ignore[literal-required]

    def on_url(self, url: bytes) -> None:
        self.url += url
        self._parsed += len(url)
        if len(self.url) > self._url_bytes:
            self._fail(UrlTooLong(self._url_bytes))

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_next:
            self._trailers += len(name) + len(value) + 4
            if self._trailers > TRAILER_BYTES:
                self._fail(HeadTooLarge(f"{TRAILER_BYTES} bytes of trailers"))
            return
        self._parsed += len(name) + len(value) + 4
        if len(self.headers) >= self._head_fields:
            self._fail(self._too_many())
        if self._parsed > self._head_bytes:
            self._fail(self._too_large())
        # Inlined from uvicorn: a call for each of many fields would cost too much.
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        place = self._place
        if place is not None:
            if self._pause is None:  # a request behind a refusal waits with it
                place.set_busy()
            if place.is_kept and not self._shared.may_use_kept(self._partial_scope()):
                self._fail(TooManyConnections())
        self._moved, self._raw = True, 0
        self._stop_timer()
        self._unset_keepalive_if_required()
        if self.parser.get_http_version() not in VERSIONS:
            self._fail(MalformedRequest())
        if self._has_body() and self.parser.should_upgrade():
            # The parser would not read the body as one; a WebSocket's head has none.
            self._fail(MalformedRequest() if self._should_upgrade() else UpgradeWithBody())
        self._limit_waiting_heads()
        super().on_headers_complete()
        self._head_next = False
        if self.pipeline:
            self.flow.resume_reading()  # while paused, a disconnect of the client goes unnoticed
        else:
            self._answered = self._last
        if place is not None and place.is_kept and self._last is not None:
            self._last.keep_alive = False

    def _limit_waiting_heads(self) -> None:
        """Limit the heads of waiting requests, together, to the size of one. No handshake waits."""
        if not self._is_answering:
            return
        if self.parser.should_upgrade() and self._should_upgrade():
            self._fail(MalformedRequest())
        weight = self._parsed + FIELD_BYTES * len(self.headers)
        most = self._head_bytes + FIELD_BYTES * self._head_fields
        if sum(self._ahead) + weight > most:
            self._fail(MalformedRequest())
        self._ahead.appendleft(weight)

    def _limit_waiting_bodies(self) -> None:
        """Limit the bodies of waiting requests.

        Reading is not paused instead: then a disconnect would go unnoticed, and the request before
        them would run to its end for a client that has gone.
        """
        if sum(len(cycle.body) for cycle, _ in self.pipeline) > AHEAD_BYTES:
            self._fail(MalformedRequest())

    def _has_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
            for name, value in self.headers
        )

    def on_chunk_header(self) -> None:
        self._moved = True
        self._chunks += 1
        if self._chunks > FREE_CHUNKS + self._chunk_bytes // CHUNK_BYTES:
            self._fail(ChunksTooSmall(self._chunks, self._chunk_bytes))

    def on_body(self, body: bytes) -> None:
        self._moved = True
        self._chunk_bytes += len(body)
        if self._last is not None and self._last is self._dropped:
            return
        super().on_body(body)
        if self.pipeline:
            self._limit_waiting_bodies()

    def on_message_complete(self) -> None:
        self._head_next, self._in_message, self._moved, self._raw = True, False, True, 0
        super().on_message_complete()
        if self._last is not None and self._last.response_complete:
            self._idle()

    # --- answers --------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        # As uvicorn's, but without a timer that is made and cancelled for each request.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._watch_reader()
            return
        if self.pipeline:
            self._ahead.pop()
            following = self.pipeline.pop()
            self._answered = following[0]
            self.flow.resume_reading()
            if self._place is not None:
                self._place.set_busy()  # a refusal that was held back may have made it wait
            self._start_asgi_task(*following)
        else:
            self.flow.resume_reading()
            self._idle()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await app(scope, receive, send)
            finally:
                if not cycle.response_complete:
                    self.loop.call_soon(self._watch_reader)  # after uvicorn has closed it

        # In the connection's context. This may run in the task of an earlier request, which starts
        # this one or resumes reading. Its context would leak into this request and, with asyncio's
        # loop, into everything that is read from then on.
        self._context.run(super()._start_asgi_task, cycle, cast("Any", watched))

    async def hold_back_refusal(self, scope: Scope) -> None:
        """Hold back the refusal of a request. Its place may go to another connection.

        The rest of its body is read and dropped, so that a disconnect is noticed.
        """
        pause_s = self._shared.charge(clients_of(scope))
        if not pause_s or self.transport.is_closing():
            return
        if self._place is not None:
            self._place.set_waiting()
        self._dropped = self._answered
        if self._dropped is not None:
            self._dropped.body = bytearray()
        self._resume_reading()
        self._pause = Pause()
        try:
            await self._pause.wait(self._shared.door.wheel, pause_s)
        finally:
            self._pause = None

    def note_refusal(self, scope: Scope) -> None:
        """Note a refusal that is sent at once."""
        self._shared.charge(clients_of(scope))

    def note_served(self, scope: Scope) -> None:
        """Note that a request is served."""
        self._shared.note_served(scope)

    def _resume_reading(self) -> None:
        """Resume reading: data is dropped from now on, but a disconnect is noticed.

        If the connection was reset a moment ago, uvloop raises `RuntimeError`.
        """
        with suppress(RuntimeError):
            self.flow.resume_reading()

    def _end_pause(self) -> None:
        """End the wait of a refusal that is held back, if any."""
        if self._pause is not None:
            self._pause.end()

    def _unset_keepalive_if_required(self) -> None:
        self._shared.idle.end(self)

    @property
    def _is_answering(self) -> bool:
        return self._last is not None and not self._last.response_complete

    @property
    def _last(self) -> RequestResponseCycle | None:
        """The last request whose head has arrived."""
        return self.cycle

    def _idle(self) -> None:
        """Wait for the next request, or the rest of a body: all that have arrived are answered."""
        if self._place is not None:
            self._place.set_waiting()
        if self._raw:
            self._unset_keepalive_if_required()
            self._shared.heads.begin(self)
        elif self._in_message and not self._head_next:
            self._unset_keepalive_if_required()
            self._stop_timer()
            self._timer = self.loop.call_later(REST_S, self._end)
        else:
            self._stop_timer()
            self._shared.idle.begin(self)

    def _watch_reader_anew(self) -> None:
        """Restart the deadline: the client has read something, or there is more to send."""
        self._shared.readers.end(self)
        self._watch_reader()

    def _watch_reader(self) -> None:
        """If the client has to read unsent data, check later whether it does.

        It has to if nothing more can be sent until then, or if the connection is to end.
        """
        if self in self._shared.readers:
            return
        if not (self.flow.write_paused or self.transport.is_closing()):
            return
        if unsent := self.transport.get_write_buffer_size():
            self._unsent = unsent
            self._shared.readers.begin(self)

    def check_reader(self) -> None:
        """Disconnect a client that has read nothing since the deadline began."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent >= self._unsent:
            self.transport.abort()
        else:
            self._watch_reader()

    # --- heads ----------------------------------------------------------------------------

    def _gathered(self, data: bytes) -> bytes:
        """Collect a head that comes in pieces; return it once it is complete or too large.

        For each piece, the parser would copy what it has of the field: quadratic time.
        """
        self._held += data
        seen = self._tail + data
        self._tail = seen[-2:]
        if b"\n\r\n" not in seen and b"\n\n" not in seen and self._raw <= self._head_bytes:
            self._shared.heads.begin(self)
            return b""
        held, self._held = bytes(self._held), bytearray()
        return held

    def _check_head(self, data: bytes) -> None:
        """Start the deadline of a head that the parser has seen a part of, or refuse it."""
        if not self._raw:
            if not self._in_message:
                return
            self._raw = self._parsed + 1  # it began in the data that ended another request
        if self._raw > self._head_bytes:
            self._refuse(self._too_large())
            return
        self._tail, self._held = data[-2:], bytearray()
        self._shared.heads.begin(self)

    def _partial_scope(self) -> dict[str, Any]:
        """Return the part of a complete head's scope that says who asks for what."""
        is_websocket = self.parser.should_upgrade() and self._should_upgrade()
        path = httptools.parse_url(self.url).path or b""
        return {
            "type": "websocket" if is_websocket else "http",
            "method": self.parser.get_method().decode("ascii"),
            "path": self.root_path + path.decode("ascii"),
            "root_path": self.root_path,
            "headers": self.headers,
        }

    def _too_large(self) -> HeadTooLarge:
        return HeadTooLarge(
            f"{self._head_bytes} bytes of header fields (limits.head_bytes, "
            "--h11-max-incomplete-event-size)"
        )

    def _too_many(self) -> HeadTooLarge:
        return HeadTooLarge(
            f"{self._head_fields} header fields (limits.head_fields, --h11-max-header-count)"
        )

    # --- ends -----------------------------------------------------------------------------

    def _stop_timers(self) -> None:
        self._stop_timer()
        self._unset_keepalive_if_required()
        self._shared.readers.end(self)

    def _stop_timer(self) -> None:
        self._shared.heads.end(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def on_head_timeout(self) -> None:
        """Refuse an incomplete head. While an answer is under way, its deadline starts later."""
        if self._is_answering:
            return
        if self._raw:
            self._refuse(HeadTimeout(self._shared.heads.seconds))
        else:
            self._end()

    def _end(self) -> None:
        """Close the connection; nothing more is read."""
        self._timer = None
        self.transport.close()
        self._watch_reader()

    def _fail(self, error: HotswapError) -> None:
        """Stop the parser by an error; called from its callbacks."""
        self._fault = error
        raise error

    def _refuse(self, error: HotswapError) -> None:
        """Read nothing more; send the error, unless it could pass for another request's answer.

        Requests before it are answered first; then the connection is closed.
        """
        self._ignores_input = True
        self._stop_timer()
        if isinstance(error, TooManyConnections):
            places = self._shared.places
            log_of_clients.warning("event=connection_refused code=%s places=%r", error.code, places)
        if self.transport.is_closing():
            return  # its last answer is written, perhaps not sent yet
        pause_s = self._shared.charge([self._client], 1 + len(self.pipeline))
        if not self._is_answering:
            self._send_later(pause_s, error)
        elif self._head_next:
            self.cycle.keep_alive = False  # requests before it are answered, then it is closed
        elif self.pipeline:
            self._drop_newest()
        elif self.cycle.response_started:
            self.transport.close()
            self._watch_reader()
        else:
            self._send_later(pause_s, error)
            self.cycle.body = bytearray()
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._end_pause()

    def _drop_newest(self) -> None:
        """Drop the newest waiting request. Those before it are answered, then it is closed.

        Further data is read and dropped, so that a disconnect is noticed.
        """
        self.pipeline.popleft()
        self._ahead.popleft()
        before = self.pipeline[0][0] if self.pipeline else self._answered
        if before is not None:
            self.cycle = before
            before.keep_alive = False
        self.flow.resume_reading()

    def _send_later(self, pause_s: float, error: HotswapError) -> None:
        if self._place is not None:
            self._place.set_waiting()
        self._resume_reading()
        if pause_s:
            take_back = self._shared.door.wheel.call_later(
                pause_s, partial(self._send_error, error)
            )
            self._pending_error = error, take_back
        else:
            self._send_error(error)

    def _send_error(self, error: HotswapError) -> None:
        self._pending_error = None
        if self.transport.is_closing():
            return
        response = openai.error_response(error)
        content = [STATUS_LINE[error.status]]
        for name, value in [*self.server_state.default_headers, *response.raw_headers]:
            content += [name, b": ", value, b"\r\n"]
        content += [b"connection: close\r\n\r\n", bytes(response.body)]
        try:
            self.transport.write(b"".join(content))
            if self.transport.can_write_eof():
                self.transport.write_eof()
        except RuntimeError:  # as in `_resume_reading`
            self.transport.abort()
            return
        if self._place is not None:
            self._place.set_waiting()
        self._timer = self.loop.call_later(LINGER_S, self.transport.abort)


class Config(uvicorn.Config):
    """uvicorn's configuration, with the state that bounded connections share."""

    shared: Connections | None = None


def bounded(config: Config, shared: Connections) -> Config:
    """Put the classes of this module into a loaded configuration, and return it.

    If uvicorn has no class for WebSockets, there is still none.
    """
    shared.keep_alive(config.timeout_keep_alive)
    config.shared = shared
    if config.ws_protocol_class is not None:
        config.ws_protocol_class = shared.counted(config.ws_protocol_class)
    return config
