"""The phases of one switch, and the way back from each of them."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from vllm_hotswap.config import SwitchingConfig
from vllm_hotswap.errors import DrainCut, DrainRefused, NoRoom, SlowReader, one_line
from vllm_hotswap.events import Observer, PhaseChanged, PhaseStatus, RequestsParked
from vllm_hotswap.failpoints import async_failpoint
from vllm_hotswap.models import EngineHost, Lease, Model, drain
from vllm_hotswap.residency import Ladder
from vllm_hotswap.states import Residency, SwitchPhase
from vllm_hotswap.switching.activation import Activation
from vllm_hotswap.switching.admission import Admission
from vllm_hotswap.switching.state import ServingState
from vllm_hotswap.switching.switch import Switch
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap")

CONNECTION_LOOK_S = 0.5
"""Interval at which a drain checks for idle WebSockets."""

SLOW_LOOK_S = 10.0
"""How long a patient drain watches its clients before it looks for slow readers."""


class SwitchTransaction:
    """Carries out the phases of a switch, and undoes them if one fails.

    It has no state of its own. Results go into the `Switch`. The caller holds the ladder's lock.
    """

    def __init__(
        self,
        state: ServingState,
        host: EngineHost,
        ladder: Ladder,
        activation: Activation,
        admission: Admission,
        observer: Observer,
        settings: SwitchingConfig,
    ) -> None:
        self._state = state
        self._host = host
        self._ladder = ladder
        self._plans = ladder.plans
        self._prefetches = ladder.prefetches
        self._activation = activation
        self._admission = admission
        self._observer = observer
        self._settings = settings

    def __repr__(self) -> str:
        return f"<SwitchTransaction {self._state!r}>"

    async def run(self, switch: Switch) -> None:
        """Make the target active. Raises whatever makes a phase fail."""
        target = switch.target
        async with self._phase(switch, SwitchPhase.VALIDATE):
            if not target.is_loaded:
                await self._ladder.device.measure()
            self._validate(switch)
            await target.engine.rehearse()
        switch.moves, switch.residency = not target.is_loaded, target.residency
        switch.memory_before_bytes = self._host.stats().used_bytes
        async with self._phase(switch, SwitchPhase.DRAIN):
            await self._drain(switch)
        switch.is_awaited = target.waking is not None
        self._prefetches.cancel(target)  # the load reads the rest itself
        async with self._phase(switch, SwitchPhase.MAKE_ROOM):
            room = await self._ladder.make_room(target)
            switch.evicted, switch.requests_lost = room.evicted, room.requests_lost
        if switch.moves:
            switch.memory_unloaded_bytes = self._host.stats().used_bytes
        async with self._phase(switch, SwitchPhase.BRING_UP):
            await self._ladder.bring_up(target)
        async with self._phase(switch, SwitchPhase.ACTIVATE):
            await self._activation.activate(target)
        if not target.is_verified:
            async with self._phase(switch, SwitchPhase.VERIFY):
                await self._activation.verify(target)

    def _validate(self, switch: Switch) -> None:
        """Refuse what cannot work, while the source has not given up anything."""
        target = switch.target
        self._ladder.revive(target)
        reads_files = target.residency in (Residency.COLD, Residency.DISCARDED)
        if reads_files:
            target.engine.validate()
        if not target.is_loaded:
            self._plans.of_switch(target, switch.source)
        if reads_files and switch.source is not None and switch.source.leases:
            self._prefetches.begin(target)

    # --- the drain --------------------------------------------------------------------------

    async def _drain(self, switch: Switch) -> None:
        """Wait for the source's leases; apply the policy to those left at the deadline."""
        source = switch.source
        if source is None:
            return
        await self._until_empty(source, self._deadline(switch))
        if not source.leases or source.residency is not Residency.ACTIVE:
            return
        if switch.is_patient:
            await self._drain_to_the_end(switch, source)
            return
        target, timeout_s = switch.target.alias, switch.drain_timeout_s
        match switch.policy:
            case "refuse":
                raise DrainRefused(source.alias, target, len(source.leases), timeout_s)
            case "park":
                self._park(switch, source)
        # With `park`, those that could not be parked; with `abort`, all of them.
        cut = DrainCut(source.alias, target, timeout_s)
        running = [lease for lease in source.leases if not lease.is_parked]
        switch.requests_cut = drain.end(running, cut)
        await drain.until_ended(source)

    def _deadline(self, switch: Switch) -> Callable[[], float]:
        """Return a function that says until when the drain waits, on the event loop's clock."""
        now_s, until_s = asyncio.get_running_loop().time(), switch.drain_until_s
        if until_s is None:
            return lambda: now_s + switch.drain_timeout_s
        ahead_s = now_s - self._state.clock()
        return lambda: until_s() + ahead_s

    async def _drain_to_the_end(self, switch: Switch, source: Model) -> None:
        """Park requests that still run, if no parked request is lost by that; wait for the others.

        Requests whose clients read slower than their answers come are aborted: otherwise such a
        client could hold up all others for as long as it likes.
        """
        if switch.may_park and self._plans.can_keep_parked(switch.target):
            self._park(switch, source)
        now_s = asyncio.get_running_loop().time
        while drain.is_running(source):
            before = {lease: _kept_waiting_s(lease) for lease in source.leases}
            await self._until_empty(source, partial(float, now_s() + SLOW_LOOK_S))
            slow = [
                lease
                for lease, before_s in before.items()
                if lease in source.leases
                and not lease.is_parked
                and _kept_waiting_s(lease) - before_s > SLOW_LOOK_S / 2
            ]
            switch.requests_cut += drain.end(slow, SlowReader(switch.target.alias))

    async def _until_empty(self, source: Model, until_s: Callable[[], float]) -> None:
        """Wait for the source's requests, but not for WebSockets that have become idle.

        `until_s` returns until when, on the loop's clock. It has to be asked again after every
        wake-up, as a request that arrives now may be due before the deadline that held when the
        drain began; `drain.recheck` causes such a wake-up. And a WebSocket becomes idle without
        any event that would wake the drain, so where there are some, they are looked at.
        """
        now_s = asyncio.get_running_loop().time
        while True:
            may_become_idle = self._admission.suspend_idle(source)
            left_s = until_s() - now_s()
            if left_s <= 0 or not drain.is_running(source):
                return
            if may_become_idle:
                left_s = min(left_s, CONNECTION_LOOK_S)
            await drain.until_empty(source, None if left_s == math.inf else left_s)

    def _park(self, switch: Switch, source: Model) -> None:
        timeout_s, at_most = self._settings.parked_timeout, self._settings.max_parked
        switch.requests_parked = count = drain.park(source, timeout_s, at_most)
        self._admission.parked(source)
        if count:
            self._observer.notify(RequestsParked(self._state.epoch, source.alias, count))

    # --- the way back -----------------------------------------------------------------------

    async def undo(self, switch: Switch) -> None:
        """Make the source the active model again, from any state that the switch has left."""
        if self._host.died.done():
            return
        try:
            await async_failpoint("switch.rollback", switch.target.alias)
            if self._state.active is switch.target:  # it was activated, but failed verification
                await self._activation.withdraw(switch.target)
            if switch.source is not None and switch.source.residency is not Residency.FAILED:
                await self._restore(switch.source, switch)
        except Exception as error:  # noqa: BLE001  # whatever the error is, the switch must end
            log.error(
                "event=rollback_failed target=%s cause=%r",
                *(value_text(switch.target.alias), one_line(error)),
            )
            self._host.kill(
                f"the engine host was stopped: a failed switch could not be undone: {error}"
            )

    async def _restore(self, source: Model, switch: Switch) -> None:
        try:
            if source.residency is not Residency.ACTIVE:
                await self._bring_back(source, switch.target)
            elif switch.phase is SwitchPhase.ACTIVATE:
                # The host may step the target already although its result was lost.
                await self._activation.repeat(source)
        except Exception as error:  # noqa: BLE001  # recovery tries again
            can_move = not self._host.died.done()
            await self._activation.abandon(source, one_line(error), can_move)
            return
        if source.is_verified:
            self._activation.resume(source)

    async def _bring_back(self, source: Model, target: Model) -> None:
        if not source.is_loaded:
            try:
                await self._ladder.make_room(source)
            except NoRoom:  # the target holds more than planned, or has been pinned
                await self._ladder.evict_all_but(source, even_pinned=target)
            await self._ladder.bring_up(source)
        await self._activation.activate(source)
        if not source.is_verified:
            await self._activation.verify(source)

    # --- phases -----------------------------------------------------------------------------

    @asynccontextmanager
    async def _phase(self, switch: Switch, phase: SwitchPhase) -> AsyncIterator[None]:
        """Run one phase of a switch: set its name, time it, and notify observers."""
        switch.phase = phase
        started_s = self._state.clock()
        self._notify(switch, phase, "started", 0.0)
        try:
            await async_failpoint(f"switch.{phase.value}", switch.target.alias)
            yield
        except BaseException:
            self._notify(switch, phase, "failed", self._state.clock() - started_s)
            raise
        duration_s = self._state.clock() - started_s
        switch.phases_s[phase.value] = duration_s
        self._notify(switch, phase, "finished", duration_s)

    def _notify(
        self, switch: Switch, phase: SwitchPhase, status: PhaseStatus, duration_s: float
    ) -> None:
        self._observer.notify(
            PhaseChanged(
                switch.operation_id,
                self._state.epoch,
                switch.target.alias,
                phase,
                status,
                duration_s,
            )
        )


def _kept_waiting_s(lease: Lease) -> float:
    return lease.kept_waiting_s() if lease.kept_waiting_s is not None else 0.0
