"""The JSON schema of the YAML file, for editors, made from the settings and from vLLM's parser."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from vllm_hotswap.config import NOT_SHARED, SECTIONS, TOP_LEVEL, GroupConfig, ModelKeys

DIALECT = "http://json-schema.org/draft-07/schema#"
"""The draft that the YAML language server supports best."""

EDITOR_LINE = "# yaml-language-server: $schema={}"
"""The first line of a YAML file, by which editors find its schema."""

REFERENCE = {
    "type": "string",
    "pattern": r"\$\{\w+(:-[^}]*)?\}",
    "description": "a reference to an environment variable",
}
"""`${NAME}`, which may stand for a value of any type."""

_TO_REFERENCE = {"$ref": "#/$defs/reference"}


def json_schema(flags: Mapping[str, argparse.Action] | None = None) -> dict[str, Any]:
    """Return the schema of the whole file.

    Args:
        flags: vLLM's flags by their key in the file; without them, any other key of a model is
            accepted.
    """
    described = {name: _flag_schema(action) for name, action in sorted((flags or {}).items())}
    definitions: dict[str, Any] = {"reference": REFERENCE, "flags": described}
    vllm = {name: {"$ref": f"#/$defs/flags/{name}"} for name in described}
    model = _properties(ModelKeys, definitions)
    shared = {key: value for key, value in model.items() if key not in NOT_SHARED}
    is_open = flags is None
    definitions |= {
        "model": _object({**vllm, **model}, is_open) | {"required": ["model"]},
        "defaults": _object({**vllm, **shared}, is_open),
        "group": _object(_properties(GroupConfig, definitions)),
        **{name: _object(_properties(kind, definitions)) for name, kind in SECTIONS.items()},
    }
    properties: dict[str, dict[str, Any]] = {
        "default_model": {"type": "string"},
        "defaults": {"$ref": "#/$defs/defaults"},
        "models": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {"$ref": "#/$defs/model"},
        },
        "rights": {
            "type": ["object", "null"],
            "additionalProperties": {"$ref": "#/$defs/group"},
        },
        **{name: {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]} for name in SECTIONS},
    }
    for name, schema in properties.items():
        schema["description"] = TOP_LEVEL[name]
    return {
        "$schema": DIALECT,
        "title": "vllm-hotswap models",
        "type": "object",
        "required": ["models"],
        "additionalProperties": False,
        "properties": properties,
        "$defs": definitions,
    }


def _object(properties: Mapping[str, Any], is_open: bool = False) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": is_open, "properties": dict(properties)}


def _properties(kind: type[Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the properties of one section; what they refer to is added to `definitions`."""
    schema = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
    definitions |= {name: _untitled(value) for name, value in schema.pop("$defs", {}).items()}
    return {name: _or_reference(value) for name, value in schema["properties"].items()}


def _or_reference(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema, extended by a reference to the environment unless it accepts one."""
    about = {key: schema[key] for key in ("description", "default") if key in schema}
    value = {key: item for key, item in schema.items() if key not in {*about, "title"}}
    if value.get("type") == "string" and "enum" not in value:
        return about | value
    return about | {"anyOf": [*value.get("anyOf", [value]), _TO_REFERENCE]}


def _untitled(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema without the titles that pydantic makes from names."""
    properties = {
        name: {key: item for key, item in value.items() if key != "title"}
        for name, value in schema["properties"].items()
    }
    return _object({name: _or_reference(value) for name, value in properties.items()})


_KINDS = {int: ["integer", "string"], float: ["number", "string"]}


def _flag_schema(action: argparse.Action) -> dict[str, Any]:
    """Describe the values of one flag, as far as known; most of vLLM's types are functions."""
    schema: dict[str, Any] = {}
    if action.help and action.help != argparse.SUPPRESS:
        schema["description"] = _first_sentence(action.help)
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        schema |= {"anyOf": [{"type": ["boolean", "null"]}, _TO_REFERENCE]}
    elif action.choices is not None:
        one = {"enum": list(dict.fromkeys([*action.choices, None]))}
        several = [{"type": "array", "items": one}] if action.nargs in ("+", "*") else []
        schema |= {"anyOf": [one, *several, _TO_REFERENCE]}
    elif isinstance(action.type, type) and action.type in _KINDS:
        schema["type"] = [*_KINDS[action.type], "null"]
    elif action.nargs in ("+", "*"):
        schema["type"] = ["array", "string", "integer", "null"]
    return schema


def _first_sentence(text: str) -> str:
    sentence, end, _ = " ".join(text.split()).partition(". ")
    return sentence + end.strip()
