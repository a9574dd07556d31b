"""The protocols of an engine, and of the process that holds all engines, for the coordinator.

Two implementations ship: `engines.vllm_host` (the real one) and `testing.fake_host` (complete,
without vLLM, for tests and for working on the server). `tests/contract` runs the same checks on
both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import ASGIApp

from vllm_hotswap.models.footprint import Footprint, Usage
from vllm_hotswap.models.routes import ForeseenRoutes, ModelRoutes
from vllm_hotswap.states import WakeProgress

Progress = Callable[[str], None]
"""Called with the name of each stage that a load reaches."""

EngineFailure = Callable[[str, str, int], None]
"""Called with an alias, the cause, and the number of the load (`Engine.loads`) that has died."""


@dataclass(frozen=True, slots=True)
class Previewed:
    """What is known of a request before there is a frontend for it."""

    refusal: Response | None = None
    """The refusal that it would get."""
    is_accepted: bool = False
    """Whether it was checked as its frontend would check it, and nothing is wrong with it."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """What a loaded model needs on its device, in bytes; estimated until it has been loaded."""

    weights_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class HostStats:
    """The engine host now. `used_bytes` is its memory (on a CPU: what cannot be dropped)."""

    pid: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class Pulse:
    """A sign of life of the engine host."""

    step_s: float
    """Seconds that the current step has taken so far; 0 if there is none."""


class Responses(Protocol):
    """The responses that a frontend keeps, with or without its engine."""

    def __contains__(self, response_id: object, /) -> bool: ...

    @property
    def running(self) -> Mapping[str, asyncio.Task[Any]]:
        """The work on responses that outlives its request, by response id."""

    def settle(self, response_id: str, why: str) -> None:
        """Mark a response as failed, with the reason, once its work has ended.

        A response that already says how it ended is left as it is; only a missing reason is added.
        """

    def forget(self, response_id: str) -> None:
        """Stop keeping a response; do nothing if it is not kept."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that a model is served with."""

    files: AdapterFiles
    id: int
    """Unique for ever: no other adapter of any model gets it, even when this one is gone."""
    failure: str | None = None
    """Why the engine could not load it; then it is not served."""


