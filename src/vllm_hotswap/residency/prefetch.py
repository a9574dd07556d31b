"""Reading models' files ahead, within the host budget."""

from __future__ import annotations

import asyncio

from vllm_hotswap.models import Model, Prefetch, Registry
from vllm_hotswap.residency.plans import Plans
from vllm_hotswap.states import Residency


class Prefetches:
    """The files that are read ahead.

    The mutable state is `prefetch` of each model in the registry.
    """

    def __init__(self, registry: Registry, plans: Plans) -> None:
        self._registry = registry
        self._plans = plans

    def __repr__(self) -> str:
        return f"<Prefetches {[model.alias for model in self._registry if model.prefetch]}>"

    @property
    def held_bytes(self) -> int:
        """Host memory for files that were read ahead and have not been needed yet."""
        return sum(model.prefetch.held_bytes for model in self._registry if model.prefetch)

    def spare_bytes(self, model: Model) -> int:
        """Return host memory for files of a model, beside sleeping weights and others' files."""
        others = self.held_bytes - (model.prefetch.held_bytes if model.prefetch else 0)
        return max(0, self._plans.budget.host - self._plans.used.host - others)

    def begin(self, model: Model) -> Prefetch:
        """Start to read a model's files, or join the reading that is under way."""
        if model.prefetch is None or not model.prefetch.is_under_way:
            limit_bytes = self.spare_bytes(model)
            if weights_bytes := model.engine.memory.weights_bytes:  # 0 where it is not known
                limit_bytes = min(limit_bytes, weights_bytes)
            model.prefetch = prefetch = Prefetch(limit_bytes)
            reading = model.engine.prefetch(limit_bytes, prefetch.record_progress)
            prefetch.task = asyncio.create_task(reading)
            # Perhaps no caller waits for it: the load will report a file that cannot be read.
            prefetch.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return model.prefetch

    async def read(self, model: Model) -> int:
        """Read a model's files as a caller asked for; join a reading that is under way.

        Returns the bytes read: 0 if the reading was cancelled. Raises what the reading does.
        """
        reading = self.begin(model)
        reading.is_explicit = True
        # Not `await reading.task`: a caller that leaves must not cancel the reading.
        await asyncio.wait([reading.task])
        return 0 if reading.task.cancelled() else reading.task.result()

    def cancel(self, model: Model) -> None:
        """Cancel the reading of a model's files, and free its place in the host budget."""
        if model.prefetch is not None:
            model.prefetch.task.cancel()
            model.prefetch = None

    def give_up_for(self, model: Model, to: Residency) -> None:
        """Give up files that were read ahead, if sleeping weights need their place."""
        footprint, budget = model.engine.footprint, self._plans.budget.host
        takes = footprint.at(to).host - footprint.at(model.residency).host
        for other in self._registry:
            if self._plans.used.host + takes + self.held_bytes <= budget or takes <= 0:
                return
            self.cancel(other)
