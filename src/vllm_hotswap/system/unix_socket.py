"""A Unix domain socket that is bound like a TCP port: once, and gone when its server has stopped.

Unlike a port, the file stays when its process is killed, and others may put another one in its
place. So a file is replaced only if it is a socket without a listener. It is removed only if it is
still the one that was made here. https://man7.org/linux/man-pages/man7/unix.7.html
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.system.claims import claimed, give_back

MAX_PATH_BYTES = 107
"""Longest path of a socket, on Linux."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Identifies a file, whatever its name."""

    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity | None:
        """The identity of the file with this name, links not followed; None if there is none."""
        try:
            status = path.lstat()
        except OSError:
            return None
        return cls(status.st_dev, status.st_ino)


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """A bound socket, and the file that belongs to it."""

    sock: socket.socket
    path: Path
    identity: FileIdentity | None
    _claim: socket.socket | None

    @classmethod
    def bind(cls, path: Path, mode: int | None = None) -> UnixSocket:
        """Create the socket; a stale one is replaced. No client can connect before `listen`.

        Args:
            path: of the socket.
            mode: of the file; None: what the umask leaves. Users who may write to it may connect.

        Raises:
            ConfigError: it cannot be created, or is in use; the message says why.
        """
        _check_place(path)
        try:
            with claimed(_claim_name(path)) as claim:
                _remove_stale(path)
                sock = _bind(path, mode)
        except OSError as error:
            raise _cannot_listen(path, error) from error
        bound = cls(sock, path.absolute(), FileIdentity.of(path), claim)
        if mode is not None:
            bound._allow(mode)
        return bound

    @property
    def is_in_place(self) -> bool:
        """Whether clients that connect to the path arrive here."""
        return self.identity is not None and FileIdentity.of(self.path) == self.identity

    def _allow(self, mode: int) -> None:
        """Restore the permissions that the umask has removed."""
        try:
            self.path.chmod(mode)
        except OSError as error:
            self.close()
            raise _cannot_listen(self.path, error) from error

    def close(self) -> None:
        """Close it, and remove its file. Call it once."""
        self.sock.close()
        if self.is_in_place:
            with contextlib.suppress(OSError):
                self.path.unlink()
        give_back(self._claim)  # only now, so that the next server finds no file of ours


def _check_place(path: Path) -> None:
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"--uds: the folder {str(folder)!r} does not exist")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--uds: the folder {str(folder)!r} cannot be written")
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(f"--uds: {str(path)!r} is longer than {MAX_PATH_BYTES} bytes")


def _claim_name(path: Path) -> str:
    """Return a name that does not depend on the links through which the path leads."""
    folder = path.absolute().parent.stat()
    name = sha256(os.fsencode(path.name)).hexdigest()[:32]
    return f"{folder.st_dev}/{folder.st_ino}/{name}"


def _remove_stale(path: Path) -> None:
    """Remove a socket without a listener. Raises `ConfigError` for anything else."""
    before = FileIdentity.of(path)
    if before is None:
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise ConfigError(f"--uds: {str(path)!r} exists and is not a socket; choose another path")
    _check_stale(path)
    if FileIdentity.of(path) != before:  # another server has replaced it during the check
        raise _in_use(path)
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _cannot_listen(path, error) from error


def _check_stale(path: Path) -> None:
    """Raise `ConfigError` unless a connection is refused, as it is without a listener."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)  # a full backlog means that a server listens
        try:
            client.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except (BlockingIOError, ConnectionError):
            pass
        except OSError as error:  # no right to connect, or a socket of another kind
            if error.errno != errno.EPROTOTYPE:
                raise _cannot_listen(path, error) from error
    raise _in_use(path)


def _bind(path: Path, mode: int | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if mode is not None:
            # On Linux this bounds the file's mode from its first moment; elsewhere it fails.
            with contextlib.suppress(OSError):
                os.fchmod(sock.fileno(), mode)
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise _cannot_listen(path, error) from error
    return sock


def _in_use(path: Path) -> ConfigError:
    return ConfigError(
        f"cannot listen on unix:{path}: {os.strerror(errno.EADDRINUSE)}; choose another --uds"
    )


def _cannot_listen(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on unix:{path}: {error.strerror or error}; choose another --uds"
    )
