"""Plain words for the mistakes that pydantic finds in values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "missing": "is missing",
        "extra_forbidden": "is unknown",
        "string_type": "must be a string",
        "bool_type": "must be true or false",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "model_type": "must be a JSON object",
        "model_attributes_type": "must be a JSON object",
        "dict_type": "must be a JSON object",
        "list_type": "must be a list",
    }
)
_WITH: Mapping[str, Callable[[Mapping[str, Any]], str]] = MappingProxyType(
    {
        "json_invalid": lambda about: f"is not valid JSON: {about['error']}",
        "literal_error": lambda about: f"must be {about['expected']}",
        "enum": lambda about: f"must be {about['expected']}",
        "greater_than": lambda about: f"must be above {about['gt']:g}",
        "greater_than_equal": lambda about: f"must be at least {about['ge']:g}",
        "less_than": lambda about: f"must be below {about['lt']:g}",
        "less_than_equal": lambda about: f"must be at most {about['le']:g}",
        "string_too_long": lambda about: f"must have at most {about['max_length']} characters",
        "value_error": lambda about: str(about["error"]),
    }
)
"""Words by pydantic's names of errors, for those that use the context that it gives.
https://docs.pydantic.dev/latest/errors/validation_errors/"""


def first_mistake(error: ValidationError) -> tuple[str | None, str]:
    """Return the field with the first mistake (None: the body itself), and a sentence about it."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"])) or None
    return field, f"{field or 'the body'} {_words(first)}"


def _words(detail: Any) -> str:
    kind, about = detail["type"], detail.get("ctx", {})
    if kind == "string_too_short":
        return "is empty" if not detail["input"] else "is too short"
    if kind in _WITH:
        return _WITH[kind](about)
    return _WORDS.get(kind) or f"cannot be used: {detail['msg']}"
