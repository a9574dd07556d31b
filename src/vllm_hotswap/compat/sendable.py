"""Whether a request can be sent to an engine at all, known before it waits for anything.

vLLM's frontend checks what a request means, and finds out only while it encodes the request for the
engine that a text has half of a surrogate pair in it (as JSON may), or that a number is too large.
It takes that for a failure of the engine.

Relies on: `VLLMValidationError`, which `AsyncLLM.generate` passes on and vLLM's routes answer with
400; `EngineCoreRequest.sampling_params`, which has everything of a client that is encoded as it is.
Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from typing import Any


def check_sendable(request: Any) -> None:
    """Encode what is not tokens in an `EngineCoreRequest`, for a trial.

    Raises:
        VLLMValidationError: it cannot be encoded; the message says what is wrong.
    """
    import msgspec

    try:
        msgspec.msgpack.encode(request.sampling_params, enc_hook=_left_out)
    except (UnicodeEncodeError, OverflowError) as error:
        raise _refusal(error) from error


def _left_out(_: object) -> None:
    """vLLM's encoder knows what msgspec does not."""


def _refusal(error: UnicodeEncodeError | OverflowError) -> Any:
    from vllm.exceptions import VLLMValidationError

    if isinstance(error, UnicodeEncodeError):
        lone = error.object[error.start : error.end].encode("unicode_escape").decode()
        return VLLMValidationError(
            f"a text of the request, in `stop` for one, has {lone}, which is half of a surrogate "
            "pair and no character; send whole characters"
        )
    return VLLMValidationError(
        "a number of the request does not fit into 64 bits; send a smaller one"
    )
