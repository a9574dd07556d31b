"""One call's many engine requests, spread so that everybody else has a turn between two of them.

The tasks that vLLM makes for a large call are paced (`vllm_hotswap.pace`). What is left is done
here: long loops in one task, which give the loop back at a place where they await something
anyway; the items of `/generative_scoring`, which vLLM tokenises on the event loop; and the outputs
of steps, of which some are looked at before others have a turn.

Relies on: `_get_trace_headers` of the serving objects in the application's state, which handlers of
several prompts await for each of them; `serving_generative_scoring` there, its `_build_prompts`, a
coroutine that waits for nothing, whose first argument has `items`, and which returns two lists with
a member for each; its `renderer._executor`, on whose threads vLLM tokenises everything else;
`VLLM_V1_OUTPUT_PROC_CHUNK_SIZE`, which `AsyncLLM` reads when its first request comes. Checked on
vLLM 0.32.0.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from vllm_hotswap.pace import OUTPUTS, Pace

ITEMS = 16
"""Of a call, that are tokenised before somebody else's text can be."""


def spread(app: Any, pace: Pace) -> None:
    """Spread the work of a frontend; once, when it is made."""
    os.environ.setdefault("VLLM_V1_OUTPUT_PROC_CHUNK_SIZE", str(OUTPUTS))
    state = getattr(app.state, "_state", {})
    for serving in {id(one): one for one in state.values()}.values():
        if hasattr(serving, "_get_trace_headers"):
            serving._get_trace_headers = _paced(serving._get_trace_headers, pace)
    scoring = state.get("serving_generative_scoring")
    if scoring is not None and hasattr(scoring, "_build_prompts"):
        scoring._build_prompts = _in_pieces(scoring._build_prompts, scoring.renderer._executor)


def _paced(work: Callable[..., Awaitable[Any]], pace: Pace) -> Callable[..., Awaitable[Any]]:
    async def work_in_turn(*args: Any, **kwargs: Any) -> Any:
        await pace.wait()
        return await work(*args, **kwargs)

    return work_in_turn


def _in_pieces(
    build: Callable[..., Coroutine[Any, Any, Any]], executor: Any
) -> Callable[..., Awaitable[Any]]:
    """A coroutine that waits for nothing, run beside the event loop, for some items at a time."""

    async def build_in_pieces(request: Any, *args: Any) -> tuple[list[Any], list[Any]]:
        loop = asyncio.get_running_loop()
        prompts: list[Any] = []
        counts: list[Any] = []
        for start in range(0, len(request.items), ITEMS):
            piece = request.model_copy(update={"items": request.items[start : start + ITEMS]})
            made = await loop.run_in_executor(executor, _run, build(piece, *args))
            prompts += made[0]
            counts += made[1]
        return prompts, counts

    return build_in_pieces


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("tokenising items waits for something in this vLLM")
