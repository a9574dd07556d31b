"""A complete engine without vLLM: for tests, and for working on the server without a model.

A fake engine answers the routes of its tasks (`fake_frontend`). Like a real one it accepts requests
while it is parked and only answers them while it is stepped; a request that is running when its
engine is parked freezes and goes on later. Its answers name the alias and are the same every time.
`fake_host` holds it, and makes it fail.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from starlette.applications import Starlette
from starlette.routing import BaseRoute

from vllm_hotswap.errors import (
    ConfigError,
    EngineUnavailable,
    HotswapError,
    NoRoom,
    VerifyFailed,
)
from vllm_hotswap.launch import read_adapter
from vllm_hotswap.models import (
    Adapter,
    EngineMemory,
    Footprint,
    ForeseenRoutes,
    ModelRoutes,
    Previewed,
    Progress,
)
from vllm_hotswap.states import WakeProgress
from vllm_hotswap.testing.fake_frontend import TASKS, FakeFrontend, Task
from vllm_hotswap.testing.fake_memory import FakeMemory
from vllm_hotswap.testing.fake_responses import FakeResponses
from vllm_hotswap.testing.fake_settings import MAX_RANK, FakeSettings
from vllm_hotswap.testing.fake_steps import FakeSteps


class Operations(Protocol):
    """What an engine needs of the host that it is in."""

    @property
    def adapter_ids(self) -> Iterator[int]: ...

    @property
    def request_ids(self) -> Iterator[int]: ...

    async def operate(self, operation: str, alias: str, duration_s: float) -> None:
        """Do what a test has prepared for the operation, and take `duration_s`.

        Raises:
            EngineUnavailable: the host is dead, or dies meanwhile.
            HotswapError: a test has made it fail.
        """

    async def gate(self, operation: str, alias: str) -> None:
        """Wait as long as a test holds the operation."""

    def step_only(self, active: FakeEngine) -> None:
        """Step this engine, and no other one."""

    def check_stepped(self, engine: FakeEngine) -> None:
        """Note an output of an engine that is not stepped."""

    def check_budget(self) -> None:
        """Note what all engines hold."""


@dataclass(eq=False)
class FakeEngine:
    """One model's fake engine and frontend.

    Parts: `place` is where its memory is, `steps` are its requests. The rest of its mutable state
    is what its loads leave (`has_frontend`, `loads`, the first canary, `prefetched`), `is_left`,
    which the host sets, `adapters`, and `canary`, which tests set.
    """

    alias: str
    host: Operations
    settings: FakeSettings = field(default_factory=FakeSettings)
    missing_files: bool = False
    broken_tokenizer: bool = False
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.place = FakeMemory(self.settings)
        self.has_frontend = False
        self.is_left = False
        """Whether it is loaded behind a frontend that has broken."""
        self.loads = 0
        self.canary = "canary"
        """What it generates to be verified; that of the first load is remembered."""
        self._first_canary: str | None = None
        self.prefetched = 0
        self.adapters: dict[str, Adapter] = {}
        self.steps = self._make_steps()
        self._frontend = FakeFrontend(self, self.settings.tasks, self.settings.manners)
        self._routes = ModelRoutes.of(self.settings.tasks, self._frontend.app.routes)

    def __repr__(self) -> str:
        return f"<FakeEngine {self.alias} loaded={self.is_loaded} stepped={self.is_stepped}>"

    def _make_steps(self) -> FakeSteps:
        token_s = self.settings.token_s
        return FakeSteps(self.alias, token_s, self.host.request_ids, self._before_token)

    async def _before_token(self) -> None:
        await self.host.gate("step", self.alias)
        self.host.check_stepped(self)

    @property
    def level(self) -> int | None:
        """0: loaded, 1 or 2: asleep at that level, None: not loaded."""
        return self.place.level

    @property
    def is_loaded(self) -> bool:
        return self.level == 0

    @property
    def app(self) -> Starlette:
        if not self.has_frontend:
            raise EngineUnavailable(f"model {self.alias!r} is not loaded")
        return self._frontend.app

    @property
    def routes(self) -> ModelRoutes | None:
        return self._routes if self.has_frontend else None

    @property
    def foreseen(self) -> ForeseenRoutes | None:
        if not self.settings.reports_tasks:
            return None
        own, every = self._paths_of(self.settings.tasks), self._paths_of(TASKS)
        return ForeseenRoutes(self.settings.tasks, every - own, own)

    @property
    def are_tools_strict(self) -> bool:
        return self.settings.are_tools_strict

    def _paths_of(self, tasks: Iterable[Task]) -> frozenset[str]:
        routes = [route for task in tasks for route in self._frontend.routes_of(task)]
        return frozenset(str(getattr(route, "path", "")) for route in routes)

    @property
    def responses(self) -> FakeResponses | None:
        has_them = self.has_frontend and "generate" in self.settings.tasks
        return self._frontend.responses if has_them else None

    @property
    def memory(self) -> EngineMemory:
        return self.place.planned

    @property
    def footprint(self) -> Footprint:
        return self.place.footprint

    @property
    def held_bytes(self) -> int:
        """What it holds now."""
        return self.place.held_bytes

    @property
    def card(self) -> Mapping[str, object]:
        root = self.settings.root or f"fake/{self.alias}"
        return {"root": root, "max_model_len": self.settings.max_model_len}

    def validate(self) -> None:
        if self.missing_files:
            raise ConfigError(
                f"model {self.alias!r}: the folder 'fake/{self.alias}' does not exist"
            )

    async def rehearse(self) -> None:
        if self.broken_tokenizer and not self.has_frontend:
            raise ConfigError(f"model {self.alias!r}: tokenizer: it cannot be read")

    async def preview(self, path: str, content_type: str, body: bytes) -> Previewed:
        if not path.startswith("/v1/"):
            return Previewed()
        refusal = self._frontend.refusal(json.loads(body))
        return Previewed(refusal, is_accepted=refusal is None)

    async def load(self, progress: Progress) -> None:
        await self.clean_up()
        self.loads += 1
        for stage in ("weights", "kv_cache", "warm_up"):
            progress(stage)
        await self.host.operate("load", self.alias, self.settings.load_s)
        if not self.has_frontend:
            progress("frontend")
            self.has_frontend = True
        self.place.move_to(0)
        self.host.check_budget()

    async def activate(self, epoch: int, canary_first: bool = False) -> None:
        await self.host.operate("activate", self.alias, self.settings.activate_s)
        if not self.is_loaded:
            raise HotswapError(f"engine {self.alias!r} is not loaded")
        self.steps.stamp = (self.alias, epoch)
        self.host.step_only(self)

    async def verify(self) -> None:
        await self.host.operate("verify", self.alias, 0)
        self._first_canary = self._first_canary or self.canary
        if self.canary != self._first_canary:
            raise VerifyFailed(self.alias, f"the canary is {self.canary!r}")

    def release(self, requests: Collection[str]) -> None:
        self.steps.release(requests)

    async def sleep(self, level: int) -> None:
        await self.host.operate("sleep", self.alias, self.settings.sleep_s)
        self.leave_memory(level)

    async def wake(self) -> None:
        duration_s = self.settings.wake_s * self.place.left_to_wake
        try:
            await self.host.operate("wake", self.alias, duration_s)
        except NoRoom:
            self.place.drop_slices()
            raise
        except HotswapError:
            self.place.move_to(None)
            raise
        self.place.move_to(0)
        self.host.check_budget()

    @property
    def wakes_in_slices(self) -> bool:
        return self.settings.slices > 0

    async def wake_some(self) -> WakeProgress:
        duration_s = self.settings.wake_s / max(1, self.settings.slices)
        try:
            await self.host.operate("wake_some", self.alias, duration_s)
        except HotswapError:
            self.place.drop_slices()
            raise
        if self.level == 1:
            self.place.wake_slice()
            self.host.check_budget()
        return self.place.wake_progress

    async def give_up_wake(self) -> None:
        await self.host.operate("give_up_wake", self.alias, 0)
        self.place.drop_slices()

    async def unload(self) -> None:
        await self.host.operate("unload", self.alias, self.settings.unload_s)
        self.leave_memory(None)

    async def clean_up(self) -> None:
        if self.is_left:
            await self.host.operate("clean_up", self.alias, self.settings.unload_s)
            self.is_left = self.has_frontend = False
            self.leave_memory(None)

    async def add_adapter(
        self, name: str, path: Path, is_3d: bool, now: bool, check: Callable[[], None]
    ) -> Adapter:
        files = read_adapter(name, path, {}, is_3d)
        if files.rank > MAX_RANK:
            raise ConfigError(f"adapter {name!r} has rank {files.rank}, the most is {MAX_RANK}")
        if now:
            try:
                await self.host.operate("add_adapter", self.alias, 0)
            except HotswapError as error:
                raise ConfigError(error.message) from error
        check()
        self.adapters[name] = adapter = Adapter(files, next(self.host.adapter_ids))
        return adapter

    def remove_adapter(self, name: str) -> None:
        del self.adapters[name]

    async def prefetch(self, limit_bytes: int, on_progress: Callable[[int], None]) -> int:
        size = min(limit_bytes, self.settings.weights_bytes)
        on_progress(size // 2)  # while it is held
        await self.host.operate("prefetch", self.alias, 0)
        on_progress(size)
        self.prefetched = size
        return size

    def leave_memory(self, level: int | None) -> None:
        """Step it no more, and have it asleep at `level`, or gone."""
        self.set_stepped(False)
        self.place.move_to(level)

    def tokens(self, max_tokens: int, name: str | None = None) -> AsyncIterator[str]:
        """The words of an answer, as `name`; each one waits until the engine is stepped."""
        return self.steps.tokens(max_tokens, name or self.alias)

    def set_stepped(self, stepped: bool) -> None:
        self.steps.set_stepped(stepped)

    @property
    def is_stepped(self) -> bool:
        return self.steps.is_stepped

    def add_route(self, route: BaseRoute) -> None:
        """Have the application answer one more route."""
        self._frontend.app.router.routes.append(route)
        self._routes = ModelRoutes.of(self.settings.tasks, self._frontend.app.routes)

    def knows(self, name: str) -> bool:
        return name in (self.alias, *self.aliases, *self.adapters)

    def is_adapter(self, name: str) -> bool:
        return name in self.adapters
