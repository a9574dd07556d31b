"""A request's hold on its model, from its entry to its last byte, in both modes.

What differs between the modes `manual` and `auto` is behind the protocol `Admission`: it makes a
lease when a request enters, and says when the request gets its turn. `Leases` has what is common to
both: granting a turn, bounds, and the end.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

from vllm_hotswap.errors import (
    ClientStalled,
    EngineUnavailable,
    QueueFull,
    SwitchFailed,
    WrongStamp,
)
from vllm_hotswap.events import ClientEvicted, Observer, OutputRefused, RequestEnded
from vllm_hotswap.models import Cut, Lease, Model, drain
from vllm_hotswap.scheduling import DEFAULT_TERMS, RequestTerms
from vllm_hotswap.switching.state import ServingState
from vllm_hotswap.switching.switch import Switch

Preview = Callable[[Lease], Awaitable[None]]
"""Checks a request whose model has no frontend yet. Raises what the request is refused with."""


class Admission(Protocol):
    """How requests get to their models. There is one implementation for each mode."""

    @property
    def waiting(self) -> int:
        """Requests that wait for their model, without parked ones."""

    def waiting_for(self, model: Model) -> int: ...

    @property
    def is_open(self) -> bool:
        """Whether requests for the active model are accepted now."""

    async def enter(
        self, model: Model, name: str | None, terms: RequestTerms, preview: Preview | None
    ) -> Lease:
        """Give a request a lease on its model, with or without its turn.

        Args:
            model: the one that the request is for.
            name: the name in the request; None if it has none, and is for the active model.
            terms: the request's terms for its turn.
            preview: called if the request has to wait for a model that has no frontend.

        Raises:
            HotswapError: the request is not admitted.
        """

    def left(self, lease: Lease) -> None:
        """Forget a request that is over."""

    def suspend_idle(self, source: Model) -> bool:
        """Take idle WebSockets out of a drain. Return whether others may become idle."""

    def parked(self, source: Model) -> None:
        """Note that requests of the source have been frozen with its engine."""

    def switched(self, switch: Switch, cost_s: float) -> None:
        """Admit what waited for a switch that has succeeded: `cost_s`, without draining."""

    def failed(
        self, switch: Switch, error: SwitchFailed | EngineUnavailable, is_refused: bool
    ) -> None:
        """Fail what waited for a switch that has failed, or was refused by its drain."""

    def activated(self, model: Model, leased_until_s: float | None) -> None:
        """Serve a model that is active and verified; jobs lease it until then (None: they do not).

        Called after every switch, whether or not it succeeded.
        """

    def leased_until(self, until_s: float | None) -> None:
        """Note until when a job holds the active model: perhaps for ever, or not at all (None)."""

    def advance(self) -> None:
        """Decide again what to do, after a change."""

    def close(self, cause: Cut) -> None:
        """Make no further decisions, and abort requests that have not had their turn."""


class Leases:
    """Grants leases their turn, and releases them.

    `hold` releases every lease that an admission has returned, whatever becomes of its request:
    served, aborted, or left by its client. An admission that fails after it has made a lease ends
    it itself. A request for a kept response has a lease that is never granted; the router ends it.
    """

    def __init__(
        self,
        state: ServingState,
        observer: Observer,
        in_flight: int,
        admission: Callable[[], Admission],
    ) -> None:
        """`in_flight`: the most engine requests of one model; `admission`: that of the mode."""
        self._state = state
        self._observer = observer
        self._in_flight = in_flight
        self._admission = admission

    def __repr__(self) -> str:
        return f"<Leases at_most={self._in_flight}>"

    @asynccontextmanager
    async def hold(
        self,
        model: Model,
        name: str | None,
        terms: RequestTerms = DEFAULT_TERMS,
        preview: Preview | None = None,
    ) -> AsyncIterator[Lease]:
        """Hold a model while the body runs; see `Coordinator.lease`."""
        lease = await self._admission().enter(model, name, terms, preview)
        try:
            yield lease
        finally:
            self.release(lease)

    @contextmanager
    def reserve(self, model: Model, requests: int) -> Iterator[None]:
        """Reserve room for a request that becomes several engine requests, while the body runs.

        Raises `QueueFull`.
        """
        if requests == 1:
            yield
            return
        self.refuse_if_full(model, requests)
        model.extra_requests += requests - 1
        try:
            yield
        finally:
            model.extra_requests -= requests - 1

    def refuse_if_full(
        self, model: Model, more: int = 1, retry_after_s: Callable[[], int] = lambda: 1
    ) -> None:
        """Check that the model may have more engine requests. Raises `QueueFull`."""
        if model.in_flight + more > self._in_flight:
            raise QueueFull(
                f"model {model.alias!r} already has {self._in_flight} requests running or "
                "waiting (limits.in_flight); retry later",
                retry_after_s=retry_after_s(),
            )

    def grant(self, model: Model, lease: Lease) -> None:
        """Admit a request to its model: from now on a drain waits for it."""
        self._state.touch()
        model.last_used_s = self._state.used_s
        lease.admit(self._state.epoch, self._state.used_s)
        model.entered.pop(lease, None)
        model.leases[lease] = None

    def release(self, lease: Lease) -> None:
        """End a lease: its request is over."""
        model, state = lease.model, self._state
        if lease.requests:
            model.engine.release(lease.requests)
        drain.release(model, lease)
        state.touch()
        model.last_used_s = state.used_s
        try:
            if isinstance(lease.cut, WrongStamp):
                self._observer.notify(OutputRefused(state.epoch, lease.alias, lease.cut.stamp))
            elif isinstance(lease.cut, ClientStalled):
                self._observer.notify(ClientEvicted(state.epoch, lease.alias))
            self._observer.notify(self._ended(lease))
        finally:
            self._admission().left(lease)

    def _ended(self, lease: Lease) -> RequestEnded:
        admitted_s, ticket = lease.admitted_s, lease.ticket
        return RequestEnded(
            lease.epoch,
            lease.alias,
            lease.result,
            arrived_s=lease.arrived_s,
            waited_s=lease.waited_s,
            prepared_s=lease.prepared_s,
            service_s=None if admitted_s is None else self._state.clock() - admitted_s,
            switched=lease.switched,
            prompt_tokens=lease.prompt_tokens,
            output_tokens=lease.output_tokens,
            priority=ticket.priority if ticket else None,
            max_wait_s=ticket.max_wait_s if ticket else None,
            is_connection=lease.is_connection,
        )


def crowding_refusal(
    waiting: int, max_waiting: int, retry_after_s: Callable[[], int], what: str = ""
) -> QueueFull | None:
    """Return the refusal of one more request that would wait, if too many do already.

    `what` is what they all wait for, if it is one model: ` for 'llama'`.
    """
    if waiting < max_waiting:
        return None
    return QueueFull(
        f"{waiting} requests are already waiting{what} (switching.max_waiting); retry later",
        retry_after_s=retry_after_s(),
    )
