"""The tasks of large calls take their steps a few in a turn of the event loop.

vLLM makes a task of each prompt, item and input of a call, and more for each step that it takes on
the way. When a thousand of them can go on, asyncio runs all of them before it looks at a socket
again. Here a task that is made for a call of many engine requests takes a place before each of its
steps; there are few of them in a turn, and all large calls share them in the order of arrival.
Other tasks are as they were.
"""

from __future__ import annotations

import asyncio
import types
from collections import deque
from collections.abc import Coroutine, Generator
from typing import Any

from vllm_hotswap.registry import Lease, current_lease

PER_TURN = 8
"""Steps of large calls between two turns of the loop: some milliseconds of work."""

OUTPUTS = 32
"""Of engines, of whomever, that are looked at between two turns of the loop."""


class Pace:
    """The places of one event loop. The mutable state is how many are left, and who waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._left = PER_TURN
        self._waiting: deque[asyncio.Future[None]] = deque()  # in order
        self._is_turning = False

    def __repr__(self) -> str:
        return f"<Pace left={self._left} waiting={len(self._waiting)}>"

    def take(self) -> asyncio.Future[None] | None:
        """Take a place: None for one in this turn, else a future that is done when it is there."""
        if not self._is_turning:
            self._is_turning = True
            self._loop.call_soon(self._turn)
        if self._left and not self._waiting:
            self._left -= 1
            return None
        self._waiting.append(future := self._loop.create_future())
        return future

    async def wait(self) -> None:
        """Return when there is a place for the running task; at once if its call is not large."""
        if _is_large(current_lease.get()) and (place := self.take()) is not None:
            await place

    def make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any
    ) -> asyncio.Task[Any]:
        """A task, as `loop.create_task` makes it; one of a large call takes places.

        It is a task factory, which gets the same arguments.
        """
        context = options.get("context")
        lease = current_lease.get() if context is None else context.get(current_lease)
        if not _is_large(lease):
            return asyncio.Task(coro, loop=loop, **options)
        task = asyncio.Task(self._run(coro), loop=loop, **options)
        task.add_done_callback(lambda _: coro.close())  # cancelled before its first step
        return task

    async def _run(self, coro: Coroutine[Any, Any, Any]) -> Any:
        return await self._steps(coro)

    @types.coroutine
    def _steps(self, coro: Coroutine[Any, Any, Any]) -> Generator[Any, None, Any]:
        """What a task does with its coroutine, and a place before each step.

        Who is cancelled waits for no place: the coroutine is told at once.
        """
        error: BaseException | None = None
        while True:
            if error is None and (place := self.take()) is not None:
                try:
                    yield from place
                except BaseException as raised:  # noqa: BLE001  # the coroutine gets it
                    error = raised
            try:
                step = coro.send(None) if error is None else coro.throw(error)
            except StopIteration as end:
                return end.value
            error = None
            try:
                yield step
            except BaseException as raised:  # noqa: BLE001  # the coroutine gets it
                error = raised

    def _turn(self) -> None:
        self._left = PER_TURN
        self._is_turning = bool(self._waiting)
        while self._waiting and self._left:
            if not (place := self._waiting.popleft()).done():  # else whoever waited has gone
                place.set_result(None)
                self._left -= 1
        if self._is_turning:
            self._loop.call_soon(self._turn)


def _is_large(lease: Lease | None) -> bool:
    return lease is not None and lease.calls > 1


def pace_tasks() -> Pace:
    """The pace of the running event loop, whose tasks take places from the first call on."""
    loop = asyncio.get_running_loop()
    factory = loop.get_task_factory()
    pace = getattr(factory, "__self__", None)
    if not isinstance(pace, Pace):
        pace = Pace(loop)
        loop.set_task_factory(pace.make_task)
    return pace
