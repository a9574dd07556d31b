"""Moving models on the residency ladder, one at a time, under the memory budget.

`planner` decides which models move. This module moves them: it steps a model's residency, lets the
engine do the work, measures the time, and notifies observers. The coordinator's switches go through
it, too. All work of an engine has a deadline: `run_with_deadline`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from vllm_hotswap.config import RecoveryConfig
from vllm_hotswap.errors import (
    ConfigError,
    EngineUnavailable,
    HotswapError,
    InvalidRequest,
    LoadFailed,
    ModelInUse,
    NoRoom,
    ParkedEnded,
    one_line,
)
from vllm_hotswap.events import (
    LoadProgress,
    ModelMoved,
    Observer,
    PinChanged,
    ResidencyChanged,
    WakeChange,
)
from vllm_hotswap.models import EngineHost, Model, Prefetch, Registry, Usage, Waking, drain
from vllm_hotswap.residency.planner import (
    MemorySnapshot,
    ModelView,
    Move,
    Plan,
    fits_together,
    make_plan,
    relief,
)
from vllm_hotswap.residency.prewake import Prewakes
from vllm_hotswap.states import DOWN, Residency, Step, is_below
from vllm_hotswap.system import value_text

Clock = Callable[[], float]
T = TypeVar("T")

log = logging.getLogger("vllm_hotswap")

RESTING = {1: Residency.ASLEEP, 2: Residency.DISCARDED}
"""The residency that each sleep level leads to."""

ENDS: Mapping[Step, WakeChange] = {Step.WAKE: "used", Step.FAIL: "failed"}
"""The outcome of an early wake, by the step that ends it."""

READ_BYTES_PER_S = 500e6
"""Assumed speed of reading weights, for the cost of a load that has not been measured yet."""

LOOK_S = 2.0
"""Seconds in which a routine look must be answered; the look waits for the step under way."""

LINK_BYTES_PER_S = 20e9
"""Assumed speed from host memory to an accelerator, for a wake that has not been measured yet:
about that of PCI Express 4.0 with 16 lanes."""


@dataclass(frozen=True, slots=True)
class Room:
    """What was done to make room."""

    evicted: tuple[Move, ...] = ()
    requests_lost: int = 0
    """Parked requests that were aborted, because their model had to be unloaded."""


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


class Ladder:
    """All models' residencies below `active`.

    The mutable state:

    - the residency, pin, costs and prefetch of each model in the registry;
    - `_move_lock`, the lock that is held while models move. The host has one compute thread, and
      the sum of what models hold is only known between moves;
    - `_wakes`, the early wakes, of models that no request has asked for yet;
    - `_logged_lack`, the last log line about memory that other processes have taken.
    """

    def __init__(
        self,
        registry: Registry,
        host: EngineHost,
        observer: Observer,
        clock: Clock,
        epoch: Callable[[], int],
        deadlines: RecoveryConfig | None = None,
    ) -> None:
        self._registry = registry
        self._host = host
        self._observer = observer
        self._clock = clock
        self._deadlines = deadlines or RecoveryConfig()
        self._epoch = epoch
        self._move_lock = asyncio.Lock()
        self._wakes = Prewakes(
            registry,
            observer,
            epoch,
            self._move_lock,
            self.run_with_deadline,
            self._lacks_memory,
            self._deadlines,
        )
        self._logged_lack: object = None
        """The last log line about memory that other processes have taken."""
        self.on_step: Callable[[], object] | None = None
        """Called when a model has moved."""

    def __repr__(self) -> str:
        where = {model.alias: model.residency.value for model in self._registry}
        return f"<Ladder {where} moving={self._move_lock.locked()}>"

    # --- what there is ------------------------------------------------------------------------

    @property
    def budget(self) -> Usage:
        return self._host.budget

    @property
    def used(self) -> Usage:
        return self.snapshot().used

    def snapshot(
        self, drained: Model | None = None, without_parked: bool = False
    ) -> MemorySnapshot:
        """Return what the planner decides from.

        Args:
            drained: a model whose requests will have ended before anything moves.
            without_parked: whether parked requests may be lost.
        """
        views = [
            self._view(model, model is drained or (without_parked and bool(model.parked)))
            for model in self._registry
        ]
        return MemorySnapshot(tuple(views), self.budget)

    def plan(self, target: Model, active: Model | None) -> Plan:
        """Return what a switch to `target` would do. Raises `NoRoom`."""
        return self._plan(target, drained=active)

    def _plan(self, target: Model, keep: Iterable[str] = (), drained: Model | None = None) -> Plan:
        """Make a plan that gives up parked requests only if there is no other way."""
        try:
            return make_plan(self.snapshot(drained), target.alias, keep)
        except NoRoom:
            if not any(model.parked for model in self._registry):
                raise
            return make_plan(self.snapshot(drained, without_parked=True), target.alias, keep)

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
            plan = self._plan(target, drained=active)
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
                self._view(model, drained=True, residency=_at_least(model, target))
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
        return fits_together([self._view(model, drained=True) for model in models], self.budget)

    def _view(self, model: Model, drained: bool, residency: Residency | None = None) -> ModelView:
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

    # --- operations that callers ask for ------------------------------------------------------

    async def load(self, model: Model) -> OperationResult:
        """Load a model to `parked` from any residency; the active model stays active."""
        return await self._move_up_on_request("load", model)

    async def wake(self, model: Model) -> OperationResult:
        """Wake a sleeping model, up to `parked`. Raises `InvalidRequest` if it is cold."""
        return await self._move_up_on_request("wake", model)

    async def unload(self, model: Model) -> OperationResult:
        """Unload a model."""
        return await self._move_down_on_request("unload", model, Residency.COLD)

    async def sleep(self, model: Model, level: int) -> OperationResult:
        """Put a model to sleep.

        Raises:
            InvalidRequest: its device does not have the level.
            ModelInUse: it is active, pinned, or has requests that would not survive.
        """
        if level not in RESTING or RESTING[level] not in model.engine.footprint.usage:
            known = [str(n) for n, to in RESTING.items() if to in model.engine.footprint.usage]
            raise InvalidRequest(
                f"model {model.alias!r} has no sleep level {level} on this platform; "
                f"levels: {', '.join(known) or 'none (it can be unloaded)'}",
                "level",
            )
        return await self._move_down_on_request("sleep", model, RESTING[level])

    async def prefetch(self, model: Model) -> OperationResult:
        """Read a model's files ahead, within the host budget; join a reading that is under way."""
        started_s, residency = self._clock(), model.residency
        done = 0
        if residency in (Residency.COLD, Residency.DISCARDED):
            reading = self.begin_prefetch(model)
            reading.is_explicit = True
            # Not `await reading.task`: a caller that leaves must not cancel the reading.
            await asyncio.wait([reading.task])
            done = 0 if reading.task.cancelled() else reading.task.result()
        return OperationResult(
            "prefetch", model.alias, residency, model.residency, self._clock() - started_s, (), done
        )

    def begin_prefetch(self, model: Model) -> Prefetch:
        """Start to read a model's files, or join the reading that is under way."""
        if model.prefetch is None or not model.prefetch.is_under_way:
            limit_bytes = self.spare_host_bytes(model)
            if weights_bytes := model.engine.memory.weights_bytes:  # 0 where it is not known
                limit_bytes = min(limit_bytes, weights_bytes)
            model.prefetch = prefetch = Prefetch(limit_bytes)
            reading = model.engine.prefetch(limit_bytes, prefetch.record_progress)
            prefetch.task = asyncio.create_task(reading)
            # Perhaps no caller waits for it: the load will report a file that cannot be read.
            prefetch.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return model.prefetch

    def spare_host_bytes(self, model: Model) -> int:
        """Return host memory for files of a model, beside sleeping weights and others' files."""
        others = self.prefetched_bytes - (model.prefetch.held_bytes if model.prefetch else 0)
        return max(0, self.budget.host - self.used.host - others)

    @property
    def prefetched_bytes(self) -> int:
        """Host memory for files that were read ahead and have not been needed yet."""
        return sum(model.prefetch.held_bytes for model in self._registry if model.prefetch)

    def cancel_prefetch(self, model: Model) -> None:
        """Cancel the reading of a model's files, and free its place in the host budget."""
        if model.prefetch is not None:
            model.prefetch.task.cancel()
            model.prefetch = None

    def _give_up_files_for(self, model: Model, to: Residency) -> None:
        """Give up files that were read ahead, if sleeping weights need their place."""
        takes = model.engine.footprint.at(to).host - model.engine.footprint.at(model.residency).host
        for other in self._registry:
            if self.used.host + takes + self.prefetched_bytes <= self.budget.host or takes <= 0:
                return
            self.cancel_prefetch(other)

    def begin_wake(self, model: Model) -> Waking | None:
        """Start to wake a sleeping model before it is asked for, if there is room right now."""
        return self._wakes.begin(model, self.budget)

    def give_up_wake(self, model: Model) -> None:
        """Make a model give back what its early wake has taken. Idempotent."""
        self._wakes.give_up(model)

    def close(self) -> None:
        """Start no early wakes from now on, and stop those under way: the server ends."""
        self._wakes.close()

    def give_up_wakes(self) -> None:
        for model in self._registry:
            self._wakes.give_up(model)

    def pin(self, model: Model, pinned: bool) -> None:
        """Keep a model from being evicted, or allow it again, whatever its residency."""
        if model.pinned != pinned:
            model.pinned = pinned
            self._observer.notify(PinChanged(self._epoch(), model.alias, pinned))

    async def _move_up_on_request(self, operation: str, model: Model) -> OperationResult:
        async with self.move_lock(), _named_failure(model, operation):
            self.revive(model)
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
                evicted = (await self.make_room(model, keep=self._active())).evicted
                await self.bring_up(model)
            took_s = self._clock() - started_s
            return OperationResult(operation, model.alias, before, model.residency, took_s, evicted)

    async def _move_down_on_request(
        self, operation: str, model: Model, to: Residency
    ) -> OperationResult:
        async with self.move_lock(), _named_failure(model, operation):
            before, started_s = model.residency, self._clock()
            if before is not Residency.FAILED and is_below(to, before):
                _refuse_use(model, operation, to)
                await self.move_down(model, to)
            return OperationResult(
                operation, model.alias, before, model.residency, self._clock() - started_s
            )

    # --- moves --------------------------------------------------------------------------------

    def move_lock(self) -> asyncio.Lock:
        """Return the lock that is held while models move: `async with ladder.move_lock()`."""
        return self._move_lock

    def revive(self, model: Model) -> None:
        """Make a model whose engine has died cold, like one that was never loaded."""
        if model.residency is Residency.FAILED:
            self.step(model, Step.REVIVE)

    async def run_with_deadline(self, work: Awaitable[T], timeout_s: float, what: str) -> T:
        """Await the work of an engine, with a deadline.

        The engine host's one compute thread cannot be stopped. If the work is not done by its
        deadline, the host is killed, and recovery starts another one.

        Raises:
            EngineUnavailable: the work was not done in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError:
            why = f"{what} did not finish within {timeout_s:g} s"
            self._host.kill(f"the engine host was stopped: {why}")
            raise EngineUnavailable(why) from None

    async def run_command(self, model: Model, what: str, work: Awaitable[T]) -> T:
        """Await work, with the deadline of all commands except loads."""
        timeout_s = self._deadlines.command_timeout
        try:
            return await self.run_with_deadline(work, timeout_s, f"{what} of model {model.alias!r}")
        except HotswapError:
            refuse_failed(model)  # if its engine has died, that is the reason
            raise

    async def make_room(self, target: Model, keep: Iterable[Model] = ()) -> Room:
        """Move models down until `target` can come up. The caller holds `move_lock`.

        Raises:
            NoRoom: it cannot; nothing has been moved.
        """
        if target.is_loaded:
            return Room()  # the usual case: it needs no memory
        await self.free_failed_engines()
        await self.measure_device()
        plan = self._plan(target, [model.alias for model in keep])
        lost = 0
        for alias in plan.given_up:
            await self._wakes.give_up_and_wait(self._registry.resolve(alias))
        for move in plan.evictions:
            lost += await self.move_down(self._registry.resolve(move.alias), move.after)
        return Room(plan.evictions, lost)

    async def free_failed_engines(self) -> None:
        """Free what failed engines still hold. The caller holds `move_lock`.

        Failed models count as cold, so plans use their memory for others.
        """
        timeout_s = self._deadlines.command_timeout
        for model in self._registry:
            what = f"cleaning up the failed engine of {model.alias!r}"
            await self.run_with_deadline(model.engine.clean_up(), timeout_s, what)

    def _active(self) -> list[Model]:
        return [model for model in self._registry if model.residency is Residency.ACTIVE]

    async def measure_device(self) -> None:
        """Measure what other processes use of the device, and adapt the budget to that.

        The caller holds `move_lock`: nothing may move during the measurement.
        """
        if self._host.is_device_shared:
            timeout_s = self._deadlines.command_timeout
            await self.run_with_deadline(
                self._host.measure_device(self._taken_bytes),
                timeout_s,
                "measuring the device's memory",
            )

    @property
    def _taken_bytes(self) -> int:
        """Device memory that models hold now: a model that wakes in slices has not taken all yet.

        A wake that is given up counts as if it had given everything back.
        """
        wakes = [model.waking for model in self._registry if model.waking]
        # Its part counts, not its bytes: those are of all workers, and this is one device.
        missing = (w.needs.device * (1.0 if w.is_given_up else w.left) for w in wakes)
        return self.used.device - round(sum(missing))

    async def relieve(self) -> tuple[Move, ...]:
        """Move models down if other processes have taken device memory that the budget counts on.

        Otherwise an allocation could fail later. The active model stays. If the host does not
        answer soon, because a step takes long, nothing is done until the next time.
        """
        async with self.move_lock():
            if not await self._measure_in_time():
                return ()
            if not self._lacks_memory():
                self._logged_lack = None
                return ()
            for model in self._registry:  # early wakes go first: no request needs them yet
                with suppress(NoRoom):  # it is logged
                    await self._wakes.give_up_and_wait(model)
            if not self._lacks_memory():
                return ()
            moves = relief(self.snapshot(), [active.alias for active in self._active()])
            self._log_lack(moves)
            for move in moves:
                await self._relieve_by(self._registry.resolve(move.alias), move.after)
            return moves

    def _lacks_memory(self) -> bool:
        return self.used.device > self.budget.device

    async def _measure_in_time(self) -> bool:
        if not self._host.is_device_shared:
            return True
        try:
            async with asyncio.timeout(LOOK_S):
                await self._host.measure_device(self._taken_bytes)
        except TimeoutError:
            return False
        return True

    def _log_lack(self, moves: tuple[Move, ...]) -> None:
        """Log a lack of memory; once, as long as nothing about it changes."""
        lack = (self._host.others_bytes, self.used.device, moves)
        if lack == self._logged_lack:
            return
        self._logged_lack = lack
        log.warning(
            "event=device_taken others_bytes=%d budget_bytes=%d used_bytes=%d moves=%s",
            self._host.others_bytes,
            self.budget.device,
            self.used.device,
            {move.alias: move.after.value for move in moves},
        )

    async def _relieve_by(self, model: Model, to: Residency) -> None:
        """Move a model down; unload it if the host has no room for it and no request needs it."""
        try:
            await self.move_down(model, to)
        except NoRoom as error:
            alias = value_text(model.alias)
            log.warning("event=sleep_failed model=%s cause=%r", alias, one_line(error))
            if not model.leases:
                await self.move_down(model, Residency.COLD)

    async def evict_all_but(self, target: Model, even_pinned: Model | None = None) -> int:
        """Unload every model except pinned ones and `target`, whatever a plan says.

        `even_pinned` is a model that is unloaded even if it is pinned. Returns the requests lost.
        """
        lost = 0
        for model in self._registry:
            if model is not target:
                with suppress(NoRoom):  # it is logged; an unload gives the memory back, too
                    await self._wakes.give_up_and_wait(model)
            is_held = model.residency not in (Residency.COLD, Residency.FAILED)
            if model is not target and is_held and (model is even_pinned or not model.pinned):
                lost += await self.move_down(model, Residency.COLD)
        return lost

    async def move_down(self, model: Model, to: Residency) -> int:
        """Move one model down, so that it gives memory back. The caller holds `move_lock`.

        Returns how many of its requests could not be kept, and were aborted.
        """
        if model.residency is Residency.ACTIVE:
            self.step(model, Step.PARK)
        async with self._wakes.take_over(model):
            return await self._move_down(model, to)

    async def _move_down(self, model: Model, to: Residency) -> int:
        if to is not Residency.COLD:
            self._give_up_files_for(model, to)
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
            async with self._wakes.take_over(model):
                await self._wake(model)

    async def _wake(self, model: Model) -> None:
        open_ones = [lease for lease in model.parked if lease.gate is None]
        for lease in model.parked:
            # A failed wake unloads the engine, which aborts them: hold that back.
            lease.close_gate()
        try:
            await self._timed(model, Step.WAKE, model.engine.wake())
        except NoRoom:  # it is still asleep, with its requests, and holds no more than before
            self._wakes.end(model, "no_room")
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
            timeout_s = self._deadlines.load_timeout
            await self.run_with_deadline(
                model.engine.load(progress), timeout_s, f"the load of {model.alias!r}"
            )
            refuse_failed(model)  # it may have died during the load
        except BaseException:
            if model.residency is not Residency.FAILED:
                self.step(model, Step.LOAD_FAILED)
            raise
        self.step(model, Step.LOADED)
        self._remember(model, Residency.COLD, self._clock() - started_s)
        progress("ready")

    async def _timed(self, model: Model, step: Step, work: Awaitable[None]) -> None:
        before, started_s = model.residency, self._clock()
        is_begun = model.waking is not None and model.waking.done_bytes > 0
        model.is_verified = False
        await self.run_command(model, step.value, work)
        refuse_failed(model)  # it may have died during the work
        self.step(model, step)
        took_s = self._clock() - started_s
        if step is Step.WAKE and not is_begun:
            self._remember(model, before, took_s)
        self._observer.notify(
            ModelMoved(self._epoch(), model.alias, before, model.residency, took_s)
        )

    def step(self, model: Model, step: Step) -> None:
        before = model.step(step)
        if step in (Step.LOAD, Step.WAKE):
            self.cancel_prefetch(model)  # the engine has its weights, or reads them itself
        if model.residency is not Residency.ASLEEP:
            self._wakes.end(model, ENDS.get(step, "given_up"))
        if step in (Step.LOADED, Step.WAKE, Step.PARK):
            model.last_used_s = self._clock()  # it was used until now, or will be used soon
        if self.on_step is not None:
            self.on_step()
        self._observer.notify(ResidencyChanged(self._epoch(), model.alias, before, model.residency))

    def _remember(self, model: Model, before: Residency, took_s: float) -> None:
        """Average a time with earlier ones: the first load pays for more than later ones."""
        known = model.up_s.get(before)
        model.up_s[before] = took_s if known is None else (known + took_s) / 2

    # --- idle models --------------------------------------------------------------------------

    @property
    def has_idle_policies(self) -> bool:
        return any(_idle_policy(model) for model in self._registry)

    async def rest_idle(self) -> None:
        """Move down the models that have been unused for as long as their policy says."""
        for model in self._registry:
            for after_s, to in _idle_policy(model):
                if self._is_due(model, after_s) and _may_rest(model, to):
                    await self._rest(model, after_s, to)

    async def _rest(self, model: Model, after_s: float, to: Residency) -> None:
        try:
            async with self.move_lock():
                # Checked again: it may have been used while the lock was awaited.
                if self._is_due(model, after_s) and _may_rest(model, to):
                    await self.move_down(model, to)
        except Exception as error:  # noqa: BLE001  # one model's trouble is not the others'
            alias = value_text(model.alias)
            log.warning("event=rest_failed model=%s cause=%r", alias, one_line(error))

    def idle_residency(self, model: Model, idle_s: float) -> Residency | None:
        """Return where the active model goes after so much idle time; None: it stays."""
        if model.pinned:
            return None
        due = [to for after_s, to in _idle_policy(model) if idle_s >= after_s]
        return next((to for to in reversed(due) if _has_residency(model, to)), None)

    def _is_due(self, model: Model, after_s: float) -> bool:
        return self._clock() - (model.last_used_s or 0.0) >= after_s


@asynccontextmanager
async def _named_failure(model: Model, operation: str) -> AsyncIterator[None]:
    """Name the operation and the model that failed, where the error itself does not."""
    try:
        yield
    except HotswapError as error:
        if type(error) in (HotswapError, ConfigError):
            raise LoadFailed(model.alias, operation, error) from error
        raise


def refuse_failed(model: Model) -> None:
    """Raise `EngineUnavailable` if the model's engine has died."""
    if model.residency is Residency.FAILED:
        raise EngineUnavailable(f"the engine of {model.alias!r} died: {model.failure}")


def up_cost_s(model: Model, where: Residency) -> float:
    """Return seconds from a residency to `parked`, measured or estimated from bytes to read."""
    if where in (Residency.PARKED, Residency.ACTIVE):
        return 0.0
    if where is Residency.ASLEEP and model.waking is not None:
        return model.waking.left * _wake_cost_s(model)
    if where in model.up_s:
        return model.up_s[where]
    if where is Residency.DISCARDED and Residency.COLD in model.up_s:
        return model.up_s[Residency.COLD]  # a load reads the same bytes
    if where is Residency.ASLEEP:
        return _wake_cost_s(model)
    return 1.0 + model.engine.memory.weights_bytes / READ_BYTES_PER_S


def _wake_cost_s(model: Model) -> float:
    if Residency.ASLEEP in model.up_s:
        return model.up_s[Residency.ASLEEP]
    return 0.1 + model.engine.footprint.at(Residency.ASLEEP).host / LINK_BYTES_PER_S


def _at_least(model: Model, target: Model) -> Residency:
    """Return the lowest residency that a model can have while `target` comes up."""
    return Residency.PARKED if model.pinned and model is not target else Residency.COLD


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
