"""What a fake engine refuses of a chat or a completion: what has not the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_hotswap.testing.fake_answers import Body

TOOL_CHOICES = ("auto", "none", "required")
LIMITS = ("max_tokens", "max_completion_tokens")


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
