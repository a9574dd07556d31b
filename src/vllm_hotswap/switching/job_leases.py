"""Job leases: a model is held for a job for some time.

Pure: the caller says what time it is. All leases that live are for one model, which is active or
about to be. A lease that waits for its model to become active has no end yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vllm_hotswap.errors import ModelLeased, UnknownLease


@dataclass(frozen=True, slots=True)
class JobLease:
    """A hold on a model. Times are seconds of the caller's clock, except `created`."""

    id: str
    model: str
    owner: str
    ttl_s: float
    note: str = ""
    created: int = 0
    """When it was asked for, in seconds since 1970."""
    expires_s: float | None = None
    """None: its model is not active yet."""
    key: str = ""
    """The fingerprint of the key of the caller who took it."""

    @property
    def is_pending(self) -> bool:
        return self.expires_s is None

    @property
    def end_s(self) -> float:
        return math.inf if self.expires_s is None else self.expires_s

    def expires_in_s(self, now_s: float) -> float:
        """Return the seconds that are left; all of them while it is pending."""
        return self.ttl_s if self.expires_s is None else max(0.0, self.expires_s - now_s)


class JobLeases:
    """The leases that live, by their id. That is its mutable state."""

    def __init__(self) -> None:
        self._leases: dict[str, JobLease] = {}

    def __repr__(self) -> str:
        return f"<JobLeases {[(lease.id, lease.model) for lease in self]}>"

    def __iter__(self) -> Iterator[JobLease]:
        return iter(self._leases.values())

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def last(self) -> JobLease | None:
        """The lease that ends last."""
        return max(self, key=lambda lease: lease.end_s, default=None)

    @property
    def model(self) -> str | None:
        """The model that is held."""
        return self.last.model if self.last else None

    @property
    def until_s(self) -> float | None:
        """Until when the model is held, perhaps infinity; None: no model is held."""
        return self.last.end_s if self.last else None

    @property
    def next_end_s(self) -> float:
        """When the first lease ends; infinity if none does."""
        return min((lease.end_s for lease in self), default=math.inf)

    def refuse_other(self, model: str, now_s: float) -> None:
        """Check that no other model is held. Raises `ModelLeased`."""
        if (last := self.last) is not None and last.model != model:
            raise ModelLeased(model, last.model, last.owner, last.id, last.expires_in_s(now_s))

    def add(self, lease: JobLease, now_s: float) -> None:
        """Hold a model. Raises `ModelLeased` if another model is held."""
        self.refuse_other(lease.model, now_s)
        self._leases[lease.id] = lease

    def begin(self, lease_id: str, now_s: float) -> JobLease:
        """Start a lease's time, now that its model is active. Raises `UnknownLease`."""
        lease = self.find(lease_id)
        return self._put(replace(lease, expires_s=now_s + lease.ttl_s))

    def renew(self, lease_id: str, ttl_s: float, now_s: float) -> JobLease:
        """Set a lease to end `ttl_s` from now. Raises `UnknownLease`."""
        lease = self.find(lease_id)
        expires_s = None if lease.is_pending else now_s + ttl_s
        return self._put(replace(lease, ttl_s=ttl_s, expires_s=expires_s))

    def remove(self, lease_id: str) -> JobLease:
        """End a lease. Raises `UnknownLease`."""
        lease = self.find(lease_id)
        del self._leases[lease_id]
        return lease

    def discard(self, lease_id: str) -> None:
        """End a lease, if it lives."""
        self._leases.pop(lease_id, None)

    def expire(self, now_s: float) -> list[JobLease]:
        """End the leases whose time is over, and return them."""
        over = [lease for lease in self if lease.end_s <= now_s]
        for lease in over:
            del self._leases[lease.id]
        return over

    def find(self, lease_id: str) -> JobLease:
        try:
            return self._leases[lease_id]
        except KeyError:
            raise UnknownLease(lease_id) from None

    def _put(self, lease: JobLease) -> JobLease:
        self._leases[lease.id] = lease
        return lease
