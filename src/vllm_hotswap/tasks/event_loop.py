"""The event loop that everything runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on uvloop, as vLLM's own server does.

    asyncio's own loop would not do. If no more files can be opened, it tries to accept a connection
    as often as the backlog is long (CPython's `BaseSelectorEventLoop._accept_connection`). Each try
    puts a traceback into the log, and everything else waits.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
