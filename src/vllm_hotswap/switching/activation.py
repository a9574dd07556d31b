"""The pointer to the active model: moving it, and verifying what it points to."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vllm_hotswap.events import Observer, RequestsResumed
from vllm_hotswap.models import Model
from vllm_hotswap.residency import Ladder, refuse_failed
from vllm_hotswap.states import Residency, Step
from vllm_hotswap.switching.state import ServingState
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap")


class Activation:
    """Makes a model the active one, or none.

    It alone writes `active`, `last_active`, `epoch` and `is_resting` of the state.
    """

    def __init__(
        self,
        state: ServingState,
        ladder: Ladder,
        observer: Observer,
        verifies: bool,
        on_serving: Callable[[], None],
    ) -> None:
        """Leave no model active.

        Args:
            state: what the server does now.
            ladder: moves models, and runs commands with a deadline.
            observer: is notified when parked requests continue.
            verifies: whether a model has to generate its canary before it serves.
            on_serving: called when a model is active and verified.
        """
        self._state = state
        self._ladder = ladder
        self._observer = observer
        self._verifies = verifies
        self._on_serving = on_serving

    def __repr__(self) -> str:
        return f"<Activation {self._state!r}>"

    async def activate(self, target: Model) -> None:
        """Make the target the stepped engine. If it is verified, its parked requests continue.

        Raises `HotswapError`: the host did not do it, or the engine has died.
        """
        state = self._state
        epoch = state.epoch + 1
        for lease in target.parked:
            # Before the command is sent: the first outputs may arrive before its result.
            lease.hold_output(epoch)
        is_to_be_verified = self._verifies and not target.is_verified
        activating = target.engine.activate(epoch, is_to_be_verified)
        await self._ladder.run_command(target, Step.ACTIVATE.value, activating)
        refuse_failed(target)  # it may have died while this waited
        if state.active is not None and state.active.residency is Residency.ACTIVE:
            self._ladder.step(state.active, Step.PARK)
        self._ladder.step(target, Step.ACTIVATE)
        state.epoch = epoch
        state.active, state.is_resting = target, False
        if target.is_verified:
            self._serve(target)

    async def verify(self, target: Model) -> None:
        """Check that the target generates what it should, before it serves requests."""
        if self._verifies:
            await self._ladder.run_command(target, "verify", target.engine.verify())
            refuse_failed(target)  # it may have died while this waited
        target.is_verified = True
        self._serve(target)

    async def repeat(self, source: Model) -> None:
        """Send the command again: the host may step another engine, as a result was lost."""
        activating = source.engine.activate(self._state.epoch)
        await self._ladder.run_command(source, Step.ACTIVATE.value, activating)

    def _serve(self, target: Model) -> None:
        self._state.last_active = target
        self._on_serving()
        self.resume(target)

    def resume(self, target: Model) -> None:
        """Continue the parked requests of the active model."""
        parked = target.parked
        for lease in parked:
            lease.settle()
        if parked:
            self._observer.notify(RequestsResumed(self._state.epoch, target.alias, len(parked)))

    def clear(self) -> None:
        """Leave no model active: its engine has failed, or the host has died."""
        self._state.active, self._state.is_resting = None, False

    def rest(self) -> None:
        """Leave no model active, as no request needs one; the next request brings one up."""
        self._state.active, self._state.is_resting = None, True

    async def withdraw(self, target: Model) -> None:
        """Take back an activation: the model failed its verification."""
        self._state.active = None
        await self._ladder.move_down(target, Residency.COLD)

    async def abandon(self, source: Model, cause: str, can_move: bool) -> None:
        """Leave no model active, as the source could not be brought back; recovery follows."""
        log.error("event=source_lost model=%s cause=%r", value_text(source.alias), cause)
        self._state.active = None
        self._state.last_active = source
        if source.is_loaded and can_move:
            await self._ladder.move_down(source, Residency.COLD)
