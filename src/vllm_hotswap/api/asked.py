"""What a request costs its engine: how many engine requests, and how large a grammar.

Read from the body before vLLM sees it. vLLM makes an engine request of every prompt, every item and
every one of `n` answers. It compiles a grammar as a whole; the time grows with the square of its
content. Field names are those of vLLM 0.32.0.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from vllm_hotswap.api.model_name import Unread
from vllm_hotswap.config import LimitsConfig
from vllm_hotswap.errors import CallTooLarge, GrammarTooLarge

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
"""Routes of pooling models, which generate nothing."""

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
"""Fields in which a route takes several things at once; each becomes an engine request."""

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
"""Routes that take one thing; a request may ask for `n` answers to it."""

_TOKENS = frozenset(["input", "prompt"])
"""Fields in which a list of numbers is one prompt."""

_CONVERSATIONS = frozenset(["input", "messages"])
"""Fields in which a list of objects (messages) is one conversation."""

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
"""Repetitions that a schema asks for by a number, and that cost as much as one value."""

_REPETITIONS = (
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
    "minProperties",
    "maxProperties",
)
_AS_TEXT = ("regex", "pattern", "grammar", "ebnf", "lark", "definition")
"""Keys whose value is a regular expression or a grammar."""

_TIMES = re.compile(
    r"(\))?(?:\{[ \t]*+(\d*+)[ \t]*+(?:,[ \t]*+(\d*+)[ \t]*+)?\}|~[ \t]*+(\d++)(?:\.\.(\d++))?)"
)
"""`{m,n}` of regular expressions and grammars, and `~m..n` of Lark; after a group, or not."""

_SLASHES = re.compile(r"(?<![\\/])/(?!/)")
"""Slashes around a regular expression in Lark; not those of comments."""

_ENDLESS = re.compile(r"[.\])][*+]")
"""A part of a regular expression that is repeated without a limit."""

EXPRESSION = 10
"""Weight, in values, of a regular expression in a grammar, and of a part of one that is repeated
without a limit. The time grows with the square: 200 such rules take half a second, 400 2.3 s."""

USUAL = 10
"""Parts of one pattern that may be repeated without a limit and weigh nothing."""

MEETING = 5
"""Factor by which the weight of regular expressions that must match one text grows with each: six
of them together exceed what usual settings allow."""

PAIRS = 20
"""Pairs of patterns for names that cost as much as one value: 200 such patterns take 1.5 s."""

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
"""Keys of a schema that constrain one and the same value."""

MOST_SEARCHED_BYTES = 4 << 20
"""Larger tools count as strict: searching this many bytes takes 2 ms of the event loop."""

_STRICT = re.compile(rb'"strict"[ \t\r\n]*+:[ \t\r\n]*+(?![ \t\r\n{\[fn])|\\u00(?:6[39]|7[234])')
"""`strict` that is not false, null, or a property of that name; or an escaped letter of the word,
which might spell it. pydantic accepts other values as true, too."""

_AS_JSON = frozenset(["json", "choice", "structural_tag"])


def keys_of(path: str) -> tuple[str, ...]:
    """Return the top-level keys of a body for this route that this module needs."""
    return (*MEMBERS, *LISTS.get(path, ()))


def requests_of(path: str, members: Mapping[str, Any], limits: LimitsConfig) -> int:
    """Return how many engine requests a body becomes.

    Raises:
        CallTooLarge: more than `limits.requests_per_call` or, for a model that generates, more than
            `limits.answers_per_call`.
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
    """Whether the request asks for generation. `/invocations` takes what several routes do."""
    if path != "/invocations":
        return path not in POOLING
    asked = "prompt" in members or any(_number(members.get(key)) > 1 for key in _NUMBERS)
    return asked or not any(key in members for key in (*_SCORED, "input"))


def _things(key: str, value: object) -> int:
    """Return how many things a field has: the items of a list or an object, else 0. Tokens of one
    prompt, and messages of one conversation, do not count where vLLM reads them as one.
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
    """Read a whole number as pydantic does: perhaps from a text, or from 3.0.

    One that is too long to be read, with zeros before it or spaces behind it, may be any number: it
    counts as the largest.
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
    """Refuse a grammar that would keep the compiler busy for too long.

    Args:
        members: the members of the body that `keys_of` names.
        limits: `grammar_bytes` and `grammar_values` apply.
        are_tools_strict: whether the model treats all tools as strict, whatever they say.

    Raises:
        GrammarTooLarge: it is too large.
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
    """Yield what a grammar may be made from, with the name of its field."""
    for name in _GRAMMARS:
        if isinstance(members.get(name), dict | Unread):
            yield name, members[name]
    if _is_compiled(members, are_tools_strict):
        yield "tools", members["tools"]


def _is_compiled(members: Mapping[str, Any], are_strict: bool) -> bool:
    """Whether tools become a grammar: one must be called, or is strict."""
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
    """Count what the compilation time grows with: items of lists, and parts of mappings except
    plain ones, such as titles. A schema may be a text that contains JSON.
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
    """Return the weight of the regular expressions in a value, beyond the values that they are.

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
    """Counts how many regular expressions in a schema must match one and the same text.

    Members of an `allOf`, what stands beside them, and what a `$ref` names are intersected. Each
    one multiplies time and memory.
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
        """Return the weight in values: 0 for lone expressions, too much for too deep a schema."""
        try:
            for node in reversed(self._nodes):  # parts before what they are part of
                self._most(node)
        except RecursionError:
            return 10**9
        return self._weight

    def _most(self, node: object) -> int:
        """Return the most expressions that meet at one place in a node, or in its parts."""
        if isinstance(node, list):
            return max(map(self._most, node), default=0)
        if not isinstance(node, dict):
            return 0
        if id(node) not in self._found:
            self._found[id(node)] = 0  # a node that contains itself adds nothing
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
    """Return the last part of a reference; equal names count together, wherever they stand."""
    return unquote(reference).rpartition("/")[2].replace("~1", "/").replace("~0", "~")


def _repetitions(value: object) -> int:
    """Return the weight, in values, of repetitions by number; some compilers expand them."""
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
    """Return how often a part of an expression or grammar is repeated at most: the largest number,
    times those of groups. A result of up to `REPEATED` counts as 0.
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
