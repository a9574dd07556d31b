"""Keeps modules from being imported from the folder in which a program was started.

`python -m` looks there first: it would run a `psutil.py` beside a models file, in a folder that
others write to or that was downloaded. Imports only what is loaded before any module is.
"""

import os
import sys


def leave() -> None:
    """Stop importing modules from the start folder, unless `PYTHONPATH` names it.

    Call it in a program that `python -m` runs, before its other imports.
    """
    if not sys.flags.safe_path and sys.path[:1] in ([_current()], [""]):
        del sys.path[0]


def _current() -> str:
    """Return the start folder, or an empty text if it has been deleted."""
    try:
        return os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        return ""
