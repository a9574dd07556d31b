"""How many refusals a client may get, and how long further ones are held back.

A refusal costs the server about as much as any small call, and its client nothing: neither a place
in an engine nor tokens. Each client's address, and each key that is known, has a token bucket of
them. Where it is empty, an answer waits until its turn in the bucket comes, `MAX_PAUSE_S` at most.
That holds for the server's own refusals, and for those of a model's application. Who asks for what
is let in is never held back for it, and pays for refusals of the same address: many users may share
one. A key that is nobody's has no bucket: strangers may send the same one.

New connections of an address in debt wait, too, by what their first head is going to come to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from starlette.types import Scope

from vllm_hotswap.places import network_of

DOOR = "vllm_hotswap.door"
"""In a scope: gives who holds refusals back, None if the connection is gone."""

KEY = "vllm_hotswap.key"
"""In a scope: gives what tells the key of a request from others, None if none that is known."""

BURST_S = 3.0
"""An empty bucket is full again after it."""

MAX_PAUSE_S = 5.0
"""The longest that an answer is held back. Nothing is owed beyond twice that."""

SUSPECT_S = 1.0
"""New connections of an address, or with a key, wait while it owes more than so many seconds."""

DOUBT_S = 0.25
"""The longest that one waits of which nobody can tell whether it is going to be refused."""


class Outlook(Enum):
    """What the first head of a connection is going to come to, besides that its key is known."""

    REFUSED = "refused"
    """For its route or its key."""
    LET_IN = "let in"
    """The route needs no key."""
    IN_DOUBT = "in doubt"
    """No key is asked for."""


MOST_CLIENTS = 10_000
"""Addresses, and keys, that are remembered. Of more, those refused longest ago are forgotten."""


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key that is a user's or an admin's, as a client."""

    mark: str
    """What tells it from others."""


class Holder(Protocol):
    """Holds refusals back."""

    def refused(self, scope: Scope) -> Awaitable[None]:
        """Note that a request is refused, and wait until its client may be told."""

    def note_refusal(self, scope: Scope) -> None:
        """Note that a request is refused, of which its client has been told."""

    def let_in(self, scope: Scope) -> None:
        """Note that a request is served."""


async def hold_back(scope: Scope) -> None:
    """Wait until a refused request may be answered; not at all, where nobody counts."""
    if (holder := _holder(scope)) is not None:
        await holder.refused(scope)


def note_refusal(scope: Scope) -> None:
    """Note that a request is refused, of which its client is told without a wait."""
    if (holder := _holder(scope)) is not None:
        holder.note_refusal(scope)


def let_in(scope: Scope) -> None:
    """Note that a request is served."""
    if (holder := _holder(scope)) is not None:
        holder.let_in(scope)


def _holder(scope: Scope) -> Holder | None:
    holder: Callable[[], Holder | None] | None = scope.get(DOOR)
    return None if holder is None else holder()


def address_of(scope: Scope) -> Hashable:
    """What stands for the address of who has sent a request; None without one."""
    client = scope.get("client")
    return network_of(client[0]) if client else None


def clients_of(scope: Scope) -> list[Hashable]:
    """What stands for who has sent a request: the address, then the key, if it is known."""
    find: Callable[[Scope], str | None] | None = scope.get(KEY)
    mark = None if find is None else find(scope)
    return [address_of(scope), *([] if mark is None else [KnownKey(mark)])]


class Refusals:
    """The buckets. The mutable state is until when each client's refusals are paid for.

    That is the generic cell rate algorithm: a refusal costs `1 / per_second` seconds of the
    bucket's time. Source: ITU-T I.371.
    """

    def __init__(self, per_second: float, clock: Callable[[], float]) -> None:
        """Args: per_second: refusals of one client in the long run; three times that at once."""
        self._cost_s = 1 / per_second
        self._clock = clock
        self._paid_s: OrderedDict[Hashable, float] = OrderedDict()
        """Of addresses."""
        self._keys_paid_s: OrderedDict[Hashable, float] = OrderedDict()
        self._strangers_paid_s: OrderedDict[Hashable, float] = OrderedDict()
        """Of addresses, by what was refused to who has sent no known key."""

    def __repr__(self) -> str:
        return f"<Refusals clients={len(self._paid_s)} keys={len(self._keys_paid_s)}>"

    def charge(self, clients: Iterable[Hashable], count: int = 1) -> float:
        """Note refusals of one request, and return for how many seconds to hold its answer back.

        Args:
            clients: all that stand for who has sent it; the poorest counts.
            count: what it has cost, in refusals.
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

    def let_in(self, address: Hashable) -> None:
        """A request from the address is served, which makes up for a refusal."""
        for paid_s in (self._paid_s, self._strangers_paid_s):
            if address in paid_s:
                paid_s[address] -= self._cost_s

    def owed_s(self, client: Hashable) -> float:
        """Seconds after which the next refusal of an address, or a key, would cost no wait."""
        is_key = isinstance(client, KnownKey)
        return self._owed_s(self._keys_paid_s if is_key else self._paid_s, client)

    def strangers_owe_s(self, address: Hashable) -> float:
        """The same, by what was refused there to who has sent no known key."""
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
