"""One call's many engine requests, spread so that everybody else has a turn between two of them.

vLLM makes a task of each prompt of a list, and all of them begin in one turn of the event loop; the
items of `/generative_scoring` it tokenises on the loop, one after the other.

Relies on: `AsyncLLM._add_request`, which its `add_request` calls on the instance for every engine
request, also for a single one; `serving_generative_scoring` in the application's state, its
`_build_prompts`, which is a coroutine that waits for nothing, and its `renderer._executor`, on
whose threads vLLM tokenises everything else. Checked on vLLM 0.32.0.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from vllm_hotswap.registry import current_lease

PER_TURN = 8
"""Engine requests that begin between two turns of the loop: some milliseconds of work."""


class Pace:
    """Lets the engine requests of large calls begin a few at a time, then the loop turns."""

    def __init__(self) -> None:
        self._left = PER_TURN
        self._waiting: deque[asyncio.Future[None]] = deque()  # in order
        self._is_turning = False

    async def wait(self) -> None:
        """Return when it is the turn of the running task; at once for a call of one request."""
        lease = current_lease.get()
        if lease is None or lease.calls == 1:
            return
        loop = asyncio.get_running_loop()
        if not self._is_turning:
            self._is_turning = True
            loop.call_soon(self._turn)
        if self._left and not self._waiting:
            self._left -= 1
            return
        self._waiting.append(future := loop.create_future())
        await future

    def _turn(self) -> None:
        self._left = PER_TURN
        self._is_turning = bool(self._waiting)
        while self._waiting and self._left:
            if not (future := self._waiting.popleft()).done():  # else whoever waited has gone
                future.set_result(None)
                self._left -= 1
        if self._is_turning:
            asyncio.get_running_loop().call_soon(self._turn)

    def paced(self, begin: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def begin_in_turn(*args: Any, **kwargs: Any) -> Any:
            await self.wait()
            return await begin(*args, **kwargs)

        return begin_in_turn


def spread(client: Any, app: Any) -> None:
    """Spread the work of a frontend; once, when it is made."""
    pace = Pace()
    client._add_request = pace.paced(client._add_request)  # once for each of `n` answers
    scoring = getattr(app.state, "serving_generative_scoring", None)
    if scoring is not None and hasattr(scoring, "_build_prompts"):
        scoring._build_prompts = _on_threads(scoring._build_prompts, scoring.renderer._executor)


def _on_threads(
    work: Callable[..., Coroutine[Any, Any, Any]], executor: Any
) -> Callable[..., Awaitable[Any]]:
    """A coroutine that waits for nothing, run beside the event loop."""

    def run(*args: Any) -> Any:
        coroutine = work(*args)
        try:
            coroutine.send(None)
        except StopIteration as end:
            return end.value
        coroutine.close()
        raise RuntimeError(f"{work.__name__} of vLLM waits for something")

    async def run_on_thread(*args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(executor, run, *args)

    return run_on_thread
