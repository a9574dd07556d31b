"""Long work on the event loop, cut into pieces between which other tasks run."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")

Work = Generator[None, None, Result]
"""Yields after each piece, and returns its result."""


class Turns:
    """Shares the event loop between tasks: in each iteration, one of them runs one piece of work.

    Round robin: a task that has run a piece waits for all others that are there. So long work does
    not hold up short work.
    """

    def __init__(self) -> None:
        self._piece = asyncio.Lock()  # first come, first served

    async def run(self, work: Work[Result]) -> Result:
        """Run the work, and yield to the event loop after each piece."""
        while True:
            async with self._piece:
                try:
                    next(work)
                except StopIteration as end:
                    result: Result = end.value
                    return result
                finally:
                    await asyncio.sleep(0)  # with the lock: one piece per iteration of the loop


def at_once(work: Work[Result]) -> Result:
    """Run the work without a pause."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result
