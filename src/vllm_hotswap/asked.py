"""What a request asks of its engine: how many requests it becomes there, and how large a grammar.

Read from its body before vLLM sees it. vLLM makes an engine request of every prompt, every item and
every one of `n` answers. A grammar it compiles as a whole, for which the time grows with the square
of what is in it. Field names are those of vLLM 0.32.0.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from vllm_hotswap.errors import CallTooLarge, GrammarTooLarge
from vllm_hotswap.model_field import Unread
from vllm_hotswap.settings import LimitsConfig

_SCORED = ("queries", "documents", "items", "text_1", "text_2", "data_1", "data_2")

POOLING = frozenset(
    [
        "/classify",
        "/pooling",
        "/rerank",
        "/score",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/score",
        "/v2/embed",
        "/v2/rerank",
    ]
)
"""Routes whose models pool, and generate nothing."""

LISTS: Mapping[str, tuple[str, ...]] = {
    "/classify": ("input", "messages"),
    "/generative_scoring": ("items",),
    "/invocations": ("prompt", "input", "messages", *_SCORED),
    "/pooling": ("input", "messages", "data"),
    "/rerank": _SCORED,
    "/score": _SCORED,
    "/v1/chat/completions/batch": ("messages",),
    "/v1/completions": ("prompt", "prompt_embeds"),
    "/v1/completions/render": ("prompt", "prompt_embeds"),
    "/v1/decisions": ("questions",),
    "/v1/embeddings": ("input", "messages"),
    "/v1/rerank": _SCORED,
    "/v1/score": _SCORED,
    "/v1/systemone": ("questions",),
    "/v2/embed": ("texts", "images", "inputs"),
    "/v2/rerank": _SCORED,
}
"""Where a route takes several things at once, each of which is an engine request."""

ONE = frozenset(
    [
        "/cohere/v2/chat",
        "/cohere/v2/chat/render",
        "/detokenize",
        "/inference/v1/generate",
        "/tokenize",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/chat/completions",
        "/v1/chat/completions/derender",
        "/v1/chat/completions/render",
        "/v1/completions/derender",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/messages/render",
        "/v1/responses",
        "/v1/responses/render",
    ]
)
"""Routes that take one thing; `n` answers to it may be asked for."""

_TOKENS = frozenset(["input", "prompt"])
"""Where a list of numbers is one prompt."""

_CONVERSATIONS = frozenset(["input", "messages"])
"""Where a list of objects, which are messages, is one conversation."""

_NUMBERS = ("n", "best_of", "sampling_params.n")
_GRAMMARS = (
    "response_format",
    "structured_outputs",
    "text",
    "output_config",
    "output_format",
    "sampling_params.structured_outputs",
)
MEMBERS = (*_NUMBERS, *_GRAMMARS, "tools", "tool_choice", "strict_tools")

REPEATED = 10
"""So many repetitions that a schema asks for by a number cost as much as one value."""

_REPETITIONS = (
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
    "minProperties",
    "maxProperties",
)
_AS_TEXT = ("regex", "pattern", "grammar", "ebnf", "lark", "definition")
"""Where a regular expression or a grammar is written."""

_TIMES = re.compile(
    r"(\))?(?:\{[ \t]*+(\d*+)[ \t]*+(?:,[ \t]*+(\d*+)[ \t]*+)?\}|~[ \t]*+(\d++)(?:\.\.(\d++))?)"
)
"""`{m,n}` of regular expressions and grammars, and `~m..n` of Lark's; after a group, or not."""

_SLASHES = re.compile(r"(?<![\\/])/(?!/)")
"""Around a regular expression of Lark's; not those of comments."""

_ENDLESS = re.compile(r"[.\])][*+]")
"""A part of a regular expression that is repeated without a bound."""

EXPRESSION = 10
"""So many values does a regular expression in a grammar weigh, and a part of one that is repeated
without a bound: the time grows with the square, 200 such rules take half a second, 400 2.3 s."""

USUAL = 10
"""So many parts of one pattern may be repeated without a bound, and weigh nothing."""

MEETING = 5
"""Regular expressions that have to fit one text weigh this much times more for each: six of them,
all together, are more than usual settings allow."""

PAIRS = 20
"""So many pairs of patterns for names cost as much as one value: 200 such patterns take 1.5 s."""

_SAME_PLACE = frozenset(
    [
        "$dynamicRef",
        "$recursiveRef",
        "$ref",
        "allOf",
        "anyOf",
        "contains",
        "else",
        "format",
        "if",
        "not",
        "oneOf",
        "pattern",
        "patternProperties",
        "propertyNames",
        "then",
    ]
)
"""Keys of a schema that ask something of one and the same value."""

MOST_SEARCHED_BYTES = 4 << 20
"""Tools that are larger are taken as strict, rather than searched on the event loop: 2 ms."""

