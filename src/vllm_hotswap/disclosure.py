"""What clients are told of a message: no folder of the machine, and no stack trace.

Messages of failures have words of vLLM and of the operating system in them, which nobody has read
before. The log has them whole; every answer goes through `told`, whoever asks.
"""

from __future__ import annotations

import re

_TRACE = re.compile(r"Traceback \(most recent call last\).*", re.DOTALL)
_IN_QUOTES = re.compile(r"(['\"])/[^'\"]*?([^'\"/]*)/*\1")

# A route follows its method or has a known first part; a URL has a colon before its slashes.
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY", "WEBSOCKET")
_NO_ROUTE = r"(?<![\w:/.~])" + "".join(f"(?<!{method} )" for method in _METHODS)
_PART = r"[^\s'\",;:()<>\[\]{}/]"
_BARE = re.compile(rf"{_NO_ROUTE}/(?!v1/|v2/|admin/)(?:{_PART}+/)+({_PART}*)")


def told(text: str) -> str:
    """The text with the last part of every absolute path alone, and no stack trace."""
    text = _TRACE.sub("(the server's log has more)", text)
    text = _IN_QUOTES.sub(r"\1.../\2\1", text)
    return _BARE.sub(r".../\1", text)


def told_if_any(text: str | None) -> str | None:
    return None if text is None else told(text)
