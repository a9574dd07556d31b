"""Many engine requests of one call leave the event loop to others, and can be given up."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_hotswap.compat.grammars import give_up
from vllm_hotswap.compat.spread import PER_TURN, spread
from vllm_hotswap.registry import Lease, current_lease


class Client:
    """Notes in which turn of the loop a request begins."""

    def __init__(self) -> None:
        self.turn = 0
        self.began: list[int] = []

    async def add_request(self, request_id: str, answers: int = 1) -> str:
        for _ in range(answers):
            await self._add_request()
        return request_id

    async def _add_request(self) -> None:
        self.began.append(self.turn)


async def begin(client: Any, requests: int, calls: int, **kwargs: int) -> list[str]:
    """Begin requests of one call at once, while somebody else uses every turn."""
    spread(client, SimpleNamespace(state=SimpleNamespace()))
    current_lease.set(Lease("llama", 1, None, calls=calls))

    async def others() -> None:
        while True:
            client.turn += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(others())
    began = [client.add_request(str(n), **kwargs) for n in range(requests)]
    answered = await asyncio.gather(*began)
    other.cancel()
    return answered


async def test_requests_of_a_large_call_begin_a_few_in_a_turn() -> None:
    """In their order, and each of several answers, too; and in no more turns than that takes."""
    client = Client()
    assert [str(n) for n in range(50)] == await begin(client, 50, calls=50)
    assert max(Counter(client.began).values()) <= PER_TURN
    assert 50 // PER_TURN <= max(client.began) - min(client.began) <= 2 * 50 // PER_TURN

    client = Client()
    await begin(client, 1, calls=20, answers=20)
    assert max(Counter(client.began).values()) <= PER_TURN


async def test_calls_of_one_request_are_not_held_up() -> None:
    """However many there are: each has come by itself."""
    client = Client()
    await begin(client, 50, calls=1)
    assert 1 == len(set(client.began))


async def test_items_are_tokenised_on_the_threads_of_the_renderer() -> None:
    """With the same result; what goes wrong is told."""

    async def build(texts: list[str], length: int) -> list[str]:
        threads.append(threading.current_thread())
        if not texts:
            raise ValueError("no texts")
        return [text[:length] for text in texts]

    async def waits() -> None:
        await asyncio.sleep(0)

    threads: list[threading.Thread] = []
    with ThreadPoolExecutor(1) as executor:
        scoring = SimpleNamespace(
            _build_prompts=build, renderer=SimpleNamespace(_executor=executor)
        )
        state = SimpleNamespace(serving_generative_scoring=scoring)
        spread(Client(), SimpleNamespace(state=state))

        assert ["ab", "c"] == await scoring._build_prompts(["abc", "c"], 2)
        with pytest.raises(ValueError, match="no texts"):
            await scoring._build_prompts([], 2)
        assert threading.main_thread() not in threads

        scoring._build_prompts = waits
        spread(Client(), SimpleNamespace(state=state))
        with pytest.raises(RuntimeError, match="waits for something"):
            await scoring._build_prompts()


def test_compilation_that_nobody_waits_for_is_taken_off_the_queue() -> None:
    """What runs goes on; requests without a grammar, and unknown ones, are passed over."""
    begun, queued, ready = Future[object](), Future[object](), object()
    begun.set_running_or_notify_cancel()
    grammars: dict[str, Any] = {"a": begun, "b": queued, "c": ready}
    requests = {
        name: SimpleNamespace(structured_output_request=SimpleNamespace(_grammar=grammar))
        for name, grammar in grammars.items()
    } | {"d": SimpleNamespace(structured_output_request=None)}

    assert 1 == give_up(SimpleNamespace(requests=requests), ["a", "b", "c", "d", "gone"])
    assert (False, True) == (begun.cancelled(), queued.cancelled())
