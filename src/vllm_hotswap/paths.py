"""Paths that the YAML file names, relative to it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from vllm_hotswap.errors import ConfigError


def beside(file: Path, name: str, place: object) -> Path:
    """The absolute path of `name`, which may be relative to the folder of `file` or begin with `~`.

    A link stays a link: its own name and its neighbours count, as in the hub's cache, where
    `snapshots/…/model.gguf` is a link to `blobs/0123abcd`. Only the folders above it are followed.

    Raises:
        ConfigError: it can be no path (an unknown user, a null byte, too long a name).
    """
    try:
        path = file.parent / Path(name).expanduser()
        path = path.parent.resolve() / path.name if path.name != ".." else path.resolve()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # raises what a name too long for the file system raises
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{place}: {name!r} is no path: {error}") from error
    return path
