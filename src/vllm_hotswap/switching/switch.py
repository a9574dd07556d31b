"""A switch: what is known about it while it is under way, and its result."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_hotswap.config import DrainAction
from vllm_hotswap.models import Model
from vllm_hotswap.residency import Move
from vllm_hotswap.states import Residency, SwitchPhase
from vllm_hotswap.switching.snapshot import SwitchSnapshot


@dataclass(frozen=True, slots=True)
class SwitchResult:
    """What a switch did. Times are in seconds, memory in bytes."""

    operation_id: str
    epoch: int
    previous_model: str | None
    current_model: str
    switched: bool
    duration_s: float
    memory_before_bytes: int
    memory_unloaded_bytes: int
    """At the moment when there was room, before the target took any."""
    memory_after_bytes: int
    phases_s: dict[str, float] = field(default_factory=dict)
    requests_cut: int = 0
    """Aborted because they were still running at the deadline of the drain."""
    requests_parked: int = 0
    requests_lost: int = 0
    """Parked, and aborted because their model had to be unloaded."""
    evicted: tuple[Move, ...] = ()

    @property
    def reconfigure_s(self) -> float:
        """Time, without the wait for running requests."""
        return self.duration_s - self.phases_s.get(SwitchPhase.DRAIN.value, 0.0)


@dataclass(eq=False, slots=True)
class Switch:
    """A switch under way."""

    operation_id: str
    source: Model | None
    target: Model
    drain_timeout_s: float
    started_s: float
    policy: DrainAction = "abort"
    automatic: bool = False
    """Whether the server decided on it: then no request is aborted for it."""
    key: str = ""
    """The fingerprint of the key of the caller that requested it."""
    is_awaited: bool = False
    """Whether the target had started to wake before, so that its time predicts nothing."""
    may_park: bool = True
    """Whether running requests may be parked for it, if the server decided on it."""
    drain_until_s: Callable[[], float] | None = None
    """Until when to wait for running requests, as of now; None: for `drain_timeout_s`."""
    residency: Residency | None = None
    """The target's, before the switch."""
    turn_s: float | None = None
    """When no other operation moved models any longer."""
    phase: SwitchPhase = SwitchPhase.VALIDATE
    phases_s: dict[str, float] = field(default_factory=dict)
    requests_cut: int = 0
    requests_parked: int = 0
    requests_lost: int = 0
    moves: bool = False
    """Whether memory moves, rather than only a pointer."""
    memory_before_bytes: int = 0
    memory_unloaded_bytes: int = 0
    evicted: tuple[Move, ...] = ()
    task: asyncio.Task[SwitchResult] | None = None

    def snapshot(self) -> SwitchSnapshot:
        return SwitchSnapshot(self.operation_id, self.target.alias, self.phase.value)

    @property
    def is_patient(self) -> bool:
        """Whether running requests are parked or waited for, however long they take."""
        return self.automatic and self.policy == "park"

    @property
    def drain_s(self) -> float:
        return self.phases_s.get(SwitchPhase.DRAIN.value, 0.0)
