"""Models that are held for jobs: leases are granted, renewed, revoked, and expire.

`Switcher` enforces what a lease means for switches. A lease counts from when it is asked for,
so that no other switch can start in the moment in which its model becomes active.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable
from typing import Protocol

from vllm_hotswap.errors import InvalidRequest
from vllm_hotswap.events import JobLeaseChange, JobLeaseChanged, Observer
from vllm_hotswap.switching.job_leases import JobLease, JobLeases

LEAST_DELAY_S = 0.001
"""The shortest delay of the timer: timers may fire a little early."""


class Holding(Protocol):
    """The part of the coordinator that is known here."""

    @property
    def epoch(self) -> int: ...

    async def switch(self, alias: str, *, key: str) -> object:
        """Make a model active, for the caller with this key. Raises `HotswapError`."""

    def leases_changed(self) -> None:
        """React to a change of the model that is held, or of the time until which it is."""


class Jobs:
    """Job leases under the clock.

    Its mutable state is `_leases`, and `_timer`, for when the next one expires.
    """

    def __init__(
        self, server: Holding, observer: Observer, longest_s: float, clock: Callable[[], float]
    ) -> None:
        self._server = server
        self._observer = observer
        self._longest_s = longest_s
        self._clock = clock
        self._leases = JobLeases()
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Jobs {self._leases!r}>"

    @property
    def model(self) -> str | None:
        """The model that is held."""
        return self._leases.model

    @property
    def until_s(self) -> float | None:
        return self._leases.until_s

    @property
    def leases(self) -> list[JobLease]:
        return list(self._leases)

    @property
    def now_s(self) -> float:
        """The time on the clock of its leases."""
        return self._clock()

    def refuse_other(self, model: str) -> None:
        """Check that no other model is held. Raises `ModelLeased`."""
        self._leases.refuse_other(model, self._clock())

    async def hold(
        self, model: str, owner: str, ttl_s: float, note: str = "", key: str = ""
    ) -> JobLease:
        """Hold a model, and switch to it first if it is not active.

        Raises:
            InvalidRequest: `ttl_s` is longer than a lease may be.
            ModelLeased: another model is held.
            HotswapError: whatever a switch may raise; then the model is not held.
            UnknownLease: it was revoked before its model was active.
        """
        self._check(ttl_s)
        lease_id = f"lease-{uuid.uuid4().hex[:12]}"
        lease = JobLease(lease_id, model, owner, ttl_s, note, int(time.time()), key=key)
        # Before the switch: from now on it keeps other switches away.
        self._leases.add(lease, self._clock())
        try:
            await self._server.switch(model, key=key)
        except BaseException:
            self._leases.discard(lease_id)
            self._server.leases_changed()
            raise
        # It may have been revoked during the switch.
        return self._changed(self._leases.begin(lease_id, self._clock()), "granted", key)

    def renew(self, lease_id: str, ttl_s: float, key: str = "") -> JobLease:
        """Set a lease to end `ttl_s` from now. Raises `InvalidRequest`, `UnknownLease`."""
        self._check(ttl_s)
        lease = self._leases.renew(lease_id, ttl_s, self._clock())
        return self._changed(lease, "renewed", key)

    def revoke(self, lease_id: str, key: str = "") -> JobLease:
        """End a lease. Raises `UnknownLease`."""
        return self._changed(self._leases.remove(lease_id), "revoked", key)

    def close(self) -> None:
        """Cancel the timer: nothing expires from now on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self, ttl_s: float) -> None:
        if ttl_s > self._longest_s:
            raise InvalidRequest(
                f"ttl: a lease may last {self._longest_s:g} s at most (switching.max_lease); ask "
                "for less, and renew it",
                "ttl",
            )

    def _expire(self) -> None:
        for lease in self._leases.expire(self._clock()):
            self._notify(lease, "expired")
        self._set_timer()
        self._server.leases_changed()

    def _changed(self, lease: JobLease, change: JobLeaseChange, key: str) -> JobLease:
        self._notify(lease, change, key)
        self._set_timer()
        self._server.leases_changed()
        return lease

    def _notify(self, lease: JobLease, change: JobLeaseChange, key: str = "") -> None:
        left_s, epoch = lease.expires_in_s(self._clock()), self._server.epoch
        self._observer.notify(
            JobLeaseChanged(epoch, lease.id, lease.model, lease.owner, change, left_s, key)
        )

    def _set_timer(self) -> None:
        self.close()
        end_s = self._leases.next_end_s
        if end_s < math.inf:
            delay_s = max(LEAST_DELAY_S, end_s - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._expire)
