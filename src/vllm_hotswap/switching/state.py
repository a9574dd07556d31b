"""What the server does now: one set of fields, each with one writer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vllm_hotswap.models import EngineHost, Model
from vllm_hotswap.states import ServerState, SwitchPhase
from vllm_hotswap.switching.switch import Switch

Clock = Callable[[], float]

SHUTTING_DOWN = "the server is shutting down"
"""Why requests and the host are ended when the server stops."""


class ServingState:
    """The mutable state of the server, besides leases and residencies.

    On one event loop, nothing else runs between two awaits. So a decision that reads these fields
    and acts on them without an await needs no lock.

    | field | its only writer |
    | --- | --- |
    | `active`, `last_active`, `epoch`, `is_resting` | `Activation` |
    | `switch`, `explicit_calls`, `last_switch_s`, `switches`, `switches_failed` | `Switcher` |
    | `host_down`, `recovery_failure`, `is_degraded`, `is_recovering` | `Recovery` |
    | `ended` | `end`, once |
    | `used_s` | `touch` |
    | `is_started` | `Coordinator.start` |
    """

    def __init__(self, clock: Clock, host: EngineHost) -> None:
        self.clock = clock
        self._host = host
        self.active: Model | None = None
        """The model that is stepped; None before the first activation, after its death, at rest."""
        self.last_active: Model | None = None
        """The model that was active last, which recovery brings back."""
        self.epoch = 0
        """Raised at every activation, never lowered."""
        self.is_resting = False
        """Whether no model is active because no request needs one."""
        self.switch: Switch | None = None
        """The switch under way."""
        self.explicit_calls = 0
        """Calls for a switch that wait for an automatic switch to end."""
        self.last_switch_s = 1.0
        """Seconds that the last switch took."""
        self.switches = 0
        """Switches that have ended."""
        self.switches_failed = 0
        self.host_down: str | None = None
        """Why there is no engine host now, until there is one again."""
        self.recovery_failure: str | None = None
        """Why recovery is under way: what has died, or why the last attempt failed."""
        self.is_degraded = False
        """Whether an attempt to recover has failed."""
        self.is_recovering = False
        self.ended: str | None = None
        """Why the server has stopped serving for good, if it has."""
        self.used_s = clock()
        """When the server last had something to do."""
        self.is_started = False
        self._given_up: asyncio.Future[str] | None = None

    def __repr__(self) -> str:
        return f"<ServingState active={self.active_alias} epoch={self.epoch} phase={self.phase}>"

    @property
    def active_alias(self) -> str | None:
        return self.active.alias if self.active else None

    @property
    def target(self) -> Model | None:
        """Return the target of the switch under way, if any."""
        return self.switch.target if self.switch else None

    @property
    def expected(self) -> Model | None:
        """Return the model that is active or about to be, or else the one that was active last."""
        return self.target or self.active or self.last_active

    @property
    def phase(self) -> str:
        return self.switch.phase.value if self.switch else "idle"

    @property
    def host_is_gone(self) -> bool:
        """Whether there is no engine host now.

        A death is known here before `Recovery` is called back: commands to the host fail first, and
        a switch that fails by that must not give requests to an engine that is gone.
        """
        return self.host_down is not None or self._host.died.done()

    @property
    def why_down(self) -> str | None:
        """Return why no model can be used at all, or None."""
        if why := self.ended or self.host_down:
            return why
        died = self._host.died
        return died.result() if died.done() and not died.cancelled() else None

    @property
    def is_there(self) -> bool:
        """Whether a model is active, or none is because the server rests."""
        return self.active is not None or self.is_resting

    @property
    def failure(self) -> str | None:
        """Return why nothing can be served, or None."""
        if self.why_down is not None:
            return self.why_down
        return None if self.is_there else self.recovery_failure or "no model is active"

    @property
    def needs_recovery(self) -> bool:
        """Whether no model is active although one should be."""
        return not self.is_there and self.is_started and self.ended is None

    @property
    def server_state(self) -> ServerState:
        if self.ended is not None:
            has_given_up = self._given_up is not None and self._given_up.done()
            return ServerState.FAILED if has_given_up else ServerState.STOPPING
        if not self.host_is_gone and self.is_there:
            if self.switch is not None:
                return ServerState.SWITCHING
            return ServerState.IDLE if self.is_resting else ServerState.SERVING
        if self.is_degraded:
            return ServerState.DEGRADED
        if self.is_recovering or self.switch is None:
            return ServerState.RECOVERING
        return ServerState.SWITCHING

    @property
    def admits_active(self) -> bool:
        """Whether the active model admits requests: no switch has got beyond its checks."""
        return self.switch is None or self.switch.phase is SwitchPhase.VALIDATE

    @property
    def given_up(self) -> asyncio.Future[str]:
        """Future that is done when the server has given up, without having been stopped."""
        if self._given_up is None:
            self._given_up = asyncio.get_running_loop().create_future()
        return self._given_up

    def touch(self) -> None:
        """Note that the server has something to do now."""
        self.used_s = self.clock()

    def end(self, why: str) -> bool:
        """Stop serving for good. Return whether the server was serving until now."""
        if self.ended is not None:
            return False
        self.ended = why
        return True

    def give_up(self, why: str) -> None:
        """Stop serving for good, because nothing brings the server back."""
        if self.end(why):
            self.given_up.set_result(why)
