"""Builds the parts that admit requests and switch models, and is what the rest of the server sees.

Everything runs on one event loop. Decisions are plain methods: between two awaits nothing else
runs, so they need no locks. Slow work (draining, making room, loading, activating) runs in one task
per switch, whose phases are listed in `states.SwitchPhase`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager

from vllm_hotswap.config import DrainAction, LimitsConfig, RecoveryConfig, SwitchingConfig
from vllm_hotswap.errors import EngineUnavailable
from vllm_hotswap.events import Observer
from vllm_hotswap.models import EngineHost, Lease, Model, ModelSettings, Registry, drain, total
from vllm_hotswap.residency import (
    Ladder,
    Lookahead,
    Operations,
    Plan,
    up_cost_s,
)
from vllm_hotswap.scheduling import DEFAULT_TERMS, RequestTerms
from vllm_hotswap.switching.activation import Activation
from vllm_hotswap.switching.admission import Admission, Leases, Preview
from vllm_hotswap.switching.auto import AutoAdmission
from vllm_hotswap.switching.idle import IdleRest
from vllm_hotswap.switching.job_leases import JobLease
from vllm_hotswap.switching.jobs import Jobs
from vllm_hotswap.switching.manual import ManualAdmission
from vllm_hotswap.switching.recovery import Recovery
from vllm_hotswap.switching.snapshot import (
    MemoryUse,
    ModelSnapshot,
    ServerSnapshot,
    ServingSnapshot,
    WakingSnapshot,
)
from vllm_hotswap.switching.startup import Startup
from vllm_hotswap.switching.state import SHUTTING_DOWN, Clock, ServingState
from vllm_hotswap.switching.switch import SwitchResult
from vllm_hotswap.switching.switcher import Switcher
from vllm_hotswap.switching.transaction import SwitchTransaction


class Coordinator:
    """Admits requests and switches models.

    The mutable state is in `ServingState`, in the leases of each model in the registry, and in the
    models' residencies, which `Ladder` changes.

    Some parts need each other. Each gets those that are built before it, and functions that find
    the later ones when they are called.
    """

    admission: Admission
    recovery: Recovery
    _switcher: Switcher

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
        settings, limits = settings or SwitchingConfig(), limits or LimitsConfig()
        deadlines = recovery or RecoveryConfig()
        self._host = host
        self._settings = settings
        self._state = state = ServingState(clock, host)
        self.registry = registry = Registry(host.engines, model_settings)
        self.ladder = ladder = Ladder(
            registry, host, observer, clock, lambda: state.epoch, deadlines
        )
        self.lookahead = Lookahead(
            registry,
            ladder.prefetches,
            ladder.wakes,
            observer,
            lambda: state.epoch,
            settings.predict,
        )
        self.jobs = Jobs(self, observer, settings.max_lease, clock)
        self.operations = Operations(
            registry, ladder, self.lookahead, self.usable, clock, deadlines.command_timeout
        )
        self._activation = Activation(state, ladder, observer, settings.verify, self._on_serving)
        self._leases = Leases(state, observer, limits.in_flight, lambda: self.admission)
        if settings.mode == "auto":
            self.admission = AutoAdmission(
                state,
                registry,
                ladder,
                self._leases,
                settings,
                lambda: self._switcher.can_switch,
                lambda target, until_s, may_park=True: self._switcher.begin_automatic(
                    target, until_s, may_park
                ),
            )
        else:
            self.admission = ManualAdmission(state, self._leases, settings)
        transaction = SwitchTransaction(
            state, host, ladder, self._activation, self.admission, observer, settings
        )
        self._switcher = Switcher(
            state,
            registry,
            host,
            ladder,
            self.lookahead,
            self.jobs,
            self.admission,
            transaction,
            observer,
            settings,
            self._recover_if_needed,
        )
        self.recovery = Recovery(
            state,
            registry,
            host,
            ladder,
            self._activation,
            observer,
            deadlines,
            self._switcher.bring_back,
            self.admission.advance,
        )
        self.idle = IdleRest(
            state,
            registry,
            host,
            ladder,
            self._activation,
            self.admission,
            self._switcher,
            self.jobs,
            settings,
        )

    def __repr__(self) -> str:
        in_flight = sum(len(model.leases) for model in self.registry)
        return (
            f"<Coordinator active={self.active} epoch={self.epoch} "
            f"phase={self._state.phase.upper()} in_flight={in_flight} "
            f"waiting={self.admission.waiting}>"
        )

    def _on_serving(self) -> None:
        self.recovery.succeeded()

    def _recover_if_needed(self, why: str) -> None:
        self.recovery.begin_if_needed(why)

    # --- what is ----------------------------------------------------------------------------

    @property
    def active(self) -> str | None:
        return self._state.active_alias

    @property
    def epoch(self) -> int:
        return self._state.epoch

    @property
    def target(self) -> str | None:
        """Return the alias of the target of the switch under way, if any."""
        return self._state.target.alias if self._state.target else None

    @property
    def is_automatic(self) -> bool:
        """Whether the server switches by itself: the mode `auto`."""
        return self._settings.mode == "auto"

    @property
    def given_up(self) -> asyncio.Future[str]:
        """Future that is done when the server has given up, without having been stopped."""
        return self._state.given_up

    def serving(self) -> ServingSnapshot:
        """Return what is served now; cheap enough for callers without a key."""
        state = self._state
        return ServingSnapshot(
            state=state.server_state,
            active=state.active_alias,
            epoch=state.epoch,
            switch=None if state.switch is None else state.switch.snapshot(),
            failure=state.failure,
            is_ready=state.why_down is None and state.is_there and self.admission.is_open,
        )

    def snapshot(self) -> ServerSnapshot:
        """Return the whole server now, as one value."""
        state, ladder, now_s = self._state, self.ladder, self._state.clock()
        leases = tuple(self.jobs.leases)
        held = Counter(lease.model for lease in leases)
        models = tuple(
            self._snapshot_of(model, now_s, held[model.alias]) for model in self.registry
        )
        return ServerSnapshot(
            now_s=now_s,
            serving=self.serving(),
            waiting=self.admission.waiting,
            models=models,
            memory=MemoryUse(
                budget=ladder.plans.budget,
                used=total(model.held for model in models),
                prefetched_bytes=ladder.prefetches.held_bytes,
                base_bytes=self._host.base_bytes,
                others_bytes=self._host.others_bytes,
            ),
            switches=state.switches,
            switches_failed=state.switches_failed,
            job_leases=leases,
            predicted=self.lookahead.predicted,
            predictions=self.lookahead.stats,
            is_fake=self._host.is_fake,
            host_restarts=self.recovery.restarts,
        )

    def _snapshot_of(self, model: Model, now_s: float, job_leases: int) -> ModelSnapshot:
        waking = model.waking
        return ModelSnapshot(
            alias=model.alias,
            residency=model.residency,
            is_active=model is self._state.active,
            in_flight=len(model.leases),
            parked=len(model.parked),
            held_back=sum(lease.held_back for lease in model.leases),
            waiting=self.admission.waiting_for(model),
            memory=model.engine.memory,
            held=model.held,
            waking=WakingSnapshot(waking.done_bytes, waking.total_bytes) if waking else None,
            pinned=model.pinned,
            job_leases=job_leases,
            idle_s=None if model.last_used_s is None else now_s - model.last_used_s,
            switch_cost_s=up_cost_s(model, model.residency),
            failure=model.failure,
        )

    def max_wait_s(self, model: Model) -> float:
        """Return after how long a waiting request of the model is due, unless it says otherwise."""
        return model.settings.max_wait_or(self._settings.max_wait)

    def usable(self, alias: str) -> Model:
        """Return the model with that alias.

        Raises:
            UnknownModel, InvalidRequest: it names no model.
            EngineUnavailable: there is no engine host.
        """
        model = self.registry.model(alias)
        if self._state.why_down is not None:
            raise EngineUnavailable(self._state.why_down)
        return model

    # --- start and stop ---------------------------------------------------------------------

    async def start(self, load: Iterable[str], default: str) -> None:
        """Load the aliases of `load`, and activate `default`; see `Startup.run`.

        Raises:
            HotswapError: one of them cannot be loaded; the message names it.
        """
        self.recovery.follow_host()
        _ = self.given_up  # created here, so that it belongs to this loop
        self.idle.default = first = self.registry.resolve(default)
        others = [self.registry.resolve(alias) for alias in load if alias != default]
        await Startup(self.ladder, self._activation).run(first, others)
        self._state.is_started = True
        self.lookahead.switched(first)
        self._switcher.serve(first)

    async def shut_down(self, timeout_s: float) -> None:
        """Admit nothing more; abort with an explicit error what still runs after `timeout_s`."""
        self._state.end(SHUTTING_DOWN)
        self.jobs.close()
        self.ladder.wakes.close()
        gone = EngineUnavailable(SHUTTING_DOWN)
        self.admission.close(gone)
        await self.recovery.stop()
        await self._switcher.stop(timeout_s)
        busy = [model for model in self.registry if model.leases]
        for model in busy:
            drain.end(model.parked, gone)  # they would never be stepped again
            await drain.until_empty(model, timeout_s)
            drain.end(model.leases, gone)
        for model in busy:
            await drain.until_ended(model)

    async def rest_idle_models(self) -> None:
        """Until cancelled, move models down that have been idle for as long as they may be."""
        await self.idle.run()

    async def watch_device(self) -> None:
        """Until cancelled, watch for memory that models count on and other processes have taken."""
        await self.idle.watch_device()

    # --- requests ---------------------------------------------------------------------------

    def resolve_target(self, name: str | None) -> Model:
        """Return the model that a request is for: by the name in the request, if it has one.

        Raises `UnknownModel`, `AdapterUnavailable`.
        """
        if name is not None:
            return self.registry.resolve(name)
        assert self._state.expected is not None
        return self._state.expected

    def reserve(self, model: Model, requests: int) -> AbstractContextManager[None]:
        """Reserve room for a request that becomes several engine requests, while the body runs.

        Raises `QueueFull`.
        """
        return self._leases.reserve(model, requests)

    def lease(
        self,
        model: Model,
        name: str | None = None,
        terms: RequestTerms = DEFAULT_TERMS,
        preview: Preview | None = None,
    ) -> AbstractAsyncContextManager[Lease]:
        """Hold a model while the body runs.

        Entering may wait for the switch under way. In the mode `auto` it does not: instead, the
        body has to wait for its turn (`Lease.wait_for_turn`) before it gives anything to the
        engine. When its lease is cut (`Lease.on_cut`), the body has `CUT_GRACE_S` to end before its
        task is cancelled.

        Args:
            model: the model that the request is for; see `resolve_target`.
            name: its name in the request; None if the request names none.
            terms: the request's terms for its turn, in the mode `auto`.
            preview: called in the mode `auto` if the model has never been loaded, so that no
                frontend can check the request yet. Then entering waits for its turn.

        Raises:
            ModelNotActive, ModelSwitching, QueueFull, WaitTimeout, SwitchFailed, SwitchNotAllowed,
            EngineUnavailable: the request is not admitted.
        """
        return self._leases.hold(model, name, terms, preview)

    # --- switches and jobs ------------------------------------------------------------------

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
        return await self._switcher.switch(alias, drain_timeout_s, on_drain_timeout, key)

    async def hold(
        self, alias: str, owner: str, ttl_s: float, note: str = "", key: str = ""
    ) -> JobLease:
        """Hold a model for a job; see `Jobs.hold`."""
        return await self.jobs.hold(self.usable(alias).alias, owner, ttl_s, note, key)

    def leases_changed(self) -> None:
        """Note that jobs hold another model than before, or until another time."""
        self._state.touch()
        self.admission.leased_until(self._switcher.leased_until_s)

    def plan(self, alias: str) -> Plan:
        """Plan a switch to `alias` without doing it. Raises `UnknownModel`, `NoRoom`."""
        return self.operations.plan(alias, self._state.active)
