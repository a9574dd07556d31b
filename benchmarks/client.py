"""The HTTP client: one keep-alive connection, read as plainly as HTTP/1.1 allows.

The client shares its cores with the servers, so it must cost little, and the same for both sides.
A streamed answer is one event per token, thousands per second. A general client resumes a coroutine
for each event, and a stream reader does for each of its lines. This protocol notes the time of the
first event as its bytes arrive, and parses when the answer is complete.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

ANSWER_TIMEOUT_S = 300.0
END_OF_CHUNKS = b"\r\n0\r\n\r\n"
Body = Mapping[str, Any]


class BadAnswer(Exception):
    """A server answered something other than what is measured."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer and how long it took, from the first byte sent to the last received."""

    body: bytes
    duration_s: float

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Stream:
    """A streamed completion, timed."""

    model: str
    ttft_s: float
    duration_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class _Raw:
    """An answer as received, with the times of its first event and its last byte."""

    status: int
    body: bytes
    first_event_s: float
    ended_s: float


class _Exchange(asyncio.Protocol):
    """Collects one answer at a time.

    The mutable state is the bytes received, where the body begins (0 until the head is
    complete), and the future that `expect` returned.
    """

    def __init__(self) -> None:
        self._answer: asyncio.Future[_Raw] | None = None
        self._reset()

    def _reset(self) -> None:
        self._received = bytearray()
        self._body_at = 0
        self._status = 0
        self._length: int | None = None
        self._first_event_s = 0.0

    def expect(self) -> asyncio.Future[_Raw]:
        """Return a future of the answer to the request that is about to be sent."""
        self._reset()
        self._answer = asyncio.get_running_loop().create_future()
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._body_at and not self._read_head():
            return
        if not self._first_event_s and self._received.find(b"data: ", self._body_at) >= 0:
            self._first_event_s = time.perf_counter()
        if self._is_complete():
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BadAnswer("the server closed the connection"))

    def _read_head(self) -> bool:
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return False
        self._body_at = end + 4
        status_line, *lines = bytes(self._received[:end]).lower().split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines)
        chunked = headers.get(b"transfer-encoding") == b"chunked"
        self._status = int(status_line.split(b" ")[1])
        self._length = None if chunked else int(headers.get(b"content-length", 0))
        return True

    def _is_complete(self) -> bool:
        if self._length is None:
            return self._received.endswith(END_OF_CHUNKS)
        return len(self._received) - self._body_at >= self._length

    def _finish(self) -> None:
        ended_s = time.perf_counter()
        body = bytes(self._received[self._body_at :])
        if self._length is None:
            body = dechunk(body)
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(_Raw(self._status, body, self._first_event_s, ended_s))


class Connection:
    """A keep-alive connection to a server on this machine, for one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._transport: asyncio.Transport
        self._exchange: _Exchange

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._transport, self._exchange = await loop.create_connection(
            _Exchange, "127.0.0.1", self._port
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._transport.close()

    async def get(self, path: str) -> Answer:
        return await self._timed("GET", path, b"")

    async def post(self, path: str, body: Body) -> Answer:
        return await self._timed("POST", path, json.dumps(body).encode())

    async def stream(self, body: Body) -> Stream:
        """Send a completion request and read its events until the last one.

        Raises:
            BadAnswer: an error, or a stream without a token or without its usage.
        """
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        started_s, raw = await self._ask("POST", "/v1/completions", json.dumps(body).encode())
        last = last_event(raw.body)
        return Stream(
            model=last["model"],
            ttft_s=raw.first_event_s - started_s,
            duration_s=raw.ended_s - started_s,
            prompt_tokens=last["usage"]["prompt_tokens"],
            output_tokens=last["usage"]["completion_tokens"],
        )

    async def _timed(self, method: str, path: str, body: bytes) -> Answer:
        started_s, raw = await self._ask(method, path, body)
        return Answer(raw.body, raw.ended_s - started_s)

    async def _ask(self, method: str, path: str, body: bytes) -> tuple[float, _Raw]:
        """Send a request; return the time before it, and the answer."""
        request = _request(method, path, body)
        expected = self._exchange.expect()
        started_s = time.perf_counter()
        self._transport.write(request)
        try:
            raw = await asyncio.wait_for(expected, ANSWER_TIMEOUT_S)
        except TimeoutError:
            raise BadAnswer(f"{path} did not answer in {ANSWER_TIMEOUT_S:g} s") from None
        if raw.status != 200:
            text = raw.body[:300].decode(errors="replace")
            raise BadAnswer(f"{path} answered {raw.status}: {text}")
        return started_s, raw


def dechunk(body: bytes) -> bytes:
    """Return the content of a complete chunked body."""
    parts: list[bytes] = []
    at = 0
    while True:
        line_end = body.index(b"\r\n", at)
        size = int(body[at:line_end], 16)
        if not size:
            return b"".join(parts)
        parts.append(body[line_end + 2 : line_end + 2 + size])
        at = line_end + 2 + size + 2


def last_event(events: bytes) -> dict[str, Any]:
    """Return the event before `[DONE]`, which has the usage.

    Raises:
        BadAnswer: the stream has no `[DONE]`, or fewer than two events before it.
    """
    data = [line[6:] for line in events.split(b"\n") if line.startswith(b"data: ")]
    if len(data) < 3 or data[-1] != b"[DONE]":
        raise BadAnswer(f"a stream ended early: {events[-300:].decode(errors='replace')}")
    event: dict[str, Any] = json.loads(data[-2])
    if not event.get("usage"):
        raise BadAnswer(f"a stream ended without its usage: {event}")
    return event


def _request(method: str, path: str, body: bytes) -> bytes:
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
