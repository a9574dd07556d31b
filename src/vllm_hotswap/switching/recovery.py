"""Deaths of engines and of the engine host, and the way back.

This module notices a death and fails the requests of what has died. It decides when the host counts
as hung, how long to wait before the next attempt to recover, and when to give up.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

from vllm_hotswap.config import RecoveryConfig
from vllm_hotswap.errors import EngineUnavailable, HotswapError, one_line
from vllm_hotswap.events import EngineDied, HostDied, HostRestarted, Observer, ServiceDegraded
from vllm_hotswap.models import EngineHost, Model, Pulse, Registry, drain
from vllm_hotswap.residency import Ladder
from vllm_hotswap.states import Residency, Step
from vllm_hotswap.switching.activation import Activation
from vllm_hotswap.switching.state import ServingState
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap")

LEAST_BACKOFF_S = 0.1

PING_S = 1.0
"""Interval at which the engine host is asked for a sign of life."""


class Recovery:
    """Recovers from deaths in one task at a time, and watches over the host.

    It alone writes `host_down`, `recovery_failure`, `is_degraded` and `is_recovering` of the state.
    Its own mutable state is `_task`, `_cleanups` (tasks that free failed engines), `_attempts_s`
    (times of the attempts to recover), `_deaths_s` (times of the host's deaths) and `restarts`.
    """

    def __init__(
        self,
        state: ServingState,
        registry: Registry,
        host: EngineHost,
        ladder: Ladder,
        activation: Activation,
        observer: Observer,
        settings: RecoveryConfig,
        bring_back: Callable[[Model], Awaitable[None]],
        attempt_failed: Callable[[], None],
    ) -> None:
        """Watch over nothing yet: `follow_host` begins it.

        Args:
            state: what the server does now.
            registry: the models.
            host: the engine host.
            ladder: moves models.
            activation: the pointer to the active model.
            observer: is notified of deaths and of the host's restart.
            settings: bounds and times.
            bring_back: makes a model the active one. Raises `HotswapError`.
            attempt_failed: called after a failed attempt; until the next one, another model may be
                tried.
        """
        self._state = state
        self._registry = registry
        self._host = host
        self._ladder = ladder
        self._activation = activation
        self._observer = observer
        self._settings = settings
        self._bring_back = bring_back
        self._attempt_failed = attempt_failed
        self._task: asyncio.Task[None] | None = None
        self._cleanups: set[asyncio.Task[None]] = set()
        self._is_well = asyncio.Event()
        self._attempts_s: deque[float] = deque()
        self._deaths_s: deque[float] = deque()
        self.restarts = 0
        """Restarts of the engine host, so far."""
        host.on_engine_failed(self.engine_failed)

    def __repr__(self) -> str:
        return f"<Recovery under_way={self._state.is_recovering} restarts={self.restarts}>"

    # --- deaths -----------------------------------------------------------------------------

    def follow_host(self) -> None:
        """Notice when the host that is there now dies."""
        self._host.died.add_done_callback(self._host_died)

    def _host_died(self, died: asyncio.Future[str]) -> None:
        """Fail every open request of every model explicitly, and begin recovery."""
        if died.cancelled() or died is not self._host.died:
            return  # the future of an earlier host
        state = self._state
        state.host_down = how = died.result()
        for model in self._registry:
            if model.residency is not Residency.COLD:
                self._fail(model, how)
            else:
                _end_with_engine(model, how)  # requests that were parked with it
        self._activation.clear()
        self._observer.notify(HostDied(state.epoch, how))
        if state.is_started and state.ended is None:
            self._count_death(how)

    def engine_failed(self, alias: str, cause: str, load: int) -> None:
        """Fail the requests of an engine that died in a step; other engines continue."""
        model = self._registry.model(alias)
        if load != model.engine.loads:
            log.info("event=stale_event_dropped model=%s load=%d", value_text(alias), load)
            return
        self._fail(model, cause)
        self._observer.notify(EngineDied(self._state.epoch, alias, cause))
        if model is self._state.active:
            self._activation.clear()
        self._ladder.give_up_wakes()  # recovery comes first
        cleanup = asyncio.create_task(self._free_failed_engines())
        self._cleanups.add(cleanup)
        cleanup.add_done_callback(self._cleanups.discard)
        self.begin_if_needed(f"the engine of {alias!r} died: {cause}")

    async def _free_failed_engines(self) -> None:
        """Free what a dead engine still holds now, rather than at the next switch."""
        try:
            async with self._ladder.move_lock():
                await self._ladder.free_failed_engines()
        except Exception as error:  # noqa: BLE001  # as if the host has died: `make_room` tries again
            log.warning("event=bury_failed cause=%r", one_line(error))

    def _fail(self, model: Model, cause: str) -> None:
        model.failure = cause
        if model.residency is not Residency.FAILED:
            self._ladder.step(model, Step.FAIL)
        _end_with_engine(model, cause)

    def _count_death(self, how: str) -> None:
        """Count a death of the host. Recovery begins, or the server is given up."""
        self._remember(self._deaths_s)
        if len(self._deaths_s) > self._settings.max_restarts:
            self._state.give_up(
                f"{how}; this was death {len(self._deaths_s)} within "
                f"{self._settings.restart_window:g} s (recovery.max_restarts)"
            )
        else:
            self._begin(how)

    # --- the way back -----------------------------------------------------------------------

    def begin_if_needed(self, why: str) -> None:
        """Start to recover if no model is active, and nothing under way will change that."""
        state = self._state
        if state.needs_recovery and state.switch is None and not state.is_recovering:
            self._begin(why)

    def _begin(self, why: str) -> None:
        self._state.recovery_failure = why
        if not self._state.is_recovering:
            self._state.is_recovering = True
            self._task = asyncio.create_task(self._run(), name="recovery")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._state.is_recovering = False  # a task that has not begun to run ends without a trace

    async def _run(self) -> None:
        try:
            while self._state.needs_recovery:
                await self._pause(self._backoff_s())
                await self._try()
            self._note_success()
        finally:
            self._state.is_recovering = False

    async def _pause(self, seconds: float) -> None:
        """Wait for so many seconds, or until a model is active."""
        self._is_well.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_well.wait()

    def succeeded(self) -> None:
        """Note that a model is active, which ends the wait for the next attempt."""
        self._note_success()
        self._is_well.set()

    def _note_success(self) -> None:
        self._state.recovery_failure, self._state.is_degraded = None, False

    async def _try(self) -> None:
        if not self._state.needs_recovery:
            return  # a switch has made a model active during the wait
        self._remember(self._attempts_s)
        try:
            await self._attempt()
        except HotswapError as error:
            self._failed(error)
        except Exception as error:
            log.exception("event=recovery_failed")
            self._failed(error)

    async def _attempt(self) -> None:
        if self._state.host_is_gone:
            await self._restart()
        assert self._state.last_active is not None
        await self._bring_back(self._state.last_active)

    async def _restart(self) -> None:
        started_s = self._state.clock()
        async with self._ladder.move_lock():
            try:
                await self._start_host(self._settings.load_timeout)
            except Exception as error:
                why = f"the engine host could not be started: {one_line(error)}"
                self._host.kill(why)
                self._observer.notify(HostDied(self._state.epoch, why))
                self._count_death(why)  # starts no second task: this one tries again
                raise
            self.restarts += 1
            self._state.host_down = None
            self.follow_host()
        took_s = self._state.clock() - started_s
        self._observer.notify(HostRestarted(self._state.epoch, self.restarts, took_s))

    async def _start_host(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._host.restart()
        except TimeoutError:
            raise HotswapError(f"it was not ready within {timeout_s:g} s") from None

    def _failed(self, error: Exception) -> None:
        failure = one_line(error)
        self._state.recovery_failure, self._state.is_degraded = failure, True
        self._observer.notify(ServiceDegraded(self._state.epoch, failure, self._backoff_s()))
        # Later: nothing that this does may end the recovery.
        asyncio.get_running_loop().call_soon(self._attempt_failed)

    def _backoff_s(self) -> float:
        """Return 0 before the first attempt, then 1, 2, 4 ... seconds while attempts come often."""
        self._forget(self._attempts_s)
        tried = len(self._attempts_s)
        if not tried:
            return 0.0
        doubled = 2.0 ** min(tried - 1, 30)
        return max(LEAST_BACKOFF_S, min(doubled, self._settings.max_backoff))

    def _remember(self, times_s: deque[float]) -> None:
        self._forget(times_s)
        times_s.append(self._state.clock())

    def _forget(self, times_s: deque[float]) -> None:
        while times_s and times_s[0] <= self._state.clock() - self._settings.restart_window:
            times_s.popleft()

    # --- watching ---------------------------------------------------------------------------

    async def watch(self) -> None:
        """Until cancelled, kill a host that gives no sign of life or is stuck in a step.

        What counts is how many checks went unanswered, not the time: while this process was
        stopped, or its loop blocked, it could not have heard the host.
        """
        silent_s = 0.0
        asking: asyncio.Task[Pulse] | None = None
        try:
            while True:
                asking = asking or asyncio.create_task(self._host.ping())
                await asyncio.sleep(PING_S)
                if self._state.host_is_gone:  # or starting, which has a deadline of its own
                    silent_s = 0.0
                    continue
                if asking.done():
                    self._on_pulse(asking)
                    silent_s, asking = 0.0, None
                    continue
                silent_s += PING_S
                if silent_s >= self._settings.hang_timeout:
                    self._host.kill(
                        f"the engine host was stopped: no sign of life for {silent_s:g} s "
                        "(recovery.hang_timeout)"
                    )
        finally:
            if asking is not None:
                asking.cancel()

    def _on_pulse(self, asking: asyncio.Task[Pulse]) -> None:
        if asking.exception() is not None:
            return  # the host is dead, which is known already
        step_s = asking.result().step_s
        if step_s >= self._settings.step_timeout:
            self._host.kill(
                f"the engine host was stopped: one step took {step_s:.0f} s (recovery.step_timeout)"
            )


def _end_with_engine(model: Model, cause: str) -> None:
    drain.end(model.leases, EngineUnavailable(f"the engine of {model.alias!r} died: {cause}"))
