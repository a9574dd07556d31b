"""Find `model`, and other fields that the router needs, in the body of a request.

The body is read as the application will read it. For JSON that is `json.loads`: UTF-8, UTF-16 or
UTF-32, with or without a byte order mark, and the last one of a repeated key counts. For forms it
is python-multipart, as in starlette. A small JSON body is simply parsed. A larger one is
scanned in pieces, because a parser holds up the event loop for as long as it parses.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote_plus

from python_multipart.multipart import MultipartParser, QuerystringParser, parse_options_header

from vllm_hotswap.api import media
from vllm_hotswap.tasks import Work, at_once
from vllm_hotswap.text import Member, check_texts, scan

SMALL_BYTES = 16 << 10
"""JSON bodies up to this size are parsed: that takes two milliseconds at most."""

_OBJECTS = re.compile(rb"\[[ \t\r\n]{0,1000}+\{")
_NUMBERS = re.compile(rb"\[[ \t\r\n]{0,1000}+[-0-9]")

MAX_NAME_BYTES = 256
MAX_VALUE_BYTES = 64 << 10
"""Bytes of a form's field that are kept at least; no model's name is as long."""


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields that the router needs from a body's top level; None if there is no such text."""

    model: str | None = None
    previous_response_id: str | None = None
    request_id: str | None = None
    stream: bool = False
    """Whether `stream` is true."""
    values: int = 0
    """JSON values in the body, counted by commas and opening brackets; 0 for a form."""
    members: Mapping[str, Any] = field(default_factory=dict)
    """Values of additional keys, as `json.loads` reads them; `Unread` if they are large."""


NO_FIELDS = Fields()

JSON_KEYS = ("model", "previous_response_id", "request_id", "stream")


@dataclass(frozen=True, slots=True)
class Unread:
    """A value of a body that was not parsed, because it is large."""

    text: memoryview = field(repr=False)
    items: int
    """How many values a list or an object contains directly."""

    @property
    def is_of_numbers(self) -> bool:
        """Whether it is a list that begins with a number."""
        return _NUMBERS.match(self.text) is not None

    @property
    def is_of_objects(self) -> bool:
        """Whether it is a list that begins with an object."""
        return _OBJECTS.match(self.text) is not None


@dataclass(frozen=True, slots=True)
class _Found:
    content: Mapping[str, Any]
    values: int = 0
    members: Mapping[str, Any] = field(default_factory=dict)


