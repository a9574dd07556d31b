"""Events as values, and the protocol of their observers.

`switching` and `residency` emit them; logs, metrics and tests observe. Every event carries the
epoch in which it happened.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from vllm_hotswap.states import Residency, SwitchPhase

PhaseStatus = Literal["started", "finished", "failed"]
SwitchStatus = Literal["switched", "refused", "failed"]
JobLeaseChange = Literal["granted", "renewed", "revoked", "expired"]
WakeChange = Literal["begun", "done", "used", "given_up", "no_room", "failed"]
"""`done`: the switch to the model has nothing left to wake. Each of the last four ends the wake;
all of them except `used` have given everything back."""
RequestResult = Literal["served", "refused", "failed", "cut", "left"]
"""`refused`: the answer was an error with a status below 500; `failed`: with another status."""


@dataclass(frozen=True, slots=True)
class PhaseChanged:
    """A phase of a switch started, finished or failed."""

    operation_id: str
    epoch: int
    target: str
    phase: SwitchPhase
    status: PhaseStatus
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SwitchEnded:
    """A switch ended, whatever its outcome."""

    operation_id: str
    epoch: int
    source: str | None
    target: str
    status: SwitchStatus
    duration_s: float
    requests_cut: int
    cause: str | None = None
    requests_parked: int = 0
    requests_lost: int = 0
    automatic: bool = False
    """Whether the server decided on it."""
    residency: Residency | None = None
    """The target's residency before the switch."""
    drain_s: float = 0.0
    queued_s: float = 0.0
    """Time that it waited for another operation that moved models."""
    key: str = ""
    """The fingerprint of the key of the caller who asked for the switch; for logs alone."""


@dataclass(frozen=True, slots=True)
class ResidencyChanged:
    """A model moved on the residency ladder."""

    epoch: int
    model: str
    before: Residency
    after: Residency


@dataclass(frozen=True, slots=True)
class ModelMoved:
    """Memory of a model went away or came back: it was put to sleep, woken or unloaded."""

    epoch: int
    model: str
    before: Residency
    after: Residency
    duration_s: float


@dataclass(frozen=True, slots=True)
class PinChanged:
    """A model was pinned, or may be evicted again."""

    epoch: int
    model: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """A load reached a stage: `weights`, `kv_cache`, `warm_up`, `frontend` or `ready`."""

    epoch: int
    model: str
    stage: str
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """A request gave its lease back: answered, aborted by the server, or left by its client.

    Times are seconds of the server's clock.
    """

    epoch: int
    model: str
    result: RequestResult
    arrived_s: float = 0.0
    waited_s: float = 0.0
    """From arrival to its turn."""
    prepared_s: float = 0.0
    """From arrival until it asked for its turn; a part of `waited_s`."""
    service_s: float | None = None
    """From its turn on; None if it never had one."""
    switched: int = 0
    """Activations that it waited for."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    priority: int | None = None
    max_wait_s: float | None = None
    """None where the request had no ticket, as in manual mode: its model's setting, not noted."""
    is_connection: bool = False
    """Whether it was a WebSocket, which stays open for long and may ask for little."""


@dataclass(frozen=True, slots=True)
class RequestsParked:
    """Requests froze with their engine."""

    epoch: int
    model: str
    count: int


@dataclass(frozen=True, slots=True)
class RequestsResumed:
    """Parked requests continue: their model is active again."""

    epoch: int
    model: str
    count: int


@dataclass(frozen=True, slots=True)
class JobLeaseChanged:
    """A model is now held for a job, or is no longer held."""

    epoch: int
    lease: str
    model: str
    owner: str
    change: JobLeaseChange
    expires_in_s: float
    key: str = ""
    """The fingerprint of the key of the caller who changed it; for logs alone."""


@dataclass(frozen=True, slots=True)
class PredictionSettled:
    """A different model became active, and a model had been predicted."""

    epoch: int
    predicted: str
    model: str
    hit: bool


@dataclass(frozen=True, slots=True)
class PrefetchSettled:
    """Files read ahead for an announcement or a prediction turned out useful or useless."""

    epoch: int
    model: str
    prefetched_bytes: int
    used: bool


@dataclass(frozen=True, slots=True)
class WakeChanged:
    """An early wake of a sleeping model, in slices, started, was done or ended."""

    epoch: int
    model: str
    change: WakeChange
    done_bytes: int
    """The device memory that it had taken."""
    total_bytes: int


@dataclass(frozen=True, slots=True)
class OutputRefused:
    """An output of another model or epoch was not delivered, and its request was aborted."""

    epoch: int
    model: str
    stamp: str


@dataclass(frozen=True, slots=True)
class ClientEvicted:
    """A client that had stopped reading was disconnected."""

    epoch: int
    model: str


@dataclass(frozen=True, slots=True)
class EngineDied:
    """One engine died, and the host continues."""

    epoch: int
    model: str
    cause: str


@dataclass(frozen=True, slots=True)
class HostDied:
    """The engine host died, or was killed because it hung."""

    epoch: int
    cause: str


@dataclass(frozen=True, slots=True)
class HostRestarted:
    """There is an engine host again, without models."""

    epoch: int
    restarts: int
    """Restarts of the host since this server started."""
    duration_s: float


@dataclass(frozen=True, slots=True)
class ServiceDegraded:
    """No model is active, and bringing one back failed; it is tried again."""

    epoch: int
    cause: str
    retry_s: float


Event = (
    PhaseChanged
    | SwitchEnded
    | ResidencyChanged
    | ModelMoved
    | PinChanged
    | LoadProgress
    | RequestEnded
    | RequestsParked
    | RequestsResumed
    | JobLeaseChanged
    | PredictionSettled
    | PrefetchSettled
    | WakeChanged
    | OutputRefused
    | ClientEvicted
    | EngineDied
    | HostDied
    | HostRestarted
    | ServiceDegraded
)


class Observer(Protocol):
    """An object that is notified of every event, synchronously and in order."""

    def notify(self, event: Event) -> None:
        """Note `event`. Must not block and must not raise."""


class Observers:
    """Notifies several observers, in the order given."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = list(observers)

    def add(self, observer: Observer) -> None:
        self._observers.append(observer)

    def notify(self, event: Event) -> None:
        for observer in self._observers:
            observer.notify(event)