_STRICT = re.compile(rb'"strict"[ \t\r\n]*+:[ \t\r\n]*+(?![ \t\r\n{\[fn])|\\u00(?:6[39]|7[234])')
"""`strict` that is not false, null, or a property of that name; or an escaped letter of it, so
that it might be one. pydantic takes other values as true, too."""

_AS_JSON = frozenset(["json", "choice", "structural_tag"])


def keys_of(path: str) -> tuple[str, ...]:
    """The top-level keys that tell it, of a body for this route."""
    return (*MEMBERS, *LISTS.get(path, ()))


def requests_of(path: str, members: Mapping[str, Any], limits: LimitsConfig) -> int:
    """How many engine requests a body becomes.

    Raises `CallTooLarge` for more than `limits.requests_per_call`, or, where they are to be
    generated, than `limits.answers_per_call`.
    """
    things = sum(_things(key, members.get(key)) for key in LISTS.get(path, ()))
    numbers = [_number(members.get(key)) for key in _NUMBERS]
    requests = max(1, things) * max(1, *numbers)
    if requests > limits.requests_per_call:
        raise CallTooLarge(limits.requests_per_call, "limits.requests_per_call")
    if requests > limits.answers_per_call and _generates(path, members):
        raise CallTooLarge(limits.answers_per_call, "limits.answers_per_call")
    return requests


def _generates(path: str, members: Mapping[str, Any]) -> bool:
    """Whether a model is to generate. `/invocations` takes what several routes do."""
    if path != "/invocations":
        return path not in POOLING
    asked = "prompt" in members or any(_number(members.get(key)) > 1 for key in _NUMBERS)
    return asked or not any(key in members for key in (*_SCORED, "input"))


def _things(key: str, value: object) -> int:
    """How many a list has. The tokens of one prompt, and the messages of one conversation, are not
    several things, where vLLM reads them so; nor is anything else.
    """
    match value:
        case Unread():
            is_prompt = key in _TOKENS and value.is_of_numbers
            is_conversation = key in _CONVERSATIONS and value.is_of_objects
            return 0 if is_prompt or is_conversation else value.items
        case [int() | float(), *_] if key in _TOKENS:
            return 0
        case [dict(), *_] if key in _CONVERSATIONS:
            return 0
        case list() | dict():
            return len(value)
    return 0


def _number(value: Any) -> int:
    """As pydantic reads a whole number: perhaps from a text, or from 3.0.

    One that was too long to be read, with zeros before it or spaces behind it, may be any.
    """
    if isinstance(value, Unread):
        return sys.maxsize
    try:
        return value if isinstance(value, int) else int(float(value or 0))
    except (TypeError, ValueError, OverflowError):
        return 0


def check_grammar(
    members: Mapping[str, Any], limits: LimitsConfig, are_tools_strict: bool = False
) -> None:
    """Raises `GrammarTooLarge` for one that would keep the compiler busy for too long.

    Args:
        members: of the body, as far as they tell it.
        limits: `grammar_bytes` and `grammar_values` count.
        are_tools_strict: whether the model takes all tools as strict, whatever they say.
    """
    size = values = 0
    for name, grammar in _grammars(members, are_tools_strict):
        text = grammar.text if isinstance(grammar, Unread) else json.dumps(grammar)
        size += len(text)
        if size > limits.grammar_bytes:
            raise GrammarTooLarge(f"{limits.grammar_bytes} bytes (limits.grammar_bytes)", name)
        values += _values(_parsed(grammar.text) if isinstance(grammar, Unread) else grammar)
        if values > limits.grammar_values:
            raise GrammarTooLarge(f"{limits.grammar_values} values (limits.grammar_values)", name)


def _grammars(members: Mapping[str, Any], are_tools_strict: bool) -> Iterator[tuple[str, Any]]:
    """What a grammar may be made from, by the name of its field."""
    for name in _GRAMMARS:
        if isinstance(members.get(name), dict | Unread):
            yield name, members[name]
    if _is_compiled(members, are_tools_strict):
        yield "tools", members["tools"]


def _is_compiled(members: Mapping[str, Any], are_strict: bool) -> bool:
    """Whether tools become a grammar: one has to be called, or is strict."""
    tools = members.get("tools")
    if not isinstance(tools, list | Unread):
        return False
    if members.get("tool_choice") not in (None, "auto", "none"):
        return True
    if are_strict or members.get("strict_tools") not in (None, False):
        return members.get("tool_choice") != "none"
    text = tools.text if isinstance(tools, Unread) else json.dumps(tools).encode()
    return len(text) > MOST_SEARCHED_BYTES or _STRICT.search(text) is not None


def _parsed(text: memoryview | str) -> Any:
    try:
        return json.loads(text if isinstance(text, str) else bytes(text))
    except (ValueError, RecursionError):
        return None


