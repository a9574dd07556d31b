"""What a request asks of its engine: how many requests, and how large a grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from tests.conftest import MakeServer
from tests.helpers.support import CHAT, Server
from vllm_hotswap.api import asked
from vllm_hotswap.api.model_name import SMALL_BYTES, json_fields
from vllm_hotswap.api.vllm_routes import VLLM_USER_ROUTES
from vllm_hotswap.config.settings import LimitsConfig
from vllm_hotswap.errors import CallTooLarge, GrammarTooLarge
from vllm_hotswap.models.routes import WEBSOCKET
from vllm_hotswap.tasks.turns import at_once
from vllm_hotswap.text.json_scan import scan

LIMITS = LimitsConfig()
LARGE = {"padding": "x" * SMALL_BYTES}
"""Makes a body that is scanned rather than parsed."""


def members_of(path: str, body: dict[str, Any]) -> dict[str, Any]:
    raw = json.dumps(body).encode()
    return dict(at_once(json_fields(raw, members=asked.keys_of(path))).members)


def requests_of(path: str, **body: Any) -> int:
    """Count the requests in a body, small and large: these are read in different ways."""
    small, large = members_of(path, body), members_of(path, LARGE | body)
    assert asked.requests_of(path, small, LIMITS) == asked.requests_of(path, large, LIMITS)
    return asked.requests_of(path, small, LIMITS)


def test_every_route_that_takes_a_body_is_known() -> None:
    """A new route must be reviewed: can one request ask for several things at once?"""
    posts = {route.removeprefix("POST ") for route in VLLM_USER_ROUTES if route.startswith("POST")}
    assert posts - {"/v1/responses/{response_id}/cancel"} == {*asked.LISTS, *asked.ONE}
    assert WEBSOCKET not in posts


@pytest.mark.parametrize(
    ("path", "body", "requests"),
    [
        (CHAT, {"messages": [{"role": "user"}] * 9}, 1),
        (CHAT, {"n": 5}, 5),
        (CHAT, {"n": "5"}, 5),
        (CHAT, {"n": 5.0}, 5),
        (CHAT, {"n": None}, 1),
        (CHAT, {"n": 10**400}, None),
        (CHAT, {"n": "inf"}, 1),
        (CHAT, {"n": "many", "best_of": 3}, 3),
        ("/v1/completions", {"prompt": "a b c"}, 1),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 3}, 6),
        ("/v1/completions", {"prompt": [1, 2, 3]}, 1),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}, 2),
        ("/v1/completions", {"prompt": []}, 1),
        ("/v1/completions", {"prompt": [7] * 100_000}, 1),
        ("/v1/completions", {"prompt": [[7] * 50] * 1000}, 1000),
        ("/v1/completions", {"prompt": ["a" * 30] * 2049}, None),
        ("/v1/completions", {"prompt": ["a"] * 1024, "n": 3}, None),
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user"}]] * 7}, 7),
        ("/v1/embeddings", {"messages": [{"role": "user", "content": "x" * 200}] * 2500}, 1),
        ("/v1/embeddings", {"input": ["a,[b", "c"]}, 2),
        ("/generative_scoring", {"query": "q", "items": ["x"] * 1024}, 1024),
        ("/v1/embeddings", {"input": ["x"] * 2048}, 2048),
        ("/generative_scoring", {"query": "q", "items": ["x"] * 30_000}, None),
        ("/score", {"queries": "q", "documents": [{"content": []}] * 3}, 3),
        ("/rerank", {"query": "q", "documents": {"content": ["a"]}}, 1),
        ("/rerank", {"query": "q", "documents": [{"role": "x", "content": []}] * 9}, 9),
        ("/rerank", {"query": "q", "documents": [{"role": "x" * 30}] * 2049}, None),
        ("/score", {"queries": "q", "documents": [1, *["a"] * 8]}, 9),
        ("/v2/embed", {"inputs": [{"role": "user", "content": []}] * 9}, 9),
        ("/v1/embeddings", {"messages": [[{"role": "user"}]] * 9}, 9),
        ("/v1/embeddings", {"input": [{"content": "x" * 200, "role": "user"}] * 2500}, 1),
        ("/invocations", {"messages": [[{"role": "user"}]] * 9}, 9),
        ("/v1/systemone", {"questions": {"a": {}, "b": {}}}, 2),
        ("/v2/embed", {"texts": ["a"] * 96}, 96),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {"n": 16384}}, None),
        (
            "/inference/v1/generate",
            {"sampling_params": {"stop": ["x" * SMALL_BYTES], "n": 3000}},
            None,
        ),
        ("/inference/v1/generate", {"sampling_params": {"n": 3}}, 3),
        ("/inference/v1/generate", {"sampling_params": [1]}, 1),
        ("/invocations", {"prompt": ["a"] * 4}, 4),
    ],
)
def test_every_thing_that_is_asked_for_counts(
    path: str, body: dict[str, Any], requests: int | None
) -> None:
    """Prompts, items and conversations count times the answers to each; None means too many."""
    if requests is None:
        with pytest.raises(CallTooLarge, match=r"limits\.requests_per_call"):
            requests_of(path, **body)
    else:
        assert requests == requests_of(path, **body)


MANY = ["x" * 30] * 1025


@pytest.mark.parametrize(
    ("path", "body", "is_refused"),
    [
        (CHAT, {"n": 1025}, True),
        ("/v1/completions", {"prompt": MANY}, True),
        ("/generative_scoring", {"query": "q", "items": MANY}, True),
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user"}]] * 1025}, True),
        ("/v1/embeddings", {"input": MANY}, False),
        ("/rerank", {"query": "q", "documents": MANY}, False),
        ("/classify", {"input": MANY}, False),
        ("/pooling", {"input": MANY}, False),
        ("/invocations", {"prompt": MANY}, True),
        ("/invocations", {"input": MANY}, False),
        ("/invocations", {"text_1": "a", "text_2": MANY}, False),
        ("/invocations", {"input": "a", "n": 1025}, True),
        ("/invocations", {"input": "a", "prompt": MANY}, True),
        ("/invocations", {"messages": [{"role": "user"}], "n": 1025}, True),
    ],
)
def test_what_is_generated_has_a_bound_of_its_own(
    path: str, body: dict[str, Any], is_refused: bool
) -> None:
    """Generated answers have a lower limit than pooled ones: they are written in one piece."""
    if is_refused:
        with pytest.raises(CallTooLarge, match=r"limits\.answers_per_call"):
            requests_of(path, **body)
    else:
        assert 1025 <= requests_of(path, **body)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(',[]{}":\\ é', max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab", max_size=2), inner),
    max_leaves=12,
)


@given(st.lists(st.tuples(st.sampled_from("abc"), values), max_size=5), st.integers(1, 40))
def test_members_are_what_parsing_finds(items: list[tuple[str, Any]], piece_bytes: int) -> None:
    """Each member has its raw text and size; of equal keys the last counts, however it is split."""
    raw = (
        "{" + " , ".join(f'"{key}" : {json.dumps(value)}' for key, value in items) + "}"
    ).encode()

    members = at_once(scan(raw, (), piece_bytes, members=("a", "b"))).members

    read = {key: value for key, value in json.loads(raw).items() if key in "ab"}
    assert read == {key: json.loads(bytes(member.text)) for key, member in members.items()}
    sizes = {key: len(v) if isinstance(v, list | dict) else 0 for key, v in read.items()}
    assert sizes == {key: member.items for key, member in members.items()}


# --- grammars ---------------------------------------------------------------------------------


class Raw(str):
    """JSON text that is kept as written."""

    __slots__ = ()


def check_grammar(limits: LimitsConfig = LIMITS, are_strict: bool = False, **body: Any) -> None:
    """Check the grammar of a small or a large body."""
    written = (
        f"{json.dumps(key)}: {value if isinstance(value, Raw) else json.dumps(value)}"
        for key, value in body.items()
    )
    raw = ("{" + ",".join(written) + "}").encode()
    members = at_once(json_fields(raw, members=asked.keys_of(CHAT))).members
    asked.check_grammar(members, limits, are_strict)


def schema_of(properties: int) -> dict[str, Any]:
    named = {f"p{n}": {"type": "string", "title": "t"} for n in range(properties)}
    return {"type": "object", "properties": named}


def asked_for(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def strict(value: object) -> list[dict[str, Any]]:
    return [{"function": {"strict": value, "parameters": schema_of(2001)}}]


def named_strict(properties: int) -> dict[str, Any]:
    schema = schema_of(properties)
    schema["properties"]["strict"] = {"type": "boolean"}
    return schema


def text_with(part: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f".*x{part}.*"}


def texts_with(parts: int) -> list[dict[str, Any]]:
    return [text_with(part) for part in range(parts)]


def named_texts(parts: int) -> dict[str, Any]:
    """Return a schema of texts, each used through a reference."""
    named = {f"p{part}": text_with(part) for part in range(parts)}
    return {"$defs": named, "allOf": [{"$ref": f"#/$defs/{name}"} for name in named]}


def chain_of(parts: int) -> dict[str, Any]:
    """Return a schema in which each definition refers to the next."""
    named = {f"p{n}": {**text_with(n), "$ref": f"#/$defs/p{n + 1}"} for n in range(parts)}
    return {"$defs": named, "$ref": "#/$defs/p0"}


def nested_texts(parts: int) -> dict[str, Any]:
    schema = text_with(0)
    for part in range(1, parts):
        schema = {**text_with(part), "allOf": [schema]}
    return schema


def lark_of(rules: int, body: str) -> str:
    names = [f"a{n}" for n in range(rules)]
    return "\n".join([f"start: {' | '.join(names)}", *(f"{name}: {body}" for name in names)])


MIXED = {
    "definitions": {"id": {"type": "string", "pattern": "^[a-z]+$", "minLength": 1}},
    "allOf": [
        {"properties": {"id": {"$ref": "#/definitions/id"}, "at": {"format": "date-time"}}},
        {"properties": {"mail": {"format": "email"}, "parts": {"items": {"$ref": "#"}}}},
        {"properties": {"kind": {"anyOf": [{"pattern": "^a"}, {"pattern": "^b"}]}}},
    ],
}

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": schema_of(2001)}}]
LIGHT_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": schema_of(10)}}]


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": asked_for(schema_of(5000))},
        {"response_format": asked_for(schema_of(2000))},
        {"text": {"format": {"type": "json_schema", "schema": schema_of(2000)}}},
        {"structured_outputs": {"json": schema_of(2000)}},
        {"structured_outputs": {"json": json.dumps(schema_of(2000))}},
        {"structured_outputs": {"choice": ["yes"] * 2001}},
        {"structured_outputs": {"choice": ["x" * 70_000]}},
        {"structured_outputs": {"regex": "x" * 70_000}},
        {"structured_outputs": {"grammar": "x" * 70_000}},
        {"structured_outputs": {"json": {"type": "array", "maxItems": 1_000_000}}},
        {"structured_outputs": {"json": {"type": "array", "minItems": 1e300}}},
        {"structured_outputs": {"json": {"enum": [*range(2001)]}}},
        {"sampling_params": {"structured_outputs": {"json": schema_of(2000)}}},
        {"sampling_params": {"structured_outputs": {"choice": ["x" * 70_000]}}},
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": strict(True)},
        {"tools": strict("true")},
        {"tools": Raw(json.dumps(strict(True)).replace("strict", "s\\u0074rict"))},
        {"tools": Raw(json.dumps(strict(True)).replace('"strict":', '"strict"\n :\t\n'))},
        {"tools": [*strict(False), {"function": {"description": "x" * (4 << 20)}}]},
        {"tools": TOOLS, "strict_tools": True},
        {"structured_outputs": {"json": {"type": "string", "maxLength": 1_000_000}}},
        {"structured_outputs": {"json": {"type": "string", "minLength": 1_000_000}}},
        {"structured_outputs": {"json": {"type": "object", "maxProperties": 1_000_000}}},
        {"structured_outputs": {"json": {"type": "string", "pattern": "^[a-z]{1,10000}$"}}},
        {"structured_outputs": {"json": {"patternProperties": {"a{10000}": {}}}}},
        {"structured_outputs": {"regex": "(a{1,100}b){ 100 }"}},
        {"structured_outputs": {"regex": "a{9999999999999999999,}"}},
        {"structured_outputs": {"grammar": 'root ::= "a"{,100000}'}},
        {"structured_outputs": {"grammar": 'start: "a"~1..100000'}},
        {"structured_outputs": {"json": {"allOf": texts_with(20)}}},
        {"structured_outputs": {"json": {"allOf": texts_with(6)}}},
        {"structured_outputs": {"json": {**text_with(0), "allOf": texts_with(5)}}},
        {"structured_outputs": {"json": {"anyOf": [{"allOf": texts_with(6)}, {}]}}},
        {"structured_outputs": {"json": {"allOf": [{"allOf": texts_with(3)}] * 2}}},
        {
            "structured_outputs": {
                "json": {"allOf": [{"properties": {"a": text_with(n)}} for n in range(6)]}
            }
        },
        {"structured_outputs": {"json": {"allOf": [{"format": "date"} for _ in range(6)]}}},
        {"structured_outputs": {"json": {"properties": {"pattern": {"allOf": texts_with(6)}}}}},
        {"structured_outputs": {"json": named_texts(6)}},
        {"structured_outputs": {"json": chain_of(6)}},
        {"structured_outputs": {"json": nested_texts(6)}},
        {"response_format": asked_for({"allOf": texts_with(6)})},
        {"structured_outputs": {"json": {"patternProperties": {f"^a{n}": {} for n in range(250)}}}},
        {"structured_outputs": {"grammar": lark_of(1500, "/abcd.*/ start?")}},
        {"structured_outputs": {"grammar": lark_of(400, "/abcd/ start?")}},
        {"structured_outputs": {"grammar": lark_of(400, '"abcd" [^x]* start?')}},
        {"structured_outputs": {"regex": "|".join(["abc.*"] * 400)}},
        {"structured_outputs": {"json": {"pattern": "|".join(["abc.*"] * 400)}}},
    ],
)
def test_grammar_that_takes_too_long_to_compile_is_refused(body: dict[str, Any]) -> None:
    """A grammar that takes too long is refused, whatever its kind, and however it is written."""
    with pytest.raises(GrammarTooLarge, match=r"limits\.grammar_") as caught:
        check_grammar(**body)
    assert (caught.value.param or "").startswith(next(iter(body)))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"response_format": {"type": "json_object"}},
        {"response_format": asked_for(schema_of(900))},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"structured_outputs": {"json": "no JSON {"}},
        {"structured_outputs": {"json": {"type": "array", "minItems": 1, "maxItems": 1000}}},
        {"tools": LIGHT_TOOLS, "tool_choice": "required"},
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "auto"},
        {"tools": "none", "tool_choice": "required"},
        {"tools": strict(False), "tool_choice": "auto"},
        {"tools": strict(None)},
        {"tools": [{"function": {"parameters": named_strict(2001)}}]},
        {"tools": Raw(json.dumps([*TOOLS, {"description": "r\u00e9sum\u00e9 \u4e2d"}]))},
        {"tools": TOOLS, "strict_tools": False},
        {"tools": TOOLS, "strict_tools": None},
        {"structured_outputs": {"regex": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}},
        {"response_format": asked_for({"type": "string", "maxLength": 10_000, "minLength": 1})},
        {"text": "x" * 100},
        {"structured_outputs": {"json": {"allOf": texts_with(3)}}},
        {"structured_outputs": {"json": {"anyOf": texts_with(300)}}},
        {
            "structured_outputs": {
                "json": {"properties": {f"p{n}": text_with(n) for n in range(600)}}
            }
        },
        {"structured_outputs": {"json": named_texts(3)}},
        {"response_format": asked_for(MIXED)},
        {"structured_outputs": {"json": {"patternProperties": {f"^a{n}": {} for n in range(20)}}}},
        {"structured_outputs": {"grammar": lark_of(100, "/[a-z]+/ start?")}},
        {"structured_outputs": {"grammar": lark_of(1000, '"abcd" // a comment')}},
    ],
)
def test_usual_grammars_pass(body: dict[str, Any]) -> None:
    """Usual grammars pass, and so do tools that the model may skip, which make no grammar."""
    check_grammar(**body)


def test_tools_are_strict_where_the_model_says_so() -> None:
    """Tools are strict where vLLM's --tool-strict-level parameter says so."""
    check_grammar(tools=TOOLS)
    check_grammar(tools=TOOLS, tool_choice="none", are_strict=True)
    check_grammar(tools=LIGHT_TOOLS, are_strict=True)
    with pytest.raises(GrammarTooLarge):
        check_grammar(tools=TOOLS, are_strict=True)


