"""The server now, as frozen values.

`Coordinator.snapshot` makes them. Whatever shows the server reads them, and no part of it:
`/admin/status`, `/metrics`, `/ready`, the event stream, and the lines at the start.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_hotswap.models import EngineMemory, Usage
from vllm_hotswap.residency import Prediction, PredictionStats
from vllm_hotswap.states import Residency, ServerState
from vllm_hotswap.switching.job_leases import JobLease


@dataclass(frozen=True, slots=True)
class SwitchSnapshot:
    """The switch under way."""

    operation_id: str
    target: str
    phase: str


@dataclass(frozen=True, slots=True)
class ServingSnapshot:
    """What is served. It costs the same however many models and requests there are."""

    state: ServerState
    active: str | None
    """The alias of the active model."""
    epoch: int
    """Number of activations so far."""
    switch: SwitchSnapshot | None
    failure: str | None
    """Why nothing can be served."""
    is_ready: bool
    """Whether requests for the active model are served now; in the mode `auto`, in turn."""

    @property
    def phase(self) -> str:
        """The phase of the switch under way, or `idle`."""
        return self.switch.phase if self.switch else "idle"

    @property
    def target(self) -> str | None:
        """The target of the switch under way."""
        return self.switch.target if self.switch else None


@dataclass(frozen=True, slots=True)
class WakingSnapshot:
    """An early wake: how much device memory it has taken, of how much. In bytes."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """One model. Times are in seconds."""

    alias: str
    residency: Residency
    is_active: bool
    """Whether it is the model that is stepped."""
    in_flight: int
    """Requests that hold a lease on it."""
    parked: int
    """Those of them that are frozen with its engine."""
    held_back: int
    """Engine requests that wait because their callers use their share of the engine."""
    waiting: int
    memory: EngineMemory
    """What it needs when it is loaded."""
    held: Usage
    """What it holds now, with all that an early wake takes."""
    waking: WakingSnapshot | None
    pinned: bool
    job_leases: int
    idle_s: float | None
    """Since it was last used; None if it never was."""
    switch_cost_s: float
    """To bring it up from its residency."""
    failure: str | None


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory budgets of the models, and how much of them is held. In bytes."""

    budget: Usage
    used: Usage
    """By models, without files that were read ahead."""
    prefetched_bytes: int
    """Host memory for files that were read ahead."""
    base_bytes: int
    """Device memory that the engine host holds without models, besides the budget."""
    others_bytes: int
    """Device memory that other processes hold."""


@dataclass(frozen=True, slots=True)
class ServerSnapshot:
    """The whole server, without the memory of the engine host's process: that is measured.

    It takes time in proportion to the models and the requests in flight.
    """

    now_s: float
    """On the clock of job leases."""
    serving: ServingSnapshot
    waiting: int
    """Requests that wait for their model, without parked ones."""
    models: tuple[ModelSnapshot, ...]
    """In the order of the configuration."""
    memory: MemoryUse
    switches: int
    """Switches that have ended."""
    switches_failed: int
    job_leases: tuple[JobLease, ...]
    predicted: Prediction | None
    """The model that is expected to follow the active one."""
    predictions: PredictionStats
    is_fake: bool
    """Whether answers are made up, without vLLM."""
    host_restarts: int
