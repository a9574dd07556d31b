"""The mode `manual`: a request is served now, waits for the switch to its model, or is refused."""

from __future__ import annotations

import asyncio

from vllm_hotswap.config import SwitchingConfig
from vllm_hotswap.errors import (
    EngineUnavailable,
    ModelNotActive,
    ModelSwitching,
    SwitchFailed,
    WaitTimeout,
)
from vllm_hotswap.models import Cut, Lease, Model
from vllm_hotswap.scheduling import RequestTerms
from vllm_hotswap.switching.admission import Leases, Preview, crowding_refusal
from vllm_hotswap.switching.state import ServingState
from vllm_hotswap.switching.switch import Switch


class ManualAdmission:
    """Admits requests of the active model, and holds those for the target of a switch.

    The mutable state is `_held`: the requests that wait for the switch under way, in order of
    arrival, each with its task.
    """

    def __init__(self, state: ServingState, leases: Leases, settings: SwitchingConfig) -> None:
        self._state = state
        self._leases = leases
        self._settings = settings
        self._held: dict[asyncio.Future[Lease], asyncio.Task[object] | None] = {}

    def __repr__(self) -> str:
        return f"<ManualAdmission held={len(self._held)}>"

    @property
    def waiting(self) -> int:
        return len(self._held)

    def waiting_for(self, model: Model) -> int:
        return self.waiting if self._state.target is model else 0

    @property
    def is_open(self) -> bool:
        return self._state.is_between_switches

    async def enter(
        self, model: Model, name: str | None, terms: RequestTerms, preview: Preview | None
    ) -> Lease:
        arrived_s, epoch = self._state.clock(), self._state.epoch
        held = self._admit(model, name)
        lease = held if isinstance(held, Lease) else await self._wait(held)
        lease.arrived_s, lease.switched = arrived_s, lease.epoch - epoch
        lease.terms = terms
        return lease

    def _admit(self, model: Model, name: str | None) -> Lease | asyncio.Future[Lease]:
        """Grant a lease now, hold the request for the switch under way, or refuse it."""
        state, switch = self._state, self._state.switch
        if state.why_down is not None:
            raise EngineUnavailable(state.why_down)
        if switch is not None and model is switch.target:
            return self._hold(switch)
        if state.active is None and (name is None or state.is_recovering):
            raise EngineUnavailable(state.failure or "no model is active")
        if model is not state.active:
            raise ModelNotActive(model.alias, state.active_alias, name)
        if switch is not None and not state.is_between_switches:
            raise ModelSwitching(model.alias, switch.target.alias, self._retry_after_s())
        self._leases.refuse_if_full(model)
        return self._grant(model, asyncio.current_task())

    def _grant(self, model: Model, task: asyncio.Task[object] | None) -> Lease:
        lease = Lease(model, self._state.epoch, task)
        self._leases.grant(model, lease)
        return lease

    def _hold(self, switch: Switch) -> asyncio.Future[Lease]:
        target = switch.target
        self._leases.refuse_if_full(target, len(self._held) + 1)
        most, waited_for = self._settings.max_waiting, f" for {target.alias!r}"
        if refusal := crowding_refusal(self.waiting, most, self._retry_after_s, waited_for):
            raise refusal
        future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._held[future] = asyncio.current_task()
        return future

    async def _wait(self, held: asyncio.Future[Lease]) -> Lease:
        try:
            async with asyncio.timeout(self._settings.wait_timeout):
                return await held
        except TimeoutError:
            # The lease may be granted in the same loop iteration in which the time is up. Then the
            # model counts it already: dropping it would block every later drain.
            if lease := _granted(held):
                return lease
            raise WaitTimeout(
                f"the request waited {self._settings.wait_timeout:g} s for a switch "
                "(switching.wait_timeout); retry when it has ended"
            ) from None
        except asyncio.CancelledError:
            if lease := _granted(held):  # granted in the same iteration, as above: give it back
                self._leases.release(lease)
            raise
        finally:
            self._held.pop(held, None)

    def _retry_after_s(self) -> int:
        return max(1, round(self._state.last_switch_s + 0.5))

    def left(self, lease: Lease) -> None:
        """Nothing waits behind another request in this mode."""

    def suspend_idle(self, source: Model) -> bool:
        """A drain waits for WebSockets here: their clients would not know of a switch."""
        return False

    def parked(self, source: Model) -> None:
        """They continue when a switch makes their model active again."""

    def switched(self, switch: Switch, cost_s: float) -> None:
        """Give held requests leases of the new epoch, in order of arrival.

        Now, rather than in the tasks that wait: a switch that begins before those run must find
        their leases, or it would not drain them.
        """
        held, self._held = self._held, {}
        for future, task in held.items():
            if not future.done():
                future.set_result(self._grant(switch.target, task))

    def failed(
        self, switch: Switch, error: SwitchFailed | EngineUnavailable, is_refused: bool
    ) -> None:
        held, self._held = self._held, {}
        for future in held:
            if not future.done():
                future.set_exception(error)

    def activated(self, model: Model, held_until_s: float | None) -> None:
        """All that waited has been admitted by `switched`."""

    def held_until(self, until_s: float | None) -> None:
        """Jobs keep other switches away; requests of their model are served as always."""

    def advance(self) -> None:
        """The server never switches by itself in this mode."""

    def close(self, cause: Cut) -> None:
        """Held requests end with the switch that they wait for."""


def _granted(held: asyncio.Future[Lease]) -> Lease | None:
    """Return the lease that a waiting request was granted, if it was."""
    is_granted = held.done() and not held.cancelled() and held.exception() is None
    return held.result() if is_granted else None
