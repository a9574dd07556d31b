"""Requests that have not had their turn, in the mode `auto`, each with its ticket.

A request enters its model's own frontend at once: an invalid one is refused without a switch.
Before anything of it reaches the engine, it waits here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from vllm_hotswap.errors import WaitTimeout
from vllm_hotswap.models import Cut, Lease, Model, drain
from vllm_hotswap.scheduling import Scheduler, Ticket
from vllm_hotswap.states import RequestStep
from vllm_hotswap.switching.admission import Leases


class Turns:
    """Registers requests, lets them wait for their turn, and forgets them.

    The mutable state is `_waiting`: the lease of each ticket, with a future if its request waits;
    and `_closed_with`: why no request gets a turn any more.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        leases: Leases,
        clock: Callable[[], float],
        wait_timeout_s: float,
        refusal: Callable[[Lease], Cut | None],
        is_served_now: Callable[[Model], bool],
        on_arrival: Callable[[], None],
    ) -> None:
        """Begin without requests.

        Args:
            scheduler: the queues of waiting requests.
            leases: grants a request its turn.
            clock: seconds, monotonic.
            wait_timeout_s: the longest wait; then the request is refused.
            refusal: returns why a request that asks for its turn is refused, or None.
            is_served_now: whether requests of a model are admitted now.
            on_arrival: called when a request has begun to wait.
        """
        self._scheduler = scheduler
        self._leases = leases
        self._clock = clock
        self._wait_timeout_s = wait_timeout_s
        self._refusal = refusal
        self._is_served_now = is_served_now
        self._on_arrival = on_arrival
        self._closed_with: Cut | None = None
        self._waiting: dict[Ticket, tuple[Lease, asyncio.Future[None] | None]] = {}

    def __repr__(self) -> str:
        return f"<Turns not_admitted={len(self._waiting)}>"

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Lease]:
        """Iterate over the leases of requests that have not had their turn."""
        return iter([lease for lease, _ in self._waiting.values()])

    @property
    def asked(self) -> list[Lease]:
        """The leases of requests that have asked for their turn."""
        return [lease for lease, future in self._waiting.values() if future is not None]

    def register(self, lease: Lease) -> Ticket:
        """Give the lease a ticket, as if its request arrived now; it asks for its turn later."""
        model = lease.model
        lease.arrived_s = now_s = self._clock()
        lease.ticket = ticket = self._scheduler.ticket(model.alias, now_s, lease.terms)
        lease.wait_for_turn, lease.admitted_s = partial(self._wait_or_cancel, lease), None
        self._waiting[ticket] = (lease, None)
        model.entered[lease] = None
        if self._closed_with is not None:  # a drain at shutdown suspends WebSockets, too
            self.end([lease], self._closed_with)
        return ticket

    def suspend(self, lease: Lease) -> None:
        """Take an admitted request out of its model's drain; it waits for a new turn."""
        lease.step(RequestStep.SUSPEND)
        self._leave(lease)
        lease.model.leases.pop(lease)
        lease.settle()
        self.register(lease)

    async def wait(self, lease: Lease, tokens: int = 0) -> None:
        """Wait until it is the request's turn, or the request has been cut or timed out."""
        ticket = lease.ticket
        assert ticket is not None
        if lease.admitted_s is not None or lease.cut is not None:
            return
        if ticket not in self._waiting:
            return  # the request is over
        _, future = self._waiting[ticket]
        # A WebSocket may have been open for long: its wait counts from now, not from its opening.
        if future is None and lease.is_connection:
            self._forget(ticket)
            ticket = self.register(lease)
        if future is None:  # one request of a client may be several of the engine's
            future = self._begin(lease, ticket, tokens)
        if future is not None:
            timeout_s = lease.arrived_s + self._wait_timeout_s - self._clock()
            # Two things that look simpler here would be wrong. `wait_for` would cancel the future
            # at a timeout, or when this task is cancelled, although other engine requests of the
            # same request wait for it, too. And a lease that this task were to grant, once it has
            # its turn, would come late: a switch that begins before the task runs would not find
            # the lease, so it would not drain it, and would stop the engine under it.
            await asyncio.wait([future], timeout=max(0.0, timeout_s))
            if not future.done():
                self._time_out(lease)

    async def _wait_or_cancel(self, lease: Lease, tokens: int) -> None:
        await self.wait(lease, tokens)
        if lease.cut is not None:
            raise asyncio.CancelledError(lease.cut.message)
        if lease.admitted_s is None:  # a leftover task of a request that is over
            raise asyncio.CancelledError

    def _begin(self, lease: Lease, ticket: Ticket, tokens: int) -> asyncio.Future[None] | None:
        """Queue the request; return None if it was admitted or refused at once."""
        now_s = self._clock()
        lease.prepared_s = now_s - lease.arrived_s
        ticket.tokens = tokens
        if (refused := self._refusal(lease)) is not None:
            drain.end([lease], refused)
            return None
        if self._scheduler.enter(ticket, now_s, is_open=self._is_served_now(lease.model)):
            self.admit([ticket])
            return None
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = (lease, future)
        lease.step(RequestStep.WAIT)
        self._on_arrival()
        if not future.done() and lease.on_wait is not None:
            lease.on_wait()
        return future

    def _time_out(self, lease: Lease) -> None:
        timeout = WaitTimeout(
            f"the request waited {self._wait_timeout_s:g} s for model {lease.alias!r} "
            "(switching.wait_timeout); retry later"
        )
        self.end([lease], timeout)

    def admit(self, tickets: Iterable[Ticket]) -> None:
        """Give requests their turn."""
        for ticket in tickets:
            if ticket in self._waiting:  # parked requests have had their turn before
                lease, _ = self._waiting[ticket]
                # Granted before its task runs: the next drain must find the lease.
                self._leases.grant(lease.model, lease)
                _settle(self._forget(ticket))

    def end(self, leases: Iterable[Lease], cause: Cut) -> None:
        """Abort requests that have not had their turn."""
        leases = list(leases)
        drain.end(leases, cause)
        for lease in leases:
            self.forget(lease)

    def close(self, cause: Cut) -> None:
        """Abort requests that have not had their turn, now and from now on."""
        self._closed_with = cause
        self.end(self, cause)

    def forget(self, lease: Lease) -> None:
        """Forget a request, whether or not it has had its turn. Idempotent."""
        if lease.ticket is not None:
            self._leave(lease)
            _settle(self._forget(lease.ticket))

    def _leave(self, lease: Lease) -> None:
        """Tell the scheduler that a request has ended."""
        assert lease.ticket is not None
        # A WebSocket may be open for long and ask for little: its duration says nothing of service.
        self._scheduler.leave(lease.ticket, self._clock(), counts=not lease.is_connection)

    def _forget(self, ticket: Ticket) -> asyncio.Future[None] | None:
        """Remove a ticket from those that wait; return the future on which its request waits."""
        if (entry := self._waiting.pop(ticket, None)) is None:
            return None
        lease, future = entry
        lease.model.entered.pop(lease, None)
        return future


def _settle(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
