"""Closes the sockets that gloo leaves open: those on which its groups have been set up.

Each gloo group listens on a TCP port for as long as it exists, although no member needs to connect
once all have met. It does not authenticate connections, never gives back their descriptors, and
ends the process when descriptors run out.

gloo itself must not notice. It holds the number of the descriptor, watches it with epoll, and will
remove it there and close it. So the number stays. `dup2` puts a listening Unix domain socket behind
it, whose name has been removed, so that no process can ever connect. gloo's thread may accept from
it at the same time: it learns that no connection waits, which it expects.

Where there is no `/proc`, nothing is done. Depends on Linux alone, not on torch.
"""

from __future__ import annotations

import logging
import os
import re
import select
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

log = logging.getLogger("vllm_hotswap.host")

PROCESS = Path("/proc/self")
ESTABLISHED = "01"
READINGS = 5
"""How often the table of connections is read before an end that is missing counts as unknown."""

BETWEEN_S = 0.02
INTERNET = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True, slots=True, order=True)
class OpenFile:
    """A descriptor with its inode: the number alone may soon be another file's."""

    fd: int
    inode: int


def open_files() -> frozenset[OpenFile]:
    """Return the files that this process has open; none where there is no `/proc`."""
    found = []
    with suppress(OSError):
        for fd in [int(path.name) for path in (PROCESS / "fd").iterdir()]:
            with suppress(OSError):  # the one for this listing is closed
                found.append(OpenFile(fd, os.fstat(fd).st_ino))
    return frozenset(found)


def seal(before: frozenset[OpenFile], *, is_alone: bool) -> int:
    """Close the listening sockets of a group that has just been made; return how many.

    Closes only TCP sockets that were opened since `before`, and that are watched by an epoll
    instance opened since then. Other listening sockets, such as a connector's port, stay as they
    are.

    Args:
        before: `open_files()`, as it was before the group was made.
        is_alone: the group has no other member. All connections to it are closed.

    Raises:
        ConnectionRefusedError: the group has other members, and a process of another user may be
            connected to it. A process whose user cannot be found may be one.
    """
    ports = set()
    for fd, watchers in _watched(open_files() - before).items():
        if (port := _listening_port(fd)) is not None:
            try:
                _replace(fd, watchers)
            except OSError as error:
                log.warning("event=listener_left_open port=%d cause=%r", port, str(error))
            else:
                ports.add(port)
    guests = list(_connected_to(ports, open_files() - before)) if ports else []
    for guest in guests:
        if is_alone:
            _hang_up(guest)
        elif not (known := _is_from_us(guest)) and connections():
            whose = "belongs to another user" if known is False else "may belong to another user"
            raise ConnectionRefusedError(
                f"a process that {whose} connected while the model's workers connected to each "
                "other; nothing was loaded; try again"
            )
    return len(ports)


def _watched(new: Iterable[OpenFile]) -> dict[int, list[int]]:
    """Return the new descriptors that new epoll instances watch, with those instances."""
    found: dict[int, list[int]] = {}
    numbers = {file.fd for file in new}
    for fd in numbers:
        with suppress(OSError):
            if (PROCESS / "fd" / str(fd)).readlink().name == "anon_inode:[eventpoll]":
                text = (PROCESS / "fdinfo" / str(fd)).read_text(encoding="ascii")
                for target in map(int, re.findall(r"^tfd:\s*(\d+)", text, re.MULTILINE)):
                    found.setdefault(target, []).append(fd)
    return {fd: watchers for fd, watchers in found.items() if fd in numbers}


def _listening_port(fd: int) -> int | None:
    """Return the TCP port on which a descriptor listens; None if it does not."""
    with suppress(OSError), closing(_socket(fd)) as sock:
        if sock.family in INTERNET and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return int(sock.getsockname()[1])
    return None


def _replace(fd: int, watchers: Iterable[int]) -> None:
    """Put the unreachable socket behind a descriptor; its watchers keep watching it."""
    door = _closed_door().fileno()
    polls = [select.epoll.fromfd(os.dup(watcher)) for watcher in watchers]  # before any change
    try:
        os.dup2(door, fd, inheritable=False)  # its watchers drop the old one
        for poll in polls:
            poll.register(fd, 0)
    finally:
        for poll in polls:
            poll.close()


@cache
def _closed_door() -> socket.socket:
    """Return a listening socket to which no process can connect."""
    with tempfile.TemporaryDirectory(prefix="vllm-hotswap-door-") as folder:
        directory = os.open(folder, os.O_RDONLY)
        try:
            door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            door.bind(f"/proc/self/fd/{directory}/door")  # a path has at most 107 bytes
            door.listen(1)
        finally:
            os.close(directory)
    return door


def _connected_to(ports: set[int], new: Iterable[OpenFile]) -> Iterator[OpenFile]:
    for file in new:
        with suppress(OSError), closing(_socket(file.fd)) as sock:
            if sock.family in INTERNET and sock.getsockname()[1] in ports:
                yield file


def _hang_up(guest: OpenFile) -> None:
    """Shut the connection down. Its descriptor is gloo's, and stays."""
    with suppress(OSError), closing(_socket(guest.fd)) as sock:
        sock.shutdown(socket.SHUT_RDWR)


def _socket(fd: int) -> socket.socket:
    """Return a socket object for a copy of a descriptor. Raises OSError if it is not a socket."""
    copy = os.dup(fd)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


# --- who the others are -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connection:
    """One end of a TCP connection, as `/proc/self/net/tcp` lists it."""

    local: str
    remote: str
    state: str
    uid: int
    inode: int


def connections() -> list[Connection]:
    """Return the ends of all TCP connections of this network namespace."""
    found = []
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            lines = (PROCESS / "net" / name).read_text(encoding="ascii").splitlines()[1:]
            for fields in map(str.split, lines):
                _, local, remote, state, *_, uid, _, inode = fields[:10]
                found.append(Connection(local, remote, state, int(uid), int(inode)))
    return found


def is_from(uid: int, inode: int, ends: Iterable[Connection]) -> bool | None:
    """Whether the other end of the connection with this inode is a living socket of that user.

    None if either end is not among `ends`.
    """
    ends = list(ends)
    mine = next((end for end in ends if end.inode == inode), None)
    users = [
        end.uid
        for end in ends
        if mine is not None
        and (end.local, end.remote) == (mine.remote, mine.local)
        and end.state == ESTABLISHED
    ]
    return users[0] == uid if users else None


def _is_from_us(guest: OpenFile) -> bool | None:
    """Return `is_from` for this process's user; read the table until both ends are in it.

    The kernel writes the table piece by piece, and leaves ends out while others come and go.
    None if an end is never in it, or there is no table.
    """
    for attempt in range(READINGS):
        if attempt:
            time.sleep(BETWEEN_S)
        known = is_from(os.geteuid(), guest.inode, connections())
        if known is not None:
            return known
    return None
