"""New connections, until there is something to read from them.

The event loop's own servers accept one connection per loop iteration and build all of its objects.
A client behind thousands of connections that are reset at once waits for all of them. Here many
are accepted per iteration: dead ones are closed, and a silent one costs a place and a file. A
connection is built with its first byte. Addresses take turns in all of this once their connections
are accepted; before, all stand in one queue of the system.

New connections from an address in debt for refusals may have to wait. What they have sent is peeked
at first. A request that will be refused waits. One that needs no key, or has a key without debt,
does not. Where this cannot be known, as with TLS, the wait is short.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.types import Scope

from vllm_hotswap.api import DOUBT_S, MAX_PAUSE_S, SUSPECT_S, KnownKey, Outlook, Refusals
from vllm_hotswap.connections.first_head import Malformed, first_head
from vllm_hotswap.connections.places import Place, Places
from vllm_hotswap.system import log_of_clients
from vllm_hotswap.tasks import Deadlines, Steps, Wheel

ACCEPTED_PER_TURN = 64
"""Most connections that are accepted in one iteration of the event loop."""

PER_TURN = 8
"""Most steps per iteration: a connection gets a place, or is built. One costs ten accepts."""

MOST_WAITING = 8192
"""Most steps of accepted connections that wait. At this bound, new connections stay in the system's
queue, which does not distinguish addresses."""

PEEK_BYTES = 8 << 10
"""Bytes of a connection's first data that are peeked at; a longer head is not examined."""

REST_S = 0.1
"""Pause of accepting when the system has no file or memory left for a connection."""

CLOSE_WAIT = 8
"""State of a TCP connection that its client has closed. Source: Linux, `tcp_states.h`."""

NO_MORE_FILES = frozenset([errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])

Build = Callable[["Arrival"], asyncio.Protocol]


def in_doubt(_: Scope) -> Outlook:
    """Answer that nothing is known about the request."""
    return Outlook.IN_DOUBT


@dataclass(slots=True)
class Door:
    """State that all listening sockets of a server share."""

    places: Places
    refusals: Refusals
    wheel: Wheel
    silent: Deadlines[Arrival]
    """Connections that have not sent a byte."""
    outlook: Callable[[Scope], Outlook | KnownKey] = in_doubt
    """Predicts whether a request is refused, from the `type`, `method`, `path`, `root_path` and
    `headers` of its scope."""
    steps: Steps = field(default_factory=lambda: Steps(PER_TURN))
    most_waiting: int = MOST_WAITING


