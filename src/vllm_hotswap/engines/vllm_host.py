"""The real engine host: one process with vLLM's engines, and the frontends in this process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from vllm_hotswap.config import MemoryBudget
from vllm_hotswap.engines import frontend
from vllm_hotswap.engines.adapters import AdapterSet
from vllm_hotswap.engines.base_memory import with_known_base
from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.engines.vllm_engine import VllmEngine
from vllm_hotswap.host import (
    Device,
    DeviceMemory,
    EngineFailed,
    LoadStage,
    Measure,
    MeasureNow,
    Message,
    Ping,
    SharedMemory,
    SocketPaths,
    anonymous_bytes,
)
from vllm_hotswap.launch import ModelLaunch, ids_of_vllm, plan_memory
from vllm_hotswap.models import EngineFailure, HostStats, Pulse, Usage


class VllmHost:
    """The engine host process and the engines of all configured models.

    The mutable state is `_budget` and `_base_bytes`, set by `start`, and `_seen`, a shared device
    as `start` or `measure_device` last looked at it.
    """

    is_fake = False

    def __init__(
        self,
        link: HostLink,
        launches: Sequence[ModelLaunch],
        memory: MemoryBudget | None = None,
    ) -> None:
        self._link = link
        self._launches = launches
        self._memory = memory or MemoryBudget()
        self._numbers = itertools.count()
        # vLLM's constructors set module globals; two at a time could mix them.
        self._one_frontend_at_a_time = lock = asyncio.Lock()
        # One count for all models, past what vLLM itself gives to adapters of modalities.
        self._adapter_ids = itertools.count(1 + max(ids_of_vllm(m.vllm_config) for m in launches))
        self._engines = {
            launch.alias: VllmEngine(
                launch, link, self._new_sockets, lock, self._new_adapter_set(launch)
            )
            for launch in launches
        }
        for engine in self._engines.values():
            engine.on_broken = partial(self._frontend_broke, engine)
        self._on_engine_failed: list[EngineFailure] = []
        self._budget = Usage()
        """As it was planned with, with what others held then."""
        self._seen: SharedMemory | None = None
        """A shared device as it was last looked at."""
        self._base_bytes = 0

    def __repr__(self) -> str:
        return f"<VllmHost engines={list(self._engines)}>"

    @property
    def engines(self) -> Mapping[str, VllmEngine]:
        return self._engines

    @property
    def budget(self) -> Usage:
        if self._seen is None:
            return self._budget
        return replace(self._budget, device=min(self._budget.device, self._seen.for_models))

    @property
    def _device(self) -> Device:
        """The one that all models have."""
        return next(iter(self._engines.values())).device

    @property
    def is_device_shared(self) -> bool:
        return self._device.is_shared

    @property
    def others_bytes(self) -> int:
        return self._seen.others if self._seen else 0

    async def measure_device(self, used_bytes: int) -> None:
        device = self._device
        # With less than that free, either others have taken it, or torch keeps it.
        reserve = self._seen.seen.reserve if self._seen else 0
        enough = self._budget.device - used_bytes + reserve // 2
        seen = await self._link.call(lambda number: MeasureNow(number, device, enough))
        self._seen = SharedMemory(seen, used_bytes, self._base_bytes)

    @property
    def base_bytes(self) -> int:
        return self._seen.own if self._seen else self._base_bytes

    @property
    def died(self) -> asyncio.Future[str]:
        return self._link.died

    async def start(self) -> None:
        """Wait for the host and have all models share the memory."""
        self._link.watch(self._receive)
        self._preparing = asyncio.create_task(self._prepare_frontends())
        engines = list(self._engines.values())
        memory = await self._ready(self._device)
        memory = with_known_base(memory, self._device)
        self._base_bytes = memory.held
        if self._device.is_shared:
            self._seen = SharedMemory(memory, 0, memory.held)
        self._budget, needs = plan_memory(self._launches, self._memory, memory)
        for engine in engines:
            engine.plan_with(needs[engine.alias])

    async def _ready(self, device: Device) -> DeviceMemory:
        await self._link.ready()
        memory: DeviceMemory = await self._link.call(lambda number: Measure(number, device))
        return memory

    def kill(self, why: str) -> None:
        self._link.end(why)

    async def restart(self) -> None:
        await self._link.gone()
        for engine in self._engines.values():
            await engine.host_died()
        self._link.spawn()
        self._link.watch(self._receive)
        await self._ready(self._device)

    async def ping(self) -> Pulse:
        return Pulse(await self._link.call(Ping))

    async def stop(self) -> None:
        try:
            for engine in self._engines.values():
                await engine.close()
        finally:
            await self._link.stop()

    def stats(self) -> HostStats:
        return HostStats(self._link.pid, anonymous_bytes(self._link.pid))

    def on_engine_failed(self, callback: EngineFailure) -> None:
        self._on_engine_failed.append(callback)

    async def _prepare_frontends(self) -> None:
        """Import beside the host's first load; frontends wait for the lock."""
        async with self._one_frontend_at_a_time:
            await asyncio.to_thread(frontend.prepare_frontends)

    def _new_sockets(self) -> SocketPaths:
        stem = f"ipc://{self._link.folder}/{next(self._numbers)}"
        return SocketPaths(input=f"{stem}-in", output=f"{stem}-out")

    def _new_adapter_set(self, launch: ModelLaunch) -> AdapterSet:
        links = self._link.folder / "adapters"
        return AdapterSet(launch.vllm_config, links, self._adapter_ids.__next__)

    def _receive(self, message: Message) -> None:
        match message:
            case LoadStage(alias=alias, stage=stage):
                self._engines[alias].stage_reached(stage)
            case EngineFailed(alias=alias, load=load, cause=cause):
                self._failed(self._engines[alias], cause, load)

    def _frontend_broke(self, engine: VllmEngine, cause: str) -> None:
        """What its engine generates reaches nobody: it is as good as dead."""
        self._failed(engine, cause, engine.loads)

    def _failed(self, engine: VllmEngine, cause: str, load: int) -> None:
        engine.engine_died(cause)
        for callback in self._on_engine_failed:
            callback(engine.alias, cause, load)
