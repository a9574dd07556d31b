"""What callers ask for: moving a model, reading it ahead, pinning it, and its adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from vllm_hotswap.errors import (
    AdapterRefused,
    ConfigError,
    ModelInUse,
    NameTaken,
    UnknownAdapter,
)
from vllm_hotswap.models import Adapter, Model, Registry
from vllm_hotswap.residency.ladder import Ladder, OperationResult
from vllm_hotswap.residency.lookahead import Announcement, Lookahead
from vllm_hotswap.residency.planner import Plan


class Operations:
    """The operations on one model. The active model stays active.

    `usable` finds a model by its alias. Raises `UnknownModel`, `InvalidRequest`,
    `EngineUnavailable`.
    """

    def __init__(
        self,
        registry: Registry,
        ladder: Ladder,
        lookahead: Lookahead,
        usable: Callable[[str], Model],
        adding_timeout_s: float,
    ) -> None:
        self._registry = registry
        self._ladder = ladder
        self._lookahead = lookahead
        self._usable = usable
        self._adding_timeout_s = adding_timeout_s

    def __repr__(self) -> str:
        return f"<Operations {self._ladder!r}>"

    def plan(self, alias: str, active: Model | None) -> Plan:
        """Plan a switch to `alias` without doing it. Raises `UnknownModel`, `NoRoom`."""
        return self._ladder.plan(self._usable(self._registry.resolve(alias).alias), active)

    async def load(self, alias: str) -> OperationResult:
        """Load a model, up to `parked`; the active one stays active."""
        return await self._ladder.load(self._usable(alias))

    async def wake(self, alias: str) -> OperationResult:
        return await self._ladder.wake(self._usable(alias))

    async def unload(self, alias: str) -> OperationResult:
        return await self._ladder.unload(self._usable(alias))

    async def sleep(self, alias: str, level: int) -> OperationResult:
        return await self._ladder.sleep(self._usable(alias), level)

    async def prefetch(self, alias: str) -> OperationResult:
        return await self._ladder.prefetch(self._usable(alias))

    def cancel_prefetch(self, alias: str) -> None:
        self._ladder.cancel_prefetch(self._usable(alias))

    def announce(self, alias: str) -> Announcement:
        """Prepare for a model that a caller announced as the next one."""
        return self._lookahead.announce(self._usable(alias))

    def pin(self, alias: str, pinned: bool) -> None:
        self._ladder.pin(self._usable(alias), pinned)

    async def add_adapter(
        self, alias: str, name: str, path: Path, is_3d: bool = False, in_place: bool = False
    ) -> Adapter:
        """Serve an adapter of a model from now on; if the model is not loaded, it loads it later.

        Args:
            alias: the model.
            name: what clients will send in `model`.
            path: the adapter's folder.
            is_3d: vLLM's `is_3d_lora_weight`.
            in_place: replace an adapter of this model that already has the name.

        Raises:
            AdapterRefused: the adapter cannot be used; nothing has changed.
            NameTaken, ModelInUse: the name is not free.
        """
        model = self._usable(alias)
        async with self._ladder.move_lock():

            def check() -> None:
                self._refuse_taken(model, name, in_place)

            check()
            try:
                # The engine calls `check` again once it is loaded: requests may have come since.
                async with asyncio.timeout(self._adding_timeout_s):
                    return await model.engine.add_adapter(name, path, is_3d, model.is_loaded, check)
            except TimeoutError:  # perhaps a slow disk: no reason to stop the host
                raise AdapterRefused(
                    f"adapter {name!r} was not added within {self._adding_timeout_s:g} s"
                ) from None
            except ConfigError as error:
                raise AdapterRefused(error.message) from error

    def remove_adapter(self, alias: str, name: str) -> int:
        """Admit no new request for an adapter. Return how many continue with it."""
        model = self._registry.model(alias)
        if name not in model.engine.adapters:
            raise UnknownAdapter(model.alias, name, model.engine.adapters)
        model.engine.remove_adapter(name)
        return model.in_flight_as(name)

    def _refuse_taken(self, model: Model, name: str, in_place: bool) -> None:
        is_own = name in model.engine.adapters
        if name in self._registry.names and not (in_place and is_own):
            hint = "; give in_place (vLLM's load_inplace) to replace it" if is_own else ""
            raise NameTaken(f"the name {name!r} is taken; aliases and adapters share names{hint}")
        # vLLM treats adapters with the same name as one, whatever their ids are.
        if in_flight := model.in_flight_as(name):
            raise ModelInUse(
                model.alias,
                f"adapter {name!r}",
                f"{in_flight} requests are in flight with the one before; retry later",
            )
