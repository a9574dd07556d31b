"""A switch: what is known of it while it is under way, and what it has done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_hotswap.planner import Move
from vllm_hotswap.registry import Lease, Model
from vllm_hotswap.settings import DrainPolicy
from vllm_hotswap.states import Residency, SwitchPhase


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
    """Once there was room, before the target took any."""
    memory_after_bytes: int
    phases_s: dict[str, float] = field(default_factory=dict)
    requests_cut: int = 0
    """Ended because they were still running at the deadline of the drain."""
    requests_parked: int = 0
    requests_lost: int = 0
    """Parked, and ended because their model had to be unloaded."""
    evicted: tuple[Move, ...] = ()

    @property
    def reconfigure_s(self) -> float:
        """Time without the wait for running requests."""
        return self.duration_s - self.phases_s.get(SwitchPhase.DRAIN.value, 0.0)


@dataclass(eq=False, slots=True)
class Switch:
    """A switch under way."""

    operation_id: str
    source: Model | None
    target: Model
    drain_timeout_s: float
    started_s: float
    policy: DrainPolicy = "abort"
    automatic: bool = False
    """Whether the server decided on it: then nobody is ended for it."""
    key: str = ""
    """The fingerprint of the key of whoever has called for it."""
    is_awaited: bool = False
    """Whether the target had begun to wake before: what it took says nothing of the next time."""
    may_park: bool = True
    """Whether requests that run may be frozen for it, if the server decided on it."""
    drain_until_s: Callable[[], float] | None = None
    """Until when requests that run are waited for, as it is now; None: for `drain_timeout_s`."""
    residency: Residency | None = None
    """Where the target lay."""
    turn_s: float | None = None
    """When nobody else moved models any more."""
    phase: SwitchPhase = SwitchPhase.VALIDATE
    phases_s: dict[str, float] = field(default_factory=dict)
    requests_cut: int = 0
    requests_parked: int = 0
    requests_lost: int = 0
    moves: bool = False
    """Whether memory is moved, rather than a pointer."""
    memory_before_bytes: int = 0
    memory_unloaded_bytes: int = 0
    evicted: tuple[Move, ...] = ()
    held: dict[asyncio.Future[Lease], asyncio.Task[object] | None] = field(default_factory=dict)
    """Requests that wait for the target, in order of arrival, each with its task."""
    task: asyncio.Task[SwitchResult] | None = None

    @property
    def drain_s(self) -> float:
        return self.phases_s.get(SwitchPhase.DRAIN.value, 0.0)
