"""Moving models on the residency ladder, one at a time, under the memory budget.

`plans` says which models move. This module moves them: it steps a model's residency, lets the
engine do the work, measures the time, and notifies observers. The coordinator's switches go through
it, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from vllm_hotswap.config import RecoveryConfig
from vllm_hotswap.errors import NoRoom, ParkedEnded
from vllm_hotswap.events import (
    LoadProgress,
    ModelMoved,
    Observer,
    PinChanged,
    ResidencyChanged,
    WakeChange,
)
from vllm_hotswap.models import EngineHost, Model, Registry, drain
from vllm_hotswap.residency.commands import Commands, refuse_failed
from vllm_hotswap.residency.device import Device
from vllm_hotswap.residency.planner import Move
from vllm_hotswap.residency.plans import Plans
from vllm_hotswap.residency.prefetch import Prefetches
from vllm_hotswap.residency.prewake import Prewakes
from vllm_hotswap.states import DOWN, Residency, Step

ENDS: Mapping[Step, WakeChange] = {Step.WAKE: "used", Step.FAIL: "failed"}
"""The outcome of an early wake, by the step that ends it."""


@dataclass(frozen=True, slots=True)
class Room:
    """What was done to make room."""

    evicted: tuple[Move, ...] = ()
    requests_lost: int = 0
    """Parked requests that were aborted, because their model had to be unloaded."""


class Ladder:
    """All models' residencies below `active`.

    The mutable state:

    - the residency, pin and measured times of each model in the registry;
    - `_move_lock`, the lock that is held while models move. The host has one compute thread, and
      the sum of what models hold is only known between moves.

    What a move needs are parts without moves of their own: `plans` (what would move), `commands`
    (work with a deadline), `device` (what other processes take of it), `prefetches` (files read
    ahead) and `wakes` (early wakes, of models that no request has asked for yet).
    """

    def __init__(
        self,
        registry: Registry,
        host: EngineHost,
        observer: Observer,
        clock: Callable[[], float],
        epoch: Callable[[], int],
        deadlines: RecoveryConfig,
    ) -> None:
        self._registry = registry
        self._observer = observer
        self._clock = clock
        self._epoch = epoch
        self._move_lock = asyncio.Lock()
        self.plans = Plans(registry, host)
        self.commands = Commands(host, deadlines)
        self.device = Device(registry, host, self.plans, self.commands)
        self.prefetches = Prefetches(registry, self.plans)
        self.wakes = Prewakes(registry, observer, epoch, self._move_lock, self.plans, self.commands)
        self.on_step: Callable[[], object] | None = None
        """Called when a model has moved."""

    def __repr__(self) -> str:
        where = {model.alias: model.residency.value for model in self._registry}
        return f"<Ladder {where} moving={self._move_lock.locked()}>"

    def move_lock(self) -> asyncio.Lock:
        """Return the lock that is held while models move: `async with ladder.move_lock()`."""
        return self._move_lock

    def pin(self, model: Model, pinned: bool) -> None:
        """Keep a model from being evicted, or allow it again, whatever its residency."""
        if model.pinned != pinned:
            model.pinned = pinned
            self._observer.notify(PinChanged(self._epoch(), model.alias, pinned))

    # --- room ---------------------------------------------------------------------------------

    async def make_room(self, target: Model, keep: Iterable[Model] = ()) -> Room:
        """Move models down until `target` can come up. The caller holds `move_lock`.

        Raises:
            NoRoom: it cannot; nothing has been moved.
        """
        if target.is_loaded:
            return Room()  # the usual case: it needs no memory
        await self.free_failed_engines()
        await self.device.measure()
        plan = self.plans.make(target, keep)
        lost = 0
        for alias in plan.given_up:
            await self.wakes.give_up_and_wait(self._registry.resolve(alias))
        for move in plan.evictions:
            lost += await self.move_down(self._registry.resolve(move.alias), move.after)
        return Room(plan.evictions, lost)

    async def evict_all_but(self, target: Model, even_pinned: Model | None = None) -> int:
        """Unload every model except pinned ones and `target`, whatever a plan says.

        `even_pinned` is a model that is unloaded even if it is pinned. Returns the requests lost.
        """
        lost = 0
        for model in self._registry:
            if model is not target:
                with suppress(NoRoom):  # it is logged; an unload gives the memory back, too
                    await self.wakes.give_up_and_wait(model)
            is_held = model.residency not in (Residency.COLD, Residency.FAILED)
            if model is not target and is_held and (model is even_pinned or not model.pinned):
                lost += await self.move_down(model, Residency.COLD)
        return lost

    async def free_failed_engines(self) -> None:
        """Free what failed engines still hold. The caller holds `move_lock`.

        Failed models count as cold, so plans use their memory for others.
        """
        for model in self._registry:
            what = f"cleaning up the failed engine of {model.alias!r}"
            await self.commands.run(model.engine.clean_up(), what)

    # --- moves --------------------------------------------------------------------------------

    async def move_down(self, model: Model, to: Residency) -> int:
        """Move one model down, so that it gives memory back. The caller holds `move_lock`.

        Returns how many of its requests could not be kept, and were aborted.
        """
        if model.residency is Residency.ACTIVE:
            self.step(model, Step.PARK)
        async with self.wakes.take_over(model):
            return await self._move_down(model, to)

    async def _move_down(self, model: Model, to: Residency) -> int:
        if to is not Residency.COLD:
            self.prefetches.give_up_for(model, to)
            work = model.engine.sleep(1 if to is Residency.ASLEEP else 2)
            await self._timed(model, DOWN[to], work)
            return 0
        lost = drain.end(model.leases, ParkedEnded(model.alias, "its model was unloaded"))
        if lost:
            await drain.until_ended(model)
        await self._timed(model, DOWN[to], model.engine.unload())
        return lost

    async def bring_up(self, model: Model) -> None:
        """Load or wake one model, for which there is room. The caller holds `move_lock`."""
        if model.residency is Residency.COLD:
            await self._load(model)
        elif not model.is_loaded:
            async with self.wakes.take_over(model):
                await self._wake(model)

    async def _wake(self, model: Model) -> None:
        open_ones = [lease for lease in model.parked if lease.gate is None]
        for lease in model.parked:
            # A failed wake unloads the engine, which aborts them: hold that back.
            lease.close_gate()
        try:
            await self._timed(model, Step.WAKE, model.engine.wake())
        except NoRoom:  # it is still asleep, with its requests, and holds no more than before
            self.wakes.end(model, "no_room")
            for lease in open_ones:
                lease.open_gate()
            raise
        except Exception:
            drain.end(model.leases, ParkedEnded(model.alias, "its model could not be woken"))
            refuse_failed(model)
            self.step(model, Step.WAKE_FAILED)
            raise

    async def _load(self, model: Model) -> None:
        refuse_failed(model)
        started_s = self._clock()
        self.step(model, Step.LOAD)
        model.failure, model.is_verified = None, False

        def progress(stage: str) -> None:
            elapsed_s = self._clock() - started_s
            self._observer.notify(LoadProgress(self._epoch(), model.alias, stage, elapsed_s))

        try:
            timeout_s = self.commands.deadlines.load_timeout
            await self.commands.run_with_deadline(
                model.engine.load(progress), timeout_s, f"the load of {model.alias!r}"
            )
            refuse_failed(model)  # it may have died during the load
        except BaseException:
            if model.residency is not Residency.FAILED:
                self.step(model, Step.LOAD_FAILED)
            raise
        self.step(model, Step.LOADED)
        model.came_up(Residency.COLD, self._clock() - started_s)
        progress("ready")

    async def _timed(self, model: Model, step: Step, work: Awaitable[None]) -> None:
        before, started_s = model.residency, self._clock()
        is_begun = model.waking is not None and model.waking.done_bytes > 0
        model.is_verified = False
        await self.commands.run_for(model, work, step.value)
        refuse_failed(model)  # it may have died during the work
        self.step(model, step)
        took_s = self._clock() - started_s
        if step is Step.WAKE and not is_begun:
            model.came_up(before, took_s)
        self._observer.notify(
            ModelMoved(self._epoch(), model.alias, before, model.residency, took_s)
        )

    # --- steps --------------------------------------------------------------------------------

    def revive(self, model: Model) -> None:
        """Make a model whose engine has died cold, like one that was never loaded."""
        if model.residency is Residency.FAILED:
            self.step(model, Step.REVIVE)

    def step(self, model: Model, step: Step) -> None:
        """Take one step of a model, and notify. Raises `IllegalTransition`."""
        before = model.step(step)
        if step in (Step.LOAD, Step.WAKE):
            self.prefetches.cancel(model)  # the engine has its weights, or reads them itself
        if model.residency is not Residency.ASLEEP:
            self.wakes.end(model, ENDS.get(step, "given_up"))
        if step in (Step.LOADED, Step.WAKE, Step.PARK):
            model.last_used_s = self._clock()  # it was used until now, or will be used soon
        if self.on_step is not None:
            self.on_step()
        self._observer.notify(ResidencyChanged(self._epoch(), model.alias, before, model.residency))
