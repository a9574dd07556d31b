"""Find top-level keys of a JSON object of any size, in pieces, without building its values.

The body is looked at as an array of bytes, a piece at a time, with numpy: which bytes are inside
strings (the parity of quotes), and how deep each is nested (the running sum of brackets). That
gives the strings at the top level, which are compared with the keys, all at once. A piece costs a
few milliseconds whatever is in it. That is why this is not a loop over tokens, and not a call of a
C parser: those hold the interpreter for as long as they parse.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_hotswap.tasks import Work, at_once

PIECE_BYTES = 128 << 10
MAX_TEXT_BYTES = 16 << 10
"""The longest value of a key, as it is written. Names of models and ids are far shorter."""

_QUOTE, _OPEN, _CLOSE, _COMMA, _COLON, _BACKSLASH = b'"{},:\\'
_TO_CURLY = 0x20
"""The bit that turns `[` and `]` into `{` and `}`."""

_SPACE = re.compile(rb"[ \t\r\n]*")
_IS_SPACE = np.isin(np.arange(256), tuple(b" \t\r\n"))
_EMPTY = re.compile(rb".[ \t\r\n]*+[\]}]", re.DOTALL)
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_TRUE = re.compile(rb"true(?!\w)")


class TooLong(ValueError):
    """The text under a key is longer than `MAX_TEXT_BYTES`. Its argument is the key."""


class TooManyValues(ValueError):
    """The body has more values than its parser may get."""


@dataclass(frozen=True, slots=True)
class Member:
    """The value of a top-level key as it is written, and how many items are in it."""

    text: memoryview = field(repr=False)
    items: int
    """How many values a list or an object contains directly; 0 for any other value."""


@dataclass(frozen=True, slots=True)
class Scanned:
    """What was found in a body."""

    found: Mapping[str, Any]
    members: Mapping[str, Member]
    values: int
    """Values at any depth: those that begin a list or an object, and those that follow a comma."""


def scan(
    body: bytes,
    keys: Collection[str],
    piece_bytes: int = PIECE_BYTES,
    most_values: int = sys.maxsize,
    members: Collection[str] = (),
) -> Work[Scanned]:
    """Find values of top-level keys, as `json.loads` would read them, the last one of each key.

    Args:
        body: JSON in any encoding that `json.loads` knows.
        keys: the keys to look for, of ASCII letters, digits and underscores.
        piece_bytes: how much is looked at between two yields.
        most_values: how many values there may be.
        members: additional keys, whose whole value is wanted.

    Returns:
        For each of `keys` that is there: its text, True, or None for any other value. A body that
        is not JSON gives any of these, and never more than `json.loads` would: its parser refuses
        it later.

    Raises:
        TooLong: a text is longer than `MAX_TEXT_BYTES`.
        TooManyValues: there are more than `most_values`.
    """
    text = yield from _as_utf8(body, piece_bytes)
    begin = yield from _end_of_space(text, 0, piece_bytes)
    match text[begin : begin + 1]:
        case b"{":
            scanner = _Scanner(text, keys, members)
        case b"[":  # it is parsed, too, before it is refused; so its values count
            scanner = _Scanner(text, (), ())
        case _:
            return Scanned({}, {}, 0)
    for start in range(begin, len(text), piece_bytes):
        yield from scanner.scan_piece(start, start + piece_bytes)
        if scanner.values > most_values:
            raise TooManyValues
        if scanner.is_over:
            break
        yield
    return Scanned(scanner.found, scanner.members(), scanner.values)


def _as_utf8(body: bytes, piece_bytes: int) -> Work[bytes]:
    """Return the text in UTF-8, without a byte order mark. Raises `UnicodeDecodeError`."""
    encoding = json.detect_encoding(body)
    if encoding == "utf-8":
        return body
    if encoding == "utf-8-sig":
        return body.removeprefix(codecs.BOM_UTF8)
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    pieces = []
    for start in range(0, len(body), piece_bytes):
        text = decoder.decode(body[start : start + piece_bytes])
        pieces.append(text.encode("utf-8", "surrogatepass"))
        yield
    return b"".join(pieces)


def utf8_of(body: bytes) -> Work[bytes]:
    """Return a JSON text in UTF-8, without a byte order mark; unchanged if it cannot be read."""
    try:
        return (yield from _as_utf8(body, PIECE_BYTES))
    except UnicodeDecodeError:
        return body


def as_utf8(body: bytes) -> bytes:
    """Do as `utf8_of` does, without a pause."""
    return at_once(utf8_of(body))


def _end_of_space(body: bytes, position: int, piece_bytes: int) -> Work[int]:
    """Return the position after any white space that begins at `position`."""
    while match := _SPACE.match(body, position, position + piece_bytes):
        position = match.end()
        if match.end() - match.start() < piece_bytes:
            break
        yield
    return position


@dataclass(slots=True)
class _Span:
    """The position of a member, as far as the body has been looked at."""

    begin: int | None = None
    end: int | None = None
    commas: int = 0

    def member(self, body: bytes) -> Member:
        text = memoryview(body)[self.begin : self.end]
        is_filled = bytes(text[:1]) in (b"[", b"{") and not _EMPTY.match(text)
        return Member(text, self.commas + 1 if is_filled else 0)


class _Scanner:
    """Reads a body piece by piece, and keeps the state that it needs between two pieces."""

    def __init__(self, body: bytes, keys: Collection[str], members: Collection[str]) -> None:
        self._body = body
        self._keys = tuple(keys)
        self._spans = {key: _Span() for key in members}
        self._bytes = np.frombuffer(body, np.uint8)
        self._depth = 0
        self._is_inside = False
        self._is_escaped = False
        self.found: dict[str, Any] = {}
        self.values = 0
        self.is_over = False
        """Whether the object has ended."""

    def scan_piece(self, start: int, end: int) -> Work[None]:
        """Look at one piece. Pieces come in order, without a gap."""
        piece = np.frombuffer(self._without_escapes(self._body[start:end]), np.uint8)
        quotes = piece == _QUOTE
        inside = np.logical_xor.accumulate(quotes) ^ self._is_inside
        steps = self._steps(piece, inside)
        self.values += _count(steps == 1) + _count((piece == _COMMA) & ~inside)
        depth: NDArray[np.int32] = np.cumsum(steps, dtype=np.int32)
        depth += self._depth
        tops = np.flatnonzero(quotes & inside & (depth == 1))
        if (depth[-1] <= 0) or not depth.all():
            self.is_over = True
            tops = tops[tops < int(np.argmax(depth <= 0))]
        self._is_inside, self._depth = bool(inside[-1]), int(depth[-1])
        yield from self._scan_keys(tops + start, end)
        if self._spans:
            yield from self._scan_members(tops + start, end)
            commas = np.where((piece == _COMMA) & ~inside, depth, 0)
            self._measure(commas == 2, (commas == 1) | (depth <= 0), start)

    def members(self) -> dict[str, Member]:
        """Return the members that were looked for and are there."""
        spans = self._spans.items()
        return {key: span.member(self._body) for key, span in spans if span.begin is not None}

    def _scan_members(self, strings: NDArray[np.intp], end: int) -> Work[None]:
        for key, span in self._spans.items():
            ends = self._ends_of(key, strings)
            colon = (yield from self._last_colon(ends, end)) if len(ends) else None
            if colon is not None:
                begin = yield from _end_of_space(self._body, colon + 1, PIECE_BYTES)
                span.begin, span.end, span.commas = begin, None, 0

    def _measure(self, commas: NDArray[np.bool_], ends: NDArray[np.bool_], start: int) -> None:
        """Continue the members that have begun, with the piece that begins at `start`.

        Args:
            commas: which bytes separate the items of a member.
            ends: which bytes end a member.
        """
        for span in self._spans.values():
            if span.begin is None or span.end is not None:
                continue
            first = max(0, span.begin - start)
            if ends[first:].any():
                span.end = start + first + int(np.argmax(ends[first:]))
            last = None if span.end is None else span.end - start
            span.commas += _count(commas[first:last])

    def _without_escapes(self, piece: bytes) -> bytes:
        """Return the piece with spaces in place of escaped quotes; positions stay."""
        if self._is_escaped:
            piece = b" " + piece[1:]
        backslashes = len(piece) - len(piece.rstrip(b"\\"))
        self._is_escaped = backslashes % 2 == 1
        if b"\\" not in piece:
            return piece
        return piece.replace(b"\\\\", b"  ").replace(
            b'\\"', b"  "
        )  # in this order: \\" ends a text

    def _steps(self, piece: NDArray[np.uint8], inside: NDArray[np.bool_]) -> NDArray[np.int8]:
        """Return 1 where a bracket opens, -1 where one closes, 0 elsewhere."""
        curly = piece | _TO_CURLY
        opens, closes = (curly == _OPEN).astype(np.int8), (curly == _CLOSE).astype(np.int8)
        steps: NDArray[np.int8] = opens - closes
        steps[inside] = 0
        return steps

    def _scan_keys(self, strings: NDArray[np.intp], end: int) -> Work[None]:
        """Read the value of the last occurrence of each key among a piece's top-level strings.

        Args:
            strings: where they begin; they may end in a later piece.
            end: the end of the piece.
        """
        for key in self._keys:
            ends = self._ends_of(key, strings)
            colon = (yield from self._last_colon(ends, end)) if len(ends) else None
            if colon is not None:
                begin = yield from _end_of_space(self._body, colon + 1, PIECE_BYTES)
                self.found[key] = self._value(key, begin)

    def _ends_of(self, key: str, strings: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return the ends, behind the closing quotes, of the strings that are `key`."""
        at = strings + 1
        for letter in key.encode():
            at = self._after(letter, at)
        ends: NDArray[np.intp] = at[self._at(at) == _QUOTE] + 1
        return ends

    def _after(self, letter: int, at: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return the positions behind this letter, plain or as an escape (`\\u006d`)."""
        found = self._at(at)
        plain: NDArray[np.intp] = at[found == letter] + 1
        escaped = at[found == _BACKSLASH]
        if not len(escaped):
            return plain
        for lower, upper in zip(b"\\u%04x" % letter, b"\\u%04X" % letter, strict=True):
            found = self._at(escaped)
            escaped = escaped[(found == lower) | (found == upper)] + 1
        return np.sort(np.concatenate((plain, escaped)))

    def _at(self, positions: NDArray[np.intp]) -> NDArray[np.uint8]:
        """Return the bytes there; beyond the end, the last byte, which ends only its own key."""
        return self._bytes.take(positions, mode="clip")

    def _last_colon(self, ends: NDArray[np.intp], piece_end: int) -> Work[int | None]:
        """Return the colon after the last of these strings that is a key and not a value."""
        first = int(ends[0])
        solid = np.flatnonzero(~_IS_SPACE[self._bytes[first:piece_end]]) + first
        index = np.searchsorted(solid, ends)
        if index[-1] == len(solid):  # what follows is in a later piece: only for the last string
            after = yield from _end_of_space(self._body, int(ends[-1]), PIECE_BYTES)
            if self._body[after : after + 1] == b":":
                return after
            index = index[:-1]
        following = solid[index]
        colons = following[self._bytes[following] == _COLON]
        return int(colons[-1]) if len(colons) else None

    def _value(self, key: str, begin: int) -> str | bool | None:
        end = begin + MAX_TEXT_BYTES
        if match := _STRING.match(self._body, begin, end):
            return _decoded(match.group())
        if self._body[begin : begin + 1] == b'"' and len(self._body) > end:
            raise TooLong(key)
        return True if _TRUE.match(self._body, begin, end) else None


def _count(flags: NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(flags))


def _decoded(token: bytes) -> str | None:
    try:
        value = json.loads(token)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
