"""Models that could not be brought up are left alone for a while, longer after each failure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_hotswap.errors import EngineUnavailable, SwitchFailed
from vllm_hotswap.models import Model

MAX_DOUBLINGS = 30

MAX_BACKOFF_S = 60.0
"""Longest time for which requests for a model that cannot be brought up are refused."""


@dataclass(frozen=True, slots=True)
class Failures:
    """How often in a row a model could not be brought up, and until when it is left alone."""

    count: int = 0
    until_s: float = -math.inf


class BackOff:
    """The models that could not be brought up. Times are in seconds, on the server's clock."""

    def __init__(self) -> None:
        self._failures: dict[str, Failures] = {}

    def __repr__(self) -> str:
        return f"<BackOff {self._failures}>"

    def until_s(self, model: Model) -> float:
        """Return until when the model is not tried again."""
        return self._failures.get(model.alias, Failures()).until_s

    def failed(self, model: Model, now_s: float) -> float:
        """Count a failure: 2, 4, 8 ... 60 s of rest. Return until when it is left alone."""
        count = min(self._failures.get(model.alias, Failures()).count + 1, MAX_DOUBLINGS)
        failures = Failures(count, now_s + min(MAX_BACKOFF_S, 2.0**count))
        self._failures[model.alias] = failures
        return failures.until_s

    def succeeded(self, model: Model) -> None:
        self._failures.pop(model.alias, None)

    def refuse(self, model: Model, now_s: float, active: str | None) -> None:
        """Check that the model may be tried now. Raises `SwitchFailed`, which says when."""
        failures = self._failures.get(model.alias, Failures())
        if now_s < failures.until_s:
            raise SwitchFailed(
                model.alias,
                "bring_up",
                EngineUnavailable(f"it has failed {failures.count} times in a row"),
                active,
                retry_after_s=math.ceil(failures.until_s - now_s),
            )
