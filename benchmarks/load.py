"""The load: prompts that share nothing, and clients that send one request after the other."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.client import BadAnswer, Connection, Stream

WORDS = ("apple", "bridge", "castle", "dream", "engine", "forest", "garden", "island", "letter")


@dataclass(frozen=True, slots=True)
class Load:
    """The number of clients, of requests for each, and the size of the requests."""

    clients: int
    requests: int
    output_tokens: int
    prompt_words: int = 16


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One run of a load."""

    output_tokens: int
    duration_s: float
    ttft_ms: list[float]
    prompt_tokens: list[int]

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.duration_s


def prompts(seed: str, words: int) -> Iterator[str]:
    """Yield prompts that begin with different numbers, so that the prefix cache never helps."""
    numbers = random.Random(seed)  # noqa: S311  # data, not secrets
    while True:
        chosen = " ".join(numbers.choices(WORDS, k=words))
        yield f"{numbers.randrange(10**6):06d} {chosen}"


def completion(alias: str, prompt: str, output_tokens: int) -> dict[str, Any]:
    """Return a request for exactly that many tokens, chosen greedily."""
    return {
        "model": alias,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


async def run_load(port: int, alias: str, load: Load, seed: str) -> LoadResult:
    """Run all clients to their end.

    Raises:
        BadAnswer: a request failed, or did not return the number of tokens that it asked for.
    """
    texts = prompts(seed, load.prompt_words)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Connection(port)) for _ in range(load.clients)]
        plans = [[next(texts) for _ in range(load.requests)] for _ in clients]
        started_s = time.perf_counter()
        answers = await asyncio.gather(
            *(_client(c, alias, p, load) for c, p in zip(clients, plans, strict=True))
        )
        duration_s = time.perf_counter() - started_s
    return _result([stream for streams in answers for stream in streams], duration_s)


async def _client(
    connection: Connection, alias: str, texts: Iterable[str], load: Load
) -> list[Stream]:
    streams = []
    for text in texts:
        stream = await connection.stream(completion(alias, text, load.output_tokens))
        if (stream.model, stream.output_tokens) != (alias, load.output_tokens):
            raise BadAnswer(f"asked {alias!r} for {load.output_tokens} tokens, got {stream}")
        streams.append(stream)
    return streams


def _result(streams: list[Stream], duration_s: float) -> LoadResult:
    return LoadResult(
        output_tokens=sum(stream.output_tokens for stream in streams),
        duration_s=duration_s,
        ttft_ms=[stream.ttft_s * 1000 for stream in streams],
        prompt_tokens=[stream.prompt_tokens for stream in streams],
    )
