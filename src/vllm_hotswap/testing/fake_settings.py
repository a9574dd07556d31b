"""How a fake model is: how long things take, what it holds, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_hotswap.models import Usage
from vllm_hotswap.testing.fake_answers import Manners
from vllm_hotswap.testing.fake_frontend import Task

UNLIMITED = Usage(1 << 60, 1 << 60)

MAX_RANK = 16
"""Of the adapters of a fake model."""


@dataclass(frozen=True, slots=True)
class FakeSettings:
    """How long things take, in seconds, and what a model holds, in bytes."""

    load_s: float = 0.0
    activate_s: float = 0.0
    token_s: float = 0.0
    sleep_s: float = 0.0
    wake_s: float = 0.0
    unload_s: float = 0.0
    weights_bytes: int = 1 << 20
    kv_bytes: int = 1 << 20
    levels: frozenset[int] = frozenset([1, 2])
    """Sleep levels that it knows."""
    tasks: tuple[Task, ...] = ("generate", "embed")
    """What it is for; its routes are those of these tasks."""
    reports_tasks: bool = True
    """Whether its configuration says which tasks it has."""
    are_tools_strict: bool = False
    root: str | None = None
    """What its card says of its checkpoint."""
    max_model_len: int = 4096
    """What its card says; no request is refused for it."""
    manners: Manners = field(default_factory=Manners)
    """How it answers."""
    offloads: bool = False
    """Whether weights asleep are host bytes, as on an accelerator, not device bytes."""
    residue_bytes: int = 0
    """Device bytes that it holds asleep, where weights asleep are host bytes."""
    slices: int = 0
    """In how many parts it wakes from level 1 while another model is served; 0: in one go."""
