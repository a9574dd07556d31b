"""Hints for people at a terminal: the nearest name to a misspelt one, and commands to paste."""

from __future__ import annotations

import difflib
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

NAME = "vllm-hotswap"

LONGEST = 200
"""The longest word for which a near one is looked for: a client's may be of any length."""


def program() -> str:
    """Return what runs this program again in a shell: its name, or else its path."""
    if shutil.which(NAME):
        return NAME
    if Path(sys.argv[0]).name == NAME:
        return shlex.quote(sys.argv[0])
    return f"{shlex.quote(sys.executable)} -m vllm_hotswap"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` with the nearest known word, or nothing if none is near."""
    if len(word) > LONGEST:
        return ""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