class Engine(Protocol):
    """One model's engine together with its frontend."""

    @property
    def alias(self) -> str: ...

    @property
    def aliases(self) -> tuple[str, ...]:
        """Additional names that clients may send for the model."""

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Its adapters, by name; they outlive unloading."""

    @property
    def loads(self) -> int:
        """Number of loads that have started; what happens to one of them carries its number."""

    @property
    def app(self) -> ASGIApp:
        """The model's own ASGI application. Only defined after the first `load`."""

    @property
    def routes(self) -> ModelRoutes | None:
        """The routes of its application; None before there has been one."""

    @property
    def foreseen(self) -> ForeseenRoutes | None:
        """What is known of `routes` before there is an application."""

    @property
    def are_tools_strict(self) -> bool:
        """Whether it treats the tools of every request as strict."""

    @property
    def responses(self) -> Responses | None:
        """The responses that its frontend keeps; None if it keeps none, or does not exist yet."""

    @property
    def memory(self) -> EngineMemory:
        """What the model needs when it is loaded."""

    @property
    def footprint(self) -> Footprint:
        """What it holds in each residency. Only defined after the host's `start`."""

    @property
    def card(self) -> Mapping[str, object]:
        """Fields of the OpenAI model card; more of them are known after `load`."""

    def validate(self) -> None:
        """Check, without loading, what can be known now (files, configuration).

        Raises:
            ConfigError: it cannot be loaded; the message says why.
        """

    async def rehearse(self) -> None:
        """Prepare, without an engine, what its frontend will need, unless it has one already.

        Raises:
            ConfigError: the frontend could not be built; the message says why.
        """

    async def preview(self, path: str, content_type: str, body: bytes) -> Previewed:
        """Return what its frontend would answer to a POST.

        For models that have no frontend yet: a bad request is refused without a load.
        """

    async def load(self, progress: Progress) -> None:
        """Create the engine and, the first time, its frontend; the engine is parked afterwards.

        Raises:
            EngineUnavailable: the host died.
            HotswapError: the model cannot be loaded; nothing of it is left behind.
        """

    async def activate(self, epoch: int, canary_first: bool = False) -> None:
        """Step this engine from now on, and no other one. Idempotent.

        With `canary_first`, nothing is stepped before `verify` has requested the canary, and then
        nothing else beside it.

        Its outputs are stamped with its alias and `epoch`. An output for a request whose lease does
        not own the stamp ends the request, and is not delivered.
        """

    async def verify(self) -> None:
        """Generate the canary with the engine, which must be the one that is stepped.

        Raises:
            VerifyFailed: the canary is not that of the first load, or not a number at all.
        """

    def release(self, requests: Collection[str]) -> None:
        """Make the engine stop what it still does for requests that are over.

        A frontend does that by itself, but late if its client does not read.

        Args:
            requests: the engine's ids, from `Lease.requests`.
        """

    async def sleep(self, level: int) -> None:
        """Give memory back (vLLM's sleep levels 1 and 2); requests in the engine are kept.

        The engine is not stepped from now on.

        Raises:
            NoRoom: there is too little host memory for what is kept; it is parked.
            HotswapError: it failed; the engine is parked, unless its failure was reported.
        """

    async def wake(self) -> None:
        """Undo `sleep`; the engine is parked afterwards.

        Raises:
            NoRoom: there is too little memory; it is still asleep.
            HotswapError: it failed; the engine is then unloaded.
        """

    @property
    def wakes_in_slices(self) -> bool:
        """Whether `wake_some` can wake it from level 1 while another engine is stepped."""

    async def wake_some(self) -> WakeProgress:
        """Take back a part of its memory. It stays asleep until `wake`, which does the rest.

        A step of another engine waits for that part at most.

        Raises:
            NoRoom: there is too little memory.
            HotswapError: it failed. In both cases it has given back what it had taken.
        """

    async def give_up_wake(self) -> None:
        """Give back what `wake_some` has taken, also in parts. Idempotent."""

    async def unload(self) -> None:
        """Give back everything but the frontend. Idempotent."""

    async def clean_up(self) -> None:
        """Give back what a failed engine, which is of no use any longer, still holds. Idempotent.

        Most failures leave nothing; a broken frontend leaves its engine.
        """

    async def add_adapter(
        self, name: str, path: Path, is_3d: bool, now: bool, check: Callable[[], None]
    ) -> Adapter:
        """Serve an adapter from a folder; it replaces one of the same name.

        Args:
            name: what clients send in `model`.
            path: the folder, in PEFT's format.
            is_3d: vLLM's `is_3d_lora_weight`.
            now: the engine is loaded, and loads the adapter at once. Otherwise the next load does,
                or the first request.
            check: called just before requests may use it; raises if it must not be served.

        Raises:
            ConfigError: it cannot be used; nothing has changed, and the message shows no path.
        """

    def remove_adapter(self, name: str) -> None:
        """Serve no new request with it; requests that run with it continue."""

    async def prefetch(self, limit_bytes: int, on_progress: Callable[[int], None]) -> int:
        """Read weight files, up to `limit_bytes`, so that a load finds them in memory.

        `on_progress` is called with the bytes read so far, on any thread. Returns the bytes read.
        Cancelling the call stops the reading.
        """


class EngineHost(Protocol):
    """The process that holds every loaded engine and steps the active one."""

    @property
    def is_fake(self) -> bool:
        """Whether responses are made up, without vLLM."""

    @property
    def engines(self) -> Mapping[str, Engine]: ...

    @property
    def budget(self) -> Usage:
        """What all models together may hold. Only defined after `start`."""

    @property
    def base_bytes(self) -> int:
        """What the host itself holds without any model, besides the budget of the models."""

    @property
    def is_device_shared(self) -> bool:
        """Whether other processes may take device memory; `measure_device` then measures it."""

    @property
    def others_bytes(self) -> int:
        """Bytes that other processes were last seen to hold of a shared device; else 0."""

    @property
    def died(self) -> asyncio.Future[str]:
        """Done when the host died without being asked to; the result says how.

        There is a new one after each `restart`.
        """

    async def start(self) -> None:
        """Start the host. Raises `EngineUnavailable` if it does not become ready."""

    async def stop(self) -> None:
        """Stop the host and everything in it. Idempotent."""

    def kill(self, why: str) -> None:
        """Kill the host at once; `died` says `why`. What waits for it fails. Idempotent."""

    async def restart(self) -> None:
        """Start the host again after its death, with nothing loaded; frontends stay.

        Raises `EngineUnavailable` if it does not become ready.
        """

    async def measure_device(self, used_bytes: int) -> None:
        """Measure what a shared device offers now; `budget` does not exceed that.

        No memory may move during it; `used_bytes` is what models hold. Raises `EngineUnavailable`.
        """

    async def ping(self) -> Pulse:
        """Return a sign of life, whatever the engines do. Raises `EngineUnavailable`."""

    def stats(self) -> HostStats: ...

    def on_engine_failed(self, callback: EngineFailure) -> None:
        """Register a callback for the death of one engine while the host stays alive."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter whose files have been checked."""

    name: str
    """The name that clients send in `model`."""
    path: Path
    rank: int
    """The highest rank of its layers."""
    is_3d: bool = False
    """vLLM's `is_3d_lora_weight`: a mixture of experts whose expert weights are one tensor."""