def json_fields(
    body: bytes, most_values: int = sys.maxsize, members: Collection[str] = ()
) -> Work[Fields]:
    """Return the fields of a JSON body, without any text if it is not a JSON object.

    Args:
        body: in any encoding that `json.loads` knows.
        most_values: how many values a body that is not small may have.
        members: additional keys whose values are wanted: at the top level, or, as `outer.inner`,
            one level below it.

    Raises:
        TooLong: a text is longer than any name.
        TooManyValues: a body that is not small has more than `most_values`.
        HalfSurrogate: a text anywhere in it has one.
    """
    found = yield from _find(body, JSON_KEYS, most_values, members)
    yield from check_texts(body)
    content = found.content
    return Fields(
        _text(content.get("model")),
        _text(content.get("previous_response_id")),
        _text(content.get("request_id")),
        content.get("stream") is True,
        found.values,
        found.members,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def from_json(body: bytes, key: str = "model") -> str | None:
    """Return the text under a top-level key; None if there is none. Does not pause."""
    return _text(at_once(_find(body, (key,))).content.get(key))


def _find(
    body: bytes,
    keys: Collection[str],
    most_values: int = sys.maxsize,
    members: Collection[str] = (),
) -> Work[_Found]:
    tops = {key.partition(".")[0] for key in members}
    if len(body) > SMALL_BYTES:
        try:
            scanned = yield from scan(body, keys, most_values=most_values, members=tops)
        except UnicodeDecodeError:
            return _Found({})
        read = {key: _read(member) for key, member in scanned.members.items()}
        return _Found(scanned.found, scanned.values, (yield from _members(read, members)))
    values = sum(map(body.count, (b",", b"[", b"{")))
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return _Found({}, values)
    if not isinstance(content, dict):
        return _Found({}, values)
    return _Found(content, values, (yield from _members(content, members)))


def _members(content: Mapping[str, Any], keys: Collection[str]) -> Work[dict[str, Any]]:
    """Return the values of those of these keys that are there."""
    found = {key: content[key] for key in keys if key in content}
    for key in keys:
        outer, dot, inner = key.partition(".")
        if not dot:
            continue
        value = content.get(outer)
        if isinstance(value, Unread):
            scanned = yield from scan(bytes(value.text), (), members=(inner,))
            value = {name: _read(member) for name, member in scanned.members.items()}
        if isinstance(value, dict) and inner in value:
            found[key] = value[inner]
    return found


def _read(member: Member) -> Any:
    """Return the value; `Unread` if it is large, None if it cannot be parsed."""
    if len(member.text) > SMALL_BYTES:
        return Unread(member.text, member.items)
    try:
        return json.loads(bytes(member.text))
    except (ValueError, RecursionError):
        return None


def form_fields(body: bytes, content_type: str) -> Work[Fields]:
    """Return the text field `model` of a multipart or urlencoded form."""
    try:
        field = _form_field(content_type)
        return Fields((yield from field.find(body)) if field else None)
    except ValueError:  # FormParserError; the application will refuse the body
        return NO_FIELDS


def _form_field(content_type: str) -> _Field | None:
    """Return a finder of the field `model`. Raises `FormParserError` for an invalid boundary."""
    kind, options = parse_options_header(content_type)
    if kind == media.URLENCODED.encode():
        return _UrlencodedField()
    boundary = options.get(b"boundary")
    return _MultipartField(boundary) if boundary else None


def from_query(query: bytes) -> str | None:
    """Return the parameter `model` of a query string; None if there is none."""
    if b"model=" not in query:
        return None
    return parse_qs(query.decode("latin-1")).get("model", [None])[0]


class _Field:
    """Feeds a parser a whole form, and keeps the last field `model`."""

    def __init__(self) -> None:
        self._found: str | None = None

    def _parse(self, data: bytes) -> object:
        raise NotImplementedError

    def _finish(self) -> None:
        """End the parse: the form is over."""

    def find(self, body: bytes) -> Work[str | None]:
        """Return the field's text. Raises `FormParserError` if the body is not such a form."""
        for start in range(0, len(body), media.FORM_PIECE_BYTES):
            self._parse(body[start : start + media.FORM_PIECE_BYTES])
            yield
        self._finish()
        return self._found


class _UrlencodedField(_Field):
    def __init__(self) -> None:
        super().__init__()
        self._name = self._value = b""
        self._parser = QuerystringParser(
            {
                "on_field_start": self._field_starts,
                "on_field_name": self._field_name,
                "on_field_data": self._field_data,
                "on_field_end": self._field_ends,
            }
        )

    def _parse(self, data: bytes) -> object:
        return self._parser.write(data)

    def _finish(self) -> None:
        self._parser.finalize()

    def _field_starts(self) -> None:
        self._name = self._value = b""

    # A piece may end inside a name or a value. The name that is looked for is short.

    def _field_name(self, data: bytes, start: int, end: int) -> None:
        self._name = (self._name + data[start:end])[:MAX_NAME_BYTES]

    def _field_data(self, data: bytes, start: int, end: int) -> None:
        if len(self._value) < MAX_VALUE_BYTES:
            self._value += data[start:end]

    def _field_ends(self) -> None:
        if unquote_plus(self._name.decode("latin-1")) == "model":
            self._found = unquote_plus(self._value.decode("latin-1"))


class _MultipartField(_Field):
    def __init__(self, boundary: bytes) -> None:
        super().__init__()
        self._header, self._header_text = b"", b""
        self._in_model = False
        self._value = b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_ends,
                "on_part_data": self._part_data,
                "on_part_end": self._part_ends,
            },
        )

    def _parse(self, data: bytes) -> object:
        return self._parser.write(data)

    def _part_begins(self) -> None:
        self._in_model, self._value = False, b""

    # A piece may end inside a header, so its name and its text come in pieces.

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_text += data[start:end]

    def _header_ends(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._header_text)
            self._in_model = options.get(b"name") == b"model" and b"filename" not in options
        self._header, self._header_text = b"", b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_model and len(self._value) < MAX_VALUE_BYTES:
            self._value += data[start:end]

    def _part_ends(self) -> None:
        if self._in_model:
            self._found = self._value.decode("utf-8", "replace")
