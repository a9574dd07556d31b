"""The models file as it was when the server started, and whether it has changed since."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vllm_hotswap.errors import one_line

log = logging.getLogger("vllm_hotswap")


@dataclass(frozen=True, slots=True)
class ModelsFile:
    """The file's path, and the digest of its content."""

    path: Path
    digest: bytes | None
    """None: it could not be read."""

    @classmethod
    def read(cls, path: Path) -> ModelsFile:
        try:
            return cls(path, _digest(path))
        except OSError:
            return cls(path, None)

    def warn_if_changed(self) -> None:
        """Log that the file has changed and a restart would apply it, or that it is unreadable."""
        try:
            is_changed = _digest(self.path) != self.digest
        except OSError as error:
            log.warning(
                "event=models_file_unreadable path=%r cause=%r then='the running server is "
                "unchanged'",
                *(str(self.path), one_line(error)),
            )
            return
        if is_changed:
            log.warning(
                "event=models_file_changed path=%r then='the running server is unchanged; "
                "restart it to apply the file'",
                str(self.path),
            )


def _digest(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise OSError("it is no longer a regular file")  # reading a pipe might never end
    return sha256(path.read_bytes()).digest()
