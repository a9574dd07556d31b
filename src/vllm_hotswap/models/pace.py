"""The tasks of large requests take their steps a few per iteration of the event loop.

vLLM makes a task for each prompt, item and input of a request, and more for each step on the way.
When a thousand of them can continue, asyncio runs all of them before it looks at a socket again.
Here a request is large if it makes several engine requests. A task that is made for one takes a
place before each of its steps. There are few places per iteration, and all large requests share
them in the order of arrival. Other tasks are unchanged.
"""

from __future__ import annotations

import asyncio
import types
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Generator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from vllm_hotswap.models.registry import Lease, current_lease

T = TypeVar("T")

PER_TURN = 8
"""Steps of large requests per iteration of the loop: some milliseconds of work."""

OUTPUTS = 32
"""Outputs of engines, for all requests, that are handled per iteration of the loop."""


class Place:
    """A place for one step of a task, which the task has or waits for."""

    __slots__ = ("future", "is_there")

    def __init__(self) -> None:
        self.is_there = False
        self.future: asyncio.Future[None] | None = None

    def give(self) -> None:
        self.is_there = True
        if self.future is not None and not self.future.done():
            self.future.set_result(None)


class Pace:
    """The places of one event loop. The mutable state is how many are left, and which wait."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._left = PER_TURN
        self._waiting: deque[Place] = deque()  # in order
        self._is_turning = False

    def __repr__(self) -> str:
        return f"<Pace left={self._left} waiting={len(self._waiting)}>"

    async def wait(self) -> None:
        """Wait for a place for the running task; return at once if its request is not large."""
        if _is_large(current_lease.get()) and (thrown := await self._place()):
            raise thrown

    def make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any
    ) -> asyncio.Task[Any]:
        """Make a task as `loop.create_task` does; a task of a large request takes places.

        This is a task factory, which gets the same arguments.
        """
        context = options.get("context")
        lease = current_lease.get() if context is None else context.get(current_lease)
        if not _is_large(lease):
            return asyncio.Task(coro, loop=loop, **options)
        task = asyncio.Task(self._run(coro), loop=loop, **options)
        task.add_done_callback(lambda _: coro.close())  # if cancelled before its first step
        return task

    async def _run(self, coro: Coroutine[Any, Any, Any]) -> Any:
        return await self._steps(coro)

    @types.coroutine
    def _steps(self, coro: Coroutine[Any, Any, Any]) -> Generator[Any, None, Any]:
        """Drive a coroutine as a task does, but take a place before each step.

        A cancellation is a step, too: when a client leaves, all tasks of its request are cancelled.
        """
        error: BaseException | None = None
        while True:
            error = (yield from self._place()) or error
            try:
                step = coro.send(None) if error is None else coro.throw(error)
            except StopIteration as end:
                return end.value
            error = None
            try:
                yield step
            except GeneratorExit:
                raise
            except BaseException as raised:  # noqa: BLE001  # the coroutine gets it
                error = raised

    @types.coroutine
    def _place(self) -> Generator[Any, None, BaseException | None]:
        """Wait for a place, and stay in the queue if something is thrown; return that."""
        place, thrown = self._take(), None
        while not place.is_there:
            place.future = self._loop.create_future()
            try:
                yield from place.future
            except GeneratorExit:
                raise
            except BaseException as raised:  # noqa: BLE001  # like a cancellation; the last counts
                thrown = raised
        return thrown

    def _take(self) -> Place:
        place = Place()
        if not self._is_turning:
            self._is_turning = True
            self._loop.call_soon(self._turn)
        if self._left and not self._waiting:  # not ahead of those that wait
            self._left -= 1
            place.give()
        else:
            self._waiting.append(place)
        return place

    def _turn(self) -> None:
        self._left = PER_TURN
        self._is_turning = bool(self._waiting)
        while self._waiting and self._left:
            self._waiting.popleft().give()
            self._left -= 1
        if self._is_turning:
            self._loop.call_soon(self._turn)


def _is_large(lease: Lease | None) -> bool:
    return lease is not None and lease.calls > 1


def pace_tasks() -> Pace:
    """Return the pace of the running event loop; from the first call on, its tasks take places."""
    loop = asyncio.get_running_loop()
    factory = loop.get_task_factory()
    pace = getattr(factory, "__self__", None)
    if not isinstance(pace, Pace):
        pace = Pace(loop)
        loop.set_task_factory(pace.make_task)
    return pace


async def give_back() -> None:
    """Let other tasks run, if the running task's request is large."""
    if _is_large(current_lease.get()):
        await asyncio.sleep(0)


def merged(*iterators: AsyncGenerator[T, None]) -> AsyncGenerator[tuple[int, T], None]:
    """Yield what several generators yield, as it comes, each with the number of its generator.

    It works as vLLM's `merge_async_iterators`, with two differences: the work for one item does not
    grow with the number of generators, and other tasks may run after a few items. Like vLLM, it
    makes no tasks for a single generator, the case of most streams.
    """
    return _only(iterators[0]) if len(iterators) == 1 else _merge(iterators)


async def _only(iterator: AsyncGenerator[T, None]) -> AsyncGenerator[tuple[int, T], None]:
    try:
        async for item in iterator:
            yield 0, item
    finally:
        with suppress(BaseException):
            await iterator.aclose()


async def _merge(
    iterators: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    loop = asyncio.get_running_loop()
    waiting: dict[asyncio.Task[T], int] = {}
    ready: deque[asyncio.Task[T]] = deque()
    is_ready = asyncio.Event()

    def note(task: asyncio.Task[T]) -> None:
        ready.append(task)
        is_ready.set()

    def ask(number: int) -> None:
        task: asyncio.Task[T] = loop.create_task(anext(iterators[number]))
        waiting[task] = number
        task.add_done_callback(note)

    try:
        for number in range(len(iterators)):
            ask(number)
            if number % PER_TURN == PER_TURN - 1:
                await asyncio.sleep(0)
        passed = 0
        while waiting:
            is_ready.clear()
            if not ready:
                await is_ready.wait()
            task = ready.popleft()
            number = waiting.pop(task)
            with suppress(StopAsyncIteration):
                item = task.result()
                ask(number)
                yield number, item
            passed += 1
            if passed % PER_TURN == 0:
                await asyncio.sleep(0)
    finally:
        for task, number in waiting.items():
            with suppress(BaseException):
                task.cancel()
                await iterators[number].aclose()
