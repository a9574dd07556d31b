"""How many refusals a client may get, and how long further ones are held back.

A refusal costs the server about as much as any small call, and its client nothing: neither a place
in an engine nor tokens. Each client's address, and each key that is sent, has a token bucket of
them. Where it is empty, an answer waits until its turn in the bucket comes, `MAX_PAUSE_S` at most.
Who asks for what is let in is never held back for it, and pays for refusals of the same address:
many users may share one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable
from typing import Protocol

from starlette.types import Scope

from vllm_hotswap.places import network_of

DOOR = "vllm_hotswap.door"
"""In a scope: gives who holds refusals back, None if the connection is gone."""

KEYS = frozenset([b"authorization", b"x-api-key"])

BURST_S = 3.0
"""An empty bucket is full again after it."""

MAX_PAUSE_S = 5.0
"""The longest that an answer is held back. Nothing is owed beyond twice that."""

SUSPECT_S = 1.0
"""New connections of an address wait while it owes more than so many seconds."""

MOST_CLIENTS = 10_000
"""Buckets that are remembered. Of more, those that were refused longest ago are forgotten."""


class Holder(Protocol):
    """Holds refusals back."""

    def refused(self, scope: Scope) -> Awaitable[None]:
        """Note that a request is refused, and wait until its client may be told."""

    def let_in(self, scope: Scope) -> None:
        """Note that a request is served."""


async def hold_back(scope: Scope) -> None:
    """Wait until a refused request may be answered; not at all, where nobody counts."""
    if (holder := _holder(scope)) is not None:
        await holder.refused(scope)


def let_in(scope: Scope) -> None:
    """Note that a request is served."""
    if (holder := _holder(scope)) is not None:
        holder.let_in(scope)


def _holder(scope: Scope) -> Holder | None:
    holder: Callable[[], Holder | None] | None = scope.get(DOOR)
    return None if holder is None else holder()


def clients_of(scope: Scope) -> list[Hashable]:
    """What stands for who has sent a request: the address, None without one, then keys."""
    client = scope.get("client")
    address = network_of(client[0]) if client else None
    return [address, *((name, hash(value)) for name, value in scope["headers"] if name in KEYS)]


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

    def __repr__(self) -> str:
        return f"<Refusals clients={len(self._paid_s)}>"

    def charge(self, clients: Iterable[Hashable], count: int = 1) -> float:
        """Note refusals of one request, and return for how many seconds to hold its answer back.

        Args:
            clients: all that stand for who has sent it; the poorest counts.
            count: what it has cost, in refusals.
        """
        return min(MAX_PAUSE_S, max((self._charge(client, count) for client in clients), default=0))

    def let_in(self, client: Hashable) -> None:
        """One of the client's requests is served, which makes up for a refusal."""
        if client in self._paid_s:
            self._paid_s[client] -= self._cost_s

    def owed_s(self, client: Hashable) -> float:
        """Seconds after which the next refusal of the client would cost no wait."""
        return max(0.0, self._paid_s.get(client, 0.0) - self._clock() - BURST_S)

    def _charge(self, client: Hashable, count: int) -> float:
        now_s = self._clock()
        paid_s = max(now_s, self._paid_s.pop(client, now_s)) + count * self._cost_s
        self._paid_s[client] = min(paid_s, now_s + BURST_S + 2 * MAX_PAUSE_S)
        if len(self._paid_s) > MOST_CLIENTS:
            self._paid_s.popitem(last=False)
        return max(0.0, paid_s - now_s - BURST_S)
