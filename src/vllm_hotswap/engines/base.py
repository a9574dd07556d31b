"""The protocols that the coordinator knows of an engine and of the process that holds all.

Two implementations ship: `engines.vllm` (the real one) and `engines.fake` (complete, without
vLLM, for tests and for working on the server). `tests/contract` runs the same checks on both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from starlette.types import ASGIApp

Progress = Callable[[str], None]
"""Called with the name of each stage that a load reaches."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """What a loaded model holds, in bytes."""

    weights_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class HostStats:
    """The engine host now. `used_bytes` is its memory (on a CPU: resident set size)."""

    pid: int
    used_bytes: int


class Engine(Protocol):
    """One model's engine together with its frontend."""

    @property
    def alias(self) -> str: ...

    @property
    def app(self) -> ASGIApp:
        """The model's own ASGI application. Only defined after `load`."""

    @property
    def memory(self) -> EngineMemory:
        """What the loaded model holds. Only defined after `load`."""

    @property
    def card(self) -> Mapping[str, object]:
        """Fields of the OpenAI model card; more of them are known after `load`."""

    def validate(self) -> None:
        """Check, without loading, whatever can be known now (files, configuration).

        Raises:
            ConfigError: it cannot be loaded; the message says why.
        """

    async def load(self, progress: Progress) -> None:
        """Make the engine and its frontend; the engine is parked afterwards.

        Raises:
            EngineUnavailable: the host died.
            HotswapError: the model cannot be loaded; nothing of it is left behind.
        """

    async def activate(self, epoch: int) -> None:
        """Step this engine from now on, and no other one. Idempotent."""


class EngineHost(Protocol):
    """The process that holds every loaded engine and steps the active one."""

    @property
    def engines(self) -> Mapping[str, Engine]: ...

    @property
    def died(self) -> asyncio.Future[str]:
        """Done when the host died without being asked to; the result says how."""

    async def start(self) -> None:
        """Start the host. Raises `EngineUnavailable` if it does not come up."""

    async def stop(self) -> None:
        """Stop the host and everything in it. Idempotent."""

    def stats(self) -> HostStats: ...

    def on_engine_failed(self, callback: Callable[[str, str], None]) -> None:
        """Register who is told (alias, cause) when one engine dies and the host goes on."""
