"""Long work on the event loop, cut into pieces between which everybody else has a turn."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")

Work = Generator[None, None, Result]
"""Yields after each piece, and returns its result."""


class Turns:
    """Works that share one event loop: in each of its turns, one of them has a piece.

    They go round: who has had a piece waits for all others that are there, so a short work is not
    held up by a long one.
    """

    def __init__(self) -> None:
        self._piece = asyncio.Lock()  # lets in whoever came first

    async def run(self, work: Work[Result]) -> Result:
        """Run the work, and let the event loop turn after each piece."""
        while True:
            async with self._piece:
                try:
                    next(work)
                except StopIteration as end:
                    result: Result = end.value
                    return result
                finally:
                    await asyncio.sleep(0)  # before the next one has its piece


def at_once(work: Work[Result]) -> Result:
    """Run the work without a pause."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result
