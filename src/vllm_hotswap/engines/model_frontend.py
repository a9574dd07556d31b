"""The life of one model's frontend: built after the first load, kept, replaced when it breaks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack, suppress
from typing import Any

from vllm_hotswap.engines import frontend, frontend_building
from vllm_hotswap.engines.adapters import AdapterTarget
from vllm_hotswap.engines.engine_waits import EngineWaits
from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.engines.vllm_metrics import forget_frontend_metrics
from vllm_hotswap.errors import ConfigError, EngineUnavailable, HotswapError, one_line
from vllm_hotswap.failpoints import async_failpoint
from vllm_hotswap.host import SocketPaths, Unload
from vllm_hotswap.launch import ModelLaunch
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap")

FORGET_TIMEOUT_S = 30.0
"""Seconds in which the host must forget an engine whose frontend could not be built."""


class ModelFrontend:
    """The frontend of one model, and the engine in the host that it is connected to.

    The mutable state: `made`, `client`, `adapter_target` and `_sockets` are set together by
    `connect` and dropped together when the frontend cannot be built or is given up; `_exits`
    closes what they hold. Three flags tell of mishaps:

    - `_is_engine_lost`: the engine it is connected to went with its host;
    - `_is_broken`: it reads no more outputs, so another one has to take its place;
    - `is_engine_left`: the engine of a broken frontend is in the host, of use to nobody.
    """

    def __init__(
        self,
        launch: ModelLaunch,
        link: HostLink,
        waits: EngineWaits,
        new_sockets: Callable[[], SocketPaths],
        one_at_a_time: asyncio.Lock,
        on_broken: Callable[[], None],
    ) -> None:
        self._launch = launch
        self._alias = launch.alias
        self._link = link
        self._waits = waits
        self._new_sockets = new_sockets
        self._one_at_a_time = one_at_a_time
        self._on_broken = on_broken
        self.made: frontend.Frontend | None = None
        self.client: Any = None
        """Kept to the end: vLLM leaves its ZeroMQ context open."""
        self.adapter_target: AdapterTarget | None = None
        self._sockets: SocketPaths | None = None
        self._exits = AsyncExitStack()
        self._is_engine_lost = False
        self._is_broken = False
        self.is_engine_left = False

    def __repr__(self) -> str:
        return f"<ModelFrontend {self._alias} is_made={self.is_made} is_broken={self._is_broken}>"

    @property
    def is_made(self) -> bool:
        return self.made is not None

    @property
    def tasks(self) -> Collection[str]:
        return self.made.routes.tasks if self.made else ()

    async def before_load(self) -> SocketPaths:
        """Return the sockets of the next load. A broken frontend is given up, with its engine."""
        if self._is_broken:
            await self._give_up()
        self._sockets = self._sockets or self._new_sockets()
        return self._sockets

    async def connect(self, sockets: SocketPaths, on_stage: Callable[[str], None]) -> None:
        """Be connected to the engine that was loaded; the first time, build the frontend.

        Raises:
            ConfigError: it could not be built, and the engine is forgotten.
            EngineUnavailable: the engine or its host died.
        """
        if self.made is None:
            on_stage("frontend")
            await self._add(sockets)
        elif self._is_engine_lost:
            await self._waits.until_answered(frontend.await_engine(self.client))
        self._is_engine_lost = False

    async def forget_left_engine(self) -> None:
        """Have the host forget the engine of a broken frontend. Raises `EngineUnavailable`."""
        self.is_engine_left = False
        try:
            await self._link.call(lambda number: Unload(number, self._alias, forget=True))
        except EngineUnavailable:
            raise
        except HotswapError as error:  # what it could take apart, it has
            alias = value_text(self._alias)
            log.warning("event=not_buried model=%s cause=%r", alias, one_line(error))

    async def host_died(self) -> None:
        """Forget the engine; the next one, in another host, says that it is ready."""
        self.is_engine_left = False
        if self.client is not None:
            await frontend.forget_engine(self.client)
            self._is_engine_lost = True

    async def close(self) -> None:
        """Give back sockets, threads and tasks."""
        await self._exits.aclose()

    async def _add(self, sockets: SocketPaths) -> None:
        """Build the frontend; if that fails, forget the engine, whose client is lost."""
        async with self._one_at_a_time:
            try:
                await self._waits.until_answered(self._build(sockets))
            except BaseException as error:
                self._sockets = self.client = None
                await self._exits.aclose()
                await self._forget_engine()
                if isinstance(error, Exception) and not isinstance(error, EngineUnavailable):
                    raise ConfigError(
                        f"the frontend of model {self._alias!r} could not be built: "
                        f"{one_line(error)}"
                    ) from error
                raise

    async def _build(self, sockets: SocketPaths) -> None:
        await async_failpoint("frontend.build", self._alias)
        # Set before anything else is built: if the host dies meanwhile, `host_died` needs it.
        self.client = client = await frontend_building.make_client(self._launch, sockets)
        self._exits.callback(client.shutdown)
        made, models = await frontend_building.build(self._launch, client, self._exits, self._broke)
        self.adapter_target = AdapterTarget(client, models)
        self.made = made

    async def _give_up(self) -> None:
        """Have the next load make another frontend, and another engine for it."""
        log.warning("event=frontend_given_up model=%s", value_text(self._alias))
        self.made = self.client = self.adapter_target = self._sockets = None
        self._is_broken = self._is_engine_lost = self.is_engine_left = False
        try:
            await self._exits.aclose()
        except Exception as error:  # noqa: BLE001  # it is broken, and goes all the same
            cause = one_line(error)
            log.warning("event=frontend_kept model=%s cause=%r", value_text(self._alias), cause)
        forget_frontend_metrics(self._alias)
        await self._forget_engine()

    def _broke(self) -> None:
        self._is_broken = self.is_engine_left = True
        self._on_broken()

    async def _forget_engine(self) -> None:
        """Have the host forget it; one that does not do that soon is stuck, or loads another."""
        forgetting = self._link.call(lambda number: Unload(number, self._alias, forget=True))
        try:
            with suppress(HotswapError):  # the first cause counts
                async with asyncio.timeout(FORGET_TIMEOUT_S):
                    await forgetting
        except TimeoutError:
            self._link.end(f"the engine host was stopped: it failed to unload {self._alias!r}")
