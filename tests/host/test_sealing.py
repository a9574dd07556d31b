"""gloo's listening sockets are closed once its members have met; other sockets are not."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_hotswap.host import sealing
from vllm_hotswap.host.sealing import Connection, OpenFile, is_from, open_files, seal

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")


class Listening:
    """A stand-in for a gloo group: a listening socket watched by an epoll instance of its own."""

    def __init__(self) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.sock.setblocking(False)
        self.address = self.sock.getsockname()
        self.watcher = select.epoll()
        self.watcher.register(self.sock, select.EPOLLIN)

    def close(self) -> None:
        self.watcher.close()
        self.sock.close()


@pytest.fixture
def before() -> frozenset[OpenFile]:
    return open_files()


@pytest.fixture
def group(before: frozenset[OpenFile]) -> Iterator[Listening]:
    group = Listening()
    yield group
    group.close()


def test_nobody_can_connect_to_a_sealed_group(
    before: frozenset[OpenFile], group: Listening
) -> None:
    """A sealed group accepts no connection and its port is free, although its descriptor stays."""
    assert 1 == seal(before, is_alone=True)

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(group.address)
    with socket.socket() as other:
        other.bind(group.address)


def test_a_sealed_group_notices_nothing(before: frozenset[OpenFile], group: Listening) -> None:
    """A sealed group's thread finds no connection, and its end closes the descriptor."""
    seal(before, is_alone=True)

    with pytest.raises(BlockingIOError):
        _accept(group.sock.fileno())
    assert [] == group.watcher.poll(0)
    group.watcher.unregister(group.sock.fileno())  # fails where it is not watched


def _accept(fd: int) -> None:
    """Accept as gloo does: by number, whatever the descriptor is now."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.accept()


def test_many_groups_are_sealed(before: frozenset[OpenFile]) -> None:
    """Many groups are sealed, with one replacement socket for all."""
    groups = [Listening() for _ in range(3)]

    assert 3 == seal(before, is_alone=True)
    for group in groups:
        group.watcher.unregister(group.sock.fileno())
        group.close()


def test_a_connection_of_the_meantime_is_ended(
    before: frozenset[OpenFile], group: Listening
) -> None:
    """A connection made while a group is created is closed."""
    with socket.create_connection(group.address) as client:
        accepted, _ = group.sock.accept()
        seal(before, is_alone=True)

        assert b"" == client.recv(1)
        accepted.close()


def test_connections_of_this_user_stay_among_members(
    before: frozenset[OpenFile], group: Listening
) -> None:
    """In a group with other members, connections of this user stay."""
    with socket.create_connection(group.address) as client:
        accepted, _ = group.sock.accept()
        seal(before, is_alone=False)
        client.sendall(b"x")

        assert b"x" == accepted.recv(1)
        accepted.close()


def test_what_listened_before_goes_on(before: frozenset[OpenFile], group: Listening) -> None:
    """A socket that listened before still listens, watched by an old epoll instance or by none."""
    seal(open_files(), is_alone=True)

    socket.create_connection(group.address).close()


def test_what_nobody_watches_goes_on(before: frozenset[OpenFile]) -> None:
    """An unwatched port that another program opened in the meantime still listens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert 0 == seal(before, is_alone=True)
        socket.create_connection(other.getsockname()).close()


def test_without_proc_nothing_is_done(
    group: Listening, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without /proc, as on other systems, sockets stay and work."""
    monkeypatch.setattr(sealing, "PROCESS", tmp_path)

    assert frozenset() == open_files()
    assert 0 == seal(frozenset(), is_alone=False)
    socket.create_connection(group.address).close()


MINE = Connection("0100007F:1000", "0100007F:2000", "01", 0, 7)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (Connection("0100007F:2000", "0100007F:1000", "01", 0, 8), True),
        (Connection("0100007F:2000", "0100007F:1000", "01", 65534, 8), False),
        (Connection("0100007F:2000", "0100007F:1000", "05", 0, 0), None),
        (Connection("0100007F:2001", "0100007F:1000", "01", 0, 8), None),
    ],
    ids=["ours", "another user's", "closed already", "another one's"],
)
def test_a_member_is_known_by_its_user(other: Connection, expected: bool | None) -> None:
    """A member is recognised by its user; a closed connection's leftovers belong to no user."""
    assert expected is is_from(0, 7, [MINE, other])


def test_who_cannot_be_seen_is_not_judged() -> None:
    """If the table lacks the connection itself, its user is unknown."""
    assert is_from(0, 7, []) is None


@pytest.mark.parametrize("missing", ["mine", "the member's"])
def test_an_end_that_the_table_leaves_out_is_looked_for_again(
    before: frozenset[OpenFile],
    group: Listening,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    """A member missing from the kernel's table is looked for again, not refused."""
    with socket.create_connection(group.address) as client:
        accepted, _ = group.sock.accept()
        gone = os.fstat((client if missing == "the member's" else accepted).fileno()).st_ino
        real, readings = sealing.connections, []

        def torn() -> list[Connection]:
            readings.append(1)
            return [end for end in real() if end.inode != gone or len(readings) > 2]

        monkeypatch.setattr(sealing, "connections", torn)
        seal(before, is_alone=False)
        client.sendall(b"x")

        assert b"x" == accepted.recv(1)
        assert len(readings) > 2
        accepted.close()


def test_whoever_is_never_seen_is_not_let_in(
    before: frozenset[OpenFile], group: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that never appears in the table is refused: it may be any user's."""
    with socket.create_connection(group.address) as client:
        accepted, _ = group.sock.accept()
        gone, real = os.fstat(client.fileno()).st_ino, sealing.connections
        seen = [end for end in real() if end.inode != gone]
        monkeypatch.setattr(sealing, "connections", lambda: seen)

        with pytest.raises(ConnectionRefusedError, match="may belong to another user"):
            seal(before, is_alone=False)
        accepted.close()


def test_a_stranger_is_not_looked_for_again(
    before: frozenset[OpenFile], group: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection of another user is refused at once."""
    with socket.create_connection(group.address) as client:
        accepted, _ = group.sock.accept()
        inode = os.fstat(client.fileno()).st_ino
        strange = [
            replace(end, uid=end.uid + (end.inode == inode)) for end in sealing.connections()
        ]
        monkeypatch.setattr(sealing, "connections", lambda: strange)
        monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it was looked for again"))

        with pytest.raises(ConnectionRefusedError, match="belongs to another user"):
            seal(before, is_alone=False)
        accepted.close()


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.groups_program", *arguments],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_groups_of_torch_listen_nowhere_and_work() -> None:
    """Groups of torch listen nowhere and work, alone and with another process, to their end."""
    result = run()

    assert {"listening": [], "told": [0], "total": 1} == result["alone"]
    assert {"listening": [], "told": [0, 1], "total": 2} == result["two"]
    assert 0 == result["second"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user, too")
def test_another_user_does_not_get_among_the_members() -> None:
    """A group that another user may have joined is not used, even after he has left."""
    assert "belong" in (said := run("stranger")["refused"])
    assert "to another user connected while the model's workers connected to each other" in said
