"""One switch at a time: begin it, join it, refuse another one, finish it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextvars import Context

from vllm_hotswap.config import DrainAction, SwitchingConfig
from vllm_hotswap.errors import (
    DrainRefused,
    EngineUnavailable,
    SwitchFailed,
    SwitchInProgress,
    SwitchRateLimited,
    one_line,
)
from vllm_hotswap.events import Observer, SwitchEnded, SwitchStatus
from vllm_hotswap.models import EngineHost, Model, Registry, drain
from vllm_hotswap.residency import Ladder, Lookahead
from vllm_hotswap.switching.admission import Admission
from vllm_hotswap.switching.jobs import Jobs
from vllm_hotswap.switching.state import SHUTTING_DOWN, ServingState
from vllm_hotswap.switching.switch import Switch, SwitchResult
from vllm_hotswap.switching.transaction import SwitchTransaction
from vllm_hotswap.tasks import Rate


class Switcher:
    """Begins and ends switches.

    It alone writes `switch`, `explicit_calls`, `last_switch_s`, `switches` and `switches_failed` of
    the state. A switch runs in a task of its own, so that a caller that leaves does not stop it.
    """

    def __init__(
        self,
        state: ServingState,
        registry: Registry,
        host: EngineHost,
        ladder: Ladder,
        lookahead: Lookahead,
        jobs: Jobs,
        admission: Admission,
        transaction: SwitchTransaction,
        observer: Observer,
        settings: SwitchingConfig,
        recover_if_needed: Callable[[str], None],
    ) -> None:
        """`recover_if_needed`: called with a cause when a switch may have left no model active."""
        self._state = state
        self._registry = registry
        self._host = host
        self._ladder = ladder
        self._lookahead = lookahead
        self._jobs = jobs
        self._admission = admission
        self._transaction = transaction
        self._observer = observer
        self._settings = settings
        self._recover_if_needed = recover_if_needed
        self._rate = Rate(settings.rate, settings.burst, state.clock)

    def __repr__(self) -> str:
        return f"<Switcher switches={self._state.switches} {self._state!r}>"

    async def switch(
        self,
        alias: str,
        drain_timeout_s: float | None = None,
        on_drain_timeout: DrainAction | None = None,
        key: str = "",
    ) -> SwitchResult:
        """Make `alias` the active model; see `Coordinator.switch`."""
        target = self._registry.resolve(alias)
        await self._wait_for_automatic_switch(target)
        # No await from here to `begin`, or two calls could each begin a switch.
        if self._state.why_down is not None:
            raise EngineUnavailable(self._state.why_down)
        switch = self._state.switch
        if switch is None:
            if target is self._state.active:
                return self._unswitched(target)
            self._refuse(target)
            if drain_timeout_s is None:
                drain_timeout_s = self._settings.drain_timeout
            policy = on_drain_timeout or self._settings.on_drain_timeout
            switch = self.begin(target, drain_timeout_s, policy, key=key)
        if switch.target is not target:
            raise SwitchInProgress(switch.target.alias, alias, switch.operation_id)
        return await result_of(switch)

    def _refuse(self, target: Model) -> None:
        """Check that a call may begin a switch. Raises `ModelLeased`, `SwitchRateLimited`."""
        self._jobs.refuse_other(target.alias)
        if wait_s := self._rate.take():
            raise SwitchRateLimited(
                f"more than {self._settings.rate:g} switches per second "
                f"(switching.rate); retry in {wait_s} s",
                retry_after_s=wait_s,
            )

    async def _wait_for_automatic_switch(self, target: Model) -> None:
        """Wait for an automatic switch to another target; no further automatic one begins."""
        self._state.explicit_calls += 1
        try:
            while (
                (switch := self._state.switch) and switch.automatic and switch.target is not target
            ):
                assert switch.task is not None
                await asyncio.wait([switch.task])
        finally:
            self._state.explicit_calls -= 1
            # Later: now, `advance` could begin an automatic switch before this call's own.
            asyncio.get_running_loop().call_soon(self._admission.advance)

    @property
    def can_switch(self) -> bool:
        """Whether the server may switch by itself now, and may admit requests."""
        state = self._state
        if state.switch is not None or state.why_down is not None or state.explicit_calls:
            return False
        if self._jobs.model not in (None, state.active_alias):
            return False  # the model that jobs hold is being brought up, or back
        return state.is_started and (state.is_there or state.is_degraded)

    def begin_automatic(
        self, target: Model, drain_until_s: Callable[[], float], may_park: bool = True
    ) -> Switch:
        """Switch without aborting requests: those that run longer are parked or waited for."""
        return self.begin(
            target,
            self._settings.drain_timeout,
            "park",
            automatic=True,
            may_park=may_park,
            drain_until_s=drain_until_s,
        )

    def begin(
        self,
        target: Model,
        drain_timeout_s: float,
        policy: DrainAction,
        *,
        key: str = "",
        automatic: bool = False,
        may_park: bool = True,
        drain_until_s: Callable[[], float] | None = None,
    ) -> Switch:
        """Begin a switch; there must be none under way. For the arguments see `Switch`."""
        state = self._state
        state.switch = switch = Switch(
            _operation_id(),
            state.active,
            target,
            drain_timeout_s,
            state.clock(),
            policy,
            automatic=automatic,
            key=key,
            may_park=may_park,
            drain_until_s=drain_until_s,
        )
        self._lookahead.switch_started(target)
        # In its own context: engine calls of the switch do not belong to the request that began it.
        switch.task = asyncio.create_task(
            self._run(switch), name=f"switch-{target.alias}", context=Context()
        )
        # If the caller has left, nothing else retrieves the exception of a failed switch.
        switch.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return switch

    async def _run(self, switch: Switch) -> SwitchResult:
        try:
            async with self._ladder.move_lock():
                switch.turn_s = self._state.clock()
                try:
                    await self._transaction.run(switch)
                except BaseException:
                    await self._transaction.undo(switch)
                    raise
                return self._finish(switch)
        except BaseException as error:
            # Also if it was cancelled while it waited for the lock, or during the rollback.
            raise self._fail(switch, error) from error

    def _finish(self, switch: Switch) -> SwitchResult:
        """Re-open admission, and tell what the switch did."""
        state = self._state
        state.switch = None
        assert switch.turn_s is not None
        now_s = state.clock()
        self._admission.switched(switch, now_s - switch.turn_s - switch.drain_s)
        state.last_switch_s = duration_s = now_s - switch.started_s
        source = switch.source.alias if switch.source else None
        self._notify_ended(switch, duration_s, None)
        self._lookahead.switched(switch.target)
        self.serve(switch.target)
        self._recover_if_needed(f"{switch.target.alias!r} died as it became active")
        return SwitchResult(
            operation_id=switch.operation_id,
            epoch=state.epoch,
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

    def _fail(self, switch: Switch, cause: BaseException) -> BaseException:
        """Fail the requests that wait for the target; return the error for the switch's caller."""
        state = self._state
        state.switch = None
        failed: SwitchFailed | EngineUnavailable
        if state.why_down is not None:
            failed = EngineUnavailable(state.why_down)
        else:
            alias, phase = switch.target.alias, switch.phase.value
            failed = SwitchFailed(alias, phase, cause, state.active_alias)
        is_refused = isinstance(cause, DrainRefused)
        self._notify_ended(switch, state.clock() - switch.started_s, cause)
        self._recover_if_needed(one_line(cause))
        self._admission.failed(switch, failed, is_refused)
        if state.active is not None and state.why_down is None:
            self.serve(state.active)
        else:
            self._admission.advance()
        if is_refused:
            return cause
        # A switch is cancelled at shutdown; its callers still get an error.
        return failed if isinstance(cause, Exception | asyncio.CancelledError) else cause

    def serve(self, model: Model) -> None:
        """Have requests admitted that wait for the active model."""
        self._admission.activated(model, self.leased_until_s)

    @property
    def leased_until_s(self) -> float | None:
        """Return until when jobs hold the active model; None if they do not."""
        is_held = self._jobs.model == self._state.active_alias
        return self._jobs.until_s if is_held else None

    async def bring_back(self, model: Model) -> None:
        """Make a model active again, or wait for the switch under way. Raises `HotswapError`."""
        await result_of(self._state.switch or self.begin(model, 0.0, "abort"))

    async def stop(self, timeout_s: float) -> None:
        """End the switch under way, if there is one: by itself, cancelled, or with the host."""
        if self._state.switch is None or self._state.switch.task is None:
            return
        task = self._state.switch.task
        await asyncio.wait([task], timeout=timeout_s)
        task.cancel(SHUTTING_DOWN)
        await asyncio.wait([task], timeout=drain.CUT_GRACE_S)
        if not task.done():  # it waits for a host that is stuck
            self._host.kill(SHUTTING_DOWN)
            await asyncio.wait([task])

    def _notify_ended(self, switch: Switch, duration_s: float, cause: BaseException | None) -> None:
        status: SwitchStatus = "switched"
        if cause is not None:
            status = "refused" if isinstance(cause, DrainRefused) else "failed"
        self._state.switches += 1
        self._state.touch()
        self._state.switches_failed += status == "failed"
        self._observer.notify(
            SwitchEnded(
                switch.operation_id,
                self._state.epoch,
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

    def _unswitched(self, active: Model) -> SwitchResult:
        used = self._host.stats().used_bytes
        return SwitchResult(
            operation_id=_operation_id(),
            epoch=self._state.epoch,
            previous_model=active.alias,
            current_model=active.alias,
            switched=False,
            duration_s=0.0,
            memory_before_bytes=used,
            memory_unloaded_bytes=used,
            memory_after_bytes=used,
        )


async def result_of(switch: Switch) -> SwitchResult:
    """Wait for a switch and return its result."""
    assert switch.task is not None
    # Shielded: a caller that leaves must not cancel the switch for the others that wait for it.
    return await asyncio.shield(switch.task)


def _operation_id() -> str:
    return f"switch-{uuid.uuid4().hex[:12]}"
