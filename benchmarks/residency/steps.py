"""Shows progress: a bar in a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

LINES = 5
"""How many log lines report one piece of work."""

log = logging.getLogger("benchmarks")


def steps(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield the items, and show how many of them are done."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, leave=False)
        return
    every = max(1, len(items) // LINES)
    for number, item in enumerate(items, 1):
        yield item
        if number % every == 0 or number == len(items):
            log.info("%s: %d of %d", what, number, len(items))
