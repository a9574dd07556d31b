"""Moving models down when other processes take device memory that the budget counts on."""

from __future__ import annotations

import logging
from contextlib import suppress

from vllm_hotswap.errors import NoRoom, one_line
from vllm_hotswap.models import EngineHost, Model, Registry
from vllm_hotswap.residency.ladder import Ladder
from vllm_hotswap.residency.planner import Move, relief
from vllm_hotswap.states import Residency
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap")


class Relief:
    """Relieves a shared device.

    The mutable state is `_logged_lack`, the last log line about memory that others have taken.
    """

    def __init__(self, registry: Registry, host: EngineHost, ladder: Ladder) -> None:
        self._registry = registry
        self._host = host
        self._ladder = ladder
        self._plans = ladder.plans
        self._logged_lack: object = None

    def __repr__(self) -> str:
        return f"<Relief logged={self._logged_lack}>"

    async def relieve(self) -> tuple[Move, ...]:
        """Move models down if other processes have taken device memory that the budget counts on.

        Otherwise an allocation could fail later. The active model stays. If the host does not
        answer soon, because a step takes long, nothing is done until the next time.
        """
        async with self._ladder.move_lock():
            if not await self._ladder.device.try_to_measure():
                return ()
            if not self._plans.lacks_memory():
                self._logged_lack = None
                return ()
            for model in self._registry:  # early wakes go first: no request needs them yet
                with suppress(NoRoom):  # it is logged
                    await self._ladder.wakes.give_up_and_wait(model)
            if not self._plans.lacks_memory():
                return ()
            moves = relief(self._plans.snapshot(), [model.alias for model in self._plans.active])
            self._log_lack(moves)
            for move in moves:
                await self._relieve_by(self._registry.resolve(move.alias), move.after)
            return moves

    def _log_lack(self, moves: tuple[Move, ...]) -> None:
        """Log a lack of memory; once, as long as nothing about it changes."""
        used, budget = self._plans.used.device, self._plans.budget.device
        lack = (self._host.others_bytes, used, moves)
        if lack == self._logged_lack:
            return
        self._logged_lack = lack
        log.warning(
            "event=device_taken others_bytes=%d budget_bytes=%d used_bytes=%d moves=%s",
            self._host.others_bytes,
            budget,
            used,
            {move.alias: move.after.value for move in moves},
        )

    async def _relieve_by(self, model: Model, to: Residency) -> None:
        """Move a model down; unload it if the host has no room for it and no request needs it."""
        try:
            await self._ladder.move_down(model, to)
        except NoRoom as error:
            alias = value_text(model.alias)
            log.warning("event=sleep_failed model=%s cause=%r", alias, one_line(error))
            if not model.leases:
                await self._ladder.move_down(model, Residency.COLD)
