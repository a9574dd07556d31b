"""Checks whether a request can be sent to an engine at all, before it waits for anything.

vLLM's frontend checks what a request means. It finds some errors only when it encodes the request
for the engine: half of a surrogate pair in a text (as JSON allows), or a number that is too large.
It treats these as a failure of the engine.

Relies on: `VLLMValidationError`, which `AsyncLLM.generate` passes on and vLLM's routes answer with
400; the names of the fields of `EngineCoreRequest`, of which a version may know only some.
Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from typing import Any

from vllm_hotswap.text import as_escape, message_of

TEXTS = (
    *("request_id", "external_req_id", "session_id", "cache_salt", "sampling_params"),
    *("pooling_params", "lora_request", "trace_headers", "reasoning_parser_kwargs", "kv_hints"),
)
"""Fields of an `EngineCoreRequest`: all but tokens, embeddings and plain numbers."""


def check_sendable(request: Any) -> None:
    """Encode an `EngineCoreRequest`, except its tokens, as a trial.

    Raises:
        VLLMValidationError: it cannot be encoded; the message says what is wrong.
    """
    import msgspec

    try:
        msgspec.msgpack.encode(_without_tokens(request), enc_hook=_left_out)
    except (UnicodeEncodeError, OverflowError) as error:
        raise _refusal(error) from error


def refusal_of(error: BaseException) -> Any:
    """Return a `VLLMValidationError` if a tokenizer or an encoder met half of a surrogate pair."""
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return _refusal(error)
    if isinstance(error, TypeError) and "TextEncodeInput" in str(error):  # of `tokenizers`
        from vllm.exceptions import VLLMValidationError

        return VLLMValidationError(
            "the tokenizer cannot read a text of the request, perhaps because of half of a "
            "surrogate pair in it; send complete characters"
        )
    return None


def _without_tokens(request: Any) -> list[Any]:
    """Return what may hold texts of a client; tokens and features are many, and come from vLLM."""
    return [getattr(request, name, None) for name in TEXTS]


def _left_out(_: object) -> None:
    """Leave out what msgspec cannot encode: vLLM's own encoder can."""


def _refusal(error: UnicodeEncodeError | OverflowError) -> Any:
    from vllm.exceptions import VLLMValidationError

    if isinstance(error, UnicodeEncodeError):
        return VLLMValidationError(message_of(as_escape(error.object[error.start])))
    return VLLMValidationError(
        "a number of the request does not fit into 64 bits; send a smaller one"
    )
