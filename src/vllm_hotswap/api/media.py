"""The media types in which the body of a request may be sent.

vLLM reads a body as JSON only if the request says that it is JSON. So `model` counts only then. A
request that does not say so is refused with that reason, not taken for one that names no model.
"""

from __future__ import annotations

from starlette.datastructures import Headers

from vllm_hotswap.errors import UnsupportedMediaType

JSON = "application/json"
MULTIPART = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"

FORMS = frozenset([MULTIPART, URLENCODED])

FORM_PIECE_BYTES = 16 << 10
"""Bytes of a form that are parsed at once: some milliseconds, whatever is in them."""

FORM_PATHS = frozenset(["/v1/audio/transcriptions", "/v1/audio/translations"])
"""Routes of vLLM that take forms. All others take JSON."""


def media_type(headers: Headers) -> str:
    """Return the type that `Content-Type` names, without parameters; empty if there is none."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def check_model_body(headers: Headers, path: str) -> None:
    """Check that a body has the type that a route of vLLM takes. Raises `UnsupportedMediaType`.

    `path` is that of the route, as `models.request_of` has it.
    """
    _check_encoding(headers)
    sent = media_type(headers)
    if path in FORM_PATHS:
        if sent not in FORMS:
            raise UnsupportedMediaType(sent, f"POST {path} takes a form", MULTIPART)
    elif sent != JSON:
        raise UnsupportedMediaType(sent, f"POST {path} takes JSON", JSON)


def check_own_body(headers: Headers) -> None:
    """Check that a body has the type that our own routes take. Raises `UnsupportedMediaType`.

    They take JSON. A body without a `Content-Type`, or with the one that `curl -d` sends by itself,
    is read as JSON, too.
    """
    _check_encoding(headers)
    sent = media_type(headers)
    if sent not in ("", JSON, URLENCODED):
        raise UnsupportedMediaType(sent, "this route takes JSON", JSON)


def _check_encoding(headers: Headers) -> None:
    encoding = headers.get("content-encoding", "identity").strip()
    if encoding.lower() not in ("", "identity"):
        raise UnsupportedMediaType(encoding, "bodies are not decompressed")