class Arrival:
    """A connection that has been accepted.

    The mutable state is its place, until the built connection takes it over, and what it waits for:
    its turn, the first byte, the end of its address's debt, or the end of a TLS handshake.
    """

    def __init__(
        self, acceptor: Acceptor, sock: socket.socket, client: tuple[str, int] | None
    ) -> None:
        self.loop = acceptor.loop
        self.client = client
        self.address = None if client is None else client[0]
        self.key = acceptor.door.places.client_of(self.address)
        """What counts as one client; None for an address that many clients share."""
        self._turn_key = self.address if self.key is None else self.key
        self._acceptor = acceptor
        self._door = acceptor.door
        self._sock = sock
        self._take_back: Callable[[], None] | None = None
        self._building: asyncio.Task[Any] | None = None
        self._is_listening = False
        self._came_s = self.loop.time()
        self.has_ended = False
        """Whether it was closed; then no connection may be built from it."""
        self.place: Place | None = None

    def __repr__(self) -> str:
        return f"<Arrival client={self.client}>"

    def begin(self) -> None:
        """Build the connection if there is something to read; otherwise wait for its first byte."""
        if len(self._door.steps) and _has_data(self._sock) is False:
            self._sock.close()  # it is dead: it need not wait for a turn
            return
        self._acceptor.arrivals.add(self)
        self._run_in_turn(self._begin)

    def _run_in_turn(self, step: Callable[[], None]) -> None:
        """Run `step` when it is its client's turn, unless it has ended by then."""

        def once() -> None:
            if not self.has_ended:
                step()

        self._door.steps.take(self.loop, self._turn_key, once)

    def _begin(self) -> None:
        if (has_data := _has_data(self._sock)) is False:
            self._end()
            return
        self.place = self._door.places.take(self, self.address)
        if self.place is None:
            self._build()  # only to be refused
        elif has_data:
            self._build_or_wait()
        else:
            self._door.silent.begin(self)
            self._listen()

    def yield_place(self) -> None:
        """Close it: another connection needs its place."""
        self._end()

    def on_timeout(self) -> None:
        """Close it: no byte has come in time."""
        self._end()

    def hand_over(self) -> Place | None:
        """Give its place to the connection that has been built."""
        place, self.place = self.place, None
        return place

    def close(self) -> None:
        self._end()

    def _listen(self) -> None:
        self._is_listening = True
        self.loop.add_reader(self._sock.fileno(), self._readable)

    def _stop_listening(self) -> None:
        if self._is_listening:
            self._is_listening = False
            self.loop.remove_reader(self._sock.fileno())

    def _readable(self) -> None:
        if (has_data := _has_data(self._sock)) is None:
            return  # a spurious wake-up: no byte has come, and the deadline stays
        self._stop_listening()
        self._door.silent.end(self)
        if has_data:
            self._run_in_turn(self._retry_build)
        else:
            self._end()

    def _build_or_wait(self) -> None:
        """Build the connection, which has sent something, unless it has to wait."""
        if (wait_s := self._wait_s()) > 0:
            later = partial(self._run_in_turn, self._retry_build)
            self._take_back = self._door.wheel.call_later(wait_s, later)
        else:
            self._build()

    def _retry_build(self) -> None:
        """Do the same, unless it is dead by now. What was peeked at stays until it is read."""
        self._take_back = None
        if _has_data(self._sock):
            self._build_or_wait()
        else:
            self._end()

    def _wait_s(self) -> float:
        """Return the seconds until it is built, or examined again."""
        client = self.key
        if client is None:
            return 0.0  # many clients share the address: none waits for the debts of others
        refusals, waited_s = self._door.refusals, self.loop.time() - self._came_s
        wait_s = min(refusals.owed_s(client) - SUSPECT_S, MAX_PAUSE_S - waited_s)
        if wait_s <= 0:
            return 0.0
        doubt_s = min(wait_s, DOUBT_S - waited_s)
        if self._acceptor.is_tls or len(said := _peeked(self._sock)) == PEEK_BYTES:
            return min(doubt_s, refusals.strangers_owe_s(client) - SUSPECT_S)
        try:
            head = first_head(said)
        except Malformed:
            return wait_s
        if head is None:  # the rest of the head may come at any time
            return min(wait_s, DOUBT_S)
        outlook = self._door.outlook(head)
        if isinstance(outlook, KnownKey):
            return min(doubt_s, refusals.owed_s(outlook) - SUSPECT_S)
        waits_s = {Outlook.REFUSED: wait_s, Outlook.LET_IN: 0.0, Outlook.IN_DOUBT: doubt_s}
        return waits_s[outlook]

    def _build(self) -> None:
        self._building = self.loop.create_task(self._acceptor.build(self, self._sock))
        self._building.add_done_callback(self._built)

    def _built(self, task: asyncio.Task[Any]) -> None:
        self._acceptor.arrivals.discard(self)
        self._leave()
        if task.cancelled():
            self._sock.close()
            return
        error = task.exception()
        if error is not None:
            self._sock.close()
            if not isinstance(error, OSError):  # includes errors of `ssl`
                log_of_clients.error("event=connection_failed", exc_info=error)

    def _end(self) -> None:
        self.has_ended = True
        self._door.silent.end(self)
        if self._take_back is not None:
            self._take_back()
        self._leave()
        if self._building is not None:
            self._building.cancel()
            return
        self._stop_listening()
        self._acceptor.arrivals.discard(self)
        self._sock.close()

    def _leave(self) -> None:
        if self.place is not None:
            self.place.leave()
            self.place = None


