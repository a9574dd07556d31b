"""Types of the JSON that our own routes return. The type checker checks code against them, and the
API description is made from them. Sizes are bytes unless the name says otherwise, times seconds.
"""

from __future__ import annotations

from typing import NotRequired

# pydantic reads these; before Python 3.12 it needs this module's TypedDict.
from typing_extensions import TypedDict


class UsageAnswer(TypedDict):
    """Bytes of device memory and of host memory."""

    device_bytes: int
    host_bytes: int


class MoveAnswer(TypedDict):
    """A model's move on the residency ladder: what it frees, and the cost of moving back."""

    model: str
    before: str
    after: str
    frees: UsageAnswer
    cost_s: float


class CardStatus(TypedDict):
    """Status of a model; `value` uses the terms that llama.cpp's router and llama-swap share."""

    value: str
    residency: str
    active: bool
    failed: NotRequired[bool]


class ModelCard(TypedDict):
    """vLLM's model card, with the model's status."""

    id: str
    object: str
    created: int
    owned_by: str
    status: CardStatus


class ModelList(TypedDict):
    """OpenAI's list of models."""

    object: str
    data: list[ModelCard]


class SwitchAnswer(TypedDict):
    """Result of a switch: the quickstart server's fields, and ours."""

    previous_model: str | None
    current_model: str
    switched: bool
    duration_ms: float
    reconfigure_ms: float
    memory_before_mb: float
    memory_after_unload_mb: float
    freed_memory_mb: float
    stash_memory_after_mb: float
    memory_after_mb: float
    operation_id: str
    epoch: int
    phases: dict[str, float]
    requests_cut: int
    requests_parked: int
    requests_lost: int
    evicted: list[MoveAnswer]


class OperationAnswer(TypedDict):
    """Result of an operation on one model."""

    operation: str
    model: str
    changed: bool
    before: str
    residency: str
    duration_ms: float
    evicted: list[MoveAnswer]
    prefetched_bytes: NotRequired[int]


class CancelAnswer(TypedDict):
    """Result of cancelling a prefetch."""

    operation: str
    model: str
    cancelled: bool


class PinAnswer(TypedDict):
    """Whether the model is pinned now."""

    operation: str
    model: str
    pinned: bool


class AdapterEntry(TypedDict):
    """An adapter; `failed` is why its engine could not load it."""

    name: str
    id: int
    rank: int
    failed: str | None


class AdapterList(TypedDict):
    """The adapters of a model."""

    model: str
    adapters: list[AdapterEntry]


class AddedAdapter(AdapterEntry):
    """An adapter that was added and is served now."""

    operation: str
    model: str


class RemovedAdapter(TypedDict):
    """An adapter that was removed; requests in flight continue with it."""

    operation: str
    model: str
    name: str
    in_flight: int


class PlanMemory(TypedDict):
    """The budget, and how much of it models hold."""

    budget: UsageAnswer
    before: UsageAnswer
    peak: UsageAnswer
    after: UsageAnswer


class PlanAnswer(TypedDict):
    """What a switch would do. `give_up_wake`: models whose early wake would be cancelled, and its
    memory freed."""

    model: str
    active: str | None
    evict: list[MoveAnswer]
    give_up_wake: list[str]
    bring_up: MoveAnswer | None
    cost_s: float
    memory: PlanMemory


class JobLeaseAnswer(TypedDict):
    """A lease that holds a model for a job; `created` is in seconds since 1970."""

    id: str
    model: str
    owner: str
    note: str
    created: int
    expires_in_s: float
    pending: bool
    key: NotRequired[str]
    """For admins: the fingerprint of the key that took the lease."""


class JobLeaseList(TypedDict):
    """All job leases that have not ended."""

    leases: list[JobLeaseAnswer]


class RevokedLease(TypedDict):
    """A job lease that was revoked."""

    id: str
    model: str
    revoked: bool


class NextAnswer(TypedDict):
    """What was done for an announced model; at most `limit_bytes` are read."""

    model: str
    residency: str
    prefetch: str
    limit_bytes: int
    wake: str


class PredictedModel(TypedDict):
    """The model that is expected to follow the active one."""

    model: str
    probability: float


class PredictionStatus(TypedDict):
    """The current prediction, and how useful predictions and announcements were since the start."""

    next: PredictedModel | None
    hits: int
    misses: int
    used_bytes: int
    wasted_bytes: int


class WakingStatus(TypedDict):
    """How much device memory a model has taken in an early wake, before a request needs it."""

    done_bytes: int
    total_bytes: int


class ModelStatus(TypedDict):
    """State of one model; `waking` is null unless it is asleep and an early wake is under way."""

    residency: str
    in_flight: int
    parked: int
    waiting: int
    weights_bytes: int
    kv_bytes: int
    held: UsageAnswer
    waking: WakingStatus | None
    pinned: bool
    idle_s: float | None
    switch_cost_s: float
    failed: str | None


class HostStatus(TypedDict):
    """The engine host's process; `is_fake`: answers are made up, without vLLM."""

    is_fake: bool
    pid: int
    used_bytes: int
    restarts: int


class DeviceMemoryStatus(TypedDict):
    """Device memory: `base` is what the engine host holds without models, `others` what other
    processes hold. If device memory is host memory, `others` is 0: it is not counted."""

    budget: int
    used: int
    base: int
    others: int


class HostMemoryStatus(TypedDict):
    """Host memory: weights of sleeping models, and files read ahead."""

    budget: int
    used: int


class MemoryStatus(TypedDict):
    """Memory budgets, and how much of them is held."""

    device: DeviceMemoryStatus
    host: HostMemoryStatus


class SwitchCounts(TypedDict):
    """Counts of switches that have ended."""

    total: int
    failed: int


class StatusAnswer(TypedDict):
    """State of the whole server."""

    state: str
    active: str | None
    epoch: int
    phase: str
    operation_id: str | None
    target: str | None
    waiting: int
    failure: str | None
    models: dict[str, ModelStatus]
    host: HostStatus
    memory: MemoryStatus
    switches: SwitchCounts
    job_leases: list[JobLeaseAnswer]
    predictions: PredictionStatus


class ReadyAnswer(TypedDict):
    """Requests are served now; `active` is null while no request needs a model."""

    ready: bool
    active: str | None
    epoch: int


class VersionAnswer(TypedDict):
    """vLLM's version."""

    version: str


class ErrorDetails(TypedDict):
    """Details of an error; `message` gives the name, the fact and the next step."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(TypedDict):
    """OpenAI's error object."""

    error: ErrorDetails
