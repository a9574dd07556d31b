"""The mode `auto`: requests wait for their turn, and the server switches by itself.

`turns` has the requests that wait. `scheduling` and its policy decide whose turn it is, and when to
switch to which model; `switcher` carries out the switch.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

from vllm_hotswap.config import SwitchingConfig
from vllm_hotswap.errors import (
    EngineUnavailable,
    HotswapError,
    QueueFull,
    RateLimited,
    SwitchFailed,
    SwitchNotAllowed,
    one_line,
)
from vllm_hotswap.models import Cut, Lease, Model, Registry, drain
from vllm_hotswap.residency import Ladder, up_cost_s
from vllm_hotswap.scheduling import (
    Decision,
    ModelTerms,
    PolicySettings,
    RequestTerms,
    Scheduler,
    SwitchCosts,
    SwitchTo,
    WaitUntil,
    batch,
    make_policy,
)
from vllm_hotswap.states import Residency, SwitchPhase
from vllm_hotswap.switching.admission import Leases, Preview, crowding_refusal
from vllm_hotswap.switching.backoff import BackOff
from vllm_hotswap.switching.state import ServingState
from vllm_hotswap.switching.switch import Switch
from vllm_hotswap.switching.turns import Turns

log = logging.getLogger("vllm_hotswap")

ACTIVATE_S = 0.005
"""Estimated cost of a switch besides bringing the target up, until one has been measured."""

LEAST_DELAY_S = 0.001
"""Shortest delay before the policy is asked again, whatever time it names."""

BRINGING_UP = (SwitchPhase.BRING_UP, SwitchPhase.ACTIVATE, SwitchPhase.VERIFY)


class BeginSwitch(Protocol):
    """Begins a switch that the server has decided on: it aborts no request."""

    def __call__(
        self, target: Model, drain_until_s: Callable[[], float], may_park: bool = True
    ) -> Switch: ...


class AutoAdmission:
    """Queues requests, gives them their turn, and starts switches as the policy decides.

    The mutable state is:

    - the scheduler;
    - `_turns`: requests that have not had their turn;
    - `_timer`: when the policy wants to be asked again;
    - `_backoff`: models that could not be brought up a moment ago;
    - `_is_closed`: whether no further decisions are made.
    """

    def __init__(
        self,
        state: ServingState,
        registry: Registry,
        ladder: Ladder,
        leases: Leases,
        settings: SwitchingConfig,
        can_switch: Callable[[], bool],
        begin_switch: BeginSwitch,
    ) -> None:
        """`can_switch`: whether the server may begin a switch, and admit requests, now."""
        self._state = state
        self._registry = registry
        self._plans = ladder.plans
        self._leases = leases
        self._settings = settings
        self._can_switch = can_switch
        self._begin_switch = begin_switch
        self._clock = state.clock
        self._policy_settings = PolicySettings(settings.min_active, settings.slice)
        self.costs = SwitchCosts()
        self.scheduler = Scheduler(
            [self._terms(model) for model in registry],
            make_policy(settings.policy, self._policy_settings),
            self._cost_s,
        )
        self._turns = Turns(
            self.scheduler,
            leases,
            state.clock,
            settings.wait_timeout,
            self._refusal,
            self._is_served_now,
            self._on_arrival,
        )
        self._timer: asyncio.TimerHandle | None = None
        self._backoff = BackOff()
        self._is_closed = False
        ladder.on_step = self.scheduler.costs_changed

    def __repr__(self) -> str:
        return f"<AutoAdmission not_admitted={len(self._turns)} {self.scheduler!r}>"

    def _terms(self, model: Model) -> ModelTerms:
        own = model.settings
        wait_s = own.max_wait_or(self._settings.max_wait)
        return ModelTerms(model.alias, own.priority, wait_s, own.weight)

    def _cost_s(self, source: str | None, target: str) -> float:
        model = self._registry.model(target)
        residency = model.residency
        if residency is Residency.ACTIVE and source is not None:  # the cost of switching back
            residency = self._plans.residency_after_switch(model, self._registry.model(source))
        unknown_s = up_cost_s(model, residency) + ACTIVATE_S
        return self.costs.estimate(source, target, residency, unknown_s)

    # --- requests -----------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return self.scheduler.waiting

    def waiting_for(self, model: Model) -> int:
        return self.scheduler.waiting_for(model.alias)

    @property
    def is_open(self) -> bool:
        """Requests are accepted at any time: they wait for their turn."""
        return True

    async def enter(
        self, model: Model, name: str | None, terms: RequestTerms, preview: Preview | None
    ) -> Lease:
        """Register a request that is validated now and gets its turn later.

        Raises:
            EngineUnavailable: there is no engine host.
            QueueFull: too many requests already wait or run.
            SwitchNotAllowed: the request may not wait for this model.
            SwitchFailed: the model could not be brought up a moment ago.
        """
        if self._state.why_down is not None:
            raise EngineUnavailable(self._state.why_down)
        lease = self._enter(model, name, terms)
        if model.engine.routes is None:
            await self._wait_for_frontend(model, lease, preview)
        return lease

    def _enter(self, model: Model, name: str | None, terms: RequestTerms) -> Lease:
        if refused := self._switch_refusal(model, terms):
            raise refused
        if model is not self._state.active:
            self._backoff.refuse(model, self._clock(), self._state.active_alias)
        self._leases.refuse_if_full(model, retry_after_s=partial(self.retry_after_s, model))
        if not self._is_served_now(model) and (crowded := self._crowding_refusal(model)):
            raise crowded
        lease = Lease(model, self._state.epoch, asyncio.current_task(), name=name, terms=terms)
        self._turns.register(lease)
        return lease

    async def _wait_for_frontend(self, model: Model, lease: Lease, preview: Preview | None) -> None:
        """Have the request previewed, as there is nothing else to check it; wait for its turn."""
        try:
            if preview is not None:
                await preview(lease)
            if model.engine.routes is None:
                await self._turns.wait(lease)
            if lease.cut is not None:
                raise lease.cut
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                lease.client_left = lease.cut is None
            elif lease.status < 400:  # a preview that refuses has set it
                lease.status = error.status if isinstance(error, HotswapError) else 500
            self._leases.release(lease)
            raise

    async def wait_for_turn(self, lease: Lease) -> None:
        """Wait until it is the request's turn, or the request has been cut or timed out."""
        await self._turns.wait(lease)

    def suspend_idle(self, source: Model) -> bool:
        """Take idle WebSockets out of the drain; each waits for a new turn when it next asks."""
        connections = [lease for lease in source.leases if lease.is_connection]
        idle = [one for one in connections if not one.requests and not one.is_parked]
        for lease in idle:
            self._turns.suspend(lease)
        return len(idle) < len(connections)

    def _switch_refusal(self, model: Model, terms: RequestTerms) -> SwitchNotAllowed | None:
        """Return why a request may not wait for the model, if waiting would cause a switch."""
        expected = self._state.expected
        if terms.may_switch or model is expected:
            return None
        now = f"{expected.alias!r} is active, or about to be" if expected else "no model is active"
        return SwitchNotAllowed(
            f"this key may not trigger a switch to {model.alias!r} ({terms.rule}); {now}; use "
            f"another model, or retry when {model.alias!r} is active"
        )

    def _is_served_now(self, model: Model) -> bool:
        return model is self._state.active and self._can_switch()

    def _crowding_refusal(self, model: Model) -> QueueFull | None:
        retry_after_s = partial(self.retry_after_s, model)
        return crowding_refusal(self.waiting, self._settings.max_waiting, retry_after_s)

    def retry_after_s(self, model: Model) -> int:
        """Estimate the seconds until a request could be served: running requests, then a switch."""
        active = self._state.active_alias
        if active == model.alias:
            return 1
        runs_s = self.scheduler.service_s(active) if active else 0.0
        return max(1, math.ceil(runs_s + self._cost_s(active, model.alias)))

    def _refusal(self, lease: Lease) -> Cut | None:
        """Return why a request that asks for its turn is refused, or None."""
        refused = self._switch_refusal(lease.model, lease.terms)
        if refused is not None or self._is_served_now(lease.model):
            return refused
        return self._crowding_refusal(lease.model) or self._charge(lease)

    def _on_arrival(self) -> None:
        if (switch := self._state.switch) is not None and switch.source is not None:
            drain.recheck(switch.source)  # the request may be due before the drain's deadline
        self.advance()

    def _charge(self, lease: Lease) -> RateLimited | None:
        """Charge a switch to the first request that waits for a model; return a refusal, if any."""
        model, charge = lease.model, lease.terms.charge
        is_coming = model in (self._state.active, self._state.target)
        is_waited_for = self.scheduler.waiting_for(model.alias) or model.parked
        if charge is None or is_coming or is_waited_for:
            return None
        try:
            charge()
        except RateLimited as error:
            return error
        return None

    def left(self, lease: Lease) -> None:
        """Forget a request that is over, whether or not it has had its turn."""
        self._turns.forget(lease)
        self.advance()

    @property
    def is_empty(self) -> bool:
        """Whether no request waits, is parked, or is being validated by a frontend."""
        return not len(self._turns) and self.scheduler.is_empty

    # --- switches -----------------------------------------------------------------------------

    def advance(self) -> None:
        """Decide what to do now, and do it. Called after every change; never awaits."""
        if self._state.active is None and self.scheduler.active is not None:
            self.scheduler.deactivate()
        if self._is_closed or not self._can_switch():
            return
        self._cancel_timer()
        if not self.scheduler.is_empty:
            self._execute(self._decide())

    def _decide(self) -> Decision:
        try:
            admitted, decision = self.scheduler.advance(self._clock())
        except Exception as error:  # noqa: BLE001  # a policy may be third-party code
            self._replace_policy(error)
            admitted, decision = self.scheduler.advance(self._clock())
        self._turns.admit(admitted)
        return decision

    def _replace_policy(self, error: Exception) -> None:
        log.error(
            "event=policy_failed policy=%s cause=%r then='falling back to batch'",
            self._settings.policy,
            one_line(error),
        )
        self.scheduler.policy = batch(self._policy_settings)

    def _execute(self, decision: Decision) -> None:
        match decision:
            case SwitchTo():
                target = self._registry.model(decision.alias)
                until_s = partial(
                    self.scheduler.drain_until_s,
                    decision,
                    self._clock(),
                    self._settings.drain_timeout,
                )
                if (first := self._model_to_serve_first(target)) is None:
                    self._begin_switch(target, until_s)
                elif (fails_until_s := self._backoff.until_s(first)) > self._clock():
                    self._leave_alone(target, fails_until_s)
                    self.advance()
                else:
                    # Do not park requests for it: the parked models could take turns forever.
                    self._begin_switch(first, until_s, may_park=False)
            case WaitUntil(time_s=time_s) if time_s < math.inf:
                delay_s = max(LEAST_DELAY_S, time_s - self._clock())
                self._timer = asyncio.get_running_loop().call_later(delay_s, self.advance)

    def _model_to_serve_first(self, target: Model) -> Model | None:
        """Return the model to serve first, if `target` needs the memory of its parked requests."""
        active = self._state.active
        busy = [m for m in self._registry if m.parked and m not in (target, active)]
        if not busy or self._plans.can_keep_parked(target, drained=active):
            return None
        return busy[0]

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def parked(self, model: Model) -> None:
        """Queue again the model's requests that have been frozen with its engine."""
        tickets = [lease.ticket for lease in model.parked if lease.ticket is not None]
        frozen = [ticket for ticket in tickets if not ticket.is_parked]
        # They are due in good time before they would be aborted.
        at_most_s = self._settings.parked_timeout / 2
        self.scheduler.park(reversed(frozen), self._clock(), at_most_s)

    def leased_until(self, until_s: float | None) -> None:
        """Note until when a job holds the active model: perhaps for ever, or not at all (None)."""
        self.scheduler.leased_until_s = until_s
        self.advance()

    def activated(self, model: Model, leased_until_s: float | None) -> None:
        """Admit requests of a model that is now active and verified."""
        self.scheduler.leased_until_s = leased_until_s
        if self._is_closed:
            return
        self._backoff.succeeded(model)
        self._refuse_unpermitted_switches()
        now_s = self._clock()
        try:
            admitted = self.scheduler.activate(model.alias, now_s)
        except Exception as error:  # noqa: BLE001  # a policy may be third-party code
            self._replace_policy(error)
            admitted = self.scheduler.activate(model.alias, now_s)
        self._turns.admit(admitted)
        self.advance()

    def _refuse_unpermitted_switches(self) -> None:
        """Refuse waiting requests that may not cause a switch back to their model."""
        for lease in self._turns.asked:
            if why := self._switch_refusal(lease.model, lease.terms):
                self._turns.end([lease], why)

    def switched(self, switch: Switch, cost_s: float) -> None:
        """Record the cost of a switch; its target's requests are admitted by `activated`."""
        source = switch.source.alias if switch.source else None
        if switch.residency is not None and not switch.is_awaited:
            self.costs.add(source, switch.target.alias, switch.residency, cost_s)

    def failed(
        self, switch: Switch, error: SwitchFailed | EngineUnavailable, is_refused: bool
    ) -> None:
        """Fail the requests that wait for a model that could not be brought up, and back off.

        If the host has died, they keep waiting for the next host, unless it died while it brought
        up this model.
        """
        is_its_fault = switch.moves and switch.phase in BRINGING_UP
        if is_refused or not (isinstance(error, SwitchFailed) or is_its_fault):
            return
        # Parked requests wait for the next attempt: a client could not start them again.
        self._leave_alone(switch.target, self._backoff.failed(switch.target, self._clock()))
        self._turns.end([one for one in self._turns if one.model is switch.target], error)

    def _leave_alone(self, model: Model, until_s: float) -> None:
        self.scheduler.pause(model.alias, until_s)
        asyncio.get_running_loop().call_later(until_s - self._clock(), self.advance)

    def close(self, cause: Cut) -> None:
        """Make no further decisions, and abort requests that have not had their turn."""
        self._is_closed = True
        self._cancel_timer()
        self._turns.close(cause)
