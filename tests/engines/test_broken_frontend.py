"""A frontend that reads no more outputs is noticed, and loses what it has registered."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import pytest
from prometheus_client import REGISTRY, Counter

from vllm_hotswap.engines.frontend import watch_outputs
from vllm_hotswap.engines.vllm_metrics import (
    VLLM_REGISTRIES,
    adopting_frontend_metrics,
    forget_frontend_metrics,
)
from vllm_hotswap.telemetry.metrics import exposition


class Client:
    """Like vLLM's `AsyncLLM`, it starts its reader of outputs once, and never again."""

    def __init__(self, taking_in: Coroutine[Any, Any, None]) -> None:
        self.output_handler: asyncio.Task[None] | None = None
        self._taking_in = taking_in

    def _run_output_handler(self) -> None:
        if self.output_handler is None:
            self.output_handler = asyncio.create_task(self._taking_in)


async def until_error(error: asyncio.Event) -> None:
    """vLLM catches whatever is raised, and leaves the loop."""
    await error.wait()


async def test_the_end_of_a_client_by_an_error_is_told() -> None:
    """The end of a client by an error is reported, even of one that was started before."""
    ended: list[str] = []
    error = asyncio.Event()
    client = Client(until_error(error))
    client._run_output_handler()
    watch_outputs(client, lambda: ended.append("ended"))
    await asyncio.sleep(0)
    assert [] == ended

    error.set()
    assert client.output_handler is not None
    await client.output_handler
    await asyncio.sleep(0)

    assert ["ended"] == ended


async def test_a_client_that_is_shut_down_has_not_failed() -> None:
    """A client that is shut down, and whose reader is cancelled, has not failed."""
    ended: list[str] = []
    client = Client(until_error(asyncio.Event()))
    watch_outputs(client, lambda: ended.append("ended"))
    await asyncio.sleep(0)

    assert client.output_handler is not None
    client.output_handler.cancel()
    with suppress(asyncio.CancelledError):
        await client.output_handler
    await asyncio.sleep(0)

    assert [] == ended


def made_once(alias: str, requests: int) -> None:
    """Metrics that an application registers when it is built."""
    with adopting_frontend_metrics(alias):
        counter = Counter("http_broken_frontend", "Of a test.", registry=REGISTRY)
    counter.inc(requests)


def shown() -> list[str]:
    lines = exposition(VLLM_REGISTRIES).decode().splitlines()
    return [line for line in lines if line.startswith("http_broken_frontend_total{")]


@pytest.fixture
def two_frontends() -> Any:
    made_once("one", 5)
    made_once("two", 7)
    yield
    forget_frontend_metrics("one")
    forget_frontend_metrics("two")


@pytest.mark.usefixtures("two_frontends")
def test_a_frontend_that_is_made_anew_counts_anew() -> None:
    """A rebuilt frontend registers its metrics once; those of other frontends stay."""
    forget_frontend_metrics("one")
    assert ['http_broken_frontend_total{model_name="two"} 7.0'] == shown()

    made_once("one", 1)

    assert [
        'http_broken_frontend_total{model_name="one"} 1.0',
        'http_broken_frontend_total{model_name="two"} 7.0',
    ] == sorted(shown())
