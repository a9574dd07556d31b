"""Small steps for many clients: a few per iteration of the event loop, round robin by client."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable


class Steps:
    """Decides which steps run in which iteration of the event loop, and for which client.

    The mutable state is how many more steps fit into this iteration, and the waiting steps of each
    client. A step is never delayed without need: it runs at once where the iteration has room.
    """

    def __init__(self, per_turn: int) -> None:
        self.per_turn = self._left = per_turn
        self._is_turning = False
        self._waiting: OrderedDict[Hashable, deque[Callable[[], None]]] = OrderedDict()
        self._count = 0

    def __repr__(self) -> str:
        return f"<Steps left={self._left} waiting={self._count} clients={len(self._waiting)}>"

    def __len__(self) -> int:
        """Return how many steps wait."""
        return self._count

    def take(
        self, loop: asyncio.AbstractEventLoop, client: Hashable, step: Callable[[], None]
    ) -> None:
        """Run it at once if this iteration has room, else when it is the client's turn."""
        if self._left:
            self._left -= 1
            self._continue(loop)
            step()
        else:
            self._waiting.setdefault(client, deque()).append(step)
            self._count += 1

    def _continue(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._is_turning:
            self._is_turning = True
            loop.call_soon(self._turn, loop)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_turning = False  # first: `take` below schedules the next turn
        self._left = self.per_turn
        while self._waiting and self._left:
            client, steps = self._waiting.popitem(last=False)
            step = steps.popleft()
            self._count -= 1
            if steps:
                self._waiting[client] = steps  # behind all others
            self.take(loop, client, step)
