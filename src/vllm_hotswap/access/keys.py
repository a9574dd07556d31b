"""Keys: where they come from, and how a key is recognized without being kept.

Only a key's digest is held: the key itself can reach no log, response, error or metric.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.system import read_private

FINGERPRINT_DIGITS = 12

MAX_NAME = 100
"""Characters of a key's name that are kept."""

_LINE = re.compile(r"(.*?)(?:(?:^|\s)#(.*))?")


@dataclass(frozen=True, slots=True)
class Key:
    """One key, as its digest."""

    digest: bytes = field(repr=False)
    place: str
    """Where it was given."""
    name: str = ""
    """The comment behind it in its file."""

    @property
    def fingerprint(self) -> str:
        """A text that tells keys apart in records, and is stable: part of the digest's digest."""
        return hashlib.sha256(self.digest).hexdigest()[:FINGERPRINT_DIGITS]


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one role."""

    _keys: tuple[Key, ...] = ()

    @classmethod
    def of(cls, keys: Iterable[str], place: str) -> Keys:
        """Make keys from texts; empty texts are left out.

        Raises:
            ConfigError: no HTTP header can carry one of them; the message names only the place.
        """
        given = [key for key in keys if key]
        for key in given:
            check_sendable(key, place)
        return cls(tuple(Key(_digest(key.encode()), place) for key in given))

    def __len__(self) -> int:
        return len(self._keys)

    def __add__(self, other: Keys) -> Keys:
        return Keys(self._keys + other._keys)

    def shared(self, other: Keys) -> tuple[Key, Key] | None:
        """Return a key that both have, as each was given it; None if there is none."""
        theirs = {key.digest: key for key in other._keys}
        return next(((key, theirs[key.digest]) for key in self._keys if key.digest in theirs), None)

    def find(self, key: bytes) -> Key | None:
        """Return the known key that equals `key`. All are compared, each in constant time."""
        digest = _digest(key)
        # A list: to stop at the first match would tell its position by the time.
        matches = [known for known in self._keys if secrets.compare_digest(digest, known.digest)]
        return matches[0] if matches else None

    def know(self, key: bytes) -> bool:
        """Whether `key` is one of them."""
        return self.find(key) is not None


@dataclass(frozen=True, slots=True)
class KeySource:
    """The keys of one role that were given, and the files of others, which may be read again."""

    given: Keys = Keys()
    files: Sequence[Path] = ()

    def read(self) -> Keys:
        """Return all keys, with the files as they are now. Raises `ConfigError`, with the file."""
        keys = self.given
        for path in self.files:
            keys += read_key_file(path)
        return keys


def split_keys(text: str) -> list[str]:
    """Split the keys of an environment variable, separated by commas or white space."""
    return re.split(r"[,\s]+", text.strip(", \t\r\n"))


def parse_key_file(text: str) -> Iterator[tuple[str, str]]:
    """Yield key and name of each line.

    A `#` at the start of a line, or behind white space, starts a comment. The comment behind a key
    is its name.
    """
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        key, comment = match.groups() if match else (line, None)
        yield key.strip(), _name(comment or "")


def _name(comment: str) -> str:
    return "".join(filter(str.isprintable, comment)).strip()[:MAX_NAME]


def read_key_file(path: Path) -> Keys:
    """Read the keys of a file that no other user of the machine may read or write.

    Raises:
        ConfigError: the file cannot be used; the message names it and the next step.
    """
    place = _place(path)
    keys = []
    for number, key, name in _key_lines(path):
        check_sendable(key, place)
        keys.append(Key(_digest(key.encode()), f"{place}, line {number}", name))
    return Keys(tuple(keys))


def plain_keys(path: Path) -> list[str]:
    """Read the keys of such a file as they are, to send them; at least one.

    Raises:
        ConfigError: the file cannot be used; the message names it and the next step.
    """
    return [key for _, key, _ in _key_lines(path)]


def _key_lines(path: Path) -> list[tuple[int, str, str]]:
    """Return number, key and name of each line with a key; at least one. Raises `ConfigError`."""
    place = _place(path)
    try:
        lines = enumerate(parse_key_file(read_private(path, place).decode()), start=1)
        found = [(number, key, name) for number, (key, name) in lines if key]
    except OSError as error:
        raise ConfigError(f"{place} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:  # its text would show what could not be decoded
        raise ConfigError(f"{place} is not UTF-8 text; write one key per line") from None
    if not found:
        raise ConfigError(f"{place} contains no key; write one per line")
    return found


def check_sendable(key: str, place: str) -> None:
    """Raise `ConfigError`, which names only the place, if no HTTP header can carry the key."""
    if not _is_sendable(key):
        raise ConfigError(f"{place}: a key may only have printable ASCII characters, and no spaces")


def _place(path: Path) -> str:
    return f"key file {str(path)!r}"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_sendable(key: str) -> bool:
    return key.isascii() and key.isprintable() and " " not in key
