"""Values of what happened, and the protocol of whoever wants to know.

The coordinator emits; logs, metrics and tests observe. Every event carries the epoch in
which it happened.
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
"""`done`: nothing is left for the switch to it; the last four end it. All but `used` have given
everything back."""
RequestResult = Literal["served", "refused", "failed", "cut", "left"]
"""`refused` and `failed`: the answer was an error, with a status below 500 or not."""


@dataclass(frozen=True, slots=True)
class PhaseChanged:
    """A phase of a switch began or ended."""

    operation_id: str
    epoch: int
    target: str
    phase: SwitchPhase
    status: PhaseStatus
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SwitchEnded:
    """A switch ended, either way."""

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
    """Where the target lay before."""
    drain_s: float = 0.0
    queued_s: float = 0.0
    """For which it waited for another operation that moved models."""
    key: str = ""
    """The fingerprint of the key of whoever has called for it; for logs alone."""


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
    """A request gave its lease back: answered, ended by the server, or left by its client.

    Times are of the server's clock, in seconds.
    """

    epoch: int
    model: str
    result: RequestResult
    arrived_s: float = 0.0
    waited_s: float = 0.0
    """Until its turn."""
    prepared_s: float = 0.0
    """Until it asked for its turn; `waited_s` has it, too."""
    service_s: float | None = None
    """From then on; None if it has never asked for its engine."""
    switched: int = 0
    """Activations that it waited for."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    priority: int | None = None
    max_wait_s: float | None = None
    """None: its model's, of which nobody took note, as requests do not take turns."""
    is_connection: bool = False
    """Whether it was a WebSocket, which is open for long, and may ask for little."""


@dataclass(frozen=True, slots=True)
class RequestsParked:
    """Requests froze with their engine."""

    epoch: int
    model: str
    count: int


@dataclass(frozen=True, slots=True)
class RequestsResumed:
    """Parked requests go on: their model is active again."""

    epoch: int
    model: str
    count: int


@dataclass(frozen=True, slots=True)
class JobLeaseChanged:
    """A model is held for a job, or is no longer."""

    epoch: int
    lease: str
    model: str
    owner: str
    change: JobLeaseChange
    expires_in_s: float
    key: str = ""
    """The fingerprint of the key of whoever has changed it; for logs alone."""


@dataclass(frozen=True, slots=True)
class PredictionSettled:
    """Another model has become active than before, and one had been predicted."""

    epoch: int
    predicted: str
    model: str
    hit: bool


@dataclass(frozen=True, slots=True)
class PrefetchSettled:
    """Files that were read ahead for an announcement or a prediction were of use, or were not."""

    epoch: int
    model: str
    prefetched_bytes: int
    used: bool


@dataclass(frozen=True, slots=True)
class WakeChanged:
    """A sleeping model wakes before it is asked for, in slices, or does so no more."""

    epoch: int
    model: str
    change: WakeChange
    done_bytes: int
    """What it had taken of the device."""
    total_bytes: int


@dataclass(frozen=True, slots=True)
class OutputRefused:
    """An output of another model or epoch was not delivered, and its request was ended."""

    epoch: int
    model: str
    stamp: str


@dataclass(frozen=True, slots=True)
class ClientEvicted:
    """A client that took in nothing was let go."""

    epoch: int
    model: str


@dataclass(frozen=True, slots=True)
class EngineDied:
    """One engine died, and the host goes on."""

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
    """Of this server so far."""
    duration_s: float


@dataclass(frozen=True, slots=True)
class ServiceDegraded:
    """No model is active, and bringing one back has failed; it is tried again."""

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
    """Somebody who is told of every event, synchronously, in order."""

    def notify(self, event: Event) -> None:
        """Take note of `event`. Must not block and must not raise."""


class Observers:
    """Tells several observers, in the order given."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = list(observers)

    def add(self, observer: Observer) -> None:
        self._observers.append(observer)

    def notify(self, event: Event) -> None:
        for observer in self._observers:
            observer.notify(event)
