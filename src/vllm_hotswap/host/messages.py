"""What the API process and the engine host say to each other.

They travel as pickles over one anonymous socket pair that the host inherits from its parent:
nobody else has an end of it, so no client can reach it (decision record 0007). Requests and
their outputs never come this way: they use vLLM's own sockets, one pair per model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelFootprint:
    """What is known of a model's memory before it is loaded, in bytes."""

    alias: str
    weights_bytes: int
    """Size of its weight files; 0 where that is not known (a hub name not yet downloaded)."""
    kv_bytes: int | None
    """Its configured KV size, None to be given one."""
    min_kv_bytes: int
    """Enough for one sequence of its maximum length; less would be refused by vLLM."""
    max_kv_bytes: int
    """Enough for all sequences it may run at once, each of its maximum length."""


@dataclass(frozen=True, slots=True)
class SocketPaths:
    """Where a model's frontend binds and its engine connects (ZeroMQ addresses)."""

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Configure:
    """Share the memory among the models that may be loaded. Answer: {alias: KV bytes}."""

    id: int
    models: tuple[ModelFootprint, ...]
    memory_fraction: float


@dataclass(frozen=True, slots=True)
class Load:
    """Make a model's engine. Answer: `Loaded`, with `LoadStage` messages before it."""

    id: int
    alias: str
    vllm_config: Any
    log_stats: bool
    sockets: SocketPaths


@dataclass(frozen=True, slots=True)
class Activate:
    """Step this engine from now on, and no other one. Answer: None."""

    id: int
    alias: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process. No answer; the channel closes."""

    id: int


Command = Configure | Load | Activate | Stop


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a loaded engine holds, in bytes."""

    weights_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The host has imported vLLM and obeys commands."""

    pid: int


@dataclass(frozen=True, slots=True)
class LoadStage:
    """A load reached a stage."""

    alias: str
    stage: str


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """One engine died; the host and the other engines go on."""

    alias: str
    cause: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of the command `id`, or why it failed."""

    id: int
    result: Any = None
    error: str | None = None


Message = Ready | LoadStage | EngineFailed | Answer
