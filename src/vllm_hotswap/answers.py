"""What our own routes answer, as types: the checker holds the code to them, and the description of
the API is made from them. Sizes are bytes unless the name says otherwise, times seconds.
"""

from __future__ import annotations

from typing import NotRequired

# pydantic reads these; before Python 3.12 it needs this module's TypedDict.
from typing_extensions import TypedDict


class UsageAnswer(TypedDict):
    """Memory of the device and of the host."""

    device_bytes: int
    host_bytes: int


class MoveAnswer(TypedDict):
    """A model that moves on the residency ladder, what that frees, and what its way back costs."""

    model: str
    before: str
    after: str
    frees: UsageAnswer
    cost_s: float


class CardStatus(TypedDict):
    """`value` is in the words that llama.cpp's router and llama-swap share."""

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
    """The quickstart server's fields, and ours."""

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
    """What an operation on one model did."""

    operation: str
    model: str
    changed: bool
    before: str
    residency: str
    duration_ms: float
    evicted: list[MoveAnswer]
    prefetched_bytes: NotRequired[int]


class CancelAnswer(TypedDict):
    """A prefetch was cancelled."""

    operation: str
    model: str
    cancelled: bool


class PinAnswer(TypedDict):
    """Whether the model is pinned now."""

    operation: str
    model: str
    pinned: bool


class AdapterEntry(TypedDict):
    """An adapter; `failed` tells why its engine could not load it."""

    name: str
    id: int
    rank: int
    failed: str | None


class AdapterList(TypedDict):
    """What a model is served with besides itself."""

    model: str
    adapters: list[AdapterEntry]


class AddedAdapter(AdapterEntry):
    """An adapter that is served now."""

    operation: str
    model: str


class RemovedAdapter(TypedDict):
    """Requests that are in flight go on with it."""

    operation: str
    model: str
    name: str
    in_flight: int


class PlanMemory(TypedDict):
    """The budget, and what models hold of it."""

    budget: UsageAnswer
    before: UsageAnswer
    peak: UsageAnswer
    after: UsageAnswer


class PlanAnswer(TypedDict):
    """What a switch would do. `give_up_wake`: models that wake before they are asked for, and would
    give back what they have taken."""

    model: str
    active: str | None
    evict: list[MoveAnswer]
    give_up_wake: list[str]
    bring_up: MoveAnswer | None
    cost_s: float
    memory: PlanMemory


class JobLeaseAnswer(TypedDict):
    """A model that is held for a job; `created` is in seconds since 1970."""

    id: str
    model: str
    owner: str
    note: str
    created: int
    expires_in_s: float
    pending: bool
    key: NotRequired[str]
    """For admins: the fingerprint of the key that has taken it."""


class JobLeaseList(TypedDict):
    """All job leases that have not ended."""

    leases: list[JobLeaseAnswer]


class RevokedLease(TypedDict):
    """A job lease that has been ended."""

    id: str
    model: str
    revoked: bool


class NextAnswer(TypedDict):
    """What was done for a model that was announced; `limit_bytes` is what is read at most."""

    model: str
    residency: str
    prefetch: str
    limit_bytes: int
    wake: str


class PredictedModel(TypedDict):
    """What is expected to follow the active model."""

    model: str
    probability: float


class PredictionStatus(TypedDict):
    """What predictions and announcements were good for, since the start."""

    next: PredictedModel | None
    hits: int
    misses: int
    used_bytes: int
    wasted_bytes: int


class WakingStatus(TypedDict):
    """How much of its device memory a model has taken that wakes before it is asked for."""

    done_bytes: int
    total_bytes: int


class ModelStatus(TypedDict):
    """One model now; `waking` is null unless it is asleep, and wakes before it is asked for."""

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
    """`base` is what the engine host holds without models, `others` what other processes do.

    Where device memory is the host's, nobody counts others: 0.
    """

    budget: int
    used: int
    base: int
    others: int


class HostMemoryStatus(TypedDict):
    """Weights asleep, and files read ahead."""

    budget: int
    used: int


class MemoryStatus(TypedDict):
    """Budgets, and what is held of them."""

    device: DeviceMemoryStatus
    host: HostMemoryStatus


class SwitchCounts(TypedDict):
    """Switches that have ended."""

    total: int
    failed: int


class StatusAnswer(TypedDict):
    """The whole server now."""

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
    """Requests are served now; `active` is null while no model is, because nobody has asked."""

    ready: bool
    active: str | None
    epoch: int


class VersionAnswer(TypedDict):
    """vLLM's version."""

    version: str


class ErrorDetails(TypedDict):
    """`message` gives the name, the fact and the next step."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(TypedDict):
    """OpenAI's error object."""

    error: ErrorDetails
