"""Rate limits of each key, per minute: requests, tokens, and switches.

Token buckets of our own: the usual package, `limits`, uses the wall clock and storages that are
shared between processes. Neither is wanted here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from vllm_hotswap.access import Account, PerMinute
from vllm_hotswap.config import LimitsConfig
from vllm_hotswap.errors import RateLimited
from vllm_hotswap.tasks import Rate

Kind = Literal["requests", "tokens", "switches"]

ELSEWHERE = PerMinute(requests=30_000, tokens=6_000_000, switches=60)
"""For each key, where no limits are configured and other machines can connect."""


class Rates:
    """The buckets of all keys. Callers without a key share theirs; admins have none.

    Valid keys are few, so no bucket is ever dropped.
    """

    def __init__(
        self, limits: LimitsConfig, clock: Callable[[], float], is_local: Callable[[], bool]
    ) -> None:
        """`is_local` says whether only programs on this machine can connect."""
        self._general = PerMinute(
            limits.requests_per_minute, limits.tokens_per_minute, limits.switches_per_minute
        )
        self._clock = clock
        self._is_local = is_local
        self._buckets: dict[tuple[Kind, str, int], Rate] = {}

    def take(self, account: Account) -> None:
        """Count a request, whatever the engine makes of it. Raises `RateLimited`."""
        bucket = self._bucket("tokens", account)  # checked only: `spend` counts them at the end
        if bucket is not None and (wait_s := bucket.wait_s()):
            raise self._refused("tokens", account, wait_s)
        self._take("requests", account)

    def give_back(self, account: Account) -> None:
        """Stop counting a request that the server did not admit."""
        if (bucket := self._bucket("requests", account)) is not None:
            bucket.give_back()

    def switch(self, account: Account) -> None:
        """Count an action that may move a model. Raises `RateLimited`."""
        self._take("switches", account)

    def spend(self, account: Account, tokens: int) -> None:
        """Count a request's tokens; `take` refuses new ones until an overdraft is made up for."""
        if tokens and (bucket := self._bucket("tokens", account)) is not None:
            bucket.spend(tokens)

    def _take(self, kind: Kind, account: Account) -> None:
        bucket = self._bucket(kind, account)
        if bucket is not None and (wait_s := bucket.take()):
            raise self._refused(kind, account, wait_s)

    def _refused(self, kind: Kind, account: Account, wait_s: int) -> RateLimited:
        return RateLimited(kind, self._bound(kind, account), wait_s, bool(account.key))

    def _bucket(self, kind: Kind, account: Account) -> Rate | None:
        if account.is_admin or not (bound := self._bound(kind, account)):
            return None
        place = (kind, account.key, bound)
        if place not in self._buckets:
            self._buckets[place] = Rate(bound / 60, bound, self._clock)
        return self._buckets[place]

    def _bound(self, kind: Kind, account: Account) -> int:
        """Return the limit that applies; 0 for none."""
        for said in (account.per_minute, self._general):
            if (bound := getattr(said, kind)) is not None:
                return int(bound)
        if self._is_local() or not account.key:
            return 0
        return int(getattr(ELSEWHERE, kind))
