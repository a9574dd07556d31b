"""The application of a fake engine: OpenAI's routes, in the shapes that vLLM answers in.

What it says is made up and the same every time. A chat with `tools` is answered with a call of one
of them, whose arguments are made up from its schema; what follows a tool's result is text again.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import math
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from vllm_hotswap.testing.fake_responses import FakeResponses, json_of, refused

Task = Literal["generate", "embed", "classify", "realtime"]
TASKS: tuple[Task, ...] = get_args(Task)

WORDS = ["I", "am", "{alias},", "a", "fake", "engine", "of", "vllm-hotswap."]
"""Of an answer; `tokens` of the engine gives them one by one."""

PIECE = 12
"""Characters of a tool call's arguments in one token."""

DIMENSIONS = 8
"""Of an embedding."""

TOOL_CHOICES = ("auto", "none", "required")
LIMITS = ("max_tokens", "max_completion_tokens")

Body = Mapping[str, Any]


class Speaker(Protocol):
    """The engine behind an application."""

    alias: str

    def tokens(self, max_tokens: int, name: str | None = None) -> AsyncIterator[str]:
        """So many words, as `name`; each one waits until the engine is stepped."""

    def knows(self, name: str) -> bool:
        """Whether a request may name it: the alias, another name of the model, an adapter."""

    def is_adapter(self, name: str) -> bool:
        """Whether answers are to name it instead of the alias."""


@dataclass(frozen=True, slots=True)
class Manners:
    """How a model answers."""

    are_tools_called: bool = True
    """Whether it calls tools by itself (`tool_choice: auto`)."""
    is_brief: bool = False
    """Whether it says its sentence once and ends, as models do; `max_tokens` of words otherwise."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is going to get."""

    id: str
    name: str
    """Of the model or the adapter."""
    count: int
    """Of tokens."""
    is_cut: bool
    """Whether `max_tokens` has ended it, or has had it go on."""
    prompt_tokens: int
    call: tuple[str, str] | None = None
    """A tool and its arguments, in JSON."""

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.count,
            "total_tokens": self.prompt_tokens + self.count,
        }

    @property
    def finish_reason(self) -> str:
        if self.is_cut:
            return "length"
        return "stop" if self.call is None else "tool_calls"


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

    # --- text -----------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, _Chat())

    async def _completion(self, request: Request) -> Response:
        return await self._generate(request, _Completion())

    async def _generate(self, request: Request, shape: _Shape) -> Response:
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
        made = _head(answer, shape.kind) | {"choices": [choice], "usage": answer.usage}
        return JSONResponse(made)

    def _answer(self, body: Body, shape: _Shape) -> Answer:
        name = body.get("model") or self._speaker.alias
        call = shape.call(body)
        most = body.get("max_tokens") or body.get("max_completion_tokens")
        whole = len(WORDS)
        if call is not None:
            whole = len(_pieces(call[1]))
            count = min(whole, most or whole)
        else:
            count = self._count(most, bool(body.get("ignore_eos")))
        return Answer(
            id=f"{shape.prefix}-fake-{next(self._numbers)}",
            name=name if self._speaker.is_adapter(name) else self._speaker.alias,
            count=count,
            is_cut=count != whole,
            prompt_tokens=_length(body.get("messages") or body.get("prompt")),
            call=call,
        )

    def _count(self, most: int | None, goes_on: bool = False) -> int:
        """Words of an answer of at most so many; `goes_on`: of so many, as with `ignore_eos`."""
        if most is None:
            return len(WORDS)
        return min(most, len(WORDS)) if self._manners.is_brief and not goes_on else most

    async def _words(self, answer: Answer) -> list[str]:
        return [word async for word in self._speaker.tokens(answer.count, answer.name)]

    async def _events(self, answer: Answer, shape: _Shape, has_usage: bool) -> AsyncIterator[str]:
        head, number = _head(answer, shape.chunk_kind), 0
        async for word in self._speaker.tokens(answer.count, answer.name):
            choice = {"index": 0, **shape.piece(answer, number, word)}
            number += 1
            choice["finish_reason"] = answer.finish_reason if number == answer.count else None
            yield _event({**head, "choices": [choice]})
        if has_usage:
            yield _event({**head, "choices": [], "usage": answer.usage})
        yield "data: [DONE]\n\n"

    # --- other tasks ----------------------------------------------------------------------

    async def _embedding(self, request: Request) -> Response:
        body = await json_of(request)
        if not isinstance(body, dict):
            return refused("the body is not a JSON object")
        async for _ in self._speaker.tokens(1):
            pass
        inputs = _inputs(body.get("input", body.get("messages")))
        is_packed = body.get("encoding_format") == "base64"
        data = [
            {"object": "embedding", "index": number, "embedding": _vector(text, is_packed)}
            for number, text in enumerate(inputs)
        ]
        tokens = sum(_length(text) for text in inputs)
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


