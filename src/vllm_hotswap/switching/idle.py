"""What the server does while it is idle: models rest, and the default one comes back."""

from __future__ import annotations

import asyncio
import logging

from vllm_hotswap.config import SwitchingConfig
from vllm_hotswap.errors import one_line
from vllm_hotswap.models import EngineHost, Model, Registry
from vllm_hotswap.residency import Ladder
from vllm_hotswap.states import Residency
from vllm_hotswap.switching.activation import Activation
from vllm_hotswap.switching.admission import Admission
from vllm_hotswap.switching.jobs import Jobs
from vllm_hotswap.switching.state import ServingState
from vllm_hotswap.switching.switcher import Switcher

log = logging.getLogger("vllm_hotswap")

IDLE_CHECK_S = 1.0
"""Interval between checks for idle models."""

DEVICE_CHECK_S = 5.0
"""Interval between checks for device memory taken by other processes."""


class IdleRest:
    """Moves idle models down, returns to the default model, and watches the device's memory."""

    def __init__(
        self,
        state: ServingState,
        registry: Registry,
        host: EngineHost,
        ladder: Ladder,
        activation: Activation,
        admission: Admission,
        switcher: Switcher,
        jobs: Jobs,
        settings: SwitchingConfig,
    ) -> None:
        self._state = state
        self._registry = registry
        self._host = host
        self._ladder = ladder
        self._activation = activation
        self._admission = admission
        self._switcher = switcher
        self._jobs = jobs
        self._settings = settings
        self.default: Model | None = None
        """The model that was active at the start."""

    def __repr__(self) -> str:
        return f"<IdleRest default={self.default}>"

    async def run(self) -> None:
        """Until cancelled, move models down that have been idle for as long as they may be."""
        while self._ladder.has_idle_policies or self._settings.return_to_default is not None:
            await asyncio.sleep(IDLE_CHECK_S)
            try:
                await self.rest()
            except Exception as error:  # noqa: BLE001  # one model's trouble is not the others'
                log.warning("event=rest_failed cause=%r", one_line(error))

    async def watch_device(self) -> None:
        """Until cancelled, watch for memory that models count on and other processes have taken."""
        while self._host.is_device_shared:
            await asyncio.sleep(DEVICE_CHECK_S)
            if self._state.host_is_gone:
                continue
            try:
                await self._ladder.relieve()
            except Exception as error:  # noqa: BLE001  # the next check may succeed
                log.warning("event=relief_failed cause=%r", one_line(error))

    async def rest(self) -> None:
        """Move idle models down, and return to the default model if that is due."""
        await self._ladder.rest_idle()
        if self._settings.mode == "auto":
            await self._rest_active()
        self._return_to_default()

    def _idle_s(self) -> float:
        """Return the seconds without a request, a switch and a job lease."""
        is_asked = any(model.leases or model.entered for model in self._registry)
        if is_asked or self._state.switch is not None or self._jobs.model is not None:
            return 0.0
        return self._state.clock() - self._state.used_s

    async def _rest_active(self) -> None:
        """Put the active model to sleep, or unload it; the next request brings one up."""
        if self._place_to_rest() is None:
            return
        async with self._ladder.move_lock():
            # Check again: a request or a switch may have come while this waited for the lock.
            model, to = self._state.active, self._place_to_rest()
            if model is not None and to is not None:
                # Before the await below: no request may be admitted to a model on its way down.
                self._activation.rest()
                self._admission.advance()
                last_used_s = model.last_used_s
                await self._ladder.move_down(model, to)
                model.last_used_s = last_used_s  # a later idle policy counts from the last use

    def _place_to_rest(self) -> Residency | None:
        active = self._state.active
        if active is None or self._state.why_down is not None:
            return None
        return self._ladder.idle_residency(active, self._idle_s())

    def _return_to_default(self) -> None:
        after_s, state = self._settings.return_to_default, self._state
        if after_s is None or self.default is None or state.active in (None, self.default):
            return
        if state.why_down is None and self._idle_s() >= after_s:
            # A request that arrives at this moment is served first: in the mode `auto` the switch
            # waits for it, in the mode `manual` the switch is given up.
            if self._settings.mode == "auto":
                timeout_s = self._settings.drain_timeout
                self._switcher.begin(self.default, timeout_s, "park", automatic=True)
            else:
                self._switcher.begin(self.default, 0.0, "refuse", automatic=True)
