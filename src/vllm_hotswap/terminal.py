"""The standard streams, which may be unable to write a name, closed, or read by nobody any more.

What is said to people there is never worth a server's life.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO

STREAMS = ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"))
"""Of a process: the file descriptor, its name in `sys`, and the mode in which it is opened."""


def prepare() -> None:
    """Have the standard streams take every text. Idempotent; call it before anything is written.

    A character that the encoding lacks is written as an escape, as standard error does by default.
    A stream that was closed becomes the null device. Otherwise the next file or socket that is
    opened would get its number, and with it what libraries and child processes write.
    """
    for number, name, mode in STREAMS:
        if not _is_open(number):
            _open_null(number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> bool:
    """Write lines to standard output, at once. False if they cannot be written; never raises.

    Whatever else is written there after such a failure is dropped, also by logs and at exit.
    """
    try:
        stream = sys.stdout
        stream.write(f"{encodable(text, stream)}\n")
        stream.flush()
    except (OSError, ValueError, AttributeError):  # reader gone or disk full; closed; None
        mute()
        return False
    return True


def encodable(text: str, stream: TextIO) -> str:
    """The text with an escape for each character that the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def mute() -> None:
    """Drop what standard output still holds, and whatever is written to it from now on.

    https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = sys.stdout.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _open_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    os.set_inheritable(number, True)
