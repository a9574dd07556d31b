"""A device that other processes use, too: what they take is measured, and the budget adapts."""

from __future__ import annotations

import asyncio

from vllm_hotswap.models import EngineHost, Registry
from vllm_hotswap.residency.commands import Commands
from vllm_hotswap.residency.plans import Plans

LOOK_S = 2.0
"""Seconds in which a routine look must be answered; the look waits for the step under way."""


class Device:
    """Measures the device's memory. It has no state of its own: the host has the budget.

    The caller holds `Ladder.move_lock` during a measurement: nothing may move in it.
    """

    def __init__(
        self, registry: Registry, host: EngineHost, plans: Plans, commands: Commands
    ) -> None:
        self._registry = registry
        self._host = host
        self._plans = plans
        self._commands = commands

    def __repr__(self) -> str:
        return f"<Device taken_bytes={self.taken_bytes} others_bytes={self._host.others_bytes}>"

    @property
    def taken_bytes(self) -> int:
        """Device memory that models hold now: a model that wakes in slices has not taken all yet.

        A wake that is given up counts as if it had given everything back.
        """
        wakes = [model.waking for model in self._registry if model.waking]
        # Its part counts, not its bytes: those are of all workers, and this is one device.
        missing = (w.needs.device * (1.0 if w.is_given_up else w.left) for w in wakes)
        return self._plans.used.device - round(sum(missing))

    async def measure(self) -> None:
        """Measure what other processes use of the device, and adapt the budget to that.

        Raises:
            EngineUnavailable: the host did not answer in time.
        """
        if self._host.is_device_shared:
            measuring = self._host.measure_device(self.taken_bytes)
            await self._commands.run(measuring, "measuring the device's memory")

    async def try_to_measure(self) -> bool:
        """Measure if the host answers soon; a host that does not is left alone.

        Returns whether the budget is up to date.
        """
        if not self._host.is_device_shared:
            return True
        try:
            async with asyncio.timeout(LOOK_S):
                await self._host.measure_device(self.taken_bytes)
        except TimeoutError:
            return False
        return True
