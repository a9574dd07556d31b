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
from vllm_hotswap.states import RequestStep
from vllm_hotswap.switching.admission import Leases, Preview, crowding_refusal
from vllm_hotswap.switching.state import ServingState
from vllm_hotswap.switching.switch import Switch


class ManualAdmission:
    """Admits requests of the active model, and holds those for the target of a switch.

    The mutable state is `_held`: the leases of requests that wait for the switch under way, in
    order of arrival, each with the future that its request waits for.
    """

    def __init__(self, state: ServingState, leases: Leases, settings: SwitchingConfig) -> None:
        self._state = state
        self._leases = leases
        self._settings = settings
        self._held: dict[Lease, asyncio.Future[None]] = {}

    def __repr__(self) -> str:
        return f"<ManualAdmission held={len(self._held)}>"

    @property
    def waiting(self) -> int:
        return len(self._held)

    def waiting_for(self, model: Model) -> int:
        return self.waiting if self._state.target is model else 0

    @property
    def is_open(self) -> bool:
        return self._state.admits_active

    async def enter(
        self, model: Model, name: str | None, terms: RequestTerms, preview: Preview | None
    ) -> Lease:
        """Grant a lease now or when the switch to its model has ended.

        Raises:
            EngineUnavailable, ModelNotActive, ModelSwitching, QueueFull, WaitTimeout, SwitchFailed:
                the request is not admitted.
        """
        is_held = self._is_held(model, name)
        lease = Lease(model, self._state.epoch, asyncio.current_task(), name=name, terms=terms)
        lease.arrived_s = self._state.clock()
        if is_held:
            await self._hold(lease)
        else:
            self._leases.grant(model, lease)
        return lease

    def _is_held(self, model: Model, name: str | None) -> bool:
        """Whether the request waits for the switch under way. Raises what it is refused with."""
        state, switch = self._state, self._state.switch
        if state.why_down is not None:
            raise EngineUnavailable(state.why_down)
        if switch is not None and model is switch.target:
            self._leases.refuse_if_full(model)
            most, waited_for = self._settings.max_waiting, f" for {model.alias!r}"
            if refusal := crowding_refusal(self.waiting, most, self._retry_after_s, waited_for):
                raise refusal
            return True
        if state.active is None and (name is None or state.is_recovering):
            raise EngineUnavailable(state.failure or "no model is active")
        if model is not state.active:
            raise ModelNotActive(model.alias, state.active_alias, name)
        if switch is not None and not state.admits_active:
            raise ModelSwitching(model.alias, switch.target.alias, self._retry_after_s())
        self._leases.refuse_if_full(model)
        return False

    async def _hold(self, lease: Lease) -> None:
        """Wait until the switch to the request's model has ended."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held[lease] = future
        lease.model.entered[lease] = None
        lease.step(RequestStep.WAIT)
        try:
            async with asyncio.timeout(self._settings.wait_timeout):
                await future
        except TimeoutError:
            # The lease may be granted in the same loop iteration in which the time is up. Then the
            # model counts it already: dropping it would block every later drain.
            if not _is_granted(future):
                self._drop(lease)
                raise WaitTimeout(
                    f"the request waited {self._settings.wait_timeout:g} s for a switch "
                    "(switching.wait_timeout); retry when it has ended"
                ) from None
        except asyncio.CancelledError:
            if _is_granted(future):  # granted in the same iteration, as above: give it back
                lease.client_left = True
                self._leases.release(lease)
            else:
                self._drop(lease)
            raise
        except BaseException:
            self._drop(lease)
            raise

    def _drop(self, lease: Lease) -> None:
        """Forget a request that was refused, or whose client left, before it had its turn."""
        self._held.pop(lease, None)
        lease.model.entered.pop(lease, None)
        lease.step(RequestStep.END)

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
        for lease, future in held.items():
            if not future.done():
                self._leases.grant(lease.model, lease)
                future.set_result(None)

    def failed(
        self, switch: Switch, error: SwitchFailed | EngineUnavailable, is_refused: bool
    ) -> None:
        held, self._held = self._held, {}
        for future in held.values():
            if not future.done():
                future.set_exception(error)

    def activated(self, model: Model, leased_until_s: float | None) -> None:
        """All that waited has been admitted by `switched`."""

    def leased_until(self, until_s: float | None) -> None:
        """Jobs keep other switches away; requests of their model are served as always."""

    def advance(self) -> None:
        """The server never switches by itself in this mode."""

    def close(self, cause: Cut) -> None:
        """Held requests end with the switch that they wait for."""


def _is_granted(held: asyncio.Future[None]) -> bool:
    return held.done() and not held.cancelled() and held.exception() is None
