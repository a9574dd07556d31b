"""Servers for tests of client commands: on fake engines, or with one canned answer."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from tests.helpers.support import Server


@dataclass
class Listening:
    """A server, its loop and its URL."""

    url: str
    server: Server
    http: uvicorn.Server
    loop: asyncio.AbstractEventLoop


@contextmanager
def listening_server(uds: Path | None = None, **kwargs: object) -> Iterator[Listening]:
    """Run a server on fake engines in a separate thread, on a port or a Unix domain socket."""
    if uds is None:
        sock = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    else:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(uds))
        url = f"unix:{uds}"
    found: list[Listening] = []
    is_up = threading.Event()

    async def serve() -> None:
        server = await Server(**kwargs).start()  # type: ignore[arg-type]
        config = uvicorn.Config(
            server.app, lifespan="off", log_level="error", timeout_graceful_shutdown=1
        )
        found.append(Listening(url, server, uvicorn.Server(config), asyncio.get_running_loop()))
        is_up.set()
        await found[0].http.serve([sock])
        await server.stop()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert is_up.wait(30)
    yield found[0]
    found[0].http.should_exit = True
    thread.join()


@dataclass
class Canned:
    """A listener that sends the same bytes to every client that has sent a request."""

    url: str
    answer: bytes | None = b""
    """None: it never sends anything."""
    asked: threading.Event = field(default_factory=threading.Event)


@contextmanager
def canned_server() -> Iterator[Canned]:
    """Run one in a separate thread; until `answer` is set, it closes connections silently."""
    sock = socket.create_server(("127.0.0.1", 0))
    canned = Canned(f"http://127.0.0.1:{sock.getsockname()[1]}")
    silent: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = sock.accept()
            except OSError:
                return
            if connection.recv(65536):
                canned.asked.set()
            if canned.answer is None:
                silent.append(connection)
                continue
            with connection:
                connection.sendall(canned.answer)
                connection.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield canned
    sock.shutdown(socket.SHUT_RDWR)
    sock.close()
    thread.join()
    for connection in silent:
        connection.close()
