"""A Unix domain socket: who may connect, who owns it, and that nothing of it is left."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.system.unix_socket import FileIdentity, UnixSocket


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


def stale(path: Path) -> None:
    """Leave a socket as a killed server does."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o000], indirect=True)
def test_the_umask_counts(umask: int, path: Path) -> None:
    """The socket's mode follows the umask, as for every other file."""
    bound = UnixSocket.bind(path)

    assert 0o777 & ~umask == mode_of(path)
    bound.close()


@pytest.mark.parametrize("umask", [0o077, 0o000], indirect=True)
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_a_mode_counts_whatever_the_umask(umask: int, mode: int, path: Path) -> None:
    """A given mode wins over the umask, both wider and narrower."""
    bound = UnixSocket.bind(path, mode)

    assert mode == mode_of(path)
    bound.close()


def test_nobody_connects_before_the_server_listens(path: Path) -> None:
    """Until the server listens connections are refused, as on a bound TCP port; none hangs."""
    bound = UnixSocket.bind(path)
    before = connects(path)
    bound.sock.listen()

    assert (False, True) == (before, connects(path))
    bound.close()
    assert not path.exists()


def test_a_stale_socket_is_replaced(path: Path) -> None:
    """A stale socket, left by a killed server, is replaced."""
    stale(path)

    bound = UnixSocket.bind(path)
    bound.sock.listen()

    assert connects(path)
    bound.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_socket_of_another_program_is_left_alone(kind: socket.SocketKind, path: Path) -> None:
    """Another program's socket of any kind is left alone, and refused like a TCP port in use."""
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            other.listen()
        before = FileIdentity.of(path)

        with pytest.raises(ConfigError, match=r"^cannot listen on unix:.*/s: Address already in"):
            UnixSocket.bind(path)

        assert before == FileIdentity.of(path)


def test_a_socket_whose_server_is_busy_is_in_use(path: Path) -> None:
    """A socket is in use even if a full backlog makes connecting fail."""
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as client:
        other.bind(str(path))
        other.listen(0)
        client.connect(str(path))

        with pytest.raises(ConfigError, match="Address already in use; choose another --uds"):
            UnixSocket.bind(path)


def test_a_server_that_still_loads_has_its_socket(path: Path, tmp_path: Path) -> None:
    """A server that is loading owns its socket, under any name of the folder, before it listens."""
    (tmp_path / "link").symlink_to(tmp_path)
    bound = UnixSocket.bind(path)

    for same in (path, tmp_path / "link" / "s"):
        with pytest.raises(ConfigError, match="Address already in use"):
            UnixSocket.bind(same)
    bound.close()
    UnixSocket.bind(path).close()


def test_of_servers_that_start_at_once_one_gets_the_socket(path: Path) -> None:
    """Of servers that start at once, one gets the socket, even if it replaces a stale one."""
    stale(path)

    def start(_: int) -> UnixSocket | None:
        try:
            return UnixSocket.bind(path)
        except ConfigError:
            return None

    with ThreadPoolExecutor(16) as pool:
        (winner,) = [bound for bound in pool.map(start, range(64)) if bound is not None]

    assert winner.is_in_place
    winner.close()
    assert not path.exists()


def test_a_file_that_took_the_sockets_place_stays(path: Path) -> None:
    """A file that took the socket's place stays: the server removes only what it made."""
    bound = UnixSocket.bind(path)
    path.unlink()
    path.write_text("another program's")

    assert not bound.is_in_place
    bound.close()
    assert "another program's" == path.read_text()


def test_a_relative_path_is_removed_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path, where the absolute is too long for a socket, is removed from anywhere."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.chdir(deep)
    bound = UnixSocket.bind(Path("s"))
    monkeypatch.chdir(tmp_path)

    bound.close()

    assert [] == list(deep.iterdir())


def test_a_killed_server_keeps_no_claim(path: Path) -> None:
    """What a killed server leaves is stale at once."""
    code = (
        "import os, sys; from pathlib import Path; "
        "from vllm_hotswap.system.unix_socket import UnixSocket; "
        "bound = UnixSocket.bind(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert path.is_socket()

    UnixSocket.bind(path).close()

    assert not path.exists()
