"""The head of a connection's first request, from bytes that were peeked at and not read.

The parser is the one that parses the request later, so both see the same.
"""

from __future__ import annotations

from urllib.parse import unquote

import httptools
from starlette.types import Scope


class Malformed(Exception):
    """The bytes are not a request's head, and cannot become one."""


class _Whole(Exception):
    """Raised at the end of the head: nothing behind it is parsed."""


class _Seen:
    """What the parser reports of a head."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_whole = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.is_whole = True
        raise _Whole


def first_head(data: bytes) -> Scope | None:
    """Return `type`, `method`, `path`, `root_path`, `headers` of a scope; None: it is not whole.

    Raises:
        Malformed: the parser would refuse the head.
    """
    seen = _Seen()
    parser = httptools.HttpRequestParser(seen)
    try:
        parser.feed_data(data)
    except httptools.HttpParserError:
        if not seen.is_whole:
            raise Malformed from None
    if not seen.is_whole:
        return None
    try:
        path = (httptools.parse_url(seen.url).path or b"").decode("ascii")
    except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
        raise Malformed from None
    fields = ((name, value.lower()) for name, value in seen.headers)
    is_websocket = parser.should_upgrade() and (b"upgrade", b"websocket") in fields
    return {
        "type": "websocket" if is_websocket else "http",
        "method": parser.get_method().decode("ascii"),
        "path": unquote(path),
        "root_path": "",
        "headers": seen.headers,
    }
