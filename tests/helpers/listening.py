"""A server on fake engines behind a real socket, and clients that send arbitrary bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

from starlette.types import ASGIApp
from uvicorn.server import ServerState

from tests.helpers.serving import flags
from tests.helpers.support import Server
from vllm_hotswap.config.settings import LimitsConfig
from vllm_hotswap.connections.arrivals import Acceptor
from vllm_hotswap.connections.connections import Config, Connections
from vllm_hotswap.connections.listen import Listener, ListenFlags
from vllm_hotswap.server import run as life

PATIENCE_S = 30.0
"""How long a test waits for something that must happen."""


@dataclass(frozen=True)
class Listening:
    """The address of a server, and what uvicorn knows about it."""

    port: int
    state: ServerState
    shared: Connections
    """State that its connections share."""
    acceptors: list[Acceptor]
    """Its listening sockets."""


@asynccontextmanager
async def listening(
    server: Server, limits: LimitsConfig | None = None, **given: object
) -> AsyncIterator[int]:
    """Run the server behind a real socket, with these flags of vLLM; yield its port."""
    async with listening_with(server, limits, **given) as at:
        yield at.port


@asynccontextmanager
async def listening_with(
    server: Server,
    limits: LimitsConfig | None = None,
    listen: ListenFlags | None = None,
    log_config: dict[str, Any] | None = None,
    **given: object,
) -> AsyncIterator[Listening]:
    """The same, with flags of our own."""
    listener = Listener.open(flags(**given), log_config, flags=listen)
    app = server.app
    config = listener.uvicorn_config(app, limits, app.may_use_kept_place, app.outlook)
    async with _serving(listener, config) as at:
        yield at


@asynccontextmanager
async def listening_to(
    app: ASGIApp, limits: LimitsConfig | None = None, log_config: dict[str, Any] | None = None
) -> AsyncIterator[Listening]:
    """Run any application behind such a socket."""
    listener = Listener.open(flags(), log_config)
    async with _serving(listener, listener.uvicorn_config(app, limits)) as at:
        yield at


@asynccontextmanager
async def _serving(listener: Listener, config: Config) -> AsyncIterator[Listening]:
    started = asyncio.get_running_loop().create_future()
    serves = life.Server(config, on_started=lambda: started.set_result(None))
    serving = asyncio.create_task(serves.serve([listener.sock]))
    await started
    assert config.shared is not None
    try:
        yield Listening(
            listener.port or 0,
            serves.server_state,
            config.shared,
            cast("list[Acceptor]", serves.servers),
        )
    finally:
        serves.should_exit = True
        await serving
        listener.close()


@dataclass
class Told:
    """One response as it arrived."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        """The error's code, if the response is one of ours."""
        if self.headers.get("content-type") != "application/json":
            return None
        error = json.loads(self.body).get("error")
        return error and error["code"]

    @property
    def ends(self) -> bool:
        """Whether it says that the connection closes."""
        return self.headers.get("connection") == "close"


class Raw:
    """The connection of a client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, port: int, host: str = "127.0.0.1", source: str | None = None) -> Raw:
        """Connect; `source` is the address of the client."""
        own = None if source is None else (source, 0)
        return cls(*await asyncio.open_connection(host, port, limit=1 << 24, local_addr=own))

    async def send(self, *pieces: bytes) -> Raw:
        """Send each in a separate segment. Bytes that the server refuses to read are not sent."""
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                self._writer.write(piece)
                await self._writer.drain()
                await asyncio.sleep(0.001 if len(pieces) > 1 else 0)
        return self

    async def get(self, path: str = "/health", *fields: str) -> Told:
        lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", *fields, "", ""]
        await self.send("\r\n".join(lines).encode())
        return await self.answer()

    async def answer(self) -> Told:
        """Read the next response; its body has its stated length, or ends with the connection."""
        async with asyncio.timeout(PATIENCE_S):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status, *lines = head.rstrip().split("\r\n")
            headers = {n.lower(): v for n, _, v in (line.partition(": ") for line in lines)}
            size = int(headers.get("content-length", 0))
            return Told(int(status.split()[1]), headers, await self._reader.readexactly(size))

    async def rest(self) -> bytes:
        """Read until the server closes the connection."""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                return await self._reader.read()
            return b""

    @property
    def unsent(self) -> int:
        """Return the number of bytes that the system has not accepted yet."""
        return self._writer.transport.get_write_buffer_size()

    def abort(self) -> None:
        """Close at once, whatever remains to be sent."""
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


async def exchange(port: int, *pieces: bytes) -> tuple[Told, bytes]:
    """Return the first response to such bytes, and what follows until the server closes."""
    client = await Raw.connect(port)
    await client.send(*pieces)
    told = await client.answer()
    rest = await client.rest()
    await client.close()
    return told, rest
