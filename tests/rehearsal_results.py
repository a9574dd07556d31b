"""What a rehearsal has counted: a line of JSON each, in the file that `REHEARSAL_RESULTS` names.

Counts and bytes, never times, which mean nothing on the stand-in.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def record(what: str, **facts: Any) -> None:
    """Add a line; nothing where nobody has asked for it."""
    if path := os.environ.get("REHEARSAL_RESULTS"):
        with Path(path).open("a", encoding="utf-8") as results:
            results.write(json.dumps({"what": what, **facts}) + "\n")
