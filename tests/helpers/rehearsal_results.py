"""Counts of a rehearsal: one line of JSON each, in the file that `REHEARSAL_RESULTS` names.

Only counts and bytes are stored: times mean nothing on the stand-in.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def record(what: str, **facts: Any) -> None:
    """Add a line, if a file is named."""
    if path := os.environ.get("REHEARSAL_RESULTS"):
        with Path(path).open("a", encoding="utf-8") as results:
            results.write(json.dumps({"what": what, **facts}) + "\n")
