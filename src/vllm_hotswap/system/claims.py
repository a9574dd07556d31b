"""Names that one server at a time may hold, while it does not listen on its address yet.

Until then, Linux allows another socket to bind the same port, and a bound Unix domain socket looks
like one that a killed server has left.
https://man7.org/linux/man-pages/man7/unix.7.html, "abstract"
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "vllm-hotswap/"
_SOCKETS = Path("/proc/net/unix")
"""Unix domain sockets of this network namespace; abstract ones have `@` before their name.
https://man7.org/linux/man-pages/man5/proc_pid_net.5.html"""

_ANY_ADDRESS = ("0.0.0.0", "::")


@contextlib.contextmanager
def claimed(name: str) -> Iterator[socket.socket | None]:
    """Claim a name of at most 90 bytes; released if the block fails, else by closing the socket.

    The name has no file. It belongs to the network of the machine (or container), and Linux drops
    it with the process. Yields None if the system has no such names, or does not allow them.

    Raises:
        OSError: another server holds it (EADDRINUSE).
    """
    claim = _claim(name)
    try:
        yield claim
    except BaseException:
        give_back(claim)
        raise


@contextlib.contextmanager
def claimed_port(address: str, port: int) -> Iterator[socket.socket | None]:
    """Claim a TCP port of an address, as `claimed` claims a name.

    Raises:
        OSError: another server has claimed it (EADDRINUSE), perhaps for all addresses.
    """
    with claimed(f"{address}/{port}") as claim:
        # Claim first, then look: in the other order, two servers that start at the same time could
        # miss each other.
        if claim and any(_overlap(address, other) for other in _addresses_with(port)):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        yield claim


def give_back(claim: socket.socket | None) -> None:
    if claim is not None:
        claim.close()


def _claim(name: str) -> socket.socket | None:
    if sys.platform != "linux":
        return None
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0{_PREFIX}{name}".encode())
    except OSError as error:
        claim.close()
        if error.errno == errno.EADDRINUSE:
            raise
        return None
    return claim


def _addresses_with(port: int) -> Iterator[str]:
    """Yield the addresses for which the port is claimed; none if the system does not list them."""
    try:
        lines = _SOCKETS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        name = line.rpartition(f"@{_PREFIX}")[2]
        address, _, claimed_for = name.rpartition("/")
        if name != line and claimed_for == str(port):
            yield address


def _overlap(one: str, other: str) -> bool:
    """Whether two different addresses cannot use the same port. `::` includes those of IPv4."""
    if one == other:
        return False  # its own claim
    is_same_family = (":" in one) == (":" in other)
    return "::" in (one, other) or (is_same_family and bool({one, other} & set(_ANY_ADDRESS)))
