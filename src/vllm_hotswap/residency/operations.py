"""What callers ask for: moving a model, reading it ahead, pinning it, and its adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_hotswap.errors import (
    AdapterRefused,
    ConfigError,
    HotswapError,
    InvalidRequest,
    LoadFailed,
    ModelInUse,
    NameTaken,
    UnknownAdapter,
)
from vllm_hotswap.models import Adapter, Model, Registry
from vllm_hotswap.residency.ladder import Ladder
from vllm_hotswap.residency.lookahead import Announcement, Lookahead
from vllm_hotswap.residency.planner import Move, Plan
from vllm_hotswap.states import Residency, is_below

RESTING = {1: Residency.ASLEEP, 2: Residency.DISCARDED}
"""The residency that each sleep level leads to."""


@dataclass(frozen=True, slots=True)
class OperationResult:
    """The result of an operation on one model. Times in seconds, memory in bytes."""

    operation: str
    model: str
    before: Residency
    after: Residency
    duration_s: float
    evicted: tuple[Move, ...] = ()
    prefetched_bytes: int | None = None

    @property
    def changed(self) -> bool:
        return self.before is not self.after


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
        clock: Callable[[], float],
        adding_timeout_s: float,
    ) -> None:
        self._registry = registry
        self._ladder = ladder
        self._lookahead = lookahead
        self._usable = usable
        self._clock = clock
        self._adding_timeout_s = adding_timeout_s

    def __repr__(self) -> str:
        return f"<Operations {self._ladder!r}>"

    def plan(self, alias: str, active: Model | None) -> Plan:
        """Plan a switch to `alias` without doing it. Raises `UnknownModel`, `NoRoom`."""
        target = self._usable(self._registry.resolve(alias).alias)
        return self._ladder.plans.of_switch(target, active)

    async def load(self, alias: str) -> OperationResult:
        """Load a model to `parked` from any residency; the active model stays active."""
        return await self._move_up("load", self._usable(alias))

    async def wake(self, alias: str) -> OperationResult:
        """Wake a sleeping model, up to `parked`. Raises `InvalidRequest` if it is cold."""
        return await self._move_up("wake", self._usable(alias))

    async def unload(self, alias: str) -> OperationResult:
        """Unload a model. Raises `ModelInUse` if it is active, pinned, or has requests."""
        return await self._move_down("unload", self._usable(alias), Residency.COLD)

    async def sleep(self, alias: str, level: int) -> OperationResult:
        """Put a model to sleep.

        Raises:
            InvalidRequest: its device does not have the level.
            ModelInUse: it is active, pinned, or has requests that would not survive.
        """
        model = self._usable(alias)
        refuse_unknown_level(model, level)
        return await self._move_down("sleep", model, RESTING[level])

    async def prefetch(self, alias: str) -> OperationResult:
        """Read a model's files ahead, within the host budget; join a reading that is under way."""
        model = self._usable(alias)
        started_s, residency = self._clock(), model.residency
        is_needed = residency in (Residency.COLD, Residency.DISCARDED)
        read_bytes = await self._ladder.prefetches.read(model) if is_needed else 0
        took_s = self._clock() - started_s
        return OperationResult(
            "prefetch", model.alias, residency, model.residency, took_s, (), read_bytes
        )

    def cancel_prefetch(self, alias: str) -> None:
        """Cancel the reading of a model's files, and free its place in the host budget."""
        self._ladder.prefetches.cancel(self._usable(alias))

    def announce(self, alias: str) -> Announcement:
        """Prepare for a model that a caller announced as the next one."""
        return self._lookahead.announce(self._usable(alias))

    def pin(self, alias: str, pinned: bool) -> None:
        """Keep a model from being evicted, or allow it again, whatever its residency."""
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

    async def _move_up(self, operation: str, model: Model) -> OperationResult:
        async with self._ladder.move_lock(), _named_failure(model, operation):
            self._ladder.revive(model)
            before, started_s = model.residency, self._clock()
            evicted: tuple[Move, ...] = ()
            if operation == "wake" and before is Residency.COLD:
                raise InvalidRequest(
                    f"model {model.alias!r} is cold, so it cannot be woken; load it instead",
                    "model",
                )
            if not model.is_loaded:
                model.engine.validate()
                # The model that is active now, not when this was asked for: the lock was awaited.
                room = await self._ladder.make_room(model, keep=self._ladder.plans.active)
                evicted = room.evicted
                await self._ladder.bring_up(model)
            took_s = self._clock() - started_s
            return OperationResult(operation, model.alias, before, model.residency, took_s, evicted)

    async def _move_down(self, operation: str, model: Model, to: Residency) -> OperationResult:
        async with self._ladder.move_lock(), _named_failure(model, operation):
            before, started_s = model.residency, self._clock()
            if before is not Residency.FAILED and is_below(to, before):
                _refuse_use(model, operation, to)
                await self._ladder.move_down(model, to)
            return OperationResult(
                operation, model.alias, before, model.residency, self._clock() - started_s
            )

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


@asynccontextmanager
async def _named_failure(model: Model, operation: str) -> AsyncIterator[None]:
    """Name the operation and the model that failed, where the error itself does not."""
    try:
        yield
    except HotswapError as error:
        if type(error) in (HotswapError, ConfigError):
            raise LoadFailed(model.alias, operation, error) from error
        raise


def refuse_unknown_level(model: Model, level: int) -> None:
    """Raise `InvalidRequest` if the model's device does not have the sleep level."""
    if level not in RESTING or RESTING[level] not in model.engine.footprint.usage:
        known = [str(n) for n, to in RESTING.items() if to in model.engine.footprint.usage]
        raise InvalidRequest(
            f"model {model.alias!r} has no sleep level {level} on this platform; "
            f"levels: {', '.join(known) or 'none (it can be unloaded)'}",
            "level",
        )


def _refuse_use(model: Model, operation: str, to: Residency) -> None:
    if model.residency is Residency.ACTIVE:
        raise ModelInUse(model.alias, operation, "it is active; switch to another model first")
    if model.pinned:
        raise ModelInUse(
            model.alias,
            operation,
            f'it is pinned; POST /admin/models/{model.alias}/pin {{"pinned": false}} first',
        )
    if model.leases and to is not Residency.ASLEEP:
        raise ModelInUse(
            model.alias, operation, f"{len(model.leases)} requests are in flight; retry later"
        )
