"""Redaction of messages for clients: no folder of the machine, and no stack trace.

Failure messages contain text of vLLM and of the operating system, which may hold anything. The log
has them in full; every response goes through `redact`, whatever the caller's role.
"""

from __future__ import annotations

import re

MAX_REDACTED = 4000
"""Most characters of a message."""

_TRACE = re.compile(r"Traceback \(most recent call last\).*", re.DOTALL)
# Possessive, like all repetitions here: no text makes the search look at anything twice.
_IN_QUOTES = re.compile(r"(['\"])(?:file:/*|ipc:/*)?(/[^'\"]*+)\1")
_LOCAL_URL = re.compile(r"\b(?:file|ipc):/[^\s'\"]*+")

# A route follows its method or has a known first part; a URL has a colon before its slashes.
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY", "WEBSOCKET")
_NO_ROUTE = r"(?<![\w:/.~])" + "".join(f"(?<!{method} )" for method in _METHODS)
_PART = r"[^\s'\",;:()<>\[\]{}/]"
_BARE = re.compile(rf"{_NO_ROUTE}/(?!v1/|v2/|admin/)(?:{_PART}++/)++({_PART}*+)")


def redact(text: str) -> str:
    """Return the text with only the last part of every absolute path, and without a stack trace.

    A long text is cut: it repeats what a client has sent.
    """
    if len(text) > MAX_REDACTED:
        text = f"{text[:MAX_REDACTED]}..."
    text = _TRACE.sub("(the server's log has more)", text)
    text = _IN_QUOTES.sub(lambda m: f"{m[1]}.../{_last_part(m[2])}{m[1]}", text)
    text = _LOCAL_URL.sub(lambda m: f".../{_last_part(m[0])}", text)
    return _BARE.sub(r".../\1", text)


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def redact_if_any(text: str | None) -> str | None:
    return None if text is None else redact(text)
