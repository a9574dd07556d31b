"""The real engines: vLLM's, one per model, in one engine host process.

The frontend of each model (vLLM's `AsyncLLM` and its FastAPI application) lives in this
process, is built once, right after the engine's first load, and is never touched again: it
outlives the model's weights and serves every later load.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.types import ASGIApp

from vllm_hotswap.config import MemoryBudget
from vllm_hotswap.engines import frontend
from vllm_hotswap.engines.adapters import AdapterSet, AdapterTarget
from vllm_hotswap.engines.base_memory import with_known_base
from vllm_hotswap.engines.canary import Canary
from vllm_hotswap.engines.engine_share import EngineShare
from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.engines.preview import Preview, make_preview
from vllm_hotswap.engines.sampling_filter import SamplingFilter
from vllm_hotswap.engines.spread import read_in_turns, spread
from vllm_hotswap.engines.stamps import StampedCore, make_stamp
from vllm_hotswap.engines.vllm_canary import ask_for_canary, can_be_asked, is_overflow
from vllm_hotswap.engines.vllm_metrics import adopting_frontend_metrics, forget_frontend_metrics
from vllm_hotswap.errors import ConfigError, EngineUnavailable, HotswapError, VerifyFailed, one_line
from vllm_hotswap.failpoints import async_failpoint
from vllm_hotswap.host import (
    Activate,
    Device,
    DeviceMemory,
    EngineFailed,
    GiveUpWake,
    Load,
    Loaded,
    LoadStage,
    Measure,
    MeasureNow,
    Message,
    Ping,
    SharedMemory,
    Sleep,
    SocketPaths,
    Unload,
    Wake,
    WakeSlice,
    anonymous_bytes,
    device_of,
    grammars,
    kv_shares,
)
from vllm_hotswap.launch import (
    ModelLaunch,
    ModelNeeds,
    check_weights,
    foresee,
    hub,
    ids_of_vllm,
    plan_memory,
    read_adapter,
    read_ahead,
    rehearsal as trial,
    shapes_of,
    weight_files,
)
from vllm_hotswap.models import (
    Adapter,
    AdapterFiles,
    EngineFailure,
    EngineMemory,
    Footprint,
    ForeseenRoutes,
    HostStats,
    ModelRoutes,
    Previewed,
    Progress,
    Pulse,
    Responses,
    Usage,
    pace_tasks,
)
from vllm_hotswap.states import Residency, WakeProgress
from vllm_hotswap.system import Helpers, value_text
from vllm_hotswap.tasks import FairPool

T = TypeVar("T")

log = logging.getLogger("vllm_hotswap")

SPARE_CHECKS = 3
"""More threads for checks of grammars, one for each check that takes very long."""

REHEARSALS = 2
"""Grammars of one model that are tried in processes at a time; as many more if some are stuck."""

_helpers = Helpers()
"""Of all models. They end with this process."""
atexit.register(_helpers.close)

FORGET_TIMEOUT_S = 30.0
"""Seconds in which the host must forget an engine whose frontend could not be built."""

REHEARSAL_S = 120.0
"""In which a tokenizer must be there, its download included."""


class VllmEngine:
    """One model's vLLM engine and frontend."""

    def __init__(
        self,
        launch: ModelLaunch,
        link: HostLink,
        sockets: Callable[[], SocketPaths],
        one_frontend_at_a_time: asyncio.Lock,
        adapter_set: AdapterSet,
    ) -> None:
        self._launch = launch
        self._adapter_set = adapter_set
        adapter_set.put(launch.adapters)
        self._link = link
        self._new_sockets = sockets
        self._one_frontend_at_a_time = one_frontend_at_a_time
        self._device = device_of(launch.vllm_config)
        self._needs = launch.needs
        self._foreseen = foresee(launch.vllm_config)
        self._has_default_kv = self._needs.kv_bytes is None
        self._sockets: SocketPaths | None = None
        self._frontend: frontend.Frontend | None = None
        self._adapter_target: AdapterTarget | None = None
        self._preview: Preview | None = None
        """Looks at requests as long as there is no frontend."""
        self._has_tried_preview = False
        self._client: Any = None
        """Kept to the end: vLLM leaves its ZeroMQ context open."""
        self._loaded: Loaded | None = None
        self._progress: Progress | None = None
        self._died: asyncio.Future[str] | None = None
        """Whoever asks the engine something waits for its death, too."""
        self._canary: Canary | None = None
        """Of its first load."""
        self._has_copy = False
        """Whether its weights are in host memory, where they stay once it has slept."""
        self.loads = 0
        self._stamp = ""
        self._aborting: set[asyncio.Task[None]] = set()
        self._is_engine_lost = False
        """Whether the engine that the frontend is connected to went with its host."""
        self._is_frontend_broken = False
        """Whether it takes in no more outputs: another one has to take its place."""
        self._is_engine_left = False
        """Whether the engine of a broken frontend is in the host, of use to nobody."""
        self.on_broken: Callable[[str], None] = lambda _: None
        """Called with the cause once that is so."""
        self._exits = AsyncExitStack()

    def __repr__(self) -> str:
        return f"<VllmEngine {self.alias} has_frontend={self._frontend is not None}>"

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
        return self._device

    @property
    def needs(self) -> ModelNeeds:
        return self._needs

    @property
    def app(self) -> ASGIApp:
        if self._frontend is None:
            raise EngineUnavailable(f"model {self.alias!r} is not loaded")
        app: ASGIApp = self._frontend.app
        return app

    @property
    def routes(self) -> ModelRoutes | None:
        return self._frontend.routes if self._frontend else None

    @property
    def foreseen(self) -> ForeseenRoutes | None:
        return self._foreseen

    @property
    def are_tools_strict(self) -> bool:
        return getattr(self._launch.args, "tool_strict_level", "auto") == "parameter"

    @property
    def responses(self) -> Responses | None:
        return self._frontend.responses if self._frontend else None

    @property
    def memory(self) -> EngineMemory:
        return EngineMemory(self._needs.weights_bytes, self._kv_bytes)

    @property
    def footprint(self) -> Footprint:
        loaded, needs = self._loaded, replace(self._needs, kv_bytes=self._kv_bytes)
        return footprint_of(needs, self._device, loaded, self._has_copy)

    @property
    def _kv_bytes(self) -> int:
        """What it was given; once it has been loaded, what it has: an encoder has none."""
        if self._loaded is None:
            return self._needs.kv_bytes or 0
        return self._loaded.kv_bytes * kv_shares(self._launch.vllm_config)

    @property
    def card(self) -> Mapping[str, object]:
        model = self._launch.vllm_config.model_config
        return {"root": self._launch.model, "max_model_len": model.max_model_len}

    def give_memory(self, needs: ModelNeeds) -> None:
        """Set what it is planned with, and so the size of its KV memory."""
        self._needs = needs
        config = self._launch.vllm_config
        config.cache_config.kv_cache_memory_bytes = (needs.kv_bytes or 0) // kv_shares(config)

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
        if self._frontend is not None:
            return
        args, config = self._launch.args, self._launch.vllm_config
        async with self._one_frontend_at_a_time:
            try:
                async with asyncio.timeout(REHEARSAL_S):
                    await _on_daemon_thread(lambda: trial.rehearse(args, config))
            except TimeoutError:
                raise ConfigError(
                    f"model {self.alias!r}: its tokenizer was not read within {REHEARSAL_S:g} s"
                ) from None
            except ConfigError as error:
                raise ConfigError(f"model {self.alias!r}: {error.message}") from error

    async def preview(self, path: str, content_type: str, body: bytes) -> Previewed:
        if not self._has_tried_preview:
            async with self._one_frontend_at_a_time:
                await self._try_preview()
        preview = self._preview
        return await preview.check(path, content_type, body) if preview else Previewed()

    async def _try_preview(self) -> None:
        if self._frontend is None and not self._has_tried_preview:
            self._preview = await self._make_preview()
            self._has_tried_preview = True

    async def _make_preview(self) -> Preview | None:
        args, config = self._launch.args, self._launch.vllm_config
        if not self._launch.sampling.is_empty:
            return None  # a parameter may be wrong that its frontend will never see
        try:
            return await _on_daemon_thread(lambda: make_preview(args, config))
        except Exception as error:  # noqa: BLE001  # the load will tell what is wrong
            alias = value_text(self.alias)
            log.warning("event=no_preview model=%s cause=%r", alias, one_line(error))
            return None

    async def load(self, progress: Progress) -> None:
        if self._is_frontend_broken:
            await self._give_up_frontend()
        self._sockets = self._sockets or self._new_sockets()
        sockets = self._sockets
        # The host gets a copy, so that what a load writes into it is gone at the next one.
        config, variables = self._launch.vllm_config, self._launch.variables
        log_stats = not self._launch.args.disable_log_stats
        self._progress = progress
        self._has_copy = False
        self.loads += 1
        try:
            self._loaded = await self._link.call(
                lambda number: Load(
                    number,
                    self.alias,
                    self.loads,
                    config,
                    log_stats,
                    sockets,
                    variables,
                    self._has_default_kv,
                )
            )
        finally:
            self._progress = None
        if self._frontend is None:
            progress("frontend")
            await self._add_frontend(sockets)
        elif self._is_engine_lost:
            await self._unless_host_dies(frontend.await_engine(self._client))
        self._is_engine_lost = False
        if config.model_config.is_multimodal_model:
            # It would send the new engine less than that needs.
            await self._unless_host_dies(self._client.reset_mm_cache())
        if self._adapter_target is not None:
            await self._unless_host_dies(self._adapter_set.load_all(self._adapter_target))

    async def activate(self, epoch: int, canary_first: bool = False) -> None:
        self._stamp = stamp = make_stamp(self.alias, epoch)
        first = canary_first and can_be_asked(self._tasks)
        await self._link.call(lambda number: Activate(number, self.alias, stamp, first))
        frontend.name_in_parser_metrics(self.alias)

    async def verify(self) -> None:
        canary = await self._asked_for_canary()
        if canary is None:
            return
        why = canary.flaw() or (self._canary and canary.difference(self._canary))
        if why:
            raise VerifyFailed(self.alias, why)
        self._canary = self._canary or canary

    @property
    def _tasks(self) -> Collection[str]:
        return self._frontend.routes.tasks if self._frontend else ()

    async def _asked_for_canary(self) -> Canary | None:
        """The canary; None if it cannot be had, which says nothing of the model."""
        if not can_be_asked(self._tasks):
            alias = value_text(self.alias)
            log.info("event=not_verified model=%s reason='no canary for its tasks'", alias)
            return None
        config, stamp = self._launch.vllm_config, self._stamp
        try:
            return await self._unless_host_dies(ask_for_canary(self._client, config, self._tasks))
        except EngineUnavailable:
            raise
        except Exception as error:
            if not is_overflow(error):
                raise VerifyFailed(self.alias, one_line(error)) from error
            alias = value_text(self.alias)
            log.warning("event=not_verified model=%s reason=%r", alias, one_line(error))
        # Its parked requests are as many as may be, and are not to wait for it any longer.
        await self._link.call(lambda number: Activate(number, self.alias, stamp))
        return None

    def release(self, requests: Collection[str]) -> None:
        task = asyncio.create_task(self._client.abort(list(requests), internal=True))
        self._client.engine_core.forget(requests)
        self._aborting.add(task)
        task.add_done_callback(self._aborting.discard)

    async def sleep(self, level: int) -> None:
        await self._link.call(lambda number: Sleep(number, self.alias, level))
        self._has_copy = self._device.keeps_copy

    async def wake(self) -> None:
        await self._link.call(lambda number: Wake(number, self.alias))

    @property
    def wakes_in_slices(self) -> bool:
        return self._device.wakes_in_slices

    async def wake_some(self) -> WakeProgress:
        progress: WakeProgress = await self._link.call(lambda number: WakeSlice(number, self.alias))
        return progress

    async def give_up_wake(self) -> None:
        while await self._link.call(lambda number: GiveUpWake(number, self.alias)):
            """A part at a time, so that steps go on in between."""

    async def unload(self) -> None:
        await self._link.call(lambda number: Unload(number, self.alias))
        self._has_copy = False

    async def clean_up(self) -> None:
        if not self._is_engine_left:
            return
        self._is_engine_left = self._has_copy = False
        try:
            await self._link.call(lambda number: Unload(number, self.alias, forget=True))
        except EngineUnavailable:
            raise
        except HotswapError as error:  # what it could take apart, it has
            alias = value_text(self.alias)
            log.warning("event=not_buried model=%s cause=%r", alias, one_line(error))

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
        return await self._unless_host_dies(
            self._adapter_set.add(files, self._adapter_target, now, check)
        )

    def _read_adapter(self, name: str, path: Path, is_3d: bool) -> AdapterFiles:
        base = hub.local_folder(self._launch.model, self._launch.vllm_config.model_config.revision)
        files = read_adapter(name, path, shapes_of(base), is_3d)
        self._adapter_set.check(files)
        return files

    def remove_adapter(self, name: str) -> None:
        self._adapter_set.remove(name, self._adapter_target)

    async def close(self) -> None:
        """Give back the frontend's sockets, threads and tasks."""
        await self._exits.aclose()

    def engine_died(self, cause: str) -> None:
        if self._died is not None and not self._died.done():
            self._died.set_result(f"the engine of {self.alias!r} died: {cause}")

    async def host_died(self) -> None:
        """Forget the engine; the next one, in another host, says that it is ready."""
        self._has_copy = self._is_engine_left = False
        if self._client is not None:
            await frontend.forget_engine(self._client)
            self._is_engine_lost = True

    def stage_reached(self, stage: str) -> None:
        if self._progress is not None:
            self._progress(stage)

    async def _add_frontend(self, sockets: SocketPaths) -> None:
        """Build the frontend; if that fails, forget the engine, whose client is lost."""
        async with self._one_frontend_at_a_time:
            try:
                await self._unless_host_dies(self._build_frontend(sockets))
            except BaseException as error:
                self._sockets = self._client = None
                await self._exits.aclose()
                await self._forget_engine()
                if isinstance(error, Exception) and not isinstance(error, EngineUnavailable):
                    raise ConfigError(
                        f"the frontend of model {self.alias!r} could not be built: "
                        f"{one_line(error)}"
                    ) from error
                raise

    async def _give_up_frontend(self) -> None:
        """Have the next load make another frontend, and another engine for it."""
        log.warning("event=frontend_given_up model=%s", value_text(self.alias))
        self._frontend = self._client = self._adapter_target = self._sockets = None
        self._is_frontend_broken = self._is_engine_lost = self._is_engine_left = False
        try:
            await self._exits.aclose()
        except Exception as error:  # noqa: BLE001  # it is broken, and goes all the same
            cause = one_line(error)
            alias = value_text(self.alias)
            log.warning("event=frontend_kept model=%s cause=%r", alias, cause)
        forget_frontend_metrics(self.alias)
        await self._forget_engine()

    def _frontend_broke(self) -> None:
        self._is_frontend_broken = self._is_engine_left = True
        self.on_broken("its frontend stopped processing outputs after an error")

    async def _forget_engine(self) -> None:
        """Have the host forget it; one that does not do that soon is stuck, or loads another."""
        forgetting = self._link.call(lambda number: Unload(number, self.alias, forget=True))
        try:
            with suppress(HotswapError):  # the first cause counts
                async with asyncio.timeout(FORGET_TIMEOUT_S):
                    await forgetting
        except TimeoutError:
            self._link.end(f"the engine host was stopped: it failed to unload {self.alias!r}")

    async def _unless_host_dies(self, asking: Coroutine[Any, Any, T]) -> T:
        """Wait for what asks the engine, and would wait for ever for one that has died."""
        task = asyncio.ensure_future(asking)
        self._died = asyncio.get_running_loop().create_future()
        deaths = (self._link.died, self._died)
        try:
            ends: list[asyncio.Future[Any]] = [task, *deaths]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineUnavailable(next(death.result() for death in deaths if death.done()))
            return await task
        finally:
            task.cancel()
            self._died = None

    async def _build_frontend(self, sockets: SocketPaths) -> None:
        config, args = self._launch.vllm_config, self._launch.args
        await async_failpoint("frontend.build", self.alias)
        # The constructor blocks until the engine's ready message, hence the thread.
        client = await _on_daemon_thread(lambda: frontend.make_client(config, sockets, args))
        self._client = client
        self._exits.callback(client.shutdown)
        pace = pace_tasks()
        read_in_turns(client.engine_core)
        scheduling = config.scheduler_config
        share = EngineShare(
            scheduling.max_num_seqs, scheduling.max_num_batched_tokens, time.monotonic
        )
        client.engine_core = StampedCore(self.alias, client.engine_core, pace, share)
        checks = grammars.Checks(
            FairPool(1, f"grammars of {self.alias}", SPARE_CHECKS),
            FairPool(
                REHEARSALS,
                f"rehearsals of {self.alias}",
                REHEARSALS,
                long_s=grammars.LONG_REHEARSAL_S,
            ),
            _helpers,
        )
        self._exits.callback(checks.shutdown)
        grammars.check_aside(client, checks)
        with adopting_frontend_metrics(self.alias):
            made = await frontend.make_frontend(client, args)
            app = made.app
            spread(client, app, pace)
            frontend.watch_outputs(client, self._frontend_broke)
            # Built now, so that its metrics are adopted; vLLM's SageMaker part may have done so.
            app.middleware_stack = app.middleware_stack or app.build_middleware_stack()
        await self._exits.enter_async_context(app.router.lifespan_context(app))
        self._adapter_target = AdapterTarget(client, app.state.openai_serving_models)
        self._frontend = replace(made, app=self._filtered(app))
        self._preview = None

    def _filtered(self, app: Any) -> ASGIApp:
        """The application behind what the configuration says of sampling."""
        sampling, args = self._launch.sampling, self._launch.args
        if sampling.is_empty:
            return app  # type: ignore[no-any-return]
        return SamplingFilter(app, sampling, frontend.request_keys(app, args))


