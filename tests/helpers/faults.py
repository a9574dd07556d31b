"""Fault injection for tests: failpoints of a running server, and clients that behave badly."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path


class Faults:
    """The failpoint file of a running server."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("")

    @property
    def variable(self) -> str:
        """The specification with which the server has to be started."""
        return f"@{self._path}"

    def inject(self, rules: str) -> None:
        """Replace all rules by these."""
        new = self._path.with_suffix(".new")
        new.write_text(rules)
        new.replace(self._path)

    def clear(self) -> None:
        self.inject("")

    def hits(self, place: str) -> int:
        """Return how often rules for this place were followed, under any specification."""
        hits = self._path.with_name(self._path.name + ".hits")
        lines = hits.read_text().splitlines() if hits.exists() else []
        return sum(f" {place}" in line for line in lines)


def wait_until(condition: Callable[[], object], timeout_s: float = 30) -> float:
    """Wait for a condition; return the seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "the condition did not come true in time"
        time.sleep(0.01)
    return time.monotonic() - started


class RawClient:
    """A connection, as a context manager, for what well-behaved HTTP clients do not do."""

    def __init__(self, port: int, receive_bytes: int | None = None) -> None:
        self._socket = socket.socket()
        if receive_bytes is not None:  # before the connection, or the window is larger
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._socket.settimeout(60)
        self._socket.connect(("127.0.0.1", port))

    def post(self, path: str, body: object) -> RawClient:
        """Send a request without reading the answer."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return self

    def send(self, content: bytes) -> None:
        self._socket.sendall(content)

    def read(self, size: int = 65536) -> bytes:
        """Return what has arrived; empty at the end of the connection."""
        try:
            return self._socket.recv(size)
        except ConnectionResetError:
            return b""

    def read_all(self) -> bytes:
        received = b""
        while part := self.read():
            received += part
        return received

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def reset(self) -> None:
        """Close as a killed client does: with RST instead of FIN."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()
