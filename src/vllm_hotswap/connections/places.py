"""Places for connections, and which connection gives way when there are no more.

A connection waits while it has no request under way: nothing has arrived yet, a head is not whole,
the last response is complete, or a refusal is held back. When places run out, the connection that
has waited longest is closed. If none waits, a few places are left that only some requests may use.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

from vllm_hotswap.system import network_of

KEPT = 64
"""Places kept for health checks and admins; an eighth of all places if there are few."""

KEPT_SHARE = 4
"""One address may have a quarter of the kept places."""


class Holder(Protocol):
    """An object that has a place."""

    def yield_place(self) -> None:
        """Close the connection. At most a refusal is under way on it."""


@dataclass(eq=False, slots=True)
class _Group:
    """The places of one client's address."""

    key: Hashable
    count: int = 0
    waiting: dict[Place, None] = field(default_factory=dict)


class Place:
    """One connection's place in a pool. It counts as waiting until `set_busy` is called."""

    __slots__ = ("_group", "_pool", "holder", "is_kept")

    def __init__(self, holder: Holder, pool: _Pool, group: _Group, is_kept: bool) -> None:
        self.holder = holder
        self.is_kept = is_kept
        self._pool: _Pool | None = pool
        self._group = group

    def set_waiting(self) -> None:
        """Note that no request is under way from now on."""
        if self._pool is not None:
            self._pool.waiting[self] = None
            self._group.waiting[self] = None

    def set_busy(self) -> None:
        """Note that a request is under way from now on."""
        if self._pool is not None:
            self._pool.waiting.pop(self, None)
            self._group.waiting.pop(self, None)

    def leave(self) -> None:
        """Free the place. Idempotent."""
        if self._pool is not None:
            self.set_busy()
            self._pool.free(self._group)
            self._pool = None


class _Pool:
    """At most `most` places, of which one address may have `share`."""

    def __init__(self, most: int, share: int, is_kept: bool) -> None:
        self.most, self.share, self._is_kept = most, share, is_kept
        self.count = 0
        self.waiting: dict[Place, None] = {}
        """In the order in which they began to wait, as in each group."""
        self.groups: dict[Hashable, _Group] = {}

    def take(self, holder: Holder, key: Hashable) -> Place | None:
        """Return a place; None if there is none. `key` is the address; None: without a bound."""
        group = self.groups.get(key) or _Group(key)
        if key is not None and group.count >= self.share:
            if not _make_room(group.waiting):
                return None
        elif self.count >= self.most and not _make_room(self.waiting):
            return None
        self.groups[key] = group
        self.count += 1
        group.count += 1
        place = Place(holder, self, group, self._is_kept)
        place.set_waiting()
        return place

    def free(self, group: _Group) -> None:
        self.count -= 1
        group.count -= 1
        if not group.count:
            del self.groups[group.key]


def _make_room(waiting: dict[Place, None]) -> bool:
    """Make the place that has waited longest give way; return False if none waits."""
    longest = next(iter(waiting), None)
    if longest is None:
        return False
    longest.leave()
    longest.holder.yield_place()
    return True


class Places:
    """All places of a server: those for all requests, and some that are kept.

    Args:
        most: places of all connections together, the kept ones included.
        per_address: places of one client's address; None: half of those for all requests.
        is_proxy: whether an address stands for many clients, and has no bound of its own.
    """

    def __init__(
        self,
        most: int,
        per_address: int | None = None,
        is_proxy: Callable[[str], bool] = lambda _: False,
    ) -> None:
        kept = min(KEPT, most // 8)
        for_all = max(1, most - kept)
        share = max(1, for_all // 2) if per_address is None else per_address
        self._all = _Pool(for_all, share, is_kept=False)
        self._kept = _Pool(kept, max(1, kept // KEPT_SHARE), is_kept=True)
        self._is_proxy = is_proxy

    def __repr__(self) -> str:
        return (
            f"<Places {self._all.count} of {self._all.most}, waiting={len(self._all.waiting)}, "
            f"kept {self._kept.count} of {self._kept.most}>"
        )

    def take(self, holder: Holder, address: str | None) -> Place | None:
        """Return a place for a connection, which waits for now; None if there is none.

        Args:
            address: the client's IP address; None for a Unix domain socket.
        """
        key = self.client_of(address)
        return self._all.take(holder, key) or self._kept.take(holder, key)

    def client_of(self, address: str | None) -> Hashable:
        """Return what counts as one client; None where clients cannot be told apart."""
        return None if address is None or self._is_proxy(address) else network_of(address)
