"""Keeps Python's garbage collector out of the start.

Importing vLLM makes hundreds of thousands of objects that live as long as the process. While they
are made, the collector looks at all of them again and again and finds nothing. That takes a quarter
of the processor time of the imports. Later, every full collection (vLLM makes three for each model
that it loads) would look at them once more.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Disable collection inside; afterwards, exclude what was made there from all collections."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
