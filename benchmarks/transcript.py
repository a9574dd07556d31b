"""Reads what an answer of a model says, complete or cut off."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.wire import End, Reply

Vector = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Transcript:
    """What a reply says, as far as it was received."""

    text: str = ""
    vector: Vector = ()
    models: frozenset[str] = frozenset()
    finish: str | None = None
    error: str | None = None
    """The code of the error that it ends with."""
    is_done: bool = False
    """Whether the reply itself says that it is complete."""
    was_parked: bool = False


def read(reply: Reply) -> Transcript:
    """Parse a reply, complete or not.

    Raises:
        ValueError, KeyError, TypeError: it is complete, but not an answer of such a server.
    """
    if reply.is_stream:
        return read_events(event for _, event in reply.events())
    if reply.end is not End.COMPLETE:
        return Transcript()  # half a JSON object says nothing
    content = json.loads(reply.body)
    if is_error(reply):
        return Transcript(error=error_code(content))
    models = frozenset({content["model"]})
    if "choices" not in content:
        return Transcript(
            vector=tuple(content["data"][0]["embedding"]), models=models, is_done=True
        )
    choice = content["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return Transcript(text=text, models=models, finish=choice["finish_reason"], is_done=True)


def read_events(events: Iterable[str]) -> Transcript:
    """Parse a stream, as far as it was received."""
    texts: list[str] = []
    models: set[str] = set()
    finish = error = None
    is_done = was_parked = False
    for event in events:
        if event.startswith(":"):
            was_parked = was_parked or "parked" in event
        elif (data := event.partition("data: ")[2]) == "[DONE]":
            is_done = True
        elif (content := json.loads(data)).get("error"):
            error = error_code(content)
        else:
            models.add(content["model"])
            for choice in content["choices"]:
                texts.append(_text(choice))
                finish = choice["finish_reason"] or finish
    return Transcript("".join(texts), (), frozenset(models), finish, error, is_done, was_parked)


def _text(choice: Mapping[str, Any]) -> str:
    text = choice["text"] if "text" in choice else choice["delta"].get("content")
    return str(text or "")


def is_error(reply: Reply) -> bool:
    return reply.end is End.COMPLETE and reply.status >= 400


def error_code(content: Mapping[str, Any]) -> str:
    """Return the code of OpenAI's error object, which must be complete."""
    error = content["error"]
    if not error["message"] or not error["type"]:
        raise ValueError("an error without a message or a type")
    return str(error["code"])


def token_times(reply: Reply) -> list[float]:
    """Return when each event with text was received."""
    return [at_s for at_s, event in reply.events() if read_events([event]).text]
