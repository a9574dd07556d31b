"""One request on a connection of its own, and how it ended.

`client.Connection` measures answers that arrive as they should. This is for tests of all other
cases: the caller says how the client behaves, and learns whether the answer was complete, whether
the connection ended before it, or whether nothing arrived at all.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

SLOW_BUFFER_BYTES = 4096
"""How much the kernel and the reader of a slow client buffer for it."""


class End(Enum):
    """How a request ended."""

    COMPLETE = "complete"
    LOST = "lost"
    """The server closed the connection, or never accepted it, before the answer was complete."""
    LEFT = "left"
    """The client closed the connection, as its `Manner` says."""
    HUNG = "hung"
    """None of these happened before the deadline."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How a client behaves."""

    deadline_s: float = 120.0
    leave_after_s: float | None = None
    leave_after_events: int | None = None
    pause_s: float = 0.0
    """How long it pauses after each piece that it has read."""

    @property
    def is_slow(self) -> bool:
        return self.pause_s > 0


PATIENT = Manner()


@dataclass(slots=True)
class Reply:
    """What was received. All times are of `time.perf_counter`."""

    end: End = End.LOST
    status: int = 0
    """0 if not even the head of an answer was received."""
    is_stream: bool = False
    """Whether it is a stream of events."""
    headers: dict[str, str] = field(default_factory=dict)
    """Header fields by name, in lower case."""
    body: bytearray = field(default_factory=bytearray)
    arrivals: list[tuple[int, float]] = field(default_factory=list)
    """The length of the body after each piece, and the time."""
    sent_s: float = 0.0
    ended_s: float = 0.0
    detail: str = ""
    """Why it was lost."""

    @property
    def duration_s(self) -> float:
        return self.ended_s - self.sent_s

    def events(self) -> list[tuple[float, str]]:
        """Return the time and text of each complete event or comment of a stream."""
        found, start = [], 0
        arrivals = iter(self.arrivals)
        length, at_s = next(arrivals, (0, 0.0))
        while (end := self.body.find(b"\n\n", start)) >= 0:
            while length < end + 2:
                length, at_s = next(arrivals)
            found.append((at_s, self.body[start:end].decode(errors="replace")))
            start = end + 2
        return found


async def ask(
    port: int,
    path: str,
    body: Mapping[str, Any] | None = None,
    manner: Manner = PATIENT,
    reply: Reply | None = None,
    key: str = "",
) -> Reply:
    """Send a request (a POST if it has a body) to this machine, and read its answer to its end.

    Args:
        key: the API key to send, if any.
        reply: filled while the answer arrives, for callers that cannot wait for its end.
    """
    reply = Reply() if reply is None else reply
    reply.sent_s = time.perf_counter()
    leaves_first = manner.leave_after_s is not None and manner.leave_after_s < manner.deadline_s
    try:
        async with asyncio.timeout(manner.leave_after_s if leaves_first else manner.deadline_s):
            reply.end = await _talk(port, _request(path, body, key), manner, reply)
    except TimeoutError:
        reply.end = End.LEFT if leaves_first else End.HUNG
    except asyncio.IncompleteReadError:
        reply.detail = "the connection ended before the answer was complete"
    except (OSError, ValueError) as error:
        reply.detail = f"{type(error).__name__}: {error}"
    reply.ended_s = time.perf_counter()
    return reply


async def _talk(port: int, request: bytes, manner: Manner, reply: Reply) -> End:
    """Exchange one request. Returns `COMPLETE`, or `LEFT` if the client has had enough events."""
    reader, writer = await _connect(port, manner)
    try:
        writer.write(request)
        headers = await _read_head(reader, reply)
        reply.is_stream = headers.get("content-type", "").startswith("text/event-stream")
        if headers.get("transfer-encoding") != "chunked":
            _take(reply, await reader.readexactly(int(headers.get("content-length", "0"))))
            return End.COMPLETE
        return await _read_chunks(reader, manner, reply)
    finally:
        writer.transport.abort()  # at once: the rest is not wanted


async def _connect(port: int, manner: Manner) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if not manner.is_slow:
        return await asyncio.open_connection("127.0.0.1", port)
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER_BYTES)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return await asyncio.open_connection(sock=sock, limit=SLOW_BUFFER_BYTES)
    except BaseException:
        sock.close()
        raise


async def _read_head(reader: asyncio.StreamReader, reply: Reply) -> dict[str, str]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status_line, *lines = head[:-4].split("\r\n")
    reply.status = int(status_line.split(" ")[1])
    pairs = (line.partition(":") for line in lines)
    reply.headers = {name.lower(): value.strip() for name, _, value in pairs}
    return reply.headers


async def _read_chunks(reader: asyncio.StreamReader, manner: Manner, reply: Reply) -> End:
    wanted = manner.leave_after_events
    while True:
        size = int(await reader.readuntil(b"\r\n"), 16)
        chunk = await reader.readexactly(size + 2)
        if not size:
            return End.COMPLETE
        _take(reply, chunk[:-2])
        if wanted is not None and reply.body.count(b"data: ") >= wanted:
            return End.LEFT
        if manner.is_slow:
            await asyncio.sleep(manner.pause_s)


def _take(reply: Reply, piece: bytes) -> None:
    reply.body += piece
    reply.arrivals.append((len(reply.body), time.perf_counter()))


def _request(path: str, body: Mapping[str, Any] | None, key: str) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    lines = [
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *([f"Authorization: Bearer {key}"] if key else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content
