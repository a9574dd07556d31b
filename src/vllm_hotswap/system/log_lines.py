"""One event is one line of the log, whatever a client has sent.

The values in a message, and the text of an exception, may come from a client. Their line breaks and
control characters are escaped when the record is made. So every logger, handler and formatter of
the process gets the same, vLLM's and uvicorn's included. A stack trace keeps its lines, indented:
none of them can be taken for a line of the log.
"""

from __future__ import annotations

import io
import logging
import re
import traceback
from collections.abc import Mapping
from typing import Any, Self

from vllm_hotswap.system import terminal

_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
"""C0, DEL and C1; line and paragraph separators; characters that turn the direction of text; halves
of surrogate pairs, with which the line would be lost."""

_UNSAFE = re.compile(f"[{_CONTROLS}\t\n]")
_UNSAFE_IN_LINES = re.compile(f"[{_CONTROLS}]")

_MARKS_LINES = "NewLineFormatter"
"""The class of vLLM's formatters that put a prefix before each line of a message. Line breaks are
kept only if all handlers have such a formatter. vLLM sets up none in the engine host, and other
formatters write lines as they are."""

INDENT = "    "


def escaped(text: str, *, keep_lines: bool = False) -> str:
    """Return the text with control characters as Python escapes them; lines may be kept."""
    unsafe = _UNSAFE_IN_LINES if keep_lines else _UNSAFE
    return unsafe.sub(lambda found: ascii(found[0])[1:-1], text)


def value_text(value: object) -> str:
    """Return a value for a `key=value` line, quoted if it is not one word of ASCII.

    Operators choose aliases, which may have spaces, quotes and any letters.
    """
    text = str(value)
    is_word = text.isascii() and text.isprintable() and not re.search("[\\s\"'=]", text)
    return text if is_word and text else repr(text)


def escape_records() -> None:
    """Escape all records from now on, in this process. Idempotent."""
    if not isinstance(logging.getLogRecordFactory(), _Factory):
        logging.setLogRecordFactory(_Factory(logging.getLogRecordFactory()))


class _Factory:
    """Makes records as `make` does, and escapes the texts in them."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._make(name, *args, **kwargs)
        keep_lines = _are_lines_marked(name)
        if isinstance(record.args, Mapping) and record.args:
            record.args = {key: _safe(value, keep_lines) for key, value in record.args.items()}
        elif record.args:
            record.args = tuple(_safe(value, keep_lines) for value in record.args)
        elif isinstance(record.msg, str | BaseException):
            record.msg = _safe(record.msg, keep_lines)
        if record.exc_info and record.exc_info[1] is not None:
            # Formatters use a text that is there already.
            record.exc_text = _indented(record.exc_info[1])
        return record


def _are_lines_marked(name: str) -> bool:
    """Whether all formatters of a logger mark each line."""
    found = logging.Logger.manager.loggerDict.get(name)
    logger = found if isinstance(found, logging.Logger) else None
    formatters: list[logging.Formatter | None] = []
    while logger is not None:
        formatters += [handler.formatter for handler in logger.handlers]
        logger = logger.parent if logger.propagate else None
    return bool(formatters) and all(
        any(kind.__name__ == _MARKS_LINES for kind in type(formatter).__mro__)
        for formatter in formatters
    )


def _safe(value: object, keep_lines: bool) -> object:
    if isinstance(value, BaseException):
        value = str(value)
    if not isinstance(value, str):
        return value
    safe = escaped(value, keep_lines=keep_lines)
    return value if safe == value else _Escaped(safe, repr(value))


class _Escaped(str):
    """A text whose `repr`, for `%r`, is that of the original text: it is not escaped twice."""

    __slots__ = ("_shown",)
    _shown: str

    def __new__(cls, text: str, shown: str) -> Self:
        made = super().__new__(cls, text)
        made._shown = shown
        return made

    def __repr__(self) -> str:
        return self._shown


def _indented(error: BaseException) -> str:
    written = io.StringIO()
    traceback.print_exception(error, file=written)
    lines = escaped(written.getvalue().rstrip("\n"), keep_lines=True).split("\n")
    return "\n".join(INDENT + line for line in lines)


def configure_logging(level: str = "INFO") -> None:
    """Send this package's log to standard error, one `key=value` line per event.

    Text from clients stays within its line, in the logs of vLLM and uvicorn, too. A line that
    cannot be written is dropped silently, vLLM's and uvicorn's, too. If the reader of a pipe has
    left, every line would otherwise cause a stack trace.
    """
    terminal.prepare()
    escape_records()
    logging.raiseExceptions = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s %(message)s"))
    logger = logging.getLogger("vllm_hotswap")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