class Acceptor:
    """One listening socket; uvicorn treats it as one of its servers."""

    def __init__(
        self,
        sock: socket.socket,
        door: Door,
        make: Build,
        backlog: int,
        context: ssl.SSLContext | None = None,
        handshake_s: float = 60.0,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.door = door
        self.arrivals: set[Arrival] = set()
        """Accepted connections that have not been built."""
        self._sock = sock
        self._make = make
        self._tls: dict[str, Any] = (
            {} if context is None else {"ssl": context, "ssl_handshake_timeout": handshake_s}
        )
        self._spare: int | None = _spare_file()
        sock.setblocking(False)
        sock.listen(backlog)
        self._is_open = True
        self._pause_timer: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        """Accept nothing more, and close arrivals that have not been built. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        if self._pause_timer is not None:
            self._pause_timer.cancel()
        self.loop.remove_reader(self._sock.fileno())
        for arrival in list(self.arrivals):
            arrival.close()
        if self._spare is not None:
            os.close(self._spare)

    @property
    def is_tls(self) -> bool:
        return bool(self._tls)

    async def wait_closed(self) -> None:
        """Return at once; uvicorn calls it as for a server of the event loop."""

    async def build(self, arrival: Arrival, sock: socket.socket) -> None:
        """Build the connection. Raises `OSError` if it, or its TLS handshake, has ended."""
        await self.loop.connect_accepted_socket(lambda: self._make(arrival), sock, **self._tls)

    def _listen(self) -> None:
        self._pause_timer = None
        self.loop.add_reader(self._sock.fileno(), self._readable)

    def _pause(self) -> None:
        """Stop accepting for `REST_S`: otherwise the socket would wake the loop again and again."""
        self.loop.remove_reader(self._sock.fileno())
        self._pause_timer = self.loop.call_later(REST_S, self._listen)

    def _readable(self) -> None:
        for _ in range(ACCEPTED_PER_TURN):
            if len(self.door.steps) >= self.door.most_waiting:
                return
            try:
                sock, client = self._sock.accept()
            except OSError as error:  # none waits, the client has gone, or no file is left
                if error.errno not in NO_MORE_FILES or not self._shed():
                    return
                continue
            sock.setblocking(False)
            Arrival(self, sock, client[:2] if isinstance(client, tuple) else None).begin()

    def _shed(self) -> bool:
        """Close the next connection, for which no file is left, so that its client need not wait.

        It is accepted with the spare file. Returns whether to continue accepting. If it cannot be
        closed either, accepting stops for `REST_S`.
        """
        if self._spare is not None:
            os.close(self._spare)
            try:
                self._sock.accept()[0].close()
                return True
            except BlockingIOError:
                return False  # no connection waits: the system looks for a file first
            except OSError:
                pass
            finally:
                self._spare = _spare_file()
        else:
            self._spare = _spare_file()
        self._pause()
        return False


def _has_data(sock: socket.socket) -> bool | None:
    """Whether there is something to read; None: not yet; False: the client has gone.

    Data can still be read after the client has reset or closed the connection. A client that has
    closed only its sending side gets no answer either: uvicorn then closes the other side.
    """
    try:
        if not sock.recv(1, socket.MSG_PEEK):
            return False
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return False
        return sock.family == socket.AF_UNIX or _tcp_state(sock) != CLOSE_WAIT
    except (BlockingIOError, InterruptedError):
        return None
    except OSError:
        return False


def _tcp_state(sock: socket.socket) -> int:
    """Return the state of a TCP connection: the first byte of Linux's `struct tcp_info`."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def _peeked(sock: socket.socket) -> bytes:
    """Return up to `PEEK_BYTES` of what there is to read, without consuming it."""
    try:
        return sock.recv(PEEK_BYTES, socket.MSG_PEEK)
    except OSError:
        return b""


def _spare_file() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
