"""The real engines: vLLM's, one per model, in one engine host process.

The frontend of each model (vLLM's `AsyncLLM` and its FastAPI application) lives in this
process, is built once, right after the engine's first load, and is never touched again.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil
from starlette.types import ASGIApp

from vllm_hotswap import compat
from vllm_hotswap.engines.base import EngineMemory, HostStats, Progress
from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.errors import ConfigError, EngineUnavailable, one_line
from vllm_hotswap.host.messages import (
    Activate,
    Configure,
    EngineFailed,
    Load,
    Loaded,
    LoadStage,
    Message,
    SocketPaths,
)
from vllm_hotswap.launch import ModelLaunch
from vllm_hotswap.metrics import adopting_frontend_metrics


class VllmEngine:
    """One model's vLLM engine and frontend."""

    def __init__(
        self,
        launch: ModelLaunch,
        link: HostLink,
        sockets: SocketPaths,
        one_frontend_at_a_time: asyncio.Lock,
    ) -> None:
        self._launch = launch
        self._link = link
        self._sockets = sockets
        self._one_frontend_at_a_time = one_frontend_at_a_time
        self._app: ASGIApp | None = None
        self._client: Any = None
        self._memory: EngineMemory | None = None
        self._progress: Progress | None = None
        self._frontend_failure: str | None = None
        self._exits = AsyncExitStack()

    def __repr__(self) -> str:
        return f"<VllmEngine {self.alias} loaded={self._app is not None}>"

    @property
    def alias(self) -> str:
        return self._launch.alias

    @property
    def app(self) -> ASGIApp:
        if self._app is None:
            raise EngineUnavailable(f"model {self.alias!r} is not loaded")
        return self._app

    @property
    def memory(self) -> EngineMemory:
        return self._memory or EngineMemory(0, 0)

    @property
    def card(self) -> Mapping[str, object]:
        model = self._launch.vllm_config.model_config
        return {"root": self._launch.model, "max_model_len": model.max_model_len}

    def validate(self) -> None:
        if self._frontend_failure is not None:
            raise ConfigError(
                f"the frontend of model {self.alias!r} could not be built: "
                f"{self._frontend_failure}; mend it and restart the server"
            )
        path = Path(self._launch.model)
        if path.is_absolute() and not path.is_dir():
            raise ConfigError(
                f"model {self.alias!r}: the folder {str(path)!r} does not exist any more"
            )

    async def load(self, progress: Progress) -> None:
        self._progress = progress
        try:
            loaded: Loaded = await self._link.call(
                lambda number: Load(
                    number,
                    self.alias,
                    self._launch.vllm_config,
                    not self._launch.args.disable_log_stats,
                    self._sockets,
                )
            )
        finally:
            self._progress = None
        progress("frontend")
        async with self._one_frontend_at_a_time:
            try:
                await self._build_frontend()
            except Exception as error:
                self._frontend_failure = one_line(error)
                raise
        self._memory = EngineMemory(
            loaded.weights_bytes or self._launch.weights_bytes, loaded.kv_bytes
        )

    async def activate(self, epoch: int) -> None:
        await self._link.call(lambda number: Activate(number, self.alias, epoch))
        compat.name_in_parser_metrics(self.alias)

    async def close(self) -> None:
        """Give back the frontend's sockets, threads and tasks."""
        await self._exits.aclose()

    def stage_reached(self, stage: str) -> None:
        if self._progress is not None:
            self._progress(stage)

    async def _build_frontend(self) -> None:
        config, args = self._launch.vllm_config, self._launch.args
        # The constructor blocks until the engine's ready message, hence the thread.
        self._client = await asyncio.to_thread(compat.make_client, config, self._sockets, args)
        self._exits.callback(self._client.shutdown)
        with adopting_frontend_metrics(self.alias):
            app = await compat.make_app(self._client, args)
            # Built now, so that its metrics are adopted; vLLM's SageMaker part may have done so.
            app.middleware_stack = app.middleware_stack or app.build_middleware_stack()
        await self._exits.enter_async_context(app.router.lifespan_context(app))
        self._app = app


class VllmHost:
    """The engine host process and the engines of all configured models."""

    def __init__(self, link: HostLink, launches: Sequence[ModelLaunch]) -> None:
        self._link = link
        self._launches = launches
        # 0700, so that nobody else of the machine can reach the engines' sockets.
        self._folder = Path(tempfile.mkdtemp(prefix="vllm-hotswap-"))
        # vLLM's constructors set module globals; two at a time could mix them.
        self._one_frontend_at_a_time = lock = asyncio.Lock()
        self._engines = {
            launch.alias: VllmEngine(launch, link, self._sockets(number), lock)
            for number, launch in enumerate(launches)
        }
        self._process: psutil.Process | None = None
        self._on_engine_failed: list[Callable[[str, str], None]] = []

    def __repr__(self) -> str:
        return f"<VllmHost engines={list(self._engines)}>"

    @property
    def engines(self) -> Mapping[str, VllmEngine]:
        return self._engines

    @property
    def died(self) -> asyncio.Future[str]:
        return self._link.died

    async def start(self) -> None:
        """Wait for the host and have it share the memory among all models."""
        self._link.watch(self._receive)
        self._preparing = asyncio.create_task(self._prepare_frontends())
        await self._link.ready()
        configs = [launch.vllm_config for launch in self._launches]
        fraction = max(config.cache_config.gpu_memory_utilization for config in configs)
        models = tuple(
            compat.footprint(launch.alias, launch.vllm_config, launch.weights_bytes)
            for launch in self._launches
        )
        kv_bytes = await self._link.call(lambda number: Configure(number, models, fraction))
        for launch in self._launches:
            launch.vllm_config.cache_config.kv_cache_memory_bytes = kv_bytes[launch.alias]

    async def stop(self) -> None:
        for engine in self._engines.values():
            await engine.close()
        await self._link.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def stats(self) -> HostStats:
        try:
            self._process = self._process or psutil.Process(self._link.pid)
            used = self._process.memory_info().rss
        except psutil.NoSuchProcess:
            used = 0
        return HostStats(self._link.pid, used)

    def on_engine_failed(self, callback: Callable[[str, str], None]) -> None:
        self._on_engine_failed.append(callback)

    async def _prepare_frontends(self) -> None:
        """Import beside the host's first load; frontends wait for the lock."""
        async with self._one_frontend_at_a_time:
            await asyncio.to_thread(compat.prepare_frontends)

    def _sockets(self, number: int) -> SocketPaths:
        stem = f"ipc://{self._folder}/{number}"
        return SocketPaths(input=f"{stem}-in", output=f"{stem}-out")

    def _receive(self, message: Message) -> None:
        match message:
            case LoadStage(alias=alias, stage=stage):
                self._engines[alias].stage_reached(stage)
            case EngineFailed(alias=alias, cause=cause):
                for callback in self._on_engine_failed:
                    callback(alias, cause)
