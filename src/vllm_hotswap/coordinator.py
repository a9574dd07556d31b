"""The one owner of all switching state, on one event loop.

Decisions are plain methods: between two awaits nothing else runs, so they need no locks. Slow
work (draining, making room, loading, activating) runs in one task per switch, `_run_switch`, whose
phases are the ones in `states.SwitchPhase`. Where models go meanwhile is `ladder`'s part.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from vllm_hotswap.engines.base import Adapter, EngineHost
from vllm_hotswap.errors import (
    AdapterRefused,
    ConfigError,
    DrainCut,
    EngineUnavailable,
    HotswapError,
    ModelInUse,
    ModelNotActive,
    ModelSwitching,
    NameTaken,
    NoRoom,
    QueueFull,
    SwitchFailed,
    SwitchInProgress,
    UnknownAdapter,
    WaitTimeout,
    one_line,
)
from vllm_hotswap.events import Observer, PhaseChanged, RequestEnded, SwitchEnded
from vllm_hotswap.ladder import Ladder, OperationResult, refuse_failed
from vllm_hotswap.planner import Plan
from vllm_hotswap.registry import Cut, Lease, Model, ModelPolicy, Registry
from vllm_hotswap.settings import SwitchingConfig
from vllm_hotswap.states import Residency, Step, SwitchPhase
from vllm_hotswap.switch import Switch, SwitchResult

Clock = Callable[[], float]

log = logging.getLogger("vllm_hotswap")

IDLE_CHECK_S = 1.0
"""How often models are looked at that may rest when nobody uses them."""

CUT_GRACE_S = 5.0
"""Seconds that a request which was ended gets to notice, and then again to send its error."""


class Coordinator:
    """Admits requests and switches models.

    The whole mutable state is:

    - `_active`: the model that is stepped, None before the first activation or after its death;
    - `_epoch`: raised at every activation, never lowered;
    - `_switch`: the switch under way, if any, with the requests held for its target;
    - `_dead`: why the engine host is gone, once it is;
    - leases of each model in the registry; residencies change through `ladder`.

    All of it is changed by methods of this class, on the event loop, and nowhere else.
    """

    def __init__(
        self,
        host: EngineHost,
        observer: Observer,
        settings: SwitchingConfig | None = None,
        policies: Mapping[str, ModelPolicy] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._host = host
        self._observer = observer
        self._settings = settings or SwitchingConfig()
        self._clock = clock
        self.registry = Registry(host.engines, policies)
        self.ladder = Ladder(self.registry, host, observer, clock, lambda: self._epoch)
        self._active: Model | None = None
        self._epoch = 0
        self._switch: Switch | None = None
        self._dead: str | None = None
        self._last_switch_s = 1.0
        self.switches = 0
        """Switches that have ended."""
        self.switches_failed = 0
        host.on_engine_failed(self._engine_failed)

    def __repr__(self) -> str:
        phase = self._switch.phase.name if self._switch else "IDLE"
        in_flight = sum(len(model.leases) for model in self.registry)
        return (
            f"<Coordinator active={self.active} epoch={self._epoch} phase={phase} "
            f"in_flight={in_flight} waiting={self.waiting}>"
        )

    @property
    def active(self) -> str | None:
        return self._active.alias if self._active else None

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def phase(self) -> str:
        return self._switch.phase.value if self._switch else "idle"

    @property
    def operation_id(self) -> str | None:
        """The switch under way."""
        return self._switch.operation_id if self._switch else None

    def idle_s(self, model: Model) -> float | None:
        """Seconds since somebody last used the model; None if nobody has."""
        return None if model.last_used_s is None else self._clock() - model.last_used_s

    @property
    def target(self) -> str | None:
        """The target of the switch under way."""
        return self._switch.target.alias if self._switch else None

    @property
    def waiting(self) -> int:
        return len(self._switch.held) if self._switch else 0

    @property
    def failure(self) -> str | None:
        """Why nothing can be served, or None."""
        if self._dead is not None:
            return self._dead
        if self._active is None and self._switch is None:
            return "no model is active"
        return None

    # --- start ----------------------------------------------------------------------------

    async def start(self, load: Iterable[str], default: str) -> None:
        """Load the aliases of `load`, and activate `default`.

        Models that the budget holds together are loaded together. Otherwise they are loaded one
        after the other, `default` last, and who does not fit any more moves down.

        Raises:
            HotswapError: one of them cannot be loaded; the message names it.
        """
        self._host.died.add_done_callback(self._host_died)
        self.ladder.check()
        first = self.registry.resolve(default)
        others = [self.registry.resolve(alias) for alias in load if alias != default]
        for model in (first, *others):
            model.engine.validate()
        async with self.ladder.turn():
            if self.ladder.fit_together([first, *others]):
                await self._start_together(first, others)
            else:
                await self._start_in_turn(first, others)
        for model in (first, *others):
            _refuse_failed_adapters(model)

    async def _start_together(self, first: Model, others: Iterable[Model]) -> None:
        # All at once: the host makes the next engine while this process builds a frontend.
        loads = [asyncio.create_task(self.ladder.bring_up(model)) for model in (first, *others)]
        try:
            await loads[0]
            await self._activate(first)
            await asyncio.gather(*loads)
        finally:
            for task in loads:
                task.cancel()
            await asyncio.gather(*loads, return_exceptions=True)

    async def _start_in_turn(self, first: Model, others: Iterable[Model]) -> None:
        for model in (*others, first):
            await self.ladder.make_room(model)
            await self.ladder.bring_up(model)
        await self._activate(first)

    # --- residency --------------------------------------------------------------------------

    def plan(self, alias: str) -> Plan:
        """What a switch to `alias` would do, without doing it. Raises `UnknownModel`, `NoRoom`."""
        return self.ladder.plan(self._usable(self.registry.resolve(alias).alias), self._active)

    async def load(self, alias: str) -> OperationResult:
        """Bring a model up to `parked`; the active one stays where it is."""
        return await self.ladder.load(self._usable(alias))

    async def wake(self, alias: str) -> OperationResult:
        return await self.ladder.wake(self._usable(alias))

    async def unload(self, alias: str) -> OperationResult:
        return await self.ladder.unload(self._usable(alias))

    async def sleep(self, alias: str, level: int) -> OperationResult:
        return await self.ladder.sleep(self._usable(alias), level)

    async def prefetch(self, alias: str) -> OperationResult:
        return await self.ladder.prefetch(self._usable(alias))

    def cancel_prefetch(self, alias: str) -> None:
        self.ladder.cancel_prefetch(self._usable(alias))

    def pin(self, alias: str, pinned: bool) -> None:
        self.ladder.pin(self._usable(alias), pinned)

    def _usable(self, alias: str) -> Model:
        model = self.registry.model(alias)
        if self._dead is not None:
            raise EngineUnavailable(self._dead)
        refuse_failed(model)
        return model

    # --- adapters ---------------------------------------------------------------------------

    async def add_adapter(
        self, alias: str, name: str, path: Path, is_3d: bool = False, in_place: bool = False
    ) -> Adapter:
        """Serve an adapter with a model from now on; a model that is not loaded loads it later.

        Args:
            alias: the model.
            name: what clients will send in `model`.
            path: the adapter's folder.
            is_3d: vLLM's `is_3d_lora_weight`.
            in_place: an adapter of the model may have the name; it is replaced.

        Raises:
            AdapterRefused: it cannot be used; nothing has changed.
            NameTaken, ModelInUse: the name is not free.
        """
        model = self._usable(alias)
        async with self.ladder.turn():
            refuse_failed(model)  # it may have died meanwhile

            def check() -> None:
                self._refuse_taken(model, name, in_place)

            check()
            try:
                # Looked at again once it is loaded: requests have come and gone meanwhile.
                return await model.engine.add_adapter(name, path, is_3d, model.is_loaded, check)
            except ConfigError as error:
                raise AdapterRefused(error.message) from error

    def remove_adapter(self, alias: str, name: str) -> int:
        """Serve no further request with an adapter; how many go on with it."""
        model = self.registry.model(alias)
        if name not in model.engine.adapters:
            raise UnknownAdapter(model.alias, name, model.engine.adapters)
        model.engine.remove_adapter(name)
        return model.in_flight_as(name)

    def _refuse_taken(self, model: Model, name: str, in_place: bool) -> None:
        is_own = name in model.engine.adapters
        if name in self.registry.names and not (in_place and is_own):
            hint = "; give in_place (vLLM's load_inplace) to replace it" if is_own else ""
            raise NameTaken(f"the name {name!r} is taken; aliases and adapters share names{hint}")
        # vLLM takes two adapters for the same that have one name, whatever their numbers.
        if in_flight := model.in_flight_as(name):
            raise ModelInUse(
                model.alias,
                f"adapter {name!r}",
                f"{in_flight} requests are in flight with the one before; retry later",
            )

    async def rest_idle_models(self) -> None:
        """Until cancelled, move models down that nobody has used for as long as they may stay."""
        while self.ladder.has_idle_policies:
            await asyncio.sleep(IDLE_CHECK_S)
            try:
                await self.rest_idle()
            except Exception as error:  # noqa: BLE001  # one model's trouble is not the others'
                log.warning("event=rest_failed cause=%r", one_line(error))

    async def rest_idle(self) -> None:
        await self.ladder.rest_idle()

    # --- requests -------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, alias: str | None) -> AsyncIterator[Lease]:
        """Hold a model, `alias` or the active one, while the body runs.

        Entering may wait for the switch under way. A body whose lease is cut (`Lease.on_cut`) has
        `CUT_GRACE_S` to end by itself before its task is cancelled.

        Raises:
            UnknownModel, ModelNotActive, ModelSwitching, QueueFull, WaitTimeout, SwitchFailed,
            EngineUnavailable: the request is not admitted.
        """
        held = self._admit(alias)
        lease = held if isinstance(held, Lease) else await self._wait(held)
        lease.name = alias
        try:
            yield lease
        finally:
            self._release(lease)

    def _admit(self, alias: str | None) -> Lease | asyncio.Future[Lease]:
        """Grant a lease now, hold the request for the switch under way, or refuse it."""
        if self._dead is not None:
            raise EngineUnavailable(self._dead)
        switch = self._switch
        model = self.registry.resolve(alias) if alias is not None else None
        if switch is not None and model in (switch.target, None):
            return self._hold(switch)
        if model is None:
            model = self._active
        if model is None:
            raise EngineUnavailable("no model is active; switch to one")
        refuse_failed(model)
        if model is not self._active:
            raise ModelNotActive(model.alias, self.active, alias)
        if switch is not None and switch.phase is not SwitchPhase.VALIDATE:
            raise ModelSwitching(model.alias, switch.target.alias, self._retry_after_s())
        return self._grant(model, asyncio.current_task())

    def _grant(self, model: Model, task: asyncio.Task[object] | None) -> Lease:
        lease = Lease(model.alias, self._epoch, task)
        model.leases.add(lease)
        model.last_used_s = self._clock()
        return lease

    def _hold(self, switch: Switch) -> asyncio.Future[Lease]:
        if len(switch.held) >= self._settings.max_waiting:
            raise QueueFull(
                f"{len(switch.held)} requests wait for {switch.target.alias!r} already "
                "(switching.max_waiting); retry later",
                retry_after_s=self._retry_after_s(),
            )
        future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        switch.held[future] = asyncio.current_task()
        return future

    async def _wait(self, held: asyncio.Future[Lease]) -> Lease:
        try:
            async with asyncio.timeout(self._settings.max_wait):
                return await held
        except TimeoutError:
            if lease := _granted(held):  # in the very turn in which the time was up
                return lease
            raise WaitTimeout(
                f"the request waited {self._settings.max_wait:g} s for a switch "
                "(switching.max_wait); retry when it has ended"
            ) from None
        except asyncio.CancelledError:
            if lease := _granted(held):  # in the very turn in which the client left
                self._release(lease)
            raise
        finally:
            if self._switch is not None:
                self._switch.held.pop(held, None)

    def _release(self, lease: Lease) -> None:
        model = self.registry.resolve(lease.alias)
        model.leases.discard(lease)
        if not model.leases and model.emptied is not None and not model.emptied.done():
            model.emptied.set_result(None)
        self._observer.notify(RequestEnded(lease.epoch, lease.alias, lease.result))

    def _retry_after_s(self) -> int:
        return max(1, round(self._last_switch_s + 0.5))

    # --- switching ------------------------------------------------------------------------

    async def switch(self, alias: str, drain_timeout_s: float | None = None) -> SwitchResult:
        """Make `alias` the active model; wait until it is.

        Calls for the target that is being switched to join that switch. A caller who leaves
        does not stop it.

        Raises:
            UnknownModel, SwitchInProgress, SwitchFailed, EngineUnavailable.
        """
        target = self.registry.resolve(alias)
        if self._dead is not None:
            raise EngineUnavailable(self._dead)
        if self._switch is None:
            if target is self._active:
                return self._unswitched()
            if drain_timeout_s is None:
                drain_timeout_s = self._settings.drain_timeout
            self._begin(target, drain_timeout_s)
        switch = self._switch
        assert switch is not None
        assert switch.task is not None
        if switch.target is not target:
            raise SwitchInProgress(switch.target.alias, alias, switch.operation_id)
        return await asyncio.shield(switch.task)

    def _begin(self, target: Model, drain_timeout_s: float) -> None:
        self._switch = switch = Switch(
            _operation_id(), self._active, target, drain_timeout_s, self._clock()
        )
        switch.task = asyncio.create_task(self._run_switch(switch), name=f"switch-{target.alias}")
        # A switch whose caller has left may fail with nobody to retrieve the exception.
        switch.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _run_switch(self, switch: Switch) -> SwitchResult:
        try:
            async with self.ladder.turn():
                try:
                    await self._take_over(switch)
                except BaseException:
                    if self._active is not None and self._dead is None:
                        await self._restore(self._active, switch.phase)
                    raise
                return self._finish(switch)
        except BaseException as error:
            # Also if it was cancelled while it waited for its turn, or on the way back.
            raise self._give_up(switch, error) from error

    async def _take_over(self, switch: Switch) -> None:
        target = switch.target
        switch.moves = not target.is_loaded
        switch.memory_before_bytes = self._host.stats().used_bytes
        async with self._phase(switch, SwitchPhase.VALIDATE):
            self._validate(switch)
        async with self._phase(switch, SwitchPhase.DRAIN):
            await self._drain(switch)
        self.ladder.cancel_prefetch(target)  # the load reads on
        async with self._phase(switch, SwitchPhase.MAKE_ROOM):
            switch.evicted = await self.ladder.make_room(target, drained=switch.source)
        if switch.moves:
            switch.memory_unloaded_bytes = self._host.stats().used_bytes
        async with self._phase(switch, SwitchPhase.BRING_UP):
            await self.ladder.bring_up(target)
        async with self._phase(switch, SwitchPhase.ACTIVATE):
            await self._activate(target)

    def _validate(self, switch: Switch) -> None:
        """Refuse what cannot work while the source has given up nothing."""
        target = switch.target
        refuse_failed(target)
        reads_files = target.residency in (Residency.COLD, Residency.DISCARDED)
        if reads_files:
            target.engine.validate()
        if not target.is_loaded:
            self.ladder.plan(target, switch.source)
        if reads_files and switch.source is not None and switch.source.leases:
            self.ladder.begin_prefetch(target)

    async def _drain(self, switch: Switch) -> None:
        """Wait for the source's leases; end with an explicit error what is left at the deadline."""
        if switch.source is None:
            return
        await self._until_empty(switch.source, switch.drain_timeout_s)
        cut = DrainCut(switch.source.alias, switch.target.alias, switch.drain_timeout_s)
        switch.requests_cut = self._end_all(switch.source, cut)
        await self._until_ended(switch.source)

    async def _until_ended(self, model: Model) -> None:
        """Wait for requests that `_end_all` has ended."""
        await self._until_empty(model, 2 * CUT_GRACE_S)

    async def _until_empty(self, model: Model, timeout_s: float) -> None:
        """Return when the model has no leases, or after `timeout_s`."""
        if not model.leases or timeout_s <= 0:
            return
        model.emptied = asyncio.get_running_loop().create_future()
        await asyncio.wait([model.emptied], timeout=timeout_s)
        model.emptied = None

    def _end_all(self, model: Model, cause: Cut) -> int:
        """End the model's requests; cancel, after a grace, those that go on all the same."""
        ended = [lease for lease in model.leases if lease.cut is None]
        for lease in ended:
            lease.end(cause)
        if ended:
            asyncio.get_running_loop().call_later(CUT_GRACE_S, self._kill, model, ended)
        return len(ended)

    def _kill(self, model: Model, ended: Iterable[Lease]) -> None:
        for lease in ended:
            if lease in model.leases:
                lease.kill()

    async def _activate(self, target: Model) -> None:
        await target.engine.activate(self._epoch + 1)
        refuse_failed(target)  # it may have died meanwhile
        if self._active is not None and self._active.residency is Residency.ACTIVE:
            self.ladder.step(self._active, Step.PARK)
        self.ladder.step(target, Step.ACTIVATE)
        self._epoch += 1
        self._active = target

    def _finish(self, switch: Switch) -> SwitchResult:
        """Re-open admission: whoever was held is served by the new epoch, in order of arrival."""
        self._switch = None
        for future, task in switch.held.items():
            if not future.done():
                future.set_result(self._grant(switch.target, task))
        duration_s = self._clock() - switch.started_s
        self._last_switch_s = duration_s
        source = switch.source.alias if switch.source else None
        self._notify_ended(switch, duration_s, None)
        return SwitchResult(
            operation_id=switch.operation_id,
            epoch=self._epoch,
            previous_model=source,
            current_model=switch.target.alias,
            switched=True,
            duration_s=duration_s,
            phases_s=switch.phases_s,
            requests_cut=switch.requests_cut,
            memory_before_bytes=switch.memory_before_bytes,
            memory_unloaded_bytes=switch.memory_unloaded_bytes or switch.memory_before_bytes,
            memory_after_bytes=self._host.stats().used_bytes
            if switch.moves
            else switch.memory_before_bytes,
            evicted=switch.evicted,
        )

    def _give_up(self, switch: Switch, cause: BaseException) -> BaseException:
        """Settle everybody who waits; return what the caller of the switch is told."""
        self._switch = None
        failed: HotswapError
        if self._dead is not None:
            failed = EngineUnavailable(self._dead)
        else:
            failed = SwitchFailed(switch.target.alias, switch.phase.value, cause, self.active)
        for future in switch.held:
            if not future.done():
                future.set_exception(failed)
        self._notify_ended(switch, self._clock() - switch.started_s, one_line(cause))
        # A switch is cancelled at shutdown, and its callers are to be told.
        return failed if isinstance(cause, Exception | asyncio.CancelledError) else cause

    async def _restore(self, source: Model, phase: SwitchPhase) -> None:
        """Have the source be stepped again, wherever it has been moved to meanwhile."""
        try:
            if source.residency is not Residency.ACTIVE:
                await self._bring_back(source)
            elif phase is SwitchPhase.ACTIVATE:
                # The pointer may have moved although the answer was lost.
                await source.engine.activate(self._epoch)
        except Exception as error:  # noqa: BLE001  # whatever it is, the switch must end
            await self._lose(source, one_line(error))

    async def _bring_back(self, source: Model) -> None:
        if not source.is_loaded:
            try:
                await self.ladder.make_room(source)
            except NoRoom:  # it has turned out to hold more than was thought
                await self.ladder.make_all_room(source)
            await self.ladder.bring_up(source)
        await self._activate(source)

    async def _lose(self, source: Model, cause: str) -> None:
        """The source could not be brought back: no model is active until the next switch."""
        log.error("event=source_lost model=%s cause=%r", source.alias, cause)
        self._active = None
        if source.is_loaded:
            try:
                await self.ladder.move_down(source, Residency.COLD)
            except Exception as error:  # noqa: BLE001  # its memory cannot be told any more
                self._engine_failed(source.alias, one_line(error))

    def _notify_ended(self, switch: Switch, duration_s: float, cause: str | None) -> None:
        self.switches += 1
        self.switches_failed += cause is not None
        self._observer.notify(
            SwitchEnded(
                switch.operation_id,
                self._epoch,
                switch.source.alias if switch.source else None,
                switch.target.alias,
                "switched" if cause is None else "failed",
                duration_s,
                switch.requests_cut,
                cause,
            )
        )

    def _unswitched(self) -> SwitchResult:
        used = self._host.stats().used_bytes
        assert self._active is not None
        alias = self._active.alias
        return SwitchResult(
            _operation_id(), self._epoch, alias, alias, False, 0.0, {}, 0, used, used, used
        )

    @asynccontextmanager
    async def _phase(self, switch: Switch, phase: SwitchPhase) -> AsyncIterator[None]:
        """Name, time and tell of one phase."""
        switch.phase = phase
        started_s = self._clock()
        self._notify_phase(switch, phase, "started", 0.0)
        try:
            yield
        except BaseException:
            self._notify_phase(switch, phase, "failed", self._clock() - started_s)
            raise
        duration_s = self._clock() - started_s
        switch.phases_s[phase.value] = duration_s
        self._notify_phase(switch, phase, "finished", duration_s)

    def _notify_phase(
        self, switch: Switch, phase: SwitchPhase, status: str, duration_s: float
    ) -> None:
        self._observer.notify(
            PhaseChanged(
                switch.operation_id,
                self._epoch,
                switch.target.alias,
                phase,
                status,  # type: ignore[arg-type]
                duration_s,
            )
        )

    async def shut_down(self, timeout_s: float) -> None:
        """Admit nothing more; end with an explicit error what still runs after `timeout_s`."""
        if self._dead is None:
            self._dead = "the server is shutting down"
        if self._switch is not None and self._switch.task is not None:
            switching = self._switch.task
            await asyncio.wait([switching], timeout=timeout_s)
            switching.cancel("the server is shutting down")
            await asyncio.wait([switching])
        busy = [model for model in self.registry if model.leases]
        for model in busy:
            await self._until_empty(model, timeout_s)
            self._end_all(model, EngineUnavailable("the server is shutting down"))
        for model in busy:
            await self._until_ended(model)

    # --- what may happen at any time --------------------------------------------------------

    def _host_died(self, died: asyncio.Future[str]) -> None:
        """Every open request of every model fails explicitly; nothing is admitted any more."""
        if died.cancelled():
            return
        self._dead = f"{died.result()}; restart the server"
        for model in self.registry:
            if model.residency is not Residency.COLD:
                self._fail(model, self._dead)
        self._active = None

    def _engine_failed(self, alias: str, cause: str) -> None:
        """One engine died in a step; the others go on."""
        model = self.registry.resolve(alias)
        self._fail(model, cause)
        if model is self._active:
            self._active = None

    def _fail(self, model: Model, cause: str) -> None:
        model.failure = cause
        if model.residency is not Residency.FAILED:
            self.ladder.step(model, Step.FAIL)
        self._end_all(model, EngineUnavailable(f"the engine of {model.alias!r} died: {cause}"))


def _refuse_failed_adapters(model: Model) -> None:
    """A configuration with an adapter that cannot be loaded is not started with."""
    for adapter in model.engine.adapters.values():
        if adapter.failure is not None:
            raise ConfigError(f"models.{model.alias}: {adapter.failure}")


def _granted(held: asyncio.Future[Lease]) -> Lease | None:
    """The lease that a request which waited has been given, if it has."""
    is_granted = held.done() and not held.cancelled() and held.exception() is None
    return held.result() if is_granted else None


def _operation_id() -> str:
    return f"switch-{uuid.uuid4().hex[:12]}"
