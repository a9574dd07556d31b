"""Waits of connections: one timer for many. A timer for each would cost more than all the rest."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from vllm_hotswap.system import log_of_clients

TICK_S = 0.05
"""Waits of a `Wheel` end at a multiple of this."""


PER_TURN = 16
"""Most waits of one `Wheel`, or of one `Deadlines`, that end in one iteration of the event loop."""


class Waiter(Protocol):
    """A connection that waits."""

    loop: asyncio.AbstractEventLoop

    @property
    def client(self) -> Any:
        """Its address, for the log."""


W = TypeVar("W", bound=Waiter)


class Deadlines(Generic[W]):
    """Waits of one length, so that the first to begin is the first to end.

    The timer rings for the first wait, if it still lasts, and is set again for the next one.
    """

    def __init__(self, seconds: float, late: Callable[[W], None]) -> None:
        self.seconds = seconds
        self._late = late
        self._ends_s: dict[W, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __contains__(self, connection: W) -> bool:
        return connection in self._ends_s

    def begin(self, connection: W) -> None:
        """Begin a wait; do nothing if the connection waits already."""
        if connection in self._ends_s:
            return
        self._ends_s[connection] = connection.loop.time() + self.seconds
        self._set(connection.loop)

    def end(self, connection: W) -> None:
        """End a wait early. Idempotent."""
        self._ends_s.pop(connection, None)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now_s = loop.time()
        due = itertools.takewhile(lambda item: item[1] <= now_s, self._ends_s.items())
        over = list(itertools.islice(due, PER_TURN))
        for connection, _ in over:
            del self._ends_s[connection]
        try:
            for connection, _ in over:
                self._end_one(connection)
        finally:
            self._set(loop)

    def _end_one(self, connection: W) -> None:
        """Call `late`; an error of one connection must not cost the others their deadlines."""
        try:
            self._late(connection)
        except Exception:
            log_of_clients.exception("event=deadline_failed client=%s", connection.client)

    def _set(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is None and self._ends_s:
            first_s = next(iter(self._ends_s.values()))
            self._timer = loop.call_at(first_s, self._ring, loop)


class Wheel:
    """Waits of any length, which end at the next tick.

    The mutable state is the callbacks, by the number of their tick, and the timer for the next one.
    Source: Varghese and Lauck, Hashed and hierarchical timing wheels, 1987.
    """

    def __init__(self) -> None:
        self._due: dict[int, dict[object, Callable[[], None]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return sum(map(len, self._due.values()))

    def call_later(self, seconds: float, what: Callable[[], None]) -> Callable[[], None]:
        """Call `what` after `seconds`. The returned function cancels it, and may be called late."""
        loop = asyncio.get_running_loop()
        tick = int((loop.time() + seconds) / TICK_S) + 1
        key = object()
        self._due.setdefault(tick, {})[key] = what
        self._set(loop)
        return lambda: self._take_back(tick, key)

    def _take_back(self, tick: int, key: object) -> None:
        if (due := self._due.get(tick)) is not None:
            due.pop(key, None)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = int(loop.time() / TICK_S)
        left = PER_TURN
        for tick in sorted(tick for tick in self._due if tick <= now):
            due = self._due[tick]
            while due and left:
                left -= 1
                _call(due.pop(next(iter(due))))
            if not due:
                del self._due[tick]
        self._set(loop, TICK_S if left else 0)

    def _set(self, loop: asyncio.AbstractEventLoop, after_s: float = TICK_S) -> None:
        if self._timer is None and self._due:
            self._timer = loop.call_later(after_s, self._ring, loop)


class Pause:
    """A task's pause, which other code on the event loop can end early."""

    def __init__(self) -> None:
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait(self, wheel: Wheel, seconds: float) -> None:
        """Wait for `seconds`, or until the pause is ended."""
        take_back = wheel.call_later(seconds, self.end)
        try:
            await self.wait_ended()
        finally:
            take_back()

    async def wait_ended(self) -> None:
        """Wait until the pause is ended, however long that takes."""
        await self._over

    def end(self) -> None:
        """End the pause. Idempotent."""
        if not self._over.done():
            self._over.set_result(None)


def _call(what: Callable[[], None]) -> None:
    """Call it; an error in one callback must not cost the others theirs."""
    try:
        what()
    except Exception:
        log_of_clients.exception("event=wait_failed")
