"""What a fake engine answers: a sentence, or the call of a tool, in the shapes of OpenAI's API."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

WORDS = ["I", "am", "{alias},", "a", "fake", "engine", "of", "vllm-hotswap."]
"""Of an answer; `tokens` of the engine gives them one by one."""

PIECE = 12
"""Characters of a tool call's arguments in one token."""

Body = Mapping[str, Any]


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


class Shape(Protocol):
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


class Chat:
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
        arguments = "".join(pieces(arguments)[: answer.count])
        call = _call(answer, name=name, arguments=arguments)
        return {"message": {"role": "assistant", "content": None, "tool_calls": [call]}}

    def piece(self, answer: Answer, number: int, word: str) -> dict[str, Any]:
        role = {} if number else {"role": "assistant"}
        if answer.call is None:
            return {"delta": {**role, "content": word + " "}}
        name, arguments = answer.call
        piece = pieces(arguments)[number]
        call: dict[str, Any] = {"index": 0, "function": {"arguments": piece}}
        if number == 0:
            call |= _call(answer, name=name, arguments=piece)
        return {"delta": {**role, "tool_calls": [call]}}


class Completion:
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def call(self, body: Body) -> None:
        return None

    def whole(self, answer: Answer, text: str) -> dict[str, Any]:
        return {"text": text}

    def piece(self, answer: Answer, number: int, word: str) -> dict[str, Any]:
        return {"text": word + " "}


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


def head_of(answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": int(time.time()), "model": answer.name}


def _call(answer: Answer, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call-{answer.id}", "type": "function", "function": function}


def pieces(arguments: str) -> Sequence[str]:
    return [arguments[at : at + PIECE] for at in range(0, len(arguments), PIECE)]


def event_of(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def length_of(value: object) -> int:
    """About as many as a tokenizer would find: its words; ids count as they are."""
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return len(value)
    return len(json.dumps(value).split())
