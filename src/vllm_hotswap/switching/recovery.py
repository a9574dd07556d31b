"""Recovery of the server after the engine host, or the active engine, has died.

This module decides when the host counts as hung, how long to wait before the next attempt, and
when to give up. The coordinator acts: it switches back to the last active model.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Protocol

from vllm_hotswap.config import RecoveryConfig
from vllm_hotswap.errors import HotswapError, one_line
from vllm_hotswap.events import HostDied, HostRestarted, Observer, ServiceDegraded
from vllm_hotswap.models import EngineHost, Pulse

log = logging.getLogger("vllm_hotswap")

LEAST_BACKOFF_S = 0.1

PING_S = 1.0
"""Interval at which the engine host is asked for a sign of life."""


class Recoverable(Protocol):
    """The coordinator, as far as recovery knows it."""

    @property
    def epoch(self) -> int: ...

    @property
    def is_host_down(self) -> bool: ...

    @property
    def needs_recovery(self) -> bool:
        """Whether no model is active although one should be."""

    def move_lock(self) -> AbstractAsyncContextManager[object]:
        """Exclusive use of the host: entered once no other operation uses it."""

    def host_restarted(self) -> None:
        """Note that there is a host again, with nothing loaded."""

    async def bring_back(self) -> None:
        """Make the last active model the active one. Raises `HotswapError`."""

    def recovery_attempt_failed(self) -> None:
        """Note a failed attempt; until the next one, another model may be tried."""

    def give_up(self, why: str) -> None:
        """Stop serving for good."""


class Recovery:
    """One recovery task at a time, and a watch over the host.

    The mutable state is `_task`, `_attempts_s` (times of the attempts to recover), `_deaths_s`
    (times of the host's deaths), `restarts`, `failure` and `is_degraded`.
    """

    def __init__(
        self,
        server: Recoverable,
        host: EngineHost,
        observer: Observer,
        settings: RecoveryConfig,
        clock: Callable[[], float],
    ) -> None:
        self._server = server
        self._host = host
        self._observer = observer
        self._settings = settings
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._is_well = asyncio.Event()
        self._attempts_s: deque[float] = deque()
        self._deaths_s: deque[float] = deque()
        self.restarts = 0
        """Restarts of the engine host, so far."""
        self.failure: str | None = None
        """Why recovery is under way: what has died, or why the last attempt failed."""
        self.is_degraded = False
        """Whether an attempt has failed."""

    def __repr__(self) -> str:
        return f"<Recovery under_way={self.is_under_way} restarts={self.restarts}>"

    @property
    def is_under_way(self) -> bool:
        return self._task is not None and not self._task.done()

    def host_died(self, how: str) -> None:
        """Count a death of the host. Recovery begins, or the server is given up."""
        self._remember(self._deaths_s)
        if len(self._deaths_s) > self._settings.max_restarts:
            self._server.give_up(
                f"{how}; this was death {len(self._deaths_s)} within "
                f"{self._settings.restart_window:g} s (recovery.max_restarts)"
            )
        else:
            self.begin(how)

    def begin(self, why: str) -> None:
        """Start to recover, unless that is under way already."""
        self.failure = why
        if not self.is_under_way:
            self._task = asyncio.create_task(self._run(), name="recovery")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while self._server.needs_recovery:
            await self._pause(self._backoff_s())
            await self._try()
        self.failure, self.is_degraded = None, False

    async def _pause(self, seconds: float) -> None:
        """Wait for so many seconds, or until a model is active."""
        self._is_well.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_well.wait()

    def succeeded(self) -> None:
        """Note that a model is active, which ends the wait for the next attempt."""
        self.failure, self.is_degraded = None, False
        self._is_well.set()

    async def _try(self) -> None:
        if not self._server.needs_recovery:
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
        if self._server.is_host_down:
            await self._restart()
        await self._server.bring_back()

    async def _restart(self) -> None:
        started_s = self._clock()
        async with self._server.move_lock():
            try:
                await self._start_host(self._settings.load_timeout)
            except Exception as error:
                why = f"the engine host could not be started: {one_line(error)}"
                self._host.kill(why)
                self._observer.notify(HostDied(self._server.epoch, why))
                self.host_died(why)  # starts no second task: this one tries again
                raise
            self.restarts += 1
            self._server.host_restarted()
        took_s = self._clock() - started_s
        self._observer.notify(HostRestarted(self._server.epoch, self.restarts, took_s))

    async def _start_host(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._host.restart()
        except TimeoutError:
            raise HotswapError(f"it was not ready within {timeout_s:g} s") from None

    def _failed(self, error: Exception) -> None:
        self.failure, self.is_degraded = one_line(error), True
        event = ServiceDegraded(self._server.epoch, self.failure, self._backoff_s())
        self._observer.notify(event)
        self._server.recovery_attempt_failed()

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
        times_s.append(self._clock())

    def _forget(self, times_s: deque[float]) -> None:
        while times_s and times_s[0] <= self._clock() - self._settings.restart_window:
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
                if self._server.is_host_down:  # or starting, which has a deadline of its own
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
