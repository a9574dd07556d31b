"""The requests that a flood must not affect: another user's streams, health checks, admin calls.

All keep their pace, whatever happens: a request is sent when it is due, on a connection of its own,
and its wait counts from then. So waits in a queue before the server count, too.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from benchmarks.load import completion, prompts
from benchmarks.wire import End, Manner, Reply, ask

DEADLINE_S = 60.0
TOKENS = 4

Call = Callable[[], Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. Times are seconds of `time.perf_counter`."""

    due_s: float
    waited_s: float
    """From `due_s` to the first token, or the answer's end, or until a failure was known."""
    error: str = ""
    """Why it is a failure; empty if the answer is as expected."""


@dataclass
class Pace:
    """One kind of request, sent at a fixed rate. `samples` has the requests that have ended."""

    name: str
    per_second: float
    call: Call
    judge: Callable[[Reply, float], Sample]
    samples: list[Sample] = field(default_factory=list)
    until_s: float = math.inf
    """When to stop; may be set while it runs."""

    async def run(self) -> None:
        """Send until `until_s`, and wait for the answers to what was sent."""
        began_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                due_s = began_s + number / self.per_second
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                if due_s >= self.until_s:
                    return
                group.create_task(self._once(due_s))

    async def _once(self, due_s: float) -> None:
        self.samples.append(self.judge(await self.call(), due_s))

    def between(self, from_s: float, to_s: float) -> list[Sample]:
        """Return the samples that were due then, whenever they were answered."""
        return [sample for sample in self.samples if from_s <= sample.due_s < to_s]


def first_token(reply: Reply, due_s: float) -> Sample:
    """Return the sample of a stream, which must be complete."""
    events = [at_s for at_s, text in reply.events() if text.startswith("data: ")]
    if _is_good(reply) and len(events) > 1 and reply.body.endswith(b"data: [DONE]\n\n"):
        return Sample(due_s, events[0] - due_s)
    return Sample(due_s, reply.ended_s - due_s, _what_is_wrong(reply))


def whole_answer(reply: Reply, due_s: float) -> Sample:
    """Return the sample of an answer whose status must be 200."""
    error = "" if _is_good(reply) else _what_is_wrong(reply)
    return Sample(due_s, reply.ended_s - due_s, error)


def _is_good(reply: Reply) -> bool:
    return reply.end is End.COMPLETE and reply.status == 200


def _what_is_wrong(reply: Reply) -> str:
    if reply.end is not End.COMPLETE:
        return f"{reply.end.value} ({reply.status}) {reply.detail}"
    return f"{reply.status}: {bytes(reply.body[-200:]).decode(errors='replace')}"


def paces(
    port: int, alias: str, user_key: str, admin_key: str, seed: str, per_second: float
) -> list[Pace]:
    """Return the three kinds of requests: streams, health checks, and admin calls."""
    texts = prompts(seed, words=8)
    manner = Manner(deadline_s=DEADLINE_S)
    switch = {"model": alias}  # it is active: nothing moves

    async def stream() -> Reply:
        body = {**completion(alias, next(texts), TOKENS), "stream": True}
        return await ask(port, "/v1/completions", body, manner, key=user_key)

    async def health() -> Reply:
        return await ask(port, "/health", None, manner)

    async def admin() -> Reply:
        return await ask(port, "/v1/models/switch", switch, manner, key=admin_key)

    return [
        Pace("stream", per_second, stream, first_token),
        Pace("health", 2, health, whole_answer),
        Pace("admin", 2, admin, whole_answer),
    ]
