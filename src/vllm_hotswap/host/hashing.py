"""Computes the hashes of an engine's prefix cache on any thread.

vLLM hashes the first block of a request together with a root, which it reads from a global of
`vllm.v1.core.kv_cache_utils` (`NONE_HASH`). With several engines in a process, that global is the
root of the engine that is worked with, while input threads hash requests for any engine.

Relies on: `EngineCore.request_block_hasher` being a plain function of that module, which reads the
root through functions of the same module. Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any


def with_own_globals(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with the globals of its module as they are now, whatever they become.

    The same holds for the functions of that module that it calls. What is not a plain function
    stays as it is.
    """
    if not isinstance(function, FunctionType):
        return function
    theirs = function.__globals__
    own = dict(theirs)
    for name, value in theirs.items():
        if isinstance(value, FunctionType) and value.__globals__ is theirs:
            own[name] = _rebound(value, own)
    return _rebound(function, own)


def _rebound(function: FunctionType, own: dict[str, Any]) -> FunctionType:
    copy = FunctionType(
        function.__code__, own, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
