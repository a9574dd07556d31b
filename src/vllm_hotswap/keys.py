"""Keys: where they come from, and how one is known without being kept.

Of a key only its digest is held: what is not there can reach no log, answer, error or metric.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_hotswap.errors import ConfigError

OTHERS = stat.S_IROTH | stat.S_IWOTH | stat.S_IXOTH

_COMMENT = re.compile(r"(^|\s)#.*")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one role, as digests."""

    _digests: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, keys: Iterable[str], place: str) -> Keys:
        """Empty ones count as none.

        Raises:
            ConfigError: no HTTP header can carry one of them; the message names the place alone.
        """
        given = [key for key in keys if key]
        for key in given:
            check_sendable(key, place)
        return cls(tuple(_digest(key.encode()) for key in given))

    def __len__(self) -> int:
        return len(self._digests)

    def __add__(self, other: Keys) -> Keys:
        return Keys(self._digests + other._digests)

    def shares(self, other: Keys) -> bool:
        """Whether some key is one of both."""
        return not set(self._digests).isdisjoint(other._digests)

    def know(self, key: bytes) -> bool:
        """Whether it is one of them. Every one is compared, each in constant time."""
        digest = _digest(key)
        matches = [secrets.compare_digest(digest, known) for known in self._digests]
        return any(matches)


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where the keys of one role come from: those that were given, and files, read at any time."""

    given: Keys = Keys()
    files: Sequence[Path] = ()

    def read(self) -> Keys:
        """All keys, as the files have them now. Raises `ConfigError`, which names the file."""
        keys = self.given
        for path in self.files:
            keys += read_key_file(path)
        return keys


def split_keys(text: str) -> list[str]:
    """The keys of an environment variable, separated by commas or white space."""
    return re.split(r"[,\s]+", text.strip(", \t\r\n"))


def parse_key_file(text: str) -> Iterator[str]:
    """One key a line; `#` at the begin of a line, or behind white space, begins a comment."""
    for line in text.splitlines():
        yield _COMMENT.sub("", line).strip()


def read_key_file(path: Path) -> Keys:
    """The keys of a file that nobody else of the machine may read or write, as digests.

    Raises:
        ConfigError: it cannot be used; the message names the file and the next step.
    """
    return Keys.of(plain_keys(path), _place(path))


def plain_keys(path: Path) -> list[str]:
    """The keys of such a file as they are, to be sent; at least one.

    Raises:
        ConfigError: it cannot be used; the message names the file and the next step.
    """
    place = _place(path)
    try:
        _check(path.stat().st_mode, path, place)
        keys = [key for key in parse_key_file(path.read_text(encoding="utf-8")) if key]
    except OSError as error:
        raise ConfigError(f"{place} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:  # which would show what it could not decode
        raise ConfigError(f"{place} is not UTF-8 text; write one key a line") from None
    if not keys:
        raise ConfigError(f"{place} contains no key; write one a line")
    return keys


def check_sendable(key: str, place: str) -> None:
    """Raises `ConfigError`, which names the place alone, if no HTTP header can carry the key."""
    if not _is_sendable(key):
        raise ConfigError(f"{place}: a key may only have printable ASCII characters, and no spaces")


def _place(path: Path) -> str:
    return f"key file {str(path)!r}"


def _check(mode: int, path: Path, place: str) -> None:
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{place} is not a regular file")
    if mode & OTHERS:
        raise ConfigError(
            f"{place} is open to every user of the machine; run: chmod o= {shlex.quote(str(path))}"
        )


def fingerprint(key: bytes) -> str:
    """Tells a key from others, and tells nothing else of it."""
    return _digest(key).hex()[:16]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_sendable(key: str) -> bool:
    return key.isascii() and key.isprintable() and " " not in key
