"""Long work on the event loop, cut into pieces between which everybody else has a turn."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")

Work = Generator[None, None, Result]
"""Yields after each piece, and returns its result."""


async def in_turns(work: Work[Result]) -> Result:
    """Run the work, and let the event loop turn after each piece."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result
        await asyncio.sleep(0)


def at_once(work: Work[Result]) -> Result:
    """Run the work without a pause."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result
