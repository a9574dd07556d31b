"""The one owner of all switching state, on one event loop.

Decisions are plain methods: between two awaits nothing else runs, so they need no locks. Slow
work (draining, making room, loading, activating) runs in one task per switch, `_run_switch`, whose
phases are listed in `states.SwitchPhase`. `ladder` moves models between residencies.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import Context
from functools import partial
from pathlib import Path

from vllm_hotswap.config import DrainAction, LimitsConfig, RecoveryConfig, SwitchingConfig
from vllm_hotswap.errors import (
    AdapterRefused,
    ClientStalled,
    ConfigError,
    DrainCut,
    DrainRefused,
    EngineUnavailable,
    HotswapError,
    ModelInUse,
    ModelNotActive,
    ModelSwitching,
    NameTaken,
    NoRoom,
    QueueFull,
    SlowReader,
    SwitchFailed,
    SwitchInProgress,
    SwitchRateLimited,
    UnknownAdapter,
    WaitTimeout,
    WrongStamp,
    one_line,
)
from vllm_hotswap.events import (
    ClientEvicted,
    EngineDied,
    HostDied,
    Observer,
    OutputRefused,
    PhaseChanged,
    RequestEnded,
    RequestsParked,
    RequestsResumed,
    SwitchEnded,
    SwitchStatus,
)
from vllm_hotswap.failpoints import async_failpoint
from vllm_hotswap.models import Adapter, EngineHost, Lease, Model, ModelSettings, Registry, drain
from vllm_hotswap.residency import (
    Announcement,
    Ladder,
    Lookahead,
    OperationResult,
    Plan,
    refuse_failed,
)
from vllm_hotswap.scheduling import DEFAULT_TERMS, RequestTerms
from vllm_hotswap.states import Residency, ServerState, Step, SwitchPhase
from vllm_hotswap.switching.auto import Dispatcher
from vllm_hotswap.switching.job_leases import JobLease
from vllm_hotswap.switching.jobs import Jobs
from vllm_hotswap.switching.recovery import Recovery
from vllm_hotswap.switching.switch import Switch, SwitchResult
from vllm_hotswap.system import value_text
from vllm_hotswap.tasks import Rate

Clock = Callable[[], float]

log = logging.getLogger("vllm_hotswap")

CONNECTION_LOOK_S = 0.5
"""Interval at which a drain checks for idle WebSockets."""

SLOW_LOOK_S = 10.0
"""How long a drain in the mode `auto` watches its clients before it looks for slow readers."""

IDLE_CHECK_S = 1.0
"""Interval between checks for idle models."""

DEVICE_CHECK_S = 5.0
"""Interval between checks for device memory taken by other processes."""


class Coordinator:
    """Admits requests and switches models.

    The whole mutable state is:

    - `_active`: the model that is stepped, None before the first activation or after its death;
    - `_is_resting`: whether no model is active because no request needs one;
    - `_used_s`: when the server last had something to do;
    - `_last_active`: the model that was active last, which recovery brings back;
    - `_epoch`: raised at every activation, never lowered;
    - `_switch`: the switch under way, if any, with the requests held for its target;
    - `_host_down`: why there is no engine host now, until there is one again;
    - `_ended`: why the server has stopped serving for good, if it has;
    - `_explicit_calls`: explicit switch calls that wait for an automatic switch to end;
    - leases of each model in the registry. Residencies change through `ladder`, and `recovery`
      counts failures.

    Only methods of this class change it, on the event loop.
    """

    def __init__(
        self,
        host: EngineHost,
        observer: Observer,
        settings: SwitchingConfig | None = None,
        model_settings: Mapping[str, ModelSettings] | None = None,
        clock: Clock = time.monotonic,
        limits: LimitsConfig | None = None,
        recovery: RecoveryConfig | None = None,
    ) -> None:
        self._host = host
        self._observer = observer
        self._settings = settings or SwitchingConfig()
        self._limits = limits or LimitsConfig()
        self._clock = clock
        recovery = recovery or RecoveryConfig()
        self.registry = Registry(host.engines, model_settings)
        self.ladder = Ladder(self.registry, host, observer, clock, lambda: self._epoch, recovery)
        self.recovery = Recovery(self, host, observer, recovery, clock)
        self.lookahead = Lookahead(
            self.registry, self.ladder, observer, lambda: self._epoch, self._settings.predict
        )
        self.jobs = Jobs(self, observer, self._settings.max_lease, clock)
        self.dispatcher: Dispatcher | None = None
        """Queues requests and starts switches in the mode `auto`; None in the mode `manual`."""
        if self._settings.mode == "auto":
            self.dispatcher = Dispatcher(
                self, self.registry, self.ladder, self._settings, self._limits, clock
            )
        self._adding_timeout_s = recovery.command_timeout
        self._rate = Rate(self._settings.rate, self._settings.burst, clock)
        self._active: Model | None = None
        self._last_active: Model | None = None
        self._default: Model | None = None
        self._is_resting = False
        self._used_s = clock()
        self._epoch = 0
        self._switch: Switch | None = None
        self._host_down: str | None = None
        self._ended: str | None = None
        self._is_started = False
        self._given_up: asyncio.Future[str] | None = None
        self._last_switch_s = 1.0
        self._explicit_calls = 0
        self.switches = 0
        """Switches that have ended."""
        self.switches_failed = 0
        self._cleanups: set[asyncio.Task[None]] = set()
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
    def last_active(self) -> str | None:
        return self._last_active.alias if self._last_active else None

    @property
    def is_automatic(self) -> bool:
        """Whether the server switches by itself: the mode `auto`."""
        return self.dispatcher is not None

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def phase(self) -> str:
        return self._switch.phase.value if self._switch else "idle"

    @property
    def operation_id(self) -> str | None:
        """Return the id of the switch under way, if any."""
        return self._switch.operation_id if self._switch else None

    def idle_s(self, model: Model) -> float | None:
        """Return the seconds since the model was last used; None if it never was."""
        return None if model.last_used_s is None else self._clock() - model.last_used_s

    @property
    def target(self) -> str | None:
        """Return the alias of the target of the switch under way, if any."""
        return self._switch.target.alias if self._switch else None

    @property
    def waiting(self) -> int:
        """Return how many requests wait for their model, without parked ones."""
        if self.dispatcher is not None:
            return self.dispatcher.scheduler.waiting
        return len(self._switch.held) if self._switch else 0

    def waiting_for(self, model: Model) -> int:
        if self.dispatcher is not None:
            return self.dispatcher.scheduler.waiting_for(model.alias)
        return self.waiting if self._switch and self._switch.target is model else 0

    @property
    def failure(self) -> str | None:
        """Return why nothing can be served, or None."""
        if self._why_down is not None:
            return self._why_down
        if self._active is not None or self._is_resting:
            return None
        return self.recovery.failure or "no model is active"

    @property
    def _why_down(self) -> str | None:
        return self._ended or self._host_down

    @property
    def state(self) -> ServerState:
        if self._ended is not None:
            given_up = self._given_up is not None and self._given_up.done()
            return ServerState.FAILED if given_up else ServerState.STOPPING
        if self._host_down is None and (self._active is not None or self._is_resting):
            if self._switch is not None:
                return ServerState.SWITCHING
            return ServerState.IDLE if self._is_resting else ServerState.SERVING
        if self.recovery.is_degraded:
            return ServerState.DEGRADED
        if self.recovery.is_under_way or self._switch is None:
            return ServerState.RECOVERING
        return ServerState.SWITCHING

    @property
    def is_ready(self) -> bool:
        """Whether requests for the active model are served now; in the mode `auto`, in turn."""
        is_open = self._switch is None or self._switch.phase is SwitchPhase.VALIDATE
        is_open = is_open or self.dispatcher is not None
        is_there = self._active is not None or self._is_resting
        return self._why_down is None and is_there and is_open

    @property
    def given_up(self) -> asyncio.Future[str]:
        """Future that is done when the server has given up, without having been stopped."""
        if self._given_up is None:
            self._given_up = asyncio.get_running_loop().create_future()
        return self._given_up

    # --- start ----------------------------------------------------------------------------

    async def start(self, load: Iterable[str], default: str) -> None:
        """Load the aliases of `load`, and activate `default`.

        Models that fit into the budget together are loaded together. Otherwise they are loaded one
        after the other, `default` last, and a model that no longer fits moves down.

        Raises:
            HotswapError: one of them cannot be loaded; the message names it.
        """
        self._host.died.add_done_callback(self._host_died)
        _ = self.given_up  # created here, so that it belongs to this loop
        self.ladder.check()
        self._default = first = self.registry.resolve(default)
        others = [self.registry.resolve(alias) for alias in load if alias != default]
        for model in (first, *others):
            model.engine.validate()
        async with self.ladder.move_lock():
            if self.ladder.fit_together([first, *others]):
                await self._start_together(first, others)
            else:
                await self._start_in_turn(first, others)
            await self._verify(first)
        for model in (first, *others):
            _refuse_failed_adapters(model)
        self._is_started = True
        self.lookahead.switched(first)
        self._notify_activated(first)

    async def _start_together(self, first: Model, others: Iterable[Model]) -> None:
        # Concurrently: the host makes the next engine while this process builds a frontend.
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
        """Plan a switch to `alias` without doing it. Raises `UnknownModel`, `NoRoom`."""
        return self.ladder.plan(self._usable(self.registry.resolve(alias).alias), self._active)

    async def load(self, alias: str) -> OperationResult:
        """Load a model, up to `parked`; the active one stays active."""
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

    def announce(self, alias: str) -> Announcement:
        """Prepare for a model that a caller announced as the next one."""
        return self.lookahead.announce(self._usable(alias))

    def pin(self, alias: str, pinned: bool) -> None:
        self.ladder.pin(self._usable(alias), pinned)

    def _usable(self, alias: str) -> Model:
        model = self.registry.model(alias)
        if self._why_down is not None:
            raise EngineUnavailable(self._why_down)
        return model

    # --- adapters ---------------------------------------------------------------------------

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
        async with self.ladder.move_lock():

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
        # vLLM treats adapters with the same name as one, whatever their ids are.
        if in_flight := model.in_flight_as(name):
            raise ModelInUse(
                model.alias,
                f"adapter {name!r}",
                f"{in_flight} requests are in flight with the one before; retry later",
            )

    async def rest_idle_models(self) -> None:
        """Until cancelled, move models down that have been idle for as long as they may be."""
        while self.ladder.has_idle_policies or self._settings.return_to_default is not None:
            await asyncio.sleep(IDLE_CHECK_S)
            try:
                await self.rest_idle()
            except Exception as error:  # noqa: BLE001  # one model's trouble is not the others'
                log.warning("event=rest_failed cause=%r", one_line(error))

    async def watch_device(self) -> None:
        """Until cancelled, watch for memory that models count on and other processes have taken."""
        while self._host.is_device_shared:
            await asyncio.sleep(DEVICE_CHECK_S)
            if self.is_host_down:
                continue
            try:
                await self.ladder.relieve()
            except Exception as error:  # noqa: BLE001  # the next check may succeed
                log.warning("event=relief_failed cause=%r", one_line(error))

    async def rest_idle(self) -> None:
        """Move idle models down, and return to the default model if that is due."""
        await self.ladder.rest_idle()
        if self.dispatcher is not None:
            await self._rest_active()
        self._return_to_default()

    def _idle_s(self) -> float:
        """Return the seconds without a request, a switch and a job lease."""
        is_asked = any(model.leases or model.entered for model in self.registry)
        if is_asked or self._switch is not None or self.jobs.model is not None:
            return 0.0
        return self._clock() - self._used_s

    async def _rest_active(self) -> None:
        """Put the active model to sleep, or unload it; the next request brings one up."""
        if self._idle_residency() is None:
            return
        async with self.ladder.move_lock():
            # Check again: a request or a switch may have come while this waited for the lock.
            model, to = self._active, self._idle_residency()
            if model is not None and to is not None:
                # Before the await below: no request may be admitted to a model on its way down.
                self._active, self._is_resting = None, True
                if self.dispatcher is not None:
                    self.dispatcher.advance()
                last_used_s = model.last_used_s
                await self.ladder.move_down(model, to)
                model.last_used_s = last_used_s  # a later idle policy counts from the last use

    def _idle_residency(self) -> Residency | None:
        if self._active is None or self._why_down is not None:
            return None
        return self.ladder.idle_residency(self._active, self._idle_s())

    def _return_to_default(self) -> None:
        after_s, default = self._settings.return_to_default, self._default
        if after_s is None or default is None or self._active in (None, default):
            return
        if self._why_down is None and self._idle_s() >= after_s:
            # In the mode `manual`, a request that arrives at this moment is served instead.
            timeout_s = self._settings.drain_timeout if self.dispatcher else 0.0
            switch = self._begin(default, timeout_s, "refuse")
            switch.automatic = True

    # --- requests -------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(
        self,
        alias: str | None,
        terms: RequestTerms = DEFAULT_TERMS,
        preview: Callable[[Lease], Awaitable[None]] | None = None,
    ) -> AsyncIterator[Lease]:
        """Hold a model, `alias` or the active one, while the body runs.

        Entering may wait for the switch under way. In the mode `auto` it does not: instead, the
        body has to wait for its turn (`Lease.wait_for_turn`) before it gives anything to the
        engine. When its lease is cut (`Lease.on_cut`), the body has `CUT_GRACE_S` to end before its
        task is cancelled.

        Args:
            alias: the model, by any of its names; None for the active one.
            terms: the request's terms for its turn, in the mode `auto`.
            preview: called in the mode `auto` if the model has never been loaded, so that no
                frontend can check the request yet. Then entering waits for its turn.

        Raises:
            UnknownModel, ModelNotActive, ModelSwitching, QueueFull, WaitTimeout, SwitchFailed,
            SwitchNotAllowed, EngineUnavailable: the request is not admitted.
        """
        lease = await (
            self._enter_manual(alias, terms)
            if self.dispatcher is None
            else self._enter_auto(alias, terms, preview)
        )
        lease.name = alias
        try:
            yield lease
        finally:
            self._release(lease)

    def max_wait_s(self, model: Model) -> float:
        """Return after how long a waiting request of the model is due, unless it says otherwise."""
        own_s = model.settings.max_wait_s
        return self._settings.max_wait if own_s is None else own_s

    def resolve_target(self, alias: str | None) -> Model:
        """Return the model that a request is for: by the name in the request, if it has one.

        Raises `UnknownModel`, `AdapterUnavailable`.
        """
        if alias is not None:
            return self.registry.resolve(alias)
        model = (self._switch.target if self._switch else self._active) or self._last_active
        assert model is not None
        return model

    @contextmanager
    def reserve(self, alias: str | None, requests: int) -> Iterator[None]:
        """Reserve room for a request that becomes several engine requests, while the body runs.

        Raises `QueueFull`, `UnknownModel`, `AdapterUnavailable`.
        """
        if requests == 1:
            yield
            return
        model = self.resolve_target(alias)
        if model.in_flight + requests > self._limits.in_flight:
            raise self._too_many(model)
        model.extra_requests += requests - 1
        try:
            yield
        finally:
            model.extra_requests -= requests - 1

    async def _enter_manual(self, alias: str | None, terms: RequestTerms) -> Lease:
        arrived_s, epoch = self._clock(), self._epoch
        held = self._admit(alias)
        lease = held if isinstance(held, Lease) else await self._wait(held)
        lease.arrived_s, lease.switched = arrived_s, lease.epoch - epoch
        lease.terms = terms
        return lease

    async def _enter_auto(
        self,
        alias: str | None,
        terms: RequestTerms,
        preview: Callable[[Lease], Awaitable[None]] | None,
    ) -> Lease:
        assert self.dispatcher is not None
        if self._why_down is not None:
            raise EngineUnavailable(self._why_down)
        model = self.resolve_target(alias)
        lease = self.dispatcher.enter(model, terms)
        if model.engine.routes is None:
            await self._wait_for_frontend(model, lease, preview)
        return lease

    async def _wait_for_frontend(
        self, model: Model, lease: Lease, preview: Callable[[Lease], Awaitable[None]] | None
    ) -> None:
        assert self.dispatcher is not None
        try:
            if preview is not None:
                await preview(lease)
            if model.engine.routes is None:
                await self.dispatcher.wait_for_turn(lease)
            if lease.cut is not None:
                raise lease.cut
        except BaseException:
            self._release(lease)
            raise

    def _admit(self, alias: str | None) -> Lease | asyncio.Future[Lease]:
        """Grant a lease now, hold the request for the switch under way, or refuse it."""
        if self._why_down is not None:
            raise EngineUnavailable(self._why_down)
        switch = self._switch
        model = self.registry.resolve(alias) if alias is not None else None
        if switch is not None and model in (switch.target, None):
            return self._hold(switch)
        if model is None:
            model = self._active
        if model is None or (self._active is None and self.recovery.is_under_way):
            raise EngineUnavailable(self.failure or "no model is active")
        if model is not self._active:
            raise ModelNotActive(model.alias, self.active, alias)
        if switch is not None and switch.phase is not SwitchPhase.VALIDATE:
            raise ModelSwitching(model.alias, switch.target.alias, self._retry_after_s())
        if model.in_flight >= self._limits.in_flight:
            raise self._too_many(model)
        return self._grant(model, asyncio.current_task())

    def _too_many(self, model: Model) -> QueueFull:
        return QueueFull(
            f"model {model.alias!r} already has {self._limits.in_flight} requests running or "
            "waiting (limits.in_flight); retry later",
            retry_after_s=1,
        )

    def _grant(self, model: Model, task: asyncio.Task[object] | None) -> Lease:
        lease = Lease(model.alias, self._epoch, task)
        self.grant(model, lease)
        return lease

    def grant(self, model: Model, lease: Lease) -> None:
        """Admit a request to its model."""
        self._used_s = model.last_used_s = now_s = self._clock()
        lease.admit(self._epoch, now_s)
        model.leases[lease] = None

    def _hold(self, switch: Switch) -> asyncio.Future[Lease]:
        if len(switch.held) + switch.target.in_flight >= self._limits.in_flight:
            raise self._too_many(switch.target)
        if len(switch.held) >= self._settings.max_waiting:
            raise QueueFull(
                f"{len(switch.held)} requests are already waiting for {switch.target.alias!r} "
                "(switching.max_waiting); retry later",
                retry_after_s=self._retry_after_s(),
            )
        future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        switch.held[future] = asyncio.current_task()
        return future

    async def _wait(self, held: asyncio.Future[Lease]) -> Lease:
        try:
            async with asyncio.timeout(self._settings.wait_timeout):
                return await held
        except TimeoutError:
            # The lease may be granted in the same loop iteration in which the time is up. Then the
            # model counts it already: dropping it would block every later drain.
            if lease := _granted(held):
                return lease
            raise WaitTimeout(
                f"the request waited {self._settings.wait_timeout:g} s for a switch "
                "(switching.wait_timeout); retry when it has ended"
            ) from None
        except asyncio.CancelledError:
            if lease := _granted(held):  # granted in the same iteration, as above: give it back
                self._release(lease)
            raise
        finally:
            if self._switch is not None:
                self._switch.held.pop(held, None)

    def _release(self, lease: Lease) -> None:
        model = self.registry.model(lease.alias)
        if lease.requests:
            model.engine.release(lease.requests)
        drain.release(model, lease)
        self._used_s = model.last_used_s = self._clock()
        if isinstance(lease.cut, WrongStamp):
            self._observer.notify(OutputRefused(self._epoch, lease.alias, lease.cut.stamp))
        elif isinstance(lease.cut, ClientStalled):
            self._observer.notify(ClientEvicted(self._epoch, lease.alias))
        try:
            self._observer.notify(self._ended_request(lease))
        finally:
            if self.dispatcher is not None:
                self.dispatcher.left(lease)

    def _ended_request(self, lease: Lease) -> RequestEnded:
        admitted_s, ticket = lease.admitted_s, lease.ticket
        return RequestEnded(
            lease.epoch,
            lease.alias,
            lease.result,
            arrived_s=lease.arrived_s,
            waited_s=lease.waited_s,
            prepared_s=lease.prepared_s,
            service_s=None if admitted_s is None else self._clock() - admitted_s,
            switched=lease.switched,
            prompt_tokens=lease.prompt_tokens,
            output_tokens=lease.output_tokens,
            priority=ticket.priority if ticket else None,
            max_wait_s=ticket.max_wait_s if ticket else None,
            is_connection=lease.is_connection,
        )

    def _retry_after_s(self) -> int:
        return max(1, round(self._last_switch_s + 0.5))

    # --- switching ------------------------------------------------------------------------

    async def switch(
        self,
        alias: str,
        drain_timeout_s: float | None = None,
        on_drain_timeout: DrainAction | None = None,
        key: str = "",
    ) -> SwitchResult:
        """Make `alias` the active model; wait until it is.

        A call for the target of the switch under way joins that switch. A call for another model
        waits for an automatic switch to end. A caller that leaves does not stop the switch.

        `key` is the fingerprint of the caller's key, for events.

        Raises:
            UnknownModel, ModelLeased, SwitchInProgress, SwitchRateLimited, DrainRefused,
            SwitchFailed, EngineUnavailable.
        """
        target = self.registry.resolve(alias)
        await self._wait_for_automatic_switch(target)
        # No await from here to `_begin`, or two calls could each begin a switch.
        if self._why_down is not None:
            raise EngineUnavailable(self._why_down)
        if self._switch is None:
            if target is self._active:
                return self._unswitched()
            self.jobs.refuse_other(target.alias)
            if wait_s := self._rate.take():
                raise SwitchRateLimited(
                    f"more than {self._settings.rate:g} switches per second "
                    f"(switching.rate); retry in {wait_s} s",
                    retry_after_s=wait_s,
                )
            if drain_timeout_s is None:
                drain_timeout_s = self._settings.drain_timeout
            policy = on_drain_timeout or self._settings.on_drain_timeout
            self._begin(target, drain_timeout_s, policy).key = key
        switch = self._switch
        assert switch is not None
        if switch.target is not target:
            raise SwitchInProgress(switch.target.alias, alias, switch.operation_id)
        return await _result(switch)

    async def _wait_for_automatic_switch(self, target: Model) -> None:
        """Wait for an automatic switch to another target; no further automatic one begins."""
        self._explicit_calls += 1
        try:
            while (switch := self._switch) and switch.automatic and switch.target is not target:
                assert switch.task is not None
                await asyncio.wait([switch.task])
        finally:
            self._explicit_calls -= 1
            if self.dispatcher is not None:
                # Later: now, `advance` could begin an automatic switch before this call's own.
                asyncio.get_running_loop().call_soon(self.dispatcher.advance)

    @property
    def can_switch(self) -> bool:
        """Whether the server may switch by itself now, and may admit requests."""
        if self._switch is not None or self._why_down is not None or self._explicit_calls:
            return False
        if self.jobs.model not in (None, self.active):
            return False  # the model that jobs hold is being brought up, or back
        is_settled = self._active is not None or self._is_resting or self.recovery.is_degraded
        return self._is_started and is_settled

    def begin_switch(
        self, target: Model, drain_until_s: Callable[[], float], may_park: bool = True
    ) -> Switch:
        """Switch without aborting requests: those that run longer are parked or waited for."""
        switch = self._begin(target, self._settings.drain_timeout, "park")
        switch.automatic, switch.may_park, switch.drain_until_s = True, may_park, drain_until_s
        return switch

    def recheck_drain(self) -> None:
        """Make a drain that is under way ask again until when it may wait."""
        if self._switch is not None and self._switch.source is not None:
            drain.recheck(self._switch.source)

    async def hold(
        self, alias: str, owner: str, ttl_s: float, note: str = "", key: str = ""
    ) -> JobLease:
        """Hold a model for a job; see `Jobs.hold`."""
        return await self.jobs.hold(self._usable(alias).alias, owner, ttl_s, note, key)

    def leases_changed(self) -> None:
        """Note that jobs hold another model than before, or until another time."""
        self._used_s = self._clock()
        if self.dispatcher is not None:
            self.dispatcher.held_until(self._held_until_s)

    @property
    def _held_until_s(self) -> float | None:
        """Return until when jobs hold the active model; None if they do not."""
        return self.jobs.until_s if self.jobs.model == self.active else None

    def _begin(self, target: Model, drain_timeout_s: float, policy: DrainAction) -> Switch:
        self._switch = switch = Switch(
            _operation_id(), self._active, target, drain_timeout_s, self._clock(), policy
        )
        self.lookahead.switch_started(target)
        # In its own context: engine calls of the switch do not belong to the request that began it.
        switch.task = asyncio.create_task(
            self._run_switch(switch), name=f"switch-{target.alias}", context=Context()
        )
        # If the caller has left, nothing else retrieves the exception of a failed switch.
        switch.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return switch

    async def _run_switch(self, switch: Switch) -> SwitchResult:
        try:
            async with self.ladder.move_lock():
                switch.turn_s = self._clock()
                try:
                    await self._take_over(switch)
                except BaseException:
                    await self._roll_back(switch)
                    raise
                return self._finish(switch)
        except BaseException as error:
            # Also if it was cancelled while it waited for the lock, or during the rollback.
            raise self._fail_switch(switch, error) from error

    async def _take_over(self, switch: Switch) -> None:
        target = switch.target
        async with self._phase(switch, SwitchPhase.VALIDATE):
            if not target.is_loaded:
                await self.ladder.measure_device()
            self._validate(switch)
            await target.engine.rehearse()
        switch.moves, switch.residency = not target.is_loaded, target.residency
        switch.memory_before_bytes = self._host.stats().used_bytes
        async with self._phase(switch, SwitchPhase.DRAIN):
            await self._drain(switch)
        switch.is_awaited = target.waking is not None
        self.ladder.cancel_prefetch(target)  # the load reads the rest itself
        async with self._phase(switch, SwitchPhase.MAKE_ROOM):
            room = await self.ladder.make_room(target)
            switch.evicted, switch.requests_lost = room.evicted, room.requests_lost
        if switch.moves:
            switch.memory_unloaded_bytes = self._host.stats().used_bytes
        async with self._phase(switch, SwitchPhase.BRING_UP):
            await self.ladder.bring_up(target)
        async with self._phase(switch, SwitchPhase.ACTIVATE):
            await self._activate(target)
        if not target.is_verified:
            async with self._phase(switch, SwitchPhase.VERIFY):
                await self._verify(target)

    def _validate(self, switch: Switch) -> None:
        """Refuse what cannot work, while the source has not given up anything."""
        target = switch.target
        self.ladder.revive(target)
        reads_files = target.residency in (Residency.COLD, Residency.DISCARDED)
        if reads_files:
            target.engine.validate()
        if not target.is_loaded:
            self.ladder.plan(target, switch.source)
        if reads_files and switch.source is not None and switch.source.leases:
            self.ladder.begin_prefetch(target)

    async def _drain(self, switch: Switch) -> None:
        """Wait for the source's leases; apply the policy to those left at the deadline."""
        source = switch.source
        if source is None:
            return
        await self._until_empty(source, self._drain_deadline(switch))
        if not source.leases or source.residency is not Residency.ACTIVE:
            return
        target, timeout_s = switch.target.alias, switch.drain_timeout_s
        if switch.automatic and self.dispatcher is not None:
            await self._drain_to_the_end(switch, source)
            return
        match switch.policy:
            case "refuse":
                raise DrainRefused(source.alias, target, len(source.leases), timeout_s)
            case "park":
                self._park(switch, source)
        # With `park`, those that could not be parked; with `abort`, all of them.
        cut = DrainCut(source.alias, target, timeout_s)
        running = [lease for lease in source.leases if not lease.is_parked]
        switch.requests_cut = drain.end(running, cut)
        await drain.until_ended(source)

    def _drain_deadline(self, switch: Switch) -> Callable[[], float]:
        """Return a function that says until when the drain waits, on the event loop's clock."""
        now_s, until_s = asyncio.get_running_loop().time(), switch.drain_until_s
        if until_s is None:
            return lambda: now_s + switch.drain_timeout_s
        ahead_s = now_s - self._clock()
        return lambda: until_s() + ahead_s

    async def _drain_to_the_end(self, switch: Switch, source: Model) -> None:
        """Park requests that still run, if no parked request is lost by that; wait for the others.

        Requests whose clients read slower than their answers come are aborted: otherwise such a
        client could hold up all others for as long as it likes.
        """
        if switch.may_park and self.ladder.can_keep_parked(switch.target):
            self._park(switch, source)
        now_s = asyncio.get_running_loop().time
        while drain.is_running(source):
            before = {lease: _kept_waiting_s(lease) for lease in source.leases}
            await self._until_empty(source, partial(float, now_s() + SLOW_LOOK_S))
            slow = [
                lease
                for lease, before_s in before.items()
                if lease in source.leases
                and not lease.is_parked
                and _kept_waiting_s(lease) - before_s > SLOW_LOOK_S / 2
            ]
            switch.requests_cut += drain.end(slow, SlowReader(switch.target.alias))

    async def _until_empty(self, source: Model, until_s: Callable[[], float]) -> None:
        """Wait for the source's requests, but not for WebSockets that have become idle.

        `until_s` returns until when, on the loop's clock. It is called again after every wake-up;
        `recheck_drain` causes one.
        """
        now_s = asyncio.get_running_loop().time
        while True:
            if self.dispatcher is not None:
                self.dispatcher.suspend_idle(source)
            left_s = until_s() - now_s()
            if left_s <= 0 or not drain.is_running(source):
                return
            if self.dispatcher is not None and any(x.is_connection for x in source.leases):
                left_s = min(left_s, CONNECTION_LOOK_S)
            await drain.until_empty(source, None if left_s == math.inf else left_s)

    def _park(self, switch: Switch, source: Model) -> None:
        timeout_s, at_most = self._settings.parked_timeout, self._settings.max_parked
        switch.requests_parked = count = drain.park(source, timeout_s, at_most)
        if self.dispatcher is not None:
            self.dispatcher.parked(source)
        if count:
            self._observer.notify(RequestsParked(self._epoch, source.alias, count))

    async def _activate(self, target: Model) -> None:
        """Make the target the stepped engine. If it is verified, its parked requests continue."""
        epoch = self._epoch + 1
        parked = target.parked
        for lease in parked:
            # Before the command is sent: the first outputs may arrive before its result.
            lease.hold_output(epoch)
        is_to_be_verified = self._settings.verify and not target.is_verified
        activating = target.engine.activate(epoch, is_to_be_verified)
        await self.ladder.run_command(target, Step.ACTIVATE.value, activating)
        refuse_failed(target)  # it may have died while this waited
        if self._active is not None and self._active.residency is Residency.ACTIVE:
            self.ladder.step(self._active, Step.PARK)
        self.ladder.step(target, Step.ACTIVATE)
        self._epoch = epoch
        self._active, self._is_resting = target, False
        if target.is_verified:
            self._serve(target)

    async def _verify(self, target: Model) -> None:
        """Check that the target generates what it should, before it serves requests."""
        if self._settings.verify:
            await self.ladder.run_command(target, "verify", target.engine.verify())
            refuse_failed(target)  # it may have died while this waited
        target.is_verified = True
        self._serve(target)

    def _serve(self, target: Model) -> None:
        self._last_active = target
        self.recovery.succeeded()
        self._resume(target)

    def _notify_activated(self, model: Model) -> None:
        """In the mode `auto`, admit requests that wait for this model, which is active now."""
        if self.dispatcher is not None:
            self.dispatcher.scheduler.leased_until_s = self._held_until_s
            self.dispatcher.activated(model.alias)

    def _resume(self, target: Model) -> None:
        parked = target.parked
        for lease in parked:
            lease.settle()
        if parked:
            self._observer.notify(RequestsResumed(self._epoch, target.alias, len(parked)))

    def _finish(self, switch: Switch) -> SwitchResult:
        """Re-open admission: held requests get leases of the new epoch, in order of arrival."""
        # Grant here rather than in the waiting tasks: a switch that begins before those run must
        # find their leases, or it would not drain them.
        self._switch = None
        for future, task in switch.held.items():
            if not future.done():
                future.set_result(self._grant(switch.target, task))
        duration_s = self._clock() - switch.started_s
        self._last_switch_s = duration_s
        source = switch.source.alias if switch.source else None
        self._notify_ended(switch, duration_s, None)
        self.lookahead.switched(switch.target)
        if self.dispatcher is not None:
            assert switch.turn_s is not None
            self.dispatcher.switched(switch, self._clock() - switch.turn_s - switch.drain_s)
        self._notify_activated(switch.target)
        return SwitchResult(
            operation_id=switch.operation_id,
            epoch=self._epoch,
            previous_model=source,
            current_model=switch.target.alias,
            switched=True,
            duration_s=duration_s,
            phases_s=switch.phases_s,
            requests_cut=switch.requests_cut,
            requests_parked=switch.requests_parked,
            requests_lost=switch.requests_lost,
            memory_before_bytes=switch.memory_before_bytes,
            memory_unloaded_bytes=switch.memory_unloaded_bytes or switch.memory_before_bytes,
            memory_after_bytes=self._host.stats().used_bytes
            if switch.moves
            else switch.memory_before_bytes,
            evicted=switch.evicted,
        )

    def _fail_switch(self, switch: Switch, cause: BaseException) -> BaseException:
        """Fail the requests that wait for the target; return the error for the switch's caller."""
        self._switch = None
        failed: SwitchFailed | EngineUnavailable
        if self._why_down is not None or self._host.died.done():
            failed = EngineUnavailable(self._why_down or self._host.died.result())
        else:
            failed = SwitchFailed(switch.target.alias, switch.phase.value, cause, self.active)
        for future in switch.held:
            if not future.done():
                future.set_exception(failed)
        self._notify_ended(switch, self._clock() - switch.started_s, cause)
        self._recover_if_needed(one_line(cause))
        if self.dispatcher is not None and not isinstance(cause, DrainRefused):
            self.dispatcher.failed(switch, failed)
        if self._active is not None:
            self._notify_activated(self._active)
        elif self.dispatcher is not None:
            self.dispatcher.advance()
        if isinstance(cause, DrainRefused):
            return cause
        # A switch is cancelled at shutdown; its callers still get an error.
        return failed if isinstance(cause, Exception | asyncio.CancelledError) else cause

    async def _roll_back(self, switch: Switch) -> None:
        """Make the source the active model again, from any state that the switch has left."""
        if self._host.died.done():
            return
        try:
            await async_failpoint("switch.rollback", switch.target.alias)
            if self._active is switch.target:  # it was activated, but failed verification
                self._active = None
                await self.ladder.move_down(switch.target, Residency.COLD)
            if switch.source is not None and switch.source.residency is not Residency.FAILED:
                await self._restore(switch.source, switch)
        except Exception as error:  # noqa: BLE001  # whatever the error is, the switch must end
            log.error(
                "event=rollback_failed target=%s cause=%r",
                *(value_text(switch.target.alias), one_line(error)),
            )
            self._host.kill(
                f"the engine host was stopped: a failed switch could not be undone: {error}"
            )

    async def _restore(self, source: Model, switch: Switch) -> None:
        try:
            if source.residency is not Residency.ACTIVE:
                await self._bring_back(source, switch.target)
            elif switch.phase is SwitchPhase.ACTIVATE:
                # The host may step the target already although its result was lost.
                await self.ladder.run_command(
                    source, "activate", source.engine.activate(self._epoch)
                )
        except Exception as error:  # noqa: BLE001  # recovery tries again
            await self._abandon_source(source, one_line(error))
            return
        if source.is_verified:
            self._resume(source)

    async def _bring_back(self, source: Model, target: Model) -> None:
        if not source.is_loaded:
            try:
                await self.ladder.make_room(source)
            except NoRoom:  # the target holds more than planned, or has been pinned
                await self.ladder.evict_all_but(source, even_pinned=target)
            await self.ladder.bring_up(source)
        await self._activate(source)
        if not source.is_verified:
            await self._verify(source)

    async def _abandon_source(self, source: Model, cause: str) -> None:
        """Leave no model active, as the source could not be brought back; recovery follows."""
        log.error("event=source_lost model=%s cause=%r", value_text(source.alias), cause)
        self._active = None
        self._last_active = source
        if source.is_loaded and not self._host.died.done():
            await self.ladder.move_down(source, Residency.COLD)

    def _notify_ended(self, switch: Switch, duration_s: float, cause: BaseException | None) -> None:
        status: SwitchStatus = "switched"
        if cause is not None:
            status = "refused" if isinstance(cause, DrainRefused) else "failed"
        self.switches += 1
        self._used_s = self._clock()
        self.switches_failed += status == "failed"
        self._observer.notify(
            SwitchEnded(
                switch.operation_id,
                self._epoch,
                switch.source.alias if switch.source else None,
                switch.target.alias,
                status,
                duration_s,
                switch.requests_cut,
                None if cause is None else one_line(cause),
                switch.requests_parked,
                switch.requests_lost,
                switch.automatic,
                switch.residency,
                switch.drain_s,
                duration_s if switch.turn_s is None else switch.turn_s - switch.started_s,
                switch.key,
            )
        )

    def _unswitched(self) -> SwitchResult:
        used = self._host.stats().used_bytes
        assert self._active is not None
        alias = self._active.alias
        return SwitchResult(
            operation_id=_operation_id(),
            epoch=self._epoch,
            previous_model=alias,
            current_model=alias,
            switched=False,
            duration_s=0.0,
            memory_before_bytes=used,
            memory_unloaded_bytes=used,
            memory_after_bytes=used,
        )

    @asynccontextmanager
    async def _phase(self, switch: Switch, phase: SwitchPhase) -> AsyncIterator[None]:
        """Run one phase of a switch: set its name, time it, and notify observers."""
        switch.phase = phase
        started_s = self._clock()
        self._notify_phase(switch, phase, "started", 0.0)
        try:
            await async_failpoint(f"switch.{phase.value}", switch.target.alias)
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
        """Admit nothing more; abort with an explicit error what still runs after `timeout_s`."""
        if self._ended is None:
            self._ended = "the server is shutting down"
        self.jobs.close()
        self.ladder.close()
        gone = EngineUnavailable("the server is shutting down")
        if self.dispatcher is not None:
            self.dispatcher.close(gone)
        await self.recovery.stop()
        if self._switch is not None and self._switch.task is not None:
            switching = self._switch.task
            await asyncio.wait([switching], timeout=timeout_s)
            switching.cancel("the server is shutting down")
            await asyncio.wait([switching], timeout=drain.CUT_GRACE_S)
            if not switching.done():  # it waits for a host that is stuck
                self._host.kill("the server is shutting down")
                await asyncio.wait([switching])
        busy = [model for model in self.registry if model.leases]
        for model in busy:
            drain.end(model.parked, gone)  # they would never be stepped again
            await drain.until_empty(model, timeout_s)
            drain.end(model.leases, gone)
        for model in busy:
            await drain.until_ended(model)

    # --- what may happen at any time --------------------------------------------------------

    def _host_died(self, died: asyncio.Future[str]) -> None:
        """Fail every open request of every model explicitly, and begin recovery."""
        if died.cancelled() or died is not self._host.died:
            return  # the future of an earlier host
        how = died.result()
        self._host_down = how
        for model in self.registry:
            if model.residency is not Residency.COLD:
                self._fail(model, how)
            else:
                _end_with_engine(model, how)  # requests that were parked with it
        self._active, self._is_resting = None, False
        self._observer.notify(HostDied(self._epoch, how))
        if self._is_started and self._ended is None:
            self.recovery.host_died(how)

    def _engine_failed(self, alias: str, cause: str, load: int) -> None:
        """Fail the requests of an engine that died in a step; other engines continue."""
        model = self.registry.model(alias)
        if load != model.engine.loads:
            log.info("event=stale_event_dropped model=%s load=%d", value_text(alias), load)
            return
        self._fail(model, cause)
        self._observer.notify(EngineDied(self._epoch, alias, cause))
        if model is self._active:
            self._active = None
        self.ladder.give_up_wakes()  # recovery comes first
        cleanup = asyncio.create_task(self._free_failed_engines())
        self._cleanups.add(cleanup)
        cleanup.add_done_callback(self._cleanups.discard)
        self._recover_if_needed(f"the engine of {alias!r} died: {cause}")

    async def _free_failed_engines(self) -> None:
        """Free what a dead engine still holds now, rather than at the next switch."""
        try:
            async with self.ladder.move_lock():
                await self.ladder.free_failed_engines()
        except HotswapError as error:  # the host has died, or the next `make_room` reports it
            log.warning("event=bury_failed cause=%r", one_line(error))

    def _fail(self, model: Model, cause: str) -> None:
        model.failure = cause
        if model.residency is not Residency.FAILED:
            self.ladder.step(model, Step.FAIL)
        _end_with_engine(model, cause)

    # --- recovery ---------------------------------------------------------------------------

    @property
    def is_host_down(self) -> bool:
        return self._host_down is not None or self._host.died.done()

    @property
    def needs_recovery(self) -> bool:
        is_missed = self._active is None and not self._is_resting
        return is_missed and self._is_started and self._ended is None

    def _recover_if_needed(self, why: str) -> None:
        if self.needs_recovery and self._switch is None and not self.recovery.is_under_way:
            self.recovery.begin(why)

    def move_lock(self) -> asyncio.Lock:
        return self.ladder.move_lock()

    def host_restarted(self) -> None:
        self._host_down = None
        self._host.died.add_done_callback(self._host_died)

    async def bring_back(self) -> None:
        switch = self._switch
        if switch is None:
            assert self._last_active is not None
            switch = self._begin(self._last_active, 0.0, "abort")
        await _result(switch)

    def recovery_attempt_failed(self) -> None:
        if self.dispatcher is not None:
            self.dispatcher.advance()

    def give_up(self, why: str) -> None:
        if self._ended is None:
            self._ended = why
            self.given_up.set_result(why)


def _end_with_engine(model: Model, cause: str) -> None:
    drain.end(model.leases, EngineUnavailable(f"the engine of {model.alias!r} died: {cause}"))


async def _result(switch: Switch) -> SwitchResult:
    """Wait for a switch and return its result."""
    assert switch.task is not None
    # Shielded: a caller that leaves must not cancel the switch for the others that wait for it.
    return await asyncio.shield(switch.task)


def _refuse_failed_adapters(model: Model) -> None:
    """Refuse to start with an adapter that could not be loaded. Raises `ConfigError`."""
    for adapter in model.engine.adapters.values():
        if adapter.failure is not None:
            raise ConfigError(f"models.{model.alias}: {adapter.failure}")


def _kept_waiting_s(lease: Lease) -> float:
    return lease.kept_waiting_s() if lease.kept_waiting_s is not None else 0.0


def _granted(held: asyncio.Future[Lease]) -> Lease | None:
    """Return the lease that a waiting request was granted, if it was."""
    is_granted = held.done() and not held.cancelled() and held.exception() is None
    return held.result() if is_granted else None


def _operation_id() -> str:
    return f"switch-{uuid.uuid4().hex[:12]}"
