"""The application of a fake engine: OpenAI's routes, in the shapes that vLLM answers in.

What it says is made up and the same every time. A chat with `tools` is answered with a call of one
of them, whose arguments are made up from its schema; what follows a tool's result is text again.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import suppress
from typing import Any, Literal, Protocol, get_args

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from vllm_hotswap.testing.fake_answers import (
    WORDS,
    Answer,
    Body,
    Chat,
    Completion,
    Manners,
    Shape,
    event_of,
    head_of,
    length_of,
    pieces,
)
from vllm_hotswap.testing.fake_checks import LIMITS, malformed
from vllm_hotswap.testing.fake_responses import FakeResponses, json_of, refused
from vllm_hotswap.testing.fake_vectors import inputs_of, vector_of

Task = Literal["generate", "embed", "classify", "realtime"]
TASKS: tuple[Task, ...] = get_args(Task)


class Speaker(Protocol):
    """The engine behind an application."""

    alias: str

    def tokens(self, max_tokens: int, name: str | None = None) -> AsyncIterator[str]:
        """So many words, as `name`; each one waits until the engine is stepped."""

    def knows(self, name: str) -> bool:
        """Whether a request may name it: the alias, another name of the model, an adapter."""

    def is_adapter(self, name: str) -> bool:
        """Whether answers are to name it instead of the alias."""


class FakeFrontend:
    """The application of one model."""

    def __init__(self, speaker: Speaker, tasks: Iterable[Task], manners: Manners) -> None:
        self._speaker = speaker
        self._manners = manners
        self._numbers = itertools.count(1)
        self.responses = FakeResponses(speaker.alias, speaker.tokens, self._count)
        routes = [route for task in tasks for route in self.routes_of(task)]
        tokenize = Route("/tokenize", self._tokenize, methods=["POST"])
        self.app = Starlette(routes=[*routes, tokenize])

    def routes_of(self, task: Task) -> list[BaseRoute]:
        of_tasks: dict[Task, list[BaseRoute]] = {
            "generate": [
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._completion, methods=["POST"]),
                *self.responses.routes,
            ],
            "embed": [Route("/v1/embeddings", self._embedding, methods=["POST"])],
            "classify": [Route("/classify", self._classify, methods=["POST"])],
            "realtime": [WebSocketRoute("/v1/realtime", self._realtime)],
        }
        return of_tasks[task]

    def refusal(self, body: object) -> Response | None:
        """What is wrong with a chat or a completion."""
        if not isinstance(body, dict):
            return refused("the body is not a JSON object")
        if key := malformed(body):
            form = "a whole number of at least 1" if key in LIMITS else "what OpenAI's API says"
            return refused(f"{key} must be {form}", key)
        name = body.get("model") or self._speaker.alias
        if not self._speaker.knows(name):
            return refused(f"The model `{name}` does not exist.", "model", 404)
        choice = body.get("tool_choice") or ("auto" if body.get("tools") else "none")
        if choice == "auto" and body.get("tools") and not self._manners.are_tools_called:
            return refused(
                '"auto" tool choice requires --enable-auto-tool-choice and '
                "--tool-call-parser to be set"
            )
        return None

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, Chat())

    async def _completion(self, request: Request) -> Response:
        return await self._generate(request, Completion())

    async def _generate(self, request: Request, shape: Shape) -> Response:
        body = await json_of(request)
        if (refusal := self.refusal(body)) is not None:
            return refusal
        answer = self._answer(body, shape)
        if body.get("stream"):
            has_usage = bool((body.get("stream_options") or {}).get("include_usage"))
            events = self._events(answer, shape, has_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        words = await unless_client_leaves(request, self._words(answer))
        if words is None:
            return Response(status_code=499)
        choice = {"index": 0, **shape.whole(answer, " ".join(words))}
        choice["finish_reason"] = answer.finish_reason
        made = head_of(answer, shape.kind) | {"choices": [choice], "usage": answer.usage}
        return JSONResponse(made)

    def _answer(self, body: Body, shape: Shape) -> Answer:
        name = body.get("model") or self._speaker.alias
        call = shape.call(body)
        most = body.get("max_tokens") or body.get("max_completion_tokens")
        whole = len(WORDS)
        if call is not None:
            whole = len(pieces(call[1]))
            count = min(whole, most or whole)
        else:
            count = self._count(most, bool(body.get("ignore_eos")))
        return Answer(
            id=f"{shape.prefix}-fake-{next(self._numbers)}",
            name=name if self._speaker.is_adapter(name) else self._speaker.alias,
            count=count,
            is_cut=count != whole,
            prompt_tokens=length_of(body.get("messages") or body.get("prompt")),
            call=call,
        )

    def _count(self, most: int | None, goes_on: bool = False) -> int:
        """Words of an answer of at most so many; `goes_on`: of so many, as with `ignore_eos`."""
        if most is None:
            return len(WORDS)
        return min(most, len(WORDS)) if self._manners.is_brief and not goes_on else most

    async def _words(self, answer: Answer) -> list[str]:
        return [word async for word in self._speaker.tokens(answer.count, answer.name)]

    async def _events(self, answer: Answer, shape: Shape, has_usage: bool) -> AsyncIterator[str]:
        head, number = head_of(answer, shape.chunk_kind), 0
        async for word in self._speaker.tokens(answer.count, answer.name):
            choice = {"index": 0, **shape.piece(answer, number, word)}
            number += 1
            choice["finish_reason"] = answer.finish_reason if number == answer.count else None
            yield event_of({**head, "choices": [choice]})
        if has_usage:
            yield event_of({**head, "choices": [], "usage": answer.usage})
        yield "data: [DONE]\n\n"

    async def _embedding(self, request: Request) -> Response:
        body = await json_of(request)
        if not isinstance(body, dict):
            return refused("the body is not a JSON object")
        async for _ in self._speaker.tokens(1):
            pass
        inputs = inputs_of(body.get("input", body.get("messages")))
        is_packed = body.get("encoding_format") == "base64"
        data = [
            {"object": "embedding", "index": number, "embedding": vector_of(text, is_packed)}
            for number, text in enumerate(inputs)
        ]
        tokens = sum(length_of(text) for text in inputs)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        alias = self._speaker.alias
        return JSONResponse({"object": "list", "model": alias, "data": data, "usage": usage})

    async def _classify(self, request: Request) -> Response:
        async for _ in self._speaker.tokens(1):
            pass
        data = [{"index": 0, "label": "fake", "probs": [1.0], "num_classes": 1}]
        return JSONResponse({"object": "list", "model": self._speaker.alias, "data": data})

    async def _realtime(self, connection: WebSocket) -> None:
        """For every text that comes in, the words of an answer."""
        await connection.accept()
        await connection.send_json({"type": "session.created"})
        with suppress(WebSocketDisconnect):
            while True:
                count = len((await connection.receive_text()).split())
                async for word in self._speaker.tokens(count):
                    await connection.send_json({"type": "transcription.delta", "delta": word})
                await connection.send_json({"type": "transcription.done"})

    async def _tokenize(self, request: Request) -> Response:
        words = str((await request.json()).get("prompt", "")).split()
        return JSONResponse({"count": len(words), "tokens": list(range(len(words)))})


async def unless_client_leaves(
    request: Request, work: Coroutine[Any, Any, list[str]]
) -> list[str] | None:
    """Its result; None after a disconnect, which ends the work as vLLM does."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
