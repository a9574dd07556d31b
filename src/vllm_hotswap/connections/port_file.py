"""A file with the server's TCP port, for the program that started it with `--port 0`."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.system import FileIdentity, replace_text, try_to_write


@dataclass(frozen=True, slots=True)
class PortFile:
    """The file as this server has written it."""

    path: Path
    identity: FileIdentity

    @classmethod
    def write(cls, path: Path, port: int) -> PortFile:
        """Write the number and a line end. A reader of the file finds all of it, or no file.

        Raises:
            OSError: the file cannot be written.
        """
        path = path.absolute()
        status = replace_text(path, f"{port}\n")
        return cls(path, FileIdentity(status.st_dev, status.st_ino))

    def remove(self) -> None:
        """Remove the file, unless another server has written its own since. Call it once."""
        if FileIdentity.of(self.path) == self.identity:
            with contextlib.suppress(OSError):
                self.path.unlink()


def check_port_file(path: Path) -> None:
    """Raise `ConfigError` if the file cannot be written, or would replace something else."""
    folder = path.absolute().parent
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise ConfigError(f"--port-file: {str(folder)!r} is not a folder")
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # raises if the name is too long for the file system
        try_to_write(folder)
    except FileNotFoundError:
        raise ConfigError(f"--port-file: the folder {str(folder)!r} does not exist") from None
    except OSError as error:
        raise ConfigError(
            f"--port-file: {str(path)!r} cannot be written: {error.strerror}; choose another"
        ) from error
    if os.path.lexists(path) and not _holds_port(path):
        raise ConfigError(
            f"--port-file: {str(path)!r} exists and is not a port file; choose another"
        )


def _holds_port(path: Path) -> bool:
    try:
        if path.is_symlink() or not path.is_file():
            return False
        with path.open("rb") as file:
            return re.fullmatch(rb"\d{0,5}\n?", file.read(8)) is not None
    except OSError:
        return False
