"""Small steps for many clients: a few in each turn of the event loop, and clients go round."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable


class Steps:
    """What is done in which turn of the event loop, for whom.

    The mutable state is how many more steps there are in this turn, and which wait, by the client.
    Work is never put off without need: a step is taken at once where its turn has room.
    """

    def __init__(self, per_turn: int) -> None:
        self.per_turn = self._left = per_turn
        self._is_turning = False
        self._waiting: OrderedDict[Hashable, deque[Callable[[], None]]] = OrderedDict()
        self._count = 0

    def __repr__(self) -> str:
        return f"<Steps left={self._left} waiting={self._count} clients={len(self._waiting)}>"

    def __len__(self) -> int:
        """How many wait."""
        return self._count

    def take(
        self, loop: asyncio.AbstractEventLoop, client: Hashable, step: Callable[[], None]
    ) -> None:
        """Take it at once, if this turn has room for it; when it is its client's turn otherwise."""
        if self._left:
            self._left -= 1
            self._go_on(loop)
            step()
        else:
            self._waiting.setdefault(client, deque()).append(step)
            self._count += 1

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._is_turning:
            self._is_turning = True
            loop.call_soon(self._turn, loop)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_turning = False
        self._left = self.per_turn
        while self._waiting and self._left:
            client, steps = self._waiting.popitem(last=False)
            step = steps.popleft()
            self._count -= 1
            if steps:
                self._waiting[client] = steps  # behind all others
            self.take(loop, client, step)