def _values(grammar: object) -> int:
    """What the time of a compilation grows with: whatever is in a list, and every part of a mapping
    but plain ones, such as titles. Schemas may be texts that have JSON in them.
    """
    count, left, nodes = 0, [grammar], [grammar]
    while left:
        value = left.pop()
        parts = value if isinstance(value, list) else [*_parts(value)]
        count += len(parts) + _repetitions(value) + _expressions(value)
        left += parts
        nodes += parts
    return count + _Meetings(nodes).weight()


def _parts(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        for key, item in value.items():
            part = _parsed(item) if isinstance(item, str) and key in _AS_JSON else item
            if isinstance(part, dict | list | bool):
                yield part


def _expressions(value: object) -> int:
    """What the regular expressions in it weigh, beyond the values that they are.

    Those of `patternProperties` are compared with each other, pair by pair.
    """
    if not isinstance(value, dict):
        return 0
    written = 0
    for key in _AS_TEXT:
        if isinstance(text := value.get(key), str):
            endless = len(_ENDLESS.findall(text))
            if key in ("regex", "pattern"):
                written += max(0, endless - USUAL)
            else:
                written += max(endless, len(_SLASHES.findall(text)) // 2)
    patterns = value.get("patternProperties")
    pairs = len(patterns) ** 2 // PAIRS if isinstance(patterns, dict) else 0
    return EXPRESSION * written + pairs


class _Meetings:
    """How many regular expressions have to fit one and the same text, in a schema.

    What members of an `allOf` ask for is intersected, and so is what stands beside them, and what
    a `$ref` names. For that, time and memory are multiplied by each.
    """

    def __init__(self, nodes: list[Any]) -> None:
        self._nodes = [node for node in nodes if isinstance(node, dict)]
        self._named: dict[str, list[Any]] = {}
        for node in self._nodes:
            for name, item in node.items():
                if isinstance(item, dict):
                    self._named.setdefault(name, []).append(item)
        self._found: dict[int, int] = {}
        self._weight = 0

    def weight(self) -> int:
        """In values: nothing where an expression is alone. Too deep a schema weighs too much."""
        try:
            for node in reversed(self._nodes):  # parts before what they are part of
                self._most(node)
        except RecursionError:
            return 10**9
        return self._weight

    def _most(self, node: object) -> int:
        """The most that meet at one place in it, or in what it consists of."""
        if isinstance(node, list):
            return max(map(self._most, node), default=0)
        if not isinstance(node, dict):
            return 0
        if id(node) not in self._found:
            self._found[id(node)] = 0  # what it is part of itself adds nothing
            here = [count for count in self._that_meet(node) if count]
            if len(here) > 1:
                self._weight += MEETING ** (min(sum(here), 20) - 1)
            inner = [self._most(item) for key, item in node.items() if key not in _SAME_PLACE]
            self._found[id(node)] = max(sum(here), *inner, 0)
        return self._found[id(node)]

    def _that_meet(self, node: dict[str, Any]) -> Iterator[int]:
        for key, item in node.items():
            if key in ("pattern", "format"):
                yield 1 if isinstance(item, str) else self._most(item)
            elif key == "allOf" and isinstance(item, list):
                yield from map(self._most, item)
            elif key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(item, str):
                named = self._named.get(_last_name(item))
                yield self._most(named) if named else max(self._found.values())
            elif key in _SAME_PLACE:
                yield self._most([*item.values()] if key == "patternProperties" else item)


def _last_name(reference: str) -> str:
    """Of what it may name: equal names are taken together, wherever they are."""
    return unquote(reference).rpartition("/")[2].replace("~1", "/").replace("~0", "~")


def _repetitions(value: object) -> int:
    """What numbers in it ask for, in values. Those of a text are expanded by some compilers."""
    if not isinstance(value, dict):
        return 0
    asked = [value.get(key) for key in _REPETITIONS]
    numbers = [number for number in asked if isinstance(number, int | float)]
    texts = [value.get(key) for key in _AS_TEXT]
    if isinstance(patterns := value.get("patternProperties"), dict):
        texts += patterns
    times = sum(_times(text) for text in texts if isinstance(text, str))
    return int(min(max(0, *numbers, 0), 1e9)) // REPEATED + times


def _times(text: str) -> int:
    """How often a part of a regular expression or grammar is repeated at most: the largest number,
    as often as the groups around it may be. Numbers up to ten are not worth counting.
    """
    most, groups = 1, 1
    for group, *written in _TIMES.findall(text):
        times = max(int(number[:9] or 0) if len(number) < 10 else 10**9 for number in written)
        if group:
            groups = min(groups * max(1, times), 10**9)
        else:
            most = max(most, times)
    times = most * groups
    return times if times > REPEATED else 0