class _Shape(Protocol):
    """What differs between chats and completions."""

    kind: str
    chunk_kind: str
    prefix: str
    """Of ids."""

    def call(self, body: Body) -> tuple[str, str] | None:
        """The tool that is called, and its arguments in JSON."""

    def whole(self, answer: Answer, text: str) -> dict[str, Any]:
        """Of a choice, what is said."""

    def piece(self, answer: Answer, number: int, word: str) -> dict[str, Any]:
        """The same of one token in a stream."""


class _Chat:
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def call(self, body: Body) -> tuple[str, str] | None:
        tools, choice = body.get("tools"), body.get("tool_choice") or "auto"
        last = (body.get("messages") or [{}])[-1]
        if not tools or choice == "none" or last.get("role") == "tool":
            return None
        wanted = choice["function"]["name"] if isinstance(choice, dict) else None
        functions = [tool["function"] for tool in tools]
        function = next((f for f in functions if f["name"] == wanted), functions[0])
        return function["name"], json.dumps(made_up(function.get("parameters") or {}))

    def whole(self, answer: Answer, text: str) -> dict[str, Any]:
        if answer.call is None:
            return {"message": {"role": "assistant", "content": text}}
        name, arguments = answer.call
        arguments = "".join(_pieces(arguments)[: answer.count])
        call = _call(answer, name=name, arguments=arguments)
        return {"message": {"role": "assistant", "content": None, "tool_calls": [call]}}

    def piece(self, answer: Answer, number: int, word: str) -> dict[str, Any]:
        role = {} if number else {"role": "assistant"}
        if answer.call is None:
            return {"delta": {**role, "content": word + " "}}
        name, arguments = answer.call
        piece = _pieces(arguments)[number]
        call: dict[str, Any] = {"index": 0, "function": {"arguments": piece}}
        if number == 0:
            call |= _call(answer, name=name, arguments=piece)
        return {"delta": {**role, "tool_calls": [call]}}


class _Completion:
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def call(self, body: Body) -> None:
        return None

    def whole(self, answer: Answer, text: str) -> dict[str, Any]:
        return {"text": text}

    def piece(self, answer: Answer, number: int, word: str) -> dict[str, Any]:
        return {"text": word + " "}


def malformed(body: Body) -> str | None:
    """The first key of a chat or a completion whose value has not OpenAI's form."""
    forms: dict[str, Callable[[Any], bool]] = {
        "model": lambda value: isinstance(value, str),
        "messages": lambda value: _is_list_of(value, lambda _: True),
        "tools": lambda value: _is_list_of(value, _is_function),
        "tool_choice": lambda value: value in TOOL_CHOICES or _is_function(value),
        "stream_options": lambda value: isinstance(value, dict),
        **dict.fromkeys(LIMITS, _is_limit),
    }
    given = ((key, body.get(key)) for key in forms)
    return next((k for k, value in given if value is not None and not forms[k](value)), None)


def _is_list_of(value: object, is_good: Callable[[Body], bool]) -> bool:
    return isinstance(value, list) and all(isinstance(x, dict) and is_good(x) for x in value)


def _is_function(value: object) -> bool:
    """A tool, or the choice of one."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    return isinstance(function.get("parameters") or {}, dict)


def _is_limit(value: object) -> bool:
    return isinstance(value, int) and value > 0


def made_up(schema: Mapping[str, Any]) -> Any:
    """A value that a plain JSON schema allows; objects have what they must have.

    References and combined schemas are not followed: they become an empty object.
    """
    if chosen := schema.get("enum"):
        return chosen[0]
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "array":
        return [made_up(schema.get("items") or {})]
    known = schema.get("properties") or {}
    plain: dict[object, Any] = {
        "string": "fake",
        "integer": schema.get("minimum", 1),
        "number": schema.get("minimum", 1),
        "boolean": True,
        "null": None,
    }
    of_object = {name: made_up(known.get(name) or {}) for name in schema.get("required") or ()}
    return plain.get(kind, of_object)


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


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": int(time.time()), "model": answer.name}


def _call(answer: Answer, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call-{answer.id}", "type": "function", "function": function}


def _pieces(arguments: str) -> Sequence[str]:
    return [arguments[at : at + PIECE] for at in range(0, len(arguments), PIECE)]


def _event(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def _length(value: object) -> int:
    """About as many as a tokenizer would find: its words; ids count as they are."""
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return len(value)
    return len(json.dumps(value).split())


def _inputs(given: Any) -> list[Any]:
    """Of an embedding: a text, a list of ids, or several of either."""
    is_many = isinstance(given, list) and not all(isinstance(item, int) for item in given)
    return given if is_many else [given]


def _vector(value: object, is_packed: bool) -> list[float] | str:
    """Of length 1, and another one for every other text."""
    digest = hashlib.sha256(json.dumps(value).encode()).digest()[: 2 * DIMENSIONS]
    numbers = [number - 32767.5 for (number,) in struct.iter_unpack("<H", digest)]
    length = math.hypot(*numbers)
    vector = [number / length for number in numbers]
    if not is_packed:
        return vector
    return base64.b64encode(struct.pack(f"<{DIMENSIONS}f", *vector)).decode()
