"""Paths that the YAML file names, relative to it, and files that are written as a whole."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from vllm_hotswap.errors import ConfigError


def resolve_beside(file: Path, name: str, place: object) -> Path:
    """Return `name` as an absolute path. It may be relative to `file`'s folder or begin with `~`.

    A link stays a link: its own name and its neighbours count, as in the hub's cache, where
    `snapshots/…/model.gguf` is a link to `blobs/0123abcd`. Only the folders above it are followed.

    Raises:
        ConfigError: it cannot be a path (an unknown user, a null byte, too long a name).
    """
    try:
        path = file.parent / Path(name).expanduser()
        path = path.parent.resolve() / path.name if path.name != ".." else path.resolve()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # raises if the name is too long for the file system
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{place}: {name!r} is not a valid path: {error}") from error
    return path


def replace_text(path: Path, text: str) -> os.stat_result:
    """Write an ASCII file; a reader finds all of it, or what was there before.

    The text is first written beside it, under a name that no other user can foresee, and only as a
    new file: no link to another user's file is followed.

    Returns:
        The status of the new file.

    Raises:
        OSError: the file cannot be written; nothing is left of it.
    """
    new = _new_name(path.parent)
    with new.open("x", encoding="ascii") as file:
        try:
            file.write(text)
            file.flush()
            new.replace(path)
        except OSError:
            with suppress(OSError):
                new.unlink()
            raise
        return os.fstat(file.fileno())


def try_to_write(folder: Path) -> None:
    """Make a file as `replace_text` does, and remove it. Raises `OSError` if that fails."""
    new = _new_name(folder)
    with new.open("x"):
        new.unlink()


def _new_name(folder: Path) -> Path:
    return folder / f".vllm-hotswap-{secrets.token_hex(8)}"
