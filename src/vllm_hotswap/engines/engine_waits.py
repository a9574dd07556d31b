"""Waits for an engine that end when it dies."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.errors import EngineUnavailable

T = TypeVar("T")


class EngineWaits:
    """What waits for answers of one engine.

    The mutable state is `_deaths`, one future for each wait, since an adapter may be loaded while
    a canary is awaited. `until_answered` makes and drops them, `engine_died` resolves them.
    """

    def __init__(self, alias: str, link: HostLink) -> None:
        self._alias = alias
        self._link = link
        self._deaths: set[asyncio.Future[str]] = set()

    def __repr__(self) -> str:
        return f"<EngineWaits {self._alias} waiting={len(self._deaths)}>"

    async def until_answered(self, asking: Coroutine[Any, Any, T]) -> T:
        """Return the result of `asking`, which would wait for ever for an engine that has died.

        Raises:
            EngineUnavailable: the engine or its host died first; `asking` was cancelled.
        """
        task = asyncio.ensure_future(asking)
        died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._deaths.add(died)
        deaths = (self._link.died, died)
        try:
            ends: list[asyncio.Future[Any]] = [task, *deaths]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineUnavailable(next(death.result() for death in deaths if death.done()))
            return await task
        finally:
            task.cancel()
            self._deaths.discard(died)

    def engine_died(self, cause: str) -> None:
        """End every wait for this engine."""
        for died in self._deaths:
            if not died.done():
                died.set_result(f"the engine of {self._alias!r} died: {cause}")
