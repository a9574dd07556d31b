"""Plain grammars are few, small, and made of parts whose cost is known."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_hotswap.host.plain_grammars import MOST_BYTES, MOST_VALUES, is_plain

PERSON = {
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "of the person"},
        "age": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
    },
    "required": ["name"],
    "additionalProperties": False,
}


def is_plain_of(**asked: Any) -> bool:
    none = dict.fromkeys(("choice", "json", "json_object", "regex", "grammar", "structural_tag"))
    return is_plain(SimpleNamespace(**none | asked))


@pytest.mark.parametrize(
    "asked",
    [
        {"json": PERSON},
        {"json": json.dumps(PERSON)},
        {"json": True},
        {"json_object": True},
        {"choice": ["yes", "no"]},
    ],
)
def test_the_usual_small_ones_are_plain(asked: dict[str, Any]) -> None:
    """The usual small schemas are plain, also when given as a text."""
    assert is_plain_of(**asked)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "a"},
        {"type": "string", "format": "date"},
        {"type": "string", "maxLength": 5},
        {"type": "array", "items": {"type": "string", "pattern": "a"}},
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        {"type": "object", "additionalProperties": {"allOf": []}},
        {"anyOf": [{"oneOf": []}]},
        {"new in a later draft": 1},
        {"properties": [1]},
        {"anyOf": {"a": {}}},
        {"items": [{}]},
        [],
        "{",
        "[" * 5000,
    ],
)
def test_whatever_else_a_schema_may_have_is_not(schema: Any) -> None:
    """A schema with any other feature is not plain, at any depth; nor is an invalid schema."""
    assert not is_plain_of(json=schema)


@pytest.mark.parametrize("asked", [{"regex": "a"}, {"grammar": "root"}, {"structural_tag": "{}"}])
def test_expressions_and_grammars_are_not_plain(asked: dict[str, Any]) -> None:
    """Regular expressions and grammars are not plain, because their cost is unknown."""
    assert not is_plain_of(**asked)


def test_large_ones_are_not_plain() -> None:
    """Large schemas are not plain, in values or in bytes, wherever they are."""
    names = [f"name {number}" for number in range(MOST_VALUES)]
    assert is_plain_of(choice=names)
    assert not is_plain_of(choice=[*names, "one more"])
    assert not is_plain_of(choice=["a" * MOST_BYTES])
    assert is_plain_of(json={"enum": names[1:]})
    assert not is_plain_of(json={"enum": names})
    assert not is_plain_of(json={"const": {"a": [{"b": names}]}})
    assert not is_plain_of(json={"properties": dict.fromkeys(names, True)})
    assert not is_plain_of(json={"title": "a" * MOST_BYTES})
