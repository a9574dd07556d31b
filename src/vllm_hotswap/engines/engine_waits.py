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

    The mutable state is `_died`, a future for the last wait that began, which `until_answered`
    makes and `engine_died` resolves.
    """

    def __init__(self, alias: str, link: HostLink) -> None:
        self._alias = alias
        self._link = link
        self._died: asyncio.Future[str] | None = None

    def __repr__(self) -> str:
        return f"<EngineWaits {self._alias} waiting={self._died is not None}>"

    async def until_answered(self, asking: Coroutine[Any, Any, T]) -> T:
        """Return the result of `asking`, which would wait for ever for an engine that has died.

        Raises:
            EngineUnavailable: the engine or its host died first; `asking` was cancelled.
        """
        task = asyncio.ensure_future(asking)
        self._died = asyncio.get_running_loop().create_future()
        deaths = (self._link.died, self._died)
        try:
            ends: list[asyncio.Future[Any]] = [task, *deaths]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineUnavailable(next(death.result() for death in deaths if death.done()))
            return await task
        finally:
            task.cancel()
            self._died = None

    def engine_died(self, cause: str) -> None:
        """End the wait for this engine, if there is one."""
        if self._died is not None and not self._died.done():
            self._died.set_result(f"the engine of {self._alias!r} died: {cause}")
