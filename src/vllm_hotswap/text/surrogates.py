r"""Half surrogates in a JSON text: an escape such as `\ud83d` without its other half.

Python reads them as texts that are not Unicode, which tokenizers refuse and nothing can encode.
Source: RFC 8259, section 8.2; RFC 3629, section 3.
"""

from __future__ import annotations

import re

from vllm_hotswap.tasks import Work
from vllm_hotswap.text.json_scan import PIECE_BYTES, utf8_of

_WHOLE = re.compile(
    rb"""(?:
        [^\\\xed]{1,64}+
        |\\(?!u[dD][89a-fA-F])[\0-\xff]                              # an escape of one character
        |\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}  # a pair
        |\xed(?![\xa0-\xbf])
    ){0,2048}+""",
    re.VERBOSE,
)
"""A piece without halves: a few milliseconds, 128 KiB at most."""

_SIGNS = (b"\\ud", b"\\uD", b"\xed")
"""A text without any of these has no half: most bodies, and quick to check."""

_HALF = re.compile(rb"\\u[0-9a-fA-F]{4}|\xed..", re.DOTALL)


class HalfSurrogate(ValueError):
    """A text has half of a surrogate pair. Its argument is that half, as a JSON escape."""


def as_escape(half: str) -> str:
    """Return a half as a JSON escape; it may be one already."""
    return half.encode("ascii", "backslashreplace").decode()


def message_of(half: str) -> str:
    """Return what is wrong, for the client."""
    return (
        f"a text in the request contains {half}, half of a surrogate pair, which is not a "
        "character; send complete characters"
    )


def check_texts(body: bytes) -> Work[None]:
    """Search a JSON text, in any encoding that `json.loads` knows, in pieces.

    Raises:
        HalfSurrogate: a text or a key in it has one.
    """
    text = yield from utf8_of(body)
    if not any(sign in text for sign in _SIGNS):
        return
    position = rested = 0
    while piece := _WHOLE.match(text, position):
        if piece.end() == position:
            break
        position = piece.end()
        if position - rested >= PIECE_BYTES:
            rested = position
            yield
    if half := _HALF.match(text, position):  # else an escape is incomplete, and this is not JSON
        raise HalfSurrogate(as_escape(half.group().decode("utf-8", "surrogatepass")))
