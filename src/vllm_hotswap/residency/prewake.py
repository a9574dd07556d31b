"""Early wakes: a model wakes in slices, before a request asks for it, while another is served.

Nothing is given up for it. A slice starts only while no models move, and a move waits at most for
the slice that is under way. The switch to the model does what is left. A wake that is no longer
wanted gives back what it has taken. Whatever fails, the model is asleep as before, and the requests
that are served are not affected.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import Context

from vllm_hotswap.errors import HotswapError, NoRoom, one_line
from vllm_hotswap.events import Observer, WakeChange, WakeChanged
from vllm_hotswap.models import Model, Registry, Usage, Waking
from vllm_hotswap.residency.commands import Commands
from vllm_hotswap.residency.plans import Plans
from vllm_hotswap.states import Residency
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap")


class Prewakes:
    """The wakes under way.

    The mutable state is `waking` of each model in the registry; `_one_at_a_time`, the lock that is
    held during a slice, so that a step waits for one slice at most; and `_is_closed`, after which
    none starts.
    """

    def __init__(
        self,
        registry: Registry,
        observer: Observer,
        epoch: Callable[[], int],
        move_lock: asyncio.Lock,
        plans: Plans,
        commands: Commands,
    ) -> None:
        """`move_lock` is held while models move."""
        self._registry = registry
        self._observer = observer
        self._epoch = epoch
        self._move_lock = move_lock
        self._plans = plans
        self._commands = commands
        deadlines = commands.deadlines
        # A slice may wait for a step, for as long as that may take: no request waits for it.
        self._slice_s = deadlines.step_timeout + deadlines.command_timeout
        # Parts are given back while models move: a load may come between two of them.
        self._give_back_s = self._slice_s + deadlines.load_timeout
        self._one_at_a_time = asyncio.Lock()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Prewakes {[model.alias for model in self._registry if model.waking]}>"

    def begin(self, model: Model) -> Waking | None:
        """Start to wake a sleeping model before it is asked for, if there is room right now."""
        needs, budget = _needs(model), self._plans.budget
        if self._is_closed:
            return None
        if not can_wake_beside(model) or not (self._held_beside(model) + needs).fits(budget):
            return None
        leaving = [m.waking.task for m in self._registry if m.waking and m.waking.is_given_up]
        model.waking = waking = Waking(needs)
        waking.task = self._start_task(model, waking, leaving)
        self._notify(model, waking, "begun")
        return waking

    def _held_beside(self, model: Model) -> Usage:
        """Return what all models hold, without the wakes of `model` and those given up already."""
        held = Usage()
        for other in self._registry:
            is_leaving = other.waking is not None and other.waking.is_given_up
            held = held + (other.resting if is_leaving or other is model else other.held)
        return held

    def give_up(self, model: Model) -> None:
        """Make a wake give back what it has taken. Idempotent."""
        if (waking := model.waking) is None:
            return
        before = waking.task
        if waking.is_given_up and not before.done() and not before.cancelling():
            return
        waking.given_up.set()
        # Its task may wait for `move_lock`, which the caller here may hold. So it is cancelled,
        # not notified. The host finishes the slice under way before it gives anything back.
        before.cancel()
        waking.task = self._start_task(model, waking, [before])

    def give_up_all(self) -> None:
        """Do as `give_up` with every model."""
        for model in self._registry:
            self.give_up(model)

    async def give_up_and_wait(self, model: Model) -> None:
        """Do as `give_up`, and wait until all is given back. The caller holds `move_lock`.

        Raises:
            NoRoom: it could not be given back; a later attempt may succeed.
        """
        if (waking := model.waking) is not None:
            self.give_up(model)
            what = f"giving back the early wake of {model.alias!r}"
            await self._commands.run(asyncio.wait([waking.task]), what)
            if model.waking is waking:
                raise NoRoom(f"no room: {what} has failed; try again")

    @asynccontextmanager
    async def take_over(self, model: Model) -> AsyncIterator[None]:
        """Take no more slices inside: the holder of `move_lock` does what is left, or ends it.

        A wake that is still there afterwards is given up.
        """
        try:
            if (waking := model.waking) is not None:
                waking.task.cancel()
                await asyncio.wait([waking.task])
            yield
        finally:
            self.give_up(model)

    def close(self) -> None:
        """Start no wake from now on, and stop those under way: the server ends.

        The host gives everything back.
        """
        self._is_closed = True
        for model in self._registry:
            if model.waking is not None:
                model.waking.task.cancel()

    def end(self, model: Model, change: WakeChange) -> None:
        """Drop a wake: the model is awake, or holds nothing of what slices have taken."""
        if (waking := model.waking) is not None:
            model.waking = None
            # Not the current task: `_run` calls this for its own wake.
            if waking.task is not asyncio.current_task():
                waking.task.cancel()
            self._notify(model, waking, change)

    def _start_task(
        self, model: Model, waking: Waking, leaving: list[asyncio.Task[None]]
    ) -> asyncio.Task[None]:
        # In a context of its own: it is not a part of the request that has led to it.
        work, name = self._run(model, waking, leaving), f"wake-{model.alias}"
        return asyncio.create_task(work, name=name, context=Context())

    async def _run(self, model: Model, waking: Waking, leaving: list[asyncio.Task[None]]) -> None:
        if leaving:
            await asyncio.wait(leaving)
        change: WakeChange = "given_up"
        try:
            await self._take_slices(model, waking)
            await waking.given_up.wait()
        except HotswapError as error:  # it holds nothing now
            change = "no_room" if isinstance(error, NoRoom) else "failed"
            _log("wake_failed", model, error)
        else:
            if not await self._try_to_give_back(model):
                return
        if model.waking is waking:
            self.end(model, change)

    async def _try_to_give_back(self, model: Model) -> bool:
        """Whether all was given back. If not, it still counts, and the next `give_up` retries."""
        what = f"giving back the early wake of {model.alias!r}"
        try:
            await self._commands.run_with_deadline(
                model.engine.give_up_wake(), self._give_back_s, what
            )
        except HotswapError as error:
            _log("wake_kept", model, error)
            return False
        return True

    async def _take_slices(self, model: Model, waking: Waking) -> None:
        while not (waking.is_given_up or waking.is_done):
            async with self._one_at_a_time:
                async with self._move_lock:
                    pass  # a move goes first
                # A move in the meantime may have been planned before this wake started.
                if self._plans.lacks_memory():
                    waking.given_up.set()
                if not waking.is_given_up:
                    what = f"a slice of the wake of {model.alias!r}"
                    slicing = model.engine.wake_some()
                    waking.progress = await self._commands.run_with_deadline(
                        slicing, self._slice_s, what
                    )
        if not waking.is_given_up:
            self._notify(model, waking, "done")

    def _notify(self, model: Model, waking: Waking, change: WakeChange) -> None:
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
    """Return what a sleeping model takes besides what it holds, until it is awake."""
    footprint = model.engine.footprint
    more = footprint.at(Residency.PARKED) - footprint.at(Residency.ASLEEP)
    return Usage(max(0, more.device), max(0, more.host))
