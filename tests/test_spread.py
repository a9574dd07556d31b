"""What vLLM does for a large call in one task leaves the event loop to others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import State

from vllm_hotswap.compat.spread import ITEMS, spread
from vllm_hotswap.pace import PER_TURN, Pace, pace_tasks
from vllm_hotswap.registry import Lease, current_lease


@pytest.fixture
async def pace() -> AsyncIterator[Pace]:
    yield pace_tasks()
    asyncio.get_running_loop().set_task_factory(None)


def application(**serving: Any) -> Any:
    return SimpleNamespace(state=State(serving))


class Serving:
    """A handler that awaits something for each prompt of a call, which takes no time."""

    async def _get_trace_headers(self, headers: str) -> str:
        return headers

    async def answer(self, prompts: int) -> list[str]:
        return [await self._get_trace_headers("found") for _ in range(prompts)]


@pytest.mark.parametrize(("calls", "turns"), [(1, 0), (100, 100 // PER_TURN)])
async def test_a_loop_over_prompts_gives_the_event_loop_back(
    pace: Pace, calls: int, turns: int
) -> None:
    """After a few of them, unless the call has only one; handlers with two names pace once."""
    serving = Serving()
    spread(application(one=serving, other=serving, none=None), pace)
    current_lease.set(Lease("llama", 1, None, calls=calls))
    passed = 0

    async def others() -> None:
        nonlocal passed
        while True:
            await asyncio.sleep(0)
            passed += 1

    other = asyncio.create_task(others())
    await asyncio.sleep(0)
    assert ["found"] * 100 == await serving.answer(100)
    other.cancel()

    assert turns <= passed <= 2 * turns


@dataclass(frozen=True)
class Request:
    items: list[str]

    def model_copy(self, update: dict[str, Any]) -> Request:
        return replace(self, **update)


class Scoring:
    """Tokenises items as vLLM's generative scoring does, and notes where, and how many at once."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self.renderer = SimpleNamespace(_executor=executor)
        self.threads: list[threading.Thread] = []
        self.sizes: list[int] = []

    async def _build_prompts(self, request: Request, length: int) -> tuple[list[str], list[int]]:
        self.threads.append(threading.current_thread())
        self.sizes.append(len(request.items))
        if "" in request.items:
            raise ValueError("no text")
        prompts = [text[:length] for text in request.items]
        return prompts, [len(prompt) for prompt in prompts]


async def test_items_are_tokenised_on_the_threads_of_the_renderer(pace: Pace) -> None:
    """Some at a time, so that others have those threads in between; with the same result."""
    with ThreadPoolExecutor(1) as executor:
        scoring: Any = Scoring(executor)
        spread(application(serving_generative_scoring=scoring), pace)
        texts = [f"text {number}" for number in range(100)]

        assert (texts, [len(text) for text in texts]) == await scoring._build_prompts(
            Request(texts), 99
        )
        assert threading.main_thread() not in scoring.threads
        assert max(scoring.sizes) == ITEMS
        with pytest.raises(ValueError, match="no text"):
            await scoring._build_prompts(Request(["a", ""]), 9)


async def test_tokenising_that_waits_is_no_longer_what_it_was(pace: Pace) -> None:
    """A newer vLLM may do it in another way; that is told, rather than hanging."""

    async def _build_prompts(request: Request) -> None:
        await asyncio.sleep(0)

    with ThreadPoolExecutor(1) as executor:
        renderer = SimpleNamespace(_executor=executor)
        scoring: Any = SimpleNamespace(renderer=renderer, _build_prompts=_build_prompts)
        spread(application(serving_generative_scoring=scoring), pace)
        with pytest.raises(RuntimeError, match="waits for something"):
            await scoring._build_prompts(Request(["a"]))
