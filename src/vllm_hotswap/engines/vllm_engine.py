"""The real engine of one model: vLLM's, in the engine host process, and its frontend here.

The frontend (vLLM's `AsyncLLM` and its FastAPI application) is built once, right after the engine's
first load, and is never touched again: it outlives the model's weights and serves every later load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from starlette.types import ASGIApp

from vllm_hotswap.engines.adapters import AdapterSet
from vllm_hotswap.engines.before_load import BeforeLoad
from vllm_hotswap.engines.engine_waits import EngineWaits
from vllm_hotswap.engines.frontend import name_in_parser_metrics
from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.engines.memory_figures import MemoryFigures
from vllm_hotswap.engines.model_frontend import ModelFrontend
from vllm_hotswap.engines.stamps import make_stamp
from vllm_hotswap.engines.verification import Verification
from vllm_hotswap.engines.vllm_canary import can_be_asked
from vllm_hotswap.errors import ConfigError, EngineUnavailable
from vllm_hotswap.host import (
    Activate,
    Device,
    GiveUpWake,
    Load,
    Sleep,
    SocketPaths,
    Unload,
    Wake,
    WakeSlice,
)
from vllm_hotswap.launch import (
    ModelLaunch,
    ModelNeeds,
    check_weights,
    foresee,
    hub,
    read_adapter,
    read_ahead,
    shapes_of,
    weight_files,
)
from vllm_hotswap.models import (
    Adapter,
    AdapterFiles,
    EngineMemory,
    Footprint,
    ForeseenRoutes,
    ModelRoutes,
    Previewed,
    Progress,
    Responses,
)
from vllm_hotswap.states import WakeProgress


class VllmEngine:
    """One model's vLLM engine and frontend.

    Parts: its `_figures` are what it holds, `_frontend` is its frontend and its client of the
    engine, `_before_load` what is checked without them, and `_verification` compares canaries. The
    mutable state besides: `loads` and `_progress`, changed by `load`, `_stamp`, by `activate`, and
    `_aborting`, by `release`.
    """

    def __init__(
        self,
        launch: ModelLaunch,
        link: HostLink,
        sockets: Callable[[], SocketPaths],
        one_frontend_at_a_time: asyncio.Lock,
        adapter_set: AdapterSet,
    ) -> None:
        self._launch = launch
        self._link = link
        self._adapter_set = adapter_set
        adapter_set.put(launch.adapters)
        self._foreseen = foresee(launch.vllm_config)
        self._figures = MemoryFigures(launch)
        self._waits = waits = EngineWaits(launch.alias, link)
        self._frontend = ModelFrontend(
            launch, link, waits, sockets, one_frontend_at_a_time, self._frontend_broke
        )
        self._before_load = BeforeLoad(
            launch, one_frontend_at_a_time, lambda: self._frontend.is_made
        )
        self._verification = Verification(launch, link, waits)
        self._progress: Progress | None = None
        self.loads = 0
        self._stamp = ""
        self._aborting: set[asyncio.Task[None]] = set()
        self.on_broken: Callable[[str], None] = lambda _: None
        """Called with the cause once its frontend reads no more outputs."""

    def __repr__(self) -> str:
        return f"<VllmEngine {self.alias} has_frontend={self._frontend.is_made}>"

    @property
    def alias(self) -> str:
        return self._launch.alias

    @property
    def aliases(self) -> tuple[str, ...]:
        return self._launch.aliases

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        return self._adapter_set.adapters

    @property
    def device(self) -> Device:
        return self._figures.device

    @property
    def app(self) -> ASGIApp:
        if self._frontend.made is None:
            raise EngineUnavailable(f"model {self.alias!r} is not loaded")
        app: ASGIApp = self._frontend.made.app
        return app

    @property
    def routes(self) -> ModelRoutes | None:
        return self._frontend.made.routes if self._frontend.made else None

    @property
    def foreseen(self) -> ForeseenRoutes | None:
        return self._foreseen

    @property
    def are_tools_strict(self) -> bool:
        return getattr(self._launch.args, "tool_strict_level", "auto") == "parameter"

    @property
    def responses(self) -> Responses | None:
        return self._frontend.made.responses if self._frontend.made else None

    @property
    def memory(self) -> EngineMemory:
        return self._figures.estimate

    @property
    def footprint(self) -> Footprint:
        return self._figures.footprint

    @property
    def card(self) -> Mapping[str, object]:
        model = self._launch.vllm_config.model_config
        return {"root": self._launch.model, "max_model_len": model.max_model_len}

    def plan_with(self, needs: ModelNeeds) -> None:
        """Set what it is planned with, and so the size of its KV memory."""
        self._figures.plan_with(needs)

    def validate(self) -> None:
        path = Path(self._launch.model)
        if path.is_absolute() and not path.exists():
            raise ConfigError(f"model {self.alias!r}: the folder {str(path)!r} no longer exists")
        if path.is_dir():
            try:
                check_weights(path)
            except ConfigError as error:
                raise ConfigError(f"model {self.alias!r}: {error.message}") from error

    async def rehearse(self) -> None:
        if not self._frontend.is_made:
            await self._before_load.rehearse()

    async def preview(self, path: str, content_type: str, body: bytes) -> Previewed:
        return await self._before_load.preview(path, content_type, body)

    async def load(self, progress: Progress) -> None:
        sockets = await self._frontend.before_load()
        await self._load_in_host(sockets, progress)
        await self._frontend.connect(sockets, progress)
        self._before_load.end()
        if self._launch.vllm_config.model_config.is_multimodal_model:
            # It would send the new engine less than that needs.
            await self._waits.until_answered(self._frontend.client.reset_mm_cache())
        if (target := self._frontend.adapter_target) is not None:
            await self._waits.until_answered(self._adapter_set.load_all(target))

    async def _load_in_host(self, sockets: SocketPaths, progress: Progress) -> None:
        # The host gets a copy, so that what a load writes into it is gone at the next one.
        config, variables = self._launch.vllm_config, self._launch.variables
        log_stats = not self._launch.args.disable_log_stats
        has_default_kv = self._figures.has_default_kv
        self._progress = progress
        self._figures.lost_copy()
        self.loads += 1
        try:
            loaded = await self._link.call(
                lambda number: Load(
                    number,
                    self.alias,
                    self.loads,
                    config,
                    log_stats,
                    sockets,
                    variables,
                    has_default_kv,
                )
            )
        finally:
            self._progress = None
        self._figures.measured(loaded)

    async def activate(self, epoch: int, canary_first: bool = False) -> None:
        self._stamp = stamp = make_stamp(self.alias, epoch)
        first = canary_first and can_be_asked(self._frontend.tasks)
        await self._link.call(lambda number: Activate(number, self.alias, stamp, first))
        name_in_parser_metrics(self.alias)

    async def verify(self) -> None:
        frontend = self._frontend
        await self._verification.verify(frontend.client, frontend.tasks, self._stamp)

    def release(self, requests: Collection[str]) -> None:
        client = self._frontend.client
        task = asyncio.create_task(client.abort(list(requests), internal=True))
        client.engine_core.forget(requests)
        self._aborting.add(task)
        task.add_done_callback(self._aborting.discard)

    async def sleep(self, level: int) -> None:
        await self._link.call(lambda number: Sleep(number, self.alias, level))
        self._figures.slept()

    async def wake(self) -> None:
        await self._link.call(lambda number: Wake(number, self.alias))

    @property
    def wakes_in_slices(self) -> bool:
        return self._figures.device.wakes_in_slices

    async def wake_some(self) -> WakeProgress:
        progress: WakeProgress = await self._link.call(lambda number: WakeSlice(number, self.alias))
        return progress

    async def give_up_wake(self) -> None:
        while await self._link.call(lambda number: GiveUpWake(number, self.alias)):
            """A part at a time, so that steps go on in between."""

    async def unload(self) -> None:
        await self._link.call(lambda number: Unload(number, self.alias))
        self._figures.lost_copy()

    async def clean_up(self) -> None:
        if self._frontend.is_engine_left:
            self._figures.lost_copy()
            await self._frontend.forget_left_engine()

    async def prefetch(self, limit_bytes: int, on_progress: Callable[[int], None]) -> int:
        revision = self._launch.vllm_config.model_config.revision
        folder = hub.local_folder(self._launch.model, revision)
        if folder is None or not folder.is_dir():
            return 0
        return await read_ahead(weight_files(folder), limit_bytes, on_progress)

    async def add_adapter(
        self, name: str, path: Path, is_3d: bool, now: bool, check: Callable[[], None]
    ) -> Adapter:
        files = await asyncio.to_thread(self._read_adapter, name, path, is_3d)
        target = self._frontend.adapter_target
        return await self._waits.until_answered(self._adapter_set.add(files, target, now, check))

    def _read_adapter(self, name: str, path: Path, is_3d: bool) -> AdapterFiles:
        base = hub.local_folder(self._launch.model, self._launch.vllm_config.model_config.revision)
        files = read_adapter(name, path, shapes_of(base), is_3d)
        self._adapter_set.check(files)
        return files

    def remove_adapter(self, name: str) -> None:
        self._adapter_set.remove(name, self._frontend.adapter_target)

    async def close(self) -> None:
        """Give back the frontend's sockets, threads and tasks."""
        await self._frontend.close()

    def engine_died(self, cause: str) -> None:
        self._waits.engine_died(cause)

    async def host_died(self) -> None:
        """Forget the engine; the next one, in another host, says that it is ready."""
        self._figures.lost_copy()
        await self._frontend.host_died()

    def stage_reached(self, stage: str) -> None:
        if self._progress is not None:
            self._progress(stage)

    def _frontend_broke(self) -> None:
        self.on_broken("its frontend stopped processing outputs after an error")
