"""The folder in which a program was started is no place to import from.

`python -m` looks there first: a `psutil.py` beside a models file, in a folder that others write to
or that was downloaded, would be run. Imports nothing that is not loaded before any module is.
"""

import os
import sys


def leave() -> None:
    """Have no module looked for in the start folder any more, unless `PYTHONPATH` names it.

    To be called by a program that `python -m` runs, before its other imports.
    """
    if not sys.flags.safe_path and sys.path[:1] in ([_current()], [""]):
        del sys.path[0]


def _current() -> str:
    """The start folder; the name of none where it has been deleted."""
    try:
        return os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        return ""
