"""The attacker's connections, and the outcomes of what it sent."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

ADDRESSES = tuple(f"127.0.0.{number}" for number in range(2, 10))
"""The addresses from which it connects in turn. They differ from the victim's, and are several, so
that the limit of one address is not what is measured."""

READ_BYTES = 1 << 24
IP_BIND_ADDRESS_NO_PORT = 24
"""Linux: a port may be used once for each address that is connected to."""

CLOSED = "closed"
"""In place of a status: the server closed the connection without an answer."""


@dataclass(frozen=True, slots=True)
class Target:
    """The server that is flooded, and the keys that its attacker knows."""

    port: int
    alias: str
    user_key: str
    rated_key: str
    """The key of a group that may send few requests per minute."""


@dataclass
class Attack:
    """A flood while it runs. `outcomes` counts statuses, and what was seen in place of one."""

    target: Target
    outcomes: Counter[str] = field(default_factory=Counter)
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once there is an outcome."""
    sent_bytes: int = 0
    kept: dict[str, Any] = field(default_factory=dict)
    """What is made once, and sent repeatedly."""
    number: itertools.count[int] = field(default_factory=itertools.count)
    seed: str = field(default_factory=lambda: secrets.token_hex(2))
    """Makes content that must not be the same in another flood."""

    def note(self, outcome: str) -> None:
        self.outcomes[outcome] += 1
        self.has_begun.set()

    async def socket(self, receive_bytes: int | None = None) -> socket.socket:
        """Open a connection that is reset when it is closed, so that no port stays taken."""
        sock = socket.socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            if receive_bytes is not None:  # before it connects, or the window is larger
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            sock.setblocking(False)
            sock.bind((ADDRESSES[next(self.number) % len(ADDRESSES)], 0))
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.target.port))
        except BaseException:
            sock.close()
            raise
        return sock

    @asynccontextmanager
    async def line(self, receive_bytes: int | None = None) -> AsyncIterator[Line]:
        """Open a connection, for as long as the context is open."""
        sock = await self.socket(receive_bytes)
        limit = READ_BYTES if receive_bytes is None else receive_bytes
        reader, writer = await asyncio.open_connection(sock=sock, limit=limit)
        try:
            yield Line(self, reader, writer)
        finally:
            writer.transport.abort()


class Line:
    """A connection that is open."""

    def __init__(
        self, attack: Attack, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._attack, self._reader, self._writer = attack, reader, writer

    async def send(self, data: bytes) -> None:
        """Send data, unless the server refuses to read it; `answer` then has its reason."""
        if not self._writer.is_closing():
            with suppress(OSError):
                self._writer.write(data)
                await self._writer.drain()
                self._attack.sent_bytes += len(data)

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[asyncio.Task[str]]:
        """Read the answer in a task, as it may arrive while something is still sent."""
        answer = asyncio.create_task(self.answer())
        try:
            yield answer
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)

    async def answer(self) -> str:
        """Read one answer to its end, and note its status, or that there was none.

        Raises `EOFError` if the connection has ended.
        """
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, OSError):
            self._attack.note(CLOSED)
            raise EOFError from None
        status = head[9:12].decode()
        self._attack.note(status)
        await self._body(head.lower())
        return status

    async def _body(self, head: bytes) -> None:
        if b"transfer-encoding: chunked" in head:
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                await self._reader.readexactly(size + 2)
            await self._reader.readexactly(2)
        elif length := head.partition(b"content-length: ")[2].partition(b"\r\n")[0]:
            await self._reader.readexactly(int(length))

    async def sip(self, size: int, pause_s: float) -> None:
        """Read the answer to its end, but slowly, and note its status."""
        self._attack.note((await self._reader.readexactly(12))[9:].decode())
        while await self._reader.read(size):  # noqa: ASYNC110  # it is slow on purpose
            await asyncio.sleep(pause_s)


def request(
    method: str,
    path: str,
    body: bytes = b"",
    key: str = "",
    *fields: str,
    length: int | None = None,
) -> bytes:
    """Return the bytes of a request.

    Args:
        body: JSON, or the beginning of it.
        key: sent as `Authorization`, if there is one.
        fields: additional header fields.
        length: the `Content-Length`; None: that of the body.
    """
    length = len(body) if length is None else length
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *fields]
    if key:
        lines.append(f"Authorization: Bearer {key}")
    if method != "GET":
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode() + body
