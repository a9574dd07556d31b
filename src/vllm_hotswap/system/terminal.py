"""The standard streams, which may lack a character, be closed, or have lost their reader.

No text written there is ever worth stopping a server.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO

STREAMS = ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"))
"""For each stream, the file descriptor, its name in `sys`, and its mode."""


def prepare() -> None:
    """Make the standard streams accept every text. Idempotent; call it before writing anything.

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


def write_text(text: str) -> bool:
    """Write lines to standard output, at once. Return False if that fails; never raise.

    After a failure, everything written there is dropped, also by logs and at exit.
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
    """Return the text with an escape for each character that the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def mute() -> None:
    """Drop what standard output still holds, and everything written to it from now on.

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
