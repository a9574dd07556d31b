"""A token bucket: how many of something a minute allows."""

from __future__ import annotations

import math
from collections.abc import Callable


class Rate:
    """A token bucket: `burst` at once, `per_second` in the long run."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._filled_s = clock()

    def __repr__(self) -> str:
        return f"<Rate tokens={self._tokens:.1f} of {self._burst}>"

    def take(self) -> int | None:
        """Take a token. If there is none, return the whole seconds until there is one."""
        if wait_s := self.wait_s():
            return wait_s
        self._tokens -= 1
        return None

    def wait_s(self) -> int | None:
        """Return the whole seconds until there is a token; None: there is one."""
        now_s = self._clock()
        filled = self._tokens + (now_s - self._filled_s) * self._per_second
        self._tokens, self._filled_s = min(filled, self._burst), now_s
        missing = 1 - self._tokens
        return max(1, math.ceil(missing / self._per_second)) if missing > 0 else None

    def spend(self, count: int) -> None:
        """Take tokens for what has been done already; this may leave a debt."""
        self._tokens -= count

    def give_back(self) -> None:
        """Put back a token that was taken for nothing."""
        self._tokens = min(self._tokens + 1, self._burst)
