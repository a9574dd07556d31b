"""Grammars of requests that nobody waits for any more: what has not begun is not compiled.

Relies on: `Scheduler.requests`, `Request.structured_output_request`, whose `_grammar` is the future
of a compilation until the scheduler has looked at it. Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any


def give_up(scheduler: Any, request_ids: Iterable[str]) -> int:
    """Take compilations off their queue; how many. One that runs cannot be stopped."""
    found = (scheduler.requests.get(request_id) for request_id in request_ids)
    asked = (getattr(request, "structured_output_request", None) for request in found)
    grammars = [getattr(one, "_grammar", None) for one in asked]
    return sum(isinstance(grammar, Future) and grammar.cancel() for grammar in grammars)