def test_parts_of_a_grammar_count_together() -> None:
    """The parts of a grammar count as a whole."""
    half = {"choice": ["x"] * 600}
    limits = LimitsConfig(grammar_values=1000)
    check_grammar(limits, structured_outputs=half)
    with pytest.raises(GrammarTooLarge):
        check_grammar(limits, structured_outputs=half, response_format=half)


# --- at the server ----------------------------------------------------------------------------


async def test_what_is_too_much_for_one_call_gets_413(make_server: MakeServer) -> None:
    """Too large a request gets 413 with the setting, before the application gets it."""
    server = await make_server()

    many = await server.ask("llama", path="/v1/completions", prompt=["a"] * 3000)
    heavy = await server.ask("llama", response_format=asked_for(schema_of(2000)))

    assert (413, "call_too_large") == (many.status_code, many.json()["error"]["code"])
    assert (413, "grammar_too_large") == (heavy.status_code, heavy.json()["error"]["code"])
    assert "response_format" == heavy.json()["error"]["param"]


@pytest.mark.parametrize(
    "written",
    [b'"n": 16384' + b" " * 17_000, b'"n": "' + b"0" * 17_000 + b'16384"'],
    ids=["spaces", "zeros"],
)
async def test_number_that_is_written_at_length_counts(server: Server, written: bytes) -> None:
    """A long spelling of a number counts as vLLM reads it."""
    body = b'{"model": "llama", "prompt": "x", ' + written + b"}"
    answer = await server.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )

    assert (413, "call_too_large") == (answer.status_code, answer.json()["error"]["code"])


@pytest.mark.parametrize("mode", ["manual", "auto"])
async def test_every_request_of_a_call_is_in_flight(make_server: MakeServer, mode: str) -> None:
    """A request for seven answers leaves room for three of ten, until it has ended."""
    server = await make_server(mode=mode, limits=LimitsConfig(in_flight=10))
    body = json.dumps({"model": "llama", "n": 7, "stream": True, "max_tokens": 3}).encode()
    call = server.request("POST", CHAT, body)
    await call.next_event()

    refused = await server.ask("llama", n=4)
    assert (429, "queue_full") == (refused.status_code, refused.json()["error"]["code"])
    assert 200 == (await server.ask("llama", n=3)).status_code

    await call.finish()
    assert 200 == (await server.ask("llama", n=10)).status_code
    assert [0, 0, 0] == [model.in_flight for model in server.coordinator.registry]
