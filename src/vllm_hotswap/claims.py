"""Names that one server at a time may hold, while it does not listen to its address yet.

Until then, Linux lets another socket be bound to the same port, and a bound Unix domain socket
looks like one that a killed server has left.
https://man7.org/linux/man-pages/man7/unix.7.html, "abstract"
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def claimed(name: str) -> Iterator[socket.socket | None]:
    """Claim a name of at most 90 bytes; given back if the block fails, else by closing it.

    It is a name without a file, in the network of the machine (or container), and Linux drops it
    with the process. None elsewhere.

    Raises:
        OSError: another server holds it (EADDRINUSE).
    """
    if sys.platform != "linux":
        yield None
        return
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0vllm-hotswap/{name}".encode())
        yield claim
    except BaseException:
        claim.close()
        raise


def give_back(claim: socket.socket | None) -> None:
    if claim is not None:
        claim.close()
