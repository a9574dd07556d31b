"""The first models of a server: loading them, together or in turn, and activating the default."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.models import Model
from vllm_hotswap.residency import Ladder
from vllm_hotswap.switching.activation import Activation


class Startup:
    """Brings up the models that are loaded at the start."""

    def __init__(self, ladder: Ladder, activation: Activation) -> None:
        self._ladder = ladder
        self._activation = activation

    def __repr__(self) -> str:
        return f"<Startup {self._ladder!r}>"

    async def run(self, first: Model, others: Sequence[Model]) -> None:
        """Load all of them, and make `first` active and verified.

        Models that fit into the budget together are loaded together. Otherwise they are loaded one
        after the other, `first` last, and a model that no longer fits moves down.

        Raises:
            HotswapError: one of them cannot be loaded; the message names it.
        """
        self._ladder.check()
        for model in (first, *others):
            model.engine.validate()
        async with self._ladder.move_lock():
            if self._ladder.fit_together([first, *others]):
                await self._together(first, others)
            else:
                await self._in_turn(first, others)
            await self._activation.verify(first)
        for model in (first, *others):
            _refuse_failed_adapters(model)

    async def _together(self, first: Model, others: Iterable[Model]) -> None:
        # Concurrently: the host makes the next engine while this process builds a frontend.
        loads = [asyncio.create_task(self._ladder.bring_up(model)) for model in (first, *others)]
        try:
            await loads[0]
            await self._activation.activate(first)
            await asyncio.gather(*loads)
        finally:
            for task in loads:
                task.cancel()
            await asyncio.gather(*loads, return_exceptions=True)

    async def _in_turn(self, first: Model, others: Iterable[Model]) -> None:
        for model in (*others, first):
            await self._ladder.make_room(model)
            await self._ladder.bring_up(model)
        await self._activation.activate(first)


def _refuse_failed_adapters(model: Model) -> None:
    """Refuse to start with an adapter that could not be loaded. Raises `ConfigError`."""
    for adapter in model.engine.adapters.values():
        if adapter.failure is not None:
            raise ConfigError(f"models.{model.alias}: {adapter.failure}")
