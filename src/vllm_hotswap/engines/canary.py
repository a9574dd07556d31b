"""Verification of a model: compare what it generates with what it generated first.

A model that was loaded or woken generates one greedy token, or pools a few tokens, from the same
ids every time. This reveals wrong weights, KV memory that is not zero, or a lost scale, which a
status code does not show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

LOGPROB_TOLERANCE = 0.5
"""Nats. Large logits in bfloat16 are 0.125 or 0.25 apart, so a kernel that rounds differently may
be off by as much."""

POOLED_TOLERANCE = 0.05
"""Tolerance as a share of the vector's largest value."""


@dataclass(frozen=True, slots=True)
class Canary:
    """One greedy token with the log-probabilities of the likeliest ones, or a pooled vector."""

    token: int | None = None
    logprobs: Mapping[int, float] = field(default_factory=dict)
    pooled: tuple[float, ...] = ()

    def flaw(self) -> str | None:
        """Return why a healthy model would not generate this, or None."""
        numbers = [*self.logprobs.values(), *self.pooled]
        if not all(map(math.isfinite, numbers)):
            return "its numbers are not finite"
        if self.pooled and not any(self.pooled):
            return "its vector is zero"
        return None

    def difference(self, first: Canary) -> str | None:
        """Return how it differs from what the model generated first, or None."""
        if len(self.pooled) != len(first.pooled):
            return f"it pools {len(self.pooled)} values, not {len(first.pooled)}"
        if self.pooled:
            return self._pooled_difference(first)
        if self.token != first.token and not first.is_nearly_tied(self.token):
            return f"it generates token {self.token}, not {first.token}"
        now, then = max(self.logprobs.values(), default=0), max(first.logprobs.values(), default=0)
        if abs(now - then) > LOGPROB_TOLERANCE:
            return f"the log-probability of its token is {now:.3f}, not {then:.3f}"
        return None

    def is_nearly_tied(self, token: int | None) -> bool:
        """Whether rounding may have made the model choose `token`."""
        if token is None or token not in self.logprobs:
            return False
        return max(self.logprobs.values()) - self.logprobs[token] <= LOGPROB_TOLERANCE

    def _pooled_difference(self, first: Canary) -> str | None:
        scale = max(map(abs, first.pooled))
        off = max(abs(a - b) for a, b in zip(self.pooled, first.pooled, strict=True))
        if off > POOLED_TOLERANCE * scale:
            return f"its vector is off by {off / scale:.0%}"
        return None
