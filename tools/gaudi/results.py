"""The file of results: a line of JSON for each, written at once."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from tools.gaudi.private import Blank


class Text(TypedDict):
    """How to read a text."""

    encoding: str
    errors: str


TEXT = Text(encoding="utf-8", errors="replace")
"""Other programs' output: a byte that is not text must not cost the rest."""


READ_BYTES = 64 << 10
"""Bytes at the end of programs' output where errors are looked for."""

TOO_LONG = f"(a line of more than {READ_BYTES >> 10} KiB)"


class Unwritable(Exception):
    """A result can't be written; the message says why and what to do, in one line."""


class Results:
    """The file. What goes wrong in a check is a result, and the next check runs."""

    def __init__(self, path: Path, blank: Blank | None = None) -> None:
        """Open it; `blank` removes names and folders from all that is written.

        Raises:
            OSError: the file can't be written.
        """
        self._blank = blank or Blank()
        self._path = path
        path.write_text("", encoding="utf-8")
        self.all_well = True

    def check(self, name: str, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Write what `do` has seen, with all names: in the file they are blanked.

        The check is well if `do` ends, and what it returns has nothing under `wrong`: a list of
        sentences, each of which says what is not as it should be.

        Raises:
            Unwritable: the disk is full, say. Later results would be lost, too.
        """
        start = time.monotonic()
        result: dict[str, Any] = {"check": name, "ok": True}
        try:
            result |= do()
            result["ok"] = not result.get("wrong")
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the result
            result |= {"ok": False, "wrong": [f"{type(error).__name__}: {last_line(str(error))}"]}
        result["seconds"] = round(time.monotonic() - start, 3)
        self.all_well &= bool(result["ok"])
        self._write(result)
        return result

    def _write(self, result: dict[str, Any]) -> None:
        """Write a line. The check's name is our own, as the keys are."""
        written = plain(self._blank.all(result)) | {"check": result["check"]}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(written, allow_nan=False) + "\n")
        except OSError as error:
            raise Unwritable(
                f"{self._path} can't be written: {error.strerror}; it has the results so far; name "
                "another file and start again"
            ) from error
        wrong = "; ".join(written.get("wrong", []))
        told = f"{'ok  ' if result['ok'] else 'BAD '} {result['check']}  {wrong}"
        say(told.rstrip())


def say(text: str) -> None:
    """Print on the terminal, as far as it has such letters. It may have gone away.

    Control characters are escaped: a log could use them to set the terminal's title, or clear it.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # until the end


LONGEST = 1000
"""Characters of a text in the file."""


def plain(value: Any) -> Any:
    """Return a JSON value with shorter texts, and words for numbers that JSON lacks.

    It has to be blanked before: half of a name is not a known name.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return value if len(value) <= LONGEST else f"{value[:LONGEST]}..."
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value


def last_line(text: str) -> str:
    """Return the line where Python and its libraries report the error; empty if none."""
    found = (text.strip().splitlines() or [""])[-1]
    return found if len(found) <= READ_BYTES else TOO_LONG


def output_of(command: list[str], limit_s: float, cwd: Path | None = None) -> str:
    """Return what a program writes.

    Raises:
        RuntimeError: it has failed. The message is what it wrote of errors.
        OSError: there is no such program.
        subprocess.TimeoutExpired: it did not end in time.
    """
    ran = subprocess.run(
        command, capture_output=True, **TEXT, check=False, timeout=limit_s, cwd=cwd
    )
    if ran.returncode != 0:
        raise RuntimeError(ran.stderr or f"{command[0]} has ended with status {ran.returncode}")
    return ran.stdout
