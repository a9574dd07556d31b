"""One call's many engine requests, spread so that everybody else has a turn between two of them.

vLLM makes a task of each prompt of a list, and all of them begin in one turn of the event loop; the
items of `/generative_scoring` it tokenises on the loop, one after the other.

Relies on: `AsyncLLM.add_request` and `_add_request`, which its `generate` and `encode` call on the
instance; `serving_generative_scoring` in the application's state, its `_build_prompts`, which is a
coroutine that waits for nothing, and its `renderer._executor`, on whose threads vLLM tokenises
everything else. Checked on vLLM 0.32.0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from vllm_hotswap.registry import current_lease


class Pace:
    """Lets the engine requests of large calls begin one by one, each in a turn of the loop."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()  # lets in whoever came first

    async def wait(self) -> None:
        """Return when it is the turn of the running task; at once for a call of one request."""
        lease = current_lease.get()
        if lease is not None and lease.calls > 1:
            async with self._turn:
                await asyncio.sleep(0)

    def paced(self, begin: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def begin_in_turn(*args: Any, **kwargs: Any) -> Any:
            await self.wait()
            return await begin(*args, **kwargs)

        return begin_in_turn


def spread(client: Any, app: Any) -> None:
    """Spread the work of a frontend; once, when it is made."""
    pace = Pace()
    client.add_request = pace.paced(client.add_request)
    client._add_request = pace.paced(client._add_request)  # each of `n` answers
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
