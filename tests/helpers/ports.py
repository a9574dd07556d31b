"""Ports for test servers, unique over all test processes."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator

FIRST, PER_WORKER, WORKERS = 18_000, 800, 17
"""Below the range from which Linux takes client ports (32768 and up), 800 for each worker."""


def _worker() -> int:
    """Return this process's number among the test workers; 0 if it is alone."""
    name = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    return int(name.removeprefix("gw")) % WORKERS


def _mine() -> Iterator[int]:
    first = FIRST + PER_WORKER * _worker()
    # Another test run may be under way: begin elsewhere.
    offset = os.getpid() % PER_WORKER
    return itertools.cycle([first + (offset + number) % PER_WORKER for number in range(PER_WORKER)])


_ports = _mine()


def free_port() -> int:
    """Return a free TCP port of 127.0.0.1, which no other worker gets."""
    for port in itertools.islice(_ports, PER_WORKER):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError(f"all {PER_WORKER} ports from {FIRST + PER_WORKER * _worker()} are in use")
