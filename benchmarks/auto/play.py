"""Plays a trace on a server, over HTTP, and checks every answer."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.auto.checkpoints import GREETINGS
from benchmarks.auto.workloads import MOST_TOKENS, PROMPTS, prompt
from benchmarks.client import BadAnswer
from benchmarks.load import completion
from benchmarks.servers import Server
from benchmarks.wire import End, Manner, Reply, ask
from vllm_hotswap.simulation.trace import Trace, TracedRequest

PATIENT = Manner(deadline_s=900.0)
COMPLETIONS = "/v1/completions"

References = Mapping[tuple[str, str], str]
"""Each model's answer to each prompt, when it has no other work."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended."""

    model: str
    waited_s: float
    """By the server's clock, from its answer."""
    took_s: float
    """By the client's clock, from the first byte sent to the last received."""
    error: str | None = None
    matches_reference: bool = True
    """Whether its text is exactly the model's answer alone."""
    paused_s: float | None = None
    """Seconds from the answer that it follows until it was sent."""


@dataclass(frozen=True, slots=True)
class Played:
    """One trace, played once on one server."""

    outcomes: tuple[Outcome, ...]
    switches: int
    total_s: float

    @property
    def waits_s(self) -> list[float]:
        return [outcome.waited_s for outcome in self.outcomes]

    @property
    def errors(self) -> list[str]:
        return [outcome.error for outcome in self.outcomes if outcome.error is not None]


async def take_references(server: Server) -> References:
    """Send every prompt to every model, one after the other.

    Raises:
        BadAnswer: a model does not say its name.
    """
    references = {}
    for alias, greeting in GREETINGS.items():
        for text in PROMPTS:
            reply = await ask(server.port, COMPLETIONS, completion(alias, text, MOST_TOKENS))
            said = _text(reply) if reply.end is End.COMPLETE and reply.status == 200 else ""
            if not said.startswith(greeting):
                raise BadAnswer(f"{alias!r} does not say its name: {bytes(reply.body[:300])!r}")
            references[alias, text] = said
    return references


async def play(server: Server, trace: Trace, references: References) -> Played:
    """Send every request at its time, or when the request that it follows has been answered."""
    switched = await _switches(server)
    loop = asyncio.get_running_loop()
    ended: dict[int, asyncio.Future[float]] = {r.id: loop.create_future() for r in trace.requests}
    started_s = time.perf_counter()

    async def send(request: TracedRequest) -> Outcome:
        paused_s: float | None = None
        if request.after is None:
            due_s = started_s + (request.arrived_s or 0.0)
            await asyncio.sleep(due_s - time.perf_counter())
        else:
            ended_s = await asyncio.shield(ended[request.after])
            await asyncio.sleep(request.think_s)
            paused_s = time.perf_counter() - ended_s
        body = completion(request.model, prompt(request.id), request.output_tokens)
        reply = await ask(server.port, COMPLETIONS, body, PATIENT)
        ended[request.id].set_result(time.perf_counter())
        return replace(judge(request, reply, references), paused_s=paused_s)

    outcomes = await asyncio.gather(*(send(request) for request in trace.requests))
    total_s = time.perf_counter() - started_s
    return Played(tuple(outcomes), await _switches(server) - switched, total_s)


def judge(request: TracedRequest, reply: Reply, references: References) -> Outcome:
    """Judge whether a reply is the complete answer of the requested model."""
    waited_s = float(reply.headers.get("x-hotswap-waited", "nan"))
    if reply.end is not End.COMPLETE or reply.status != 200:
        how = f"{reply.end.value} {reply.status} {reply.detail}{bytes(reply.body[:200])!r}"
        return Outcome(request.model, waited_s, reply.duration_s, how, matches_reference=False)
    content, said = json.loads(reply.body), _text(reply)
    told = (content["model"], reply.headers.get("x-hotswap-model"))
    tokens = content["usage"]["completion_tokens"]
    error: str | None = None
    if told != (request.model, request.model) or not said.startswith(GREETINGS[request.model]):
        error = f"asked {request.model!r}, but {told} answered {said!r}"
    elif tokens != request.output_tokens:
        error = f"asked for {request.output_tokens} tokens, but got {tokens}"
    elif math.isnan(waited_s):
        error = "the answer does not say how long it waited"
    reference = references[request.model, prompt(request.id)]
    return Outcome(request.model, waited_s, reply.duration_s, error, reference.startswith(said))


def _text(reply: Reply) -> str:
    return str(json.loads(reply.body)["choices"][0]["text"]).strip()


async def _switches(server: Server) -> int:
    reply = await ask(server.port, "/admin/status")
    if reply.status != 200:
        raise BadAnswer(f"/admin/status answered {reply.status}")
    return int(json.loads(reply.body)["switches"]["total"])
