"""Paths that the YAML file names, relative to it."""

from __future__ import annotations

from pathlib import Path

from vllm_hotswap.errors import ConfigError


def beside(file: Path, name: str, place: str) -> Path:
    """The absolute path of `name`, which may be relative to the folder of `file` or begin with `~`.

    Raises:
        ConfigError: it can be no path (an unknown user, a null byte, too long a name).
    """
    try:
        path = (file.parent / Path(name).expanduser()).resolve()
        path.exists()  # raises what a name too long for the file system raises
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{place}: {name!r} is no path: {error}") from error
    return path
