"""Waking a model before it is asked for, in slices, while another one is served.

Nothing is given up for it. A slice is begun when nobody moves models, and whoever moves them waits
for none but the one that is under way. The switch to the model does what is left. A wake that is
not wanted any more gives back what it has taken; whatever fails of it, the model is asleep, as it
was, and who is served has not noticed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import Context
from typing import Protocol, TypeVar

from vllm_hotswap.errors import HotswapError, NoRoom, one_line
from vllm_hotswap.events import Observer, WakeChange, WakeChanged
from vllm_hotswap.log_lines import value_text
from vllm_hotswap.planner import Usage
from vllm_hotswap.registry import Model, Registry, Waking
from vllm_hotswap.settings import RecoveryConfig
from vllm_hotswap.states import Residency

T = TypeVar("T")

log = logging.getLogger("vllm_hotswap")


class Within(Protocol):
    """Has a deadline for what an engine is told: `Ladder.within`."""

    def __call__(self, work: Awaitable[T], timeout_s: float, what: str) -> Awaitable[T]: ...


class Prewakes:
    """The wakes under way.

    The mutable state is `waking` of each model in the registry; `_one_at_a_time`, the lock of who
    takes a slice: a step waits for one of them at most; and `_is_closed`: none begins any more.
    """

    def __init__(
        self,
        registry: Registry,
        observer: Observer,
        epoch: Callable[[], int],
        turn: asyncio.Lock,
        within: Within,
        lacks_memory: Callable[[], bool],
        deadlines: RecoveryConfig,
    ) -> None:
        """
        Args:
            turn: held by whoever moves models.
            lacks_memory: says whether models count on more of the device than they may have.
        """
        self._lacks_memory = lacks_memory
        self._registry = registry
        self._observer = observer
        self._epoch = epoch
        self._turn = turn
        self._within = within
        self._command_s = deadlines.command_timeout
        # A slice may wait for a step, for as long as that may take: nobody has asked for it.
        self._slice_s = deadlines.step_timeout + deadlines.command_timeout
        # Parts are given back while others move models: a load may come between two of them.
        self._give_back_s = self._slice_s + deadlines.load_timeout
        self._one_at_a_time = asyncio.Lock()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Prewakes {[model.alias for model in self._registry if model.waking]}>"

    def begin(self, model: Model, budget: Usage) -> Waking | None:
        """Begin to wake a model, if it sleeps and there is room for it as things are."""
        needs = _needs(model)
        if self._is_closed:
            return None
        if not can_wake_beside(model) or not (self._held_beside(model) + needs).fits(budget):
            return None
        leaving = [m.waking.task for m in self._registry if m.waking and m.waking.is_given_up]
        model.waking = waking = Waking(needs)
        waking.task = self._begun(model, waking, leaving)
        self._tell(model, waking, "begun")
        return waking

    def _held_beside(self, model: Model) -> Usage:
        """What all hold but by wakes: that of `model`, and those that give it back already."""
        held = Usage()
        for other in self._registry:
            is_leaving = other.waking is not None and other.waking.is_given_up
            held = held + (other.resting if is_leaving or other is model else other.held)
        return held

    def give_up(self, model: Model) -> None:
        """Have a wake give back what it has taken. Idempotent."""
        if (waking := model.waking) is None:
            return
        before = waking.task
        if waking.is_given_up and not before.done() and not before.cancelling():
            return
        waking.given_up.set()
        # Its task may wait for the turn, which whoever gives it up may hold: so it is told nothing,
        # but ended. The host does the slice that is under way before it gives anything back.
        before.cancel()
        waking.task = self._begun(model, waking, [before])

    async def gave_up(self, model: Model) -> None:
        """The same, and wait for it. The caller holds the turn.

        Raises:
            NoRoom: it could not be given back; another time it may.
        """
        if (waking := model.waking) is not None:
            self.give_up(model)
            what = f"giving back what the wake of {model.alias!r} had taken"
            await self._within(asyncio.wait([waking.task]), self._command_s, what)
            if model.waking is waking:
                raise NoRoom(f"no room: {what} has failed; try again")

    @asynccontextmanager
    async def taken_over(self, model: Model) -> AsyncIterator[None]:
        """No more slices are taken inside: whoever holds the turn does what is left, or ends it.

        What is there afterwards all the same is given up.
        """
        try:
            if (waking := model.waking) is not None:
                waking.task.cancel()
                await asyncio.wait([waking.task])
            yield
        finally:
            self.give_up(model)

    def close(self) -> None:
        """The server ends: nothing is taken any more, and the host gives all back."""
        self._is_closed = True
        for model in self._registry:
            if model.waking is not None:
                model.waking.task.cancel()

    def end(self, model: Model, change: WakeChange) -> None:
        """The model has woken, or holds nothing any more of what slices have taken."""
        if (waking := model.waking) is not None:
            model.waking = None
            if waking.task is not asyncio.current_task():
                waking.task.cancel()
            self._tell(model, waking, change)

    def _begun(
        self, model: Model, waking: Waking, leaving: list[asyncio.Task[None]]
    ) -> asyncio.Task[None]:
        # In a context of its own: it is no part of whichever request has led to it.
        work, name = self._run(model, waking, leaving), f"wake-{model.alias}"
        return asyncio.create_task(work, name=name, context=Context())

    async def _run(self, model: Model, waking: Waking, leaving: list[asyncio.Task[None]]) -> None:
        if leaving:
            await asyncio.wait(leaving)
        change: WakeChange = "given_up"
        try:
            await self._take_slices(model, waking)
            await waking.given_up.wait()
        except HotswapError as error:  # nothing is held any more
            change = "no_room" if isinstance(error, NoRoom) else "failed"
            _log("wake_failed", model, error)
        else:
            if not await self._has_given_back(model):
                return
        if model.waking is waking:
            self.end(model, change)

    async def _has_given_back(self, model: Model) -> bool:
        """What could not be given back stays in the books, and is tried again with a next end."""
        what = f"giving back what the wake of {model.alias!r} had taken"
        try:
            await self._within(model.engine.give_up_wake(), self._give_back_s, what)
        except HotswapError as error:
            _log("wake_kept", model, error)
            return False
        return True

    async def _take_slices(self, model: Model, waking: Waking) -> None:
        while not (waking.is_given_up or waking.is_done):
            async with self._one_at_a_time:
                async with self._turn:
                    pass  # whoever moves models goes first
                # Who has moved in the meantime may have planned before this one had begun.
                if self._lacks_memory():
                    waking.given_up.set()
                if not waking.is_given_up:
                    what = f"a slice of the wake of {model.alias!r}"
                    slicing = model.engine.wake_some()
                    waking.progress = await self._within(slicing, self._slice_s, what)
        if not waking.is_given_up:
            self._tell(model, waking, "done")

    def _tell(self, model: Model, waking: Waking, change: WakeChange) -> None:
        event = WakeChanged(
            self._epoch(), model.alias, change, waking.done_bytes, waking.total_bytes
        )
        self._observer.notify(event)


def _log(event: str, model: Model, error: HotswapError) -> None:
    log.warning("event=%s model=%s cause=%r", event, value_text(model.alias), one_line(error))


def can_wake_beside(model: Model) -> bool:
    """Whether it sleeps, and its device can wake it while another model is served."""
    return model.residency is Residency.ASLEEP and model.engine.wakes_in_slices


def _needs(model: Model) -> Usage:
    """What a sleeping model takes besides what it holds, until it is awake."""
    footprint = model.engine.footprint
    more = footprint.at(Residency.PARKED) - footprint.at(Residency.ASLEEP)
    return Usage(max(0, more.device), max(0, more.host))
