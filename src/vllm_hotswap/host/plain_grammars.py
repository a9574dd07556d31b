"""Which grammars are plain: so small, and of such parts, that their cost is known in advance.

They are checked and compiled in place. Others are tried in a process that can be killed. This is a
list of what is known to be cheap, not of what is known to be costly: anything new is tried.
"""

from __future__ import annotations

import json
from typing import Any

MOST_BYTES = 8 << 10
MOST_VALUES = 32
"""Properties, members of lists and schemas. 20 optional properties take xgrammar 9 ms of processor
time with a small vocabulary, and 0.1 s with 150,000 tokens."""

_NOTES = frozenset(["$schema", "default", "description", "examples", "title"])
_PLAIN = _NOTES | frozenset(
    ["additionalProperties", "anyOf", "const", "enum", "items", "properties", "required", "type"]
)


def is_plain(outputs: Any) -> bool:
    """Whether `StructuredOutputsParams` are plain.

    That is JSON without a schema, a few choices, or a small schema of the usual parts.
    """
    if outputs.choice is not None:
        return _values(outputs.choice) <= MOST_VALUES and _is_short(outputs.choice)
    if outputs.json is not None:
        return _is_plain_schema(outputs.json)
    return bool(outputs.json_object)


def _is_plain_schema(schema: Any) -> bool:
    if not _is_short(schema):
        return False
    try:
        read = json.loads(schema) if isinstance(schema, str) else schema
        return _weight(read) <= MOST_VALUES
    except (ValueError, RecursionError):
        return False  # the trial of it says what is wrong with it


def _is_short(value: Any) -> bool:
    return len(value if isinstance(value, str) else json.dumps(value)) <= MOST_BYTES


def _weight(schema: Any) -> int:
    """Return how many values are in a schema. Raises `ValueError` if it has other parts."""
    if isinstance(schema, bool):
        return 1
    if not isinstance(schema, dict) or not schema.keys() <= _PLAIN:
        raise ValueError(schema)
    inner = [schema[key] for key in ("additionalProperties", "items") if key in schema]
    inner += _as(list, schema.get("anyOf", []))
    inner += _as(dict, schema.get("properties", {})).values()
    values = [schema.get(key) for key in ("const", "enum", "required", "type")]
    return 1 + sum(map(_weight, inner)) + sum(map(_values, values))


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(value)
    return value


def _values(value: Any) -> int:
    """Return how many values are in a list or mapping, however deep; 0 for anything else."""
    if isinstance(value, dict):
        value = [*value.values()]
    return len(value) + sum(map(_values, value)) if isinstance(value, list) else 0
