"""Number of examples per property: bounded by default, ten times that in `make test-long`."""

from __future__ import annotations

import os

DEPTH = int(os.environ.get("TEST_DEPTH", "1"))


def examples(usual: int) -> int:
    return usual * DEPTH
