"""What models hold now, and what the planner says about it.

`planner` is pure. `Plans` makes the values that it decides from, and asks it: can a model fit,
which models would move for it, and what will the active one be after a switch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from vllm_hotswap.errors import ConfigError, NoRoom
from vllm_hotswap.models import EngineHost, Model, Registry, Usage, total
from vllm_hotswap.residency.costs import up_cost_s
from vllm_hotswap.residency.planner import (
    MemorySnapshot,
    ModelView,
    Plan,
    fits_together,
    make_plan,
)
from vllm_hotswap.states import Residency


class Plans:
    """Questions about memory and moves. It has no state of its own, and moves nothing."""

    def __init__(self, registry: Registry, host: EngineHost) -> None:
        self._registry = registry
        self._host = host

    def __repr__(self) -> str:
        return f"<Plans used={self.used} budget={self.budget}>"

    @property
    def budget(self) -> Usage:
        return self._host.budget

    @property
    def used(self) -> Usage:
        """What models hold; as in `snapshot`, whose costs are not needed for that."""
        return total(model.held for model in self._registry)

    def lacks_memory(self) -> bool:
        """Whether models count on more device memory than they may have."""
        return self.used.device > self.budget.device

    @property
    def active(self) -> list[Model]:
        """The active model, if there is one."""
        return [model for model in self._registry if model.residency is Residency.ACTIVE]

    def snapshot(
        self, drained: Model | None = None, without_parked: bool = False
    ) -> MemorySnapshot:
        """Return what the planner decides from.

        Args:
            drained: a model whose requests will have ended before anything moves.
            without_parked: whether parked requests may be lost.
        """
        views = [
            _view(model, model is drained or (without_parked and bool(model.parked)))
            for model in self._registry
        ]
        return MemorySnapshot(tuple(views), self.budget)

    def of_switch(self, target: Model, active: Model | None) -> Plan:
        """Return what a switch to `target` would do. Raises `NoRoom`."""
        return self.make(target, drained=active)

    def make(self, target: Model, keep: Iterable[Model] = (), drained: Model | None = None) -> Plan:
        """Make a plan that gives up parked requests only if there is no other way.

        Args:
            target: the model that comes up.
            keep: models that must not move.
            drained: a model whose requests will have ended before anything moves.

        Raises:
            NoRoom: no moves suffice.
        """
        kept = [model.alias for model in keep]
        try:
            return make_plan(self.snapshot(drained), target.alias, kept)
        except NoRoom:
            if not any(model.parked for model in self._registry):
                raise
            return make_plan(self.snapshot(drained, without_parked=True), target.alias, kept)

    def can_keep_parked(self, target: Model, drained: Model | None = None) -> bool:
        """Whether there is room for `target` although every parked request is kept.

        `drained` is a model whose requests will have ended by then.
        """
        if target.is_loaded:
            return True
        try:
            make_plan(self.snapshot(drained), target.alias)
        except NoRoom:
            return False
        return True

    def residency_after_switch(self, active: Model, target: Model) -> Residency:
        """Return the residency that the active model will have after a switch to `target`."""
        if target.is_loaded:
            return Residency.PARKED
        try:
            plan = self.make(target, drained=active)
        except NoRoom:
            return Residency.COLD
        moves = [move.after for move in plan.evictions if move.alias == active.alias]
        return moves[-1] if moves else Residency.PARKED

    def check(self) -> None:
        """Check that every model can be loaded beside the pinned ones.

        Raises:
            ConfigError: a model never can; the message has the arithmetic.
        """
        for target in self._registry:
            views = tuple(
                _view(model, drained=True, residency=_at_least(model, target))
                for model in self._registry
            )
            try:
                make_plan(MemorySnapshot(views, self.budget), target.alias)
            except NoRoom as error:
                raise ConfigError(
                    f"{error.message}; raise memory.device, lower kv_cache_memory_bytes, "
                    "or unpin a model"
                ) from None

    def fit_together(self, models: Iterable[Model]) -> bool:
        """Whether all of these models fit into the budget, loaded."""
        return fits_together([_view(model, drained=True) for model in models], self.budget)


def _view(model: Model, drained: bool, residency: Residency | None = None) -> ModelView:
    is_where_it_is = residency is None
    residency = residency or model.residency
    return ModelView(
        alias=model.alias,
        # A dead engine holds nothing, and can be loaded again.
        residency=Residency.COLD if residency is Residency.FAILED else residency,
        footprint=model.engine.footprint,
        pinned=model.pinned,
        in_flight=0 if drained else len(model.leases),
        # A model that requests wait for would have to come up again soon.
        last_used_s=math.inf if model.entered else model.last_used_s or 0.0,
        up_s={where: up_cost_s(model, where) for where in Residency},
        waking=model.waking.needs if model.waking and is_where_it_is else Usage(),
    )


def _at_least(model: Model, target: Model) -> Residency:
    """Return the lowest residency that a model can have while `target` comes up."""
    return Residency.PARKED if model.pinned and model is not target else Residency.COLD
