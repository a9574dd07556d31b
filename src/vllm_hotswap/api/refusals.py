"""Limits on refusals: how many a client may get, and how long additional ones are held back.

A refusal costs the server about as much as any small request. It costs its client nothing: neither
a place in an engine nor tokens. So each client address, and each known key, has a token bucket of
refusals. Where it is empty, a refusal waits until the bucket has room, `MAX_PAUSE_S` at most. That
holds for the server's own refusals and for those of a model's application.

A request that is let in is never held back for this, and makes up for refusals of the same address:
many users may share one. Unknown keys have no bucket: unrelated clients may send the same one.

New connections of an address in debt wait, too; how long depends on what their first head asks for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from starlette.types import Scope

from vllm_hotswap.system import network_of

DOOR = "vllm_hotswap.door"
"""Key of a scope: a function that returns the `Holder`, or None if the connection is gone."""

KEY = "vllm_hotswap.key"
"""Key of a scope: a function that returns the mark of its key, or None without a known key."""

BURST_S = 3.0
"""Time after which an empty bucket is full again."""

MAX_PAUSE_S = 5.0
"""The longest time that a response is held back. A debt never exceeds twice that."""

SUSPECT_S = 1.0
"""New connections of an address, or with a key, wait while it owes more than so many seconds."""

DOUBT_S = 0.25
"""The longest wait of a connection of which it is unknown whether it will be refused."""


class Outlook(Enum):
    """The expected outcome of a connection's first head, where it has no known key."""

    REFUSED = "refused"
    """Because of its route or its key."""
    LET_IN = "let in"
    """The route needs no key."""
    IN_DOUBT = "in doubt"
    """The server requires no key."""


MOST_CLIENTS = 10_000
"""Addresses, and keys, that are remembered. Beyond that, those refused longest ago are dropped."""


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A known key, a user's or an admin's, as a client."""

    mark: str
    """Identifies it among the known keys."""


class Holder(Protocol):
    """Holds refusals back."""

    def hold_back_refusal(self, scope: Scope) -> Awaitable[None]:
        """Note that a request is refused, and wait until its client may get the refusal."""

    def note_refusal(self, scope: Scope) -> None:
        """Note that a request is refused whose client has got the refusal already."""

    def note_served(self, scope: Scope) -> None:
        """Note that a request is served."""


async def hold_back(scope: Scope) -> None:
    """Wait until a refused request may be answered; not at all, where refusals do not count."""
    if (holder := _holder(scope)) is not None:
        await holder.hold_back_refusal(scope)


def note_refusal(scope: Scope) -> None:
    """Note that a request is refused whose client gets the refusal without a wait."""
    if (holder := _holder(scope)) is not None:
        holder.note_refusal(scope)


def note_served(scope: Scope) -> None:
    """Note that a request is served."""
    if (holder := _holder(scope)) is not None:
        holder.note_served(scope)


def _holder(scope: Scope) -> Holder | None:
    holder: Callable[[], Holder | None] | None = scope.get(DOOR)
    return None if holder is None else holder()


def address_of(scope: Scope) -> Hashable:
    """Return what identifies the address of a request's client; None without an address."""
    client = scope.get("client")
    return network_of(client[0]) if client else None


def clients_of(scope: Scope) -> list[Hashable]:
    """Return what identifies the client of a request: its address, then its key if it is known."""
    find: Callable[[Scope], str | None] | None = scope.get(KEY)
    mark = None if find is None else find(scope)
    return [address_of(scope), *([] if mark is None else [KnownKey(mark)])]


class Refusals:
    """The buckets. The mutable state is the time up to which each client has paid for refusals.

    This is the generic cell rate algorithm: a refusal costs `1 / per_second` seconds of the
    bucket's time. Source: ITU-T I.371.
    """

    def __init__(self, per_second: float, clock: Callable[[], float]) -> None:
        """Args: per_second: refusals of one client in the long run; three times as many at once."""
        self._cost_s = 1 / per_second
        self._clock = clock
        self._paid_s: OrderedDict[Hashable, float] = OrderedDict()
        """By address."""
        self._keys_paid_s: OrderedDict[Hashable, float] = OrderedDict()
        self._strangers_paid_s: OrderedDict[Hashable, float] = OrderedDict()
        """By address, for refusals of requests without a known key."""

    def __repr__(self) -> str:
        return f"<Refusals clients={len(self._paid_s)} keys={len(self._keys_paid_s)}>"

    def charge(self, clients: Iterable[Hashable], count: int = 1) -> float:
        """Note refusals of one request, and return for how many seconds to hold back its response.

        Args:
            clients: everything that identifies its client; the one that owes most counts.
            count: its cost, in refusals.
        """
        clients = list(clients)
        keys = [client for client in clients if isinstance(client, KnownKey)]
        addresses = [client for client in clients if not isinstance(client, KnownKey)]
        waits_s = [self._charge(self._keys_paid_s, key, count) for key in keys]
        waits_s += [self._charge(self._paid_s, address, count) for address in addresses]
        if not keys:
            for address in addresses:
                self._charge(self._strangers_paid_s, address, count)
        return min(MAX_PAUSE_S, max(waits_s, default=0))

    def note_served(self, address: Hashable) -> None:
        """Note that a request from the address is served, which makes up for a refusal."""
        for paid_s in (self._paid_s, self._strangers_paid_s):
            if address in paid_s:
                paid_s[address] -= self._cost_s

    def owed_s(self, client: Hashable) -> float:
        """Seconds after which the next refusal of an address, or a key, would cost no wait."""
        is_key = isinstance(client, KnownKey)
        return self._owed_s(self._keys_paid_s if is_key else self._paid_s, client)

    def strangers_owe_s(self, address: Hashable) -> float:
        """Return `owed_s` of an address for refusals of requests without a known key alone."""
        return self._owed_s(self._strangers_paid_s, address)

    def _owed_s(self, all_paid_s: OrderedDict[Hashable, float], client: Hashable) -> float:
        return max(0.0, all_paid_s.get(client, 0.0) - self._clock() - BURST_S)

    def _charge(
        self, all_paid_s: OrderedDict[Hashable, float], client: Hashable, count: int
    ) -> float:
        now_s = self._clock()
        paid_s = max(now_s, all_paid_s.pop(client, now_s)) + count * self._cost_s
        all_paid_s[client] = min(paid_s, now_s + BURST_S + 2 * MAX_PAUSE_S)
        if len(all_paid_s) > MOST_CLIENTS:
            all_paid_s.popitem(last=False)
        return max(0.0, paid_s - now_s - BURST_S)