def footprint_of(
    needs: ModelNeeds, device: Device, loaded: Loaded | None, has_copy: bool = False
) -> Footprint:
    """What a model holds in each residency: as its load has measured it, estimated before one.

    `has_copy`: its weights are in host memory, awake as well.
    """
    if device.reports_sleep_bytes:
        return _reported_footprint(needs, loaded, has_copy)
    kv = needs.kv_bytes or 0
    weights = needs.weights_bytes + needs.more_weights_bytes
    held = needs.held_bytes
    if loaded is not None and loaded.held_bytes > 0:
        # Files may be larger than what is made of them, or smaller.
        weights = loaded.weights_bytes or needs.weights_bytes
        held = max(loaded.held_bytes, weights) + needs.copies_bytes
    rest = max(held - weights, 0)
    usage = {Residency.PARKED: Usage(held + kv), Residency.COLD: Usage()}
    if 1 in device.sleep_levels:
        usage[Residency.ASLEEP] = Usage(held) if device.is_host_memory else Usage(rest, weights)
    if loaded.can_discard if loaded else 2 in device.sleep_levels:
        usage[Residency.DISCARDED] = Usage(rest)
    return Footprint(usage, Usage(held + kv + needs.reading_bytes))


def _reported_footprint(needs: ModelNeeds, loaded: Loaded | None, has_copy: bool) -> Footprint:
    """Of a model whose worker tells what its sleep gives back, and what it takes."""
    kv = needs.kv_bytes or 0
    held, residue = needs.held_bytes + kv, needs.residue_bytes
    copy = needs.held_bytes - residue
    if loaded is not None and loaded.sleep_bytes > 0:
        # Another process that has given memory back during the load makes it look small.
        held = max(loaded.held_bytes + kv, loaded.sleep_bytes)
        residue, copy = held - loaded.sleep_bytes, loaded.copy_bytes
    parked = Usage(held, copy if has_copy else 0)
    usage = {
        Residency.PARKED: parked,
        Residency.ASLEEP: Usage(residue, copy),
        Residency.COLD: Usage(),
    }
    return Footprint(usage, parked + Usage(needs.reading_bytes))


async def _on_daemon_thread(make: Callable[[], T]) -> T:
    """The result of `make`, on a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = make()
        except BaseException as raised:  # noqa: BLE001  # handed on to whoever waits
            error = raised
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, daemon=True, name="frontend").start()
    return await future


class VllmHost:
    """The engine host process and the engines of all configured models."""

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
            engine.give_memory(needs[engine.alias])

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
