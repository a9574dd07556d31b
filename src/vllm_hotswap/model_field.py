"""Find `model` in a request body without parsing the body.

vLLM parses every body itself; a second full parse of a body with megabytes of images or token
ids would be wasted. For JSON, a scan steps over whole strings with one regular expression, keeps
count of brackets, and stops at the value of the top-level key. For forms, python-multipart
(the parser that starlette uses) is fed until the field has ended.
"""

from __future__ import annotations

import json
import re
from urllib.parse import parse_qs

from python_multipart.multipart import MultipartParser, parse_options_header

# A whole string or one bracket. Possessive, so that no input makes it backtrack; the closing quote
# is optional, so that a string without one is passed over once, not again from each quote in it.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[{}\[\]]', re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*")
_OPEN, _CLOSE = b"{[", b"}]"


def from_json(body: bytes, key: str = "model") -> str | None:
    """The string under a top-level key; None if there is none.

    A body that is no JSON object gives None or any string of it: whoever parses it refuses it.
    """
    depth = 0
    position = _end_of_space(body, 0)
    if body[position : position + 1] != b"{":
        return None
    while match := _TOKEN.search(body, position):
        token, position = match.group(), match.end()
        if token in _OPEN:
            depth += 1
        elif token in _CLOSE:
            depth -= 1
            if depth == 0:
                return None
        elif depth == 1 and _is_key(token, body, position) and _decode(token) == key:
            return _string_at(body, _end_of_space(body, position) + 1)
    return None


def from_form(body: bytes, content_type: str) -> str | None:
    """The text field `model` of a multipart or urlencoded form; None if there is none."""
    kind, options = parse_options_header(content_type)
    if kind == b"application/x-www-form-urlencoded":
        return parse_qs(body.decode("utf-8", "replace")).get("model", [None])[0]
    boundary = options.get(b"boundary")
    return _FieldFinder(boundary).find(body) if boundary else None


def from_query(query: bytes) -> str | None:
    """The parameter `model` of a query string; None if there is none."""
    if b"model=" not in query:
        return None
    return parse_qs(query.decode("latin-1")).get("model", [None])[0]


def _end_of_space(body: bytes, position: int) -> int:
    match = _SPACE.match(body, position)
    return match.end() if match else position


def _is_key(token: bytes, body: bytes, end: int) -> bool:
    """Whether the token that ends at `end` is a string with a colon behind it."""
    after = _end_of_space(body, end)
    return token[0] == ord('"') and body[after : after + 1] == b":"


def _string_at(body: bytes, position: int) -> str | None:
    match = _TOKEN.match(body, _end_of_space(body, position))
    return _decode(match.group()) if match and match.group()[0] == ord('"') else None


def _decode(token: bytes) -> str | None:
    try:
        value = json.loads(token)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


class _FieldFinder:
    """Feeds a multipart parser until the field `model` has ended."""

    CHUNK = 64 << 10

    def __init__(self, boundary: bytes) -> None:
        self._header, self._header_text = b"", b""
        self._in_model = False
        self._value = b""
        self._found: str | None = None
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

    def find(self, body: bytes) -> str | None:
        try:
            for start in range(0, len(body), self.CHUNK):
                self._parser.write(body[start : start + self.CHUNK])
                if self._found is not None:
                    break
        except ValueError:  # MultipartParseError; the application will refuse the body
            return None
        return self._found

    def _part_begins(self) -> None:
        self._in_model, self._value = False, b""

    # A chunk may end inside a header, so its name and its text come in pieces.

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
        if self._in_model:
            self._value += data[start:end]

    def _part_ends(self) -> None:
        if self._in_model and self._found is None:
            self._found = self._value.decode("utf-8", "replace")
