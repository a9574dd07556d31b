"""What the policies of models say about idle time, and the moves that follow from it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vllm_hotswap.errors import one_line
from vllm_hotswap.models import Model, Registry
from vllm_hotswap.residency.ladder import Ladder
from vllm_hotswap.states import Residency, is_below
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap")


class IdlePolicies:
    """Moves unused models down. It has no state of its own."""

    def __init__(self, registry: Registry, ladder: Ladder, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._ladder = ladder
        self._clock = clock

    def __repr__(self) -> str:
        return f"<IdlePolicies of {[m.alias for m in self._registry if _idle_policy(m)]}>"

    @property
    def has_any(self) -> bool:
        """Whether any model has a policy."""
        return any(_idle_policy(model) for model in self._registry)

    async def rest_idle(self) -> None:
        """Move down the models that have been unused for as long as their policy says."""
        for model in self._registry:
            for after_s, to in _idle_policy(model):
                if self._is_due(model, after_s) and _may_rest(model, to):
                    await self._rest(model, after_s, to)

    async def _rest(self, model: Model, after_s: float, to: Residency) -> None:
        try:
            async with self._ladder.move_lock():
                # Checked again: it may have been used while the lock was awaited.
                if self._is_due(model, after_s) and _may_rest(model, to):
                    await self._ladder.move_down(model, to)
        except Exception as error:  # noqa: BLE001  # one model's trouble is not the others'
            alias = value_text(model.alias)
            log.warning("event=rest_failed model=%s cause=%r", alias, one_line(error))

    def _is_due(self, model: Model, after_s: float) -> bool:
        return self._clock() - (model.last_used_s or 0.0) >= after_s


def idle_residency(model: Model, idle_s: float) -> Residency | None:
    """Return where the active model goes after so much idle time; None: it stays."""
    if model.pinned:
        return None
    due = [to for after_s, to in _idle_policy(model) if idle_s >= after_s]
    return next((to for to in reversed(due) if _has_residency(model, to)), None)


def _idle_policy(model: Model) -> list[tuple[float, Residency]]:
    """Return idle times and the residencies they lead to, the lowest last."""
    policy = model.settings
    times = [(policy.idle_sleep_s, Residency.ASLEEP), (policy.idle_unload_s, Residency.COLD)]
    return [(time_s, to) for time_s, to in times if time_s is not None]


def _may_rest(model: Model, to: Residency) -> bool:
    is_there = model.residency in (Residency.PARKED, Residency.ASLEEP, Residency.DISCARDED)
    is_used = model.pinned or model.leases or model.entered
    return is_there and is_below(to, model.residency) and _has_residency(model, to) and not is_used


def _has_residency(model: Model, residency: Residency) -> bool:
    """Whether its device has that residency."""
    return residency is Residency.COLD or residency in model.engine.footprint.usage
