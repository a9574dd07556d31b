"""Complete engines without vLLM: for tests, and for working on the server without a model.

A fake engine answers the routes of its tasks (`fake_frontend`). Like a real one it accepts requests
while it is parked and only answers them while it is stepped; a request that is running when its
engine is parked freezes and goes on later. Its answers name the alias and are the same every time.

Tests drive it: `hold` and `release` gate an operation, `fail_next` makes it fail, `kill` ends the
host or one engine, `hang` has nothing go on any more, `corrupt` spoils what an engine generates;
witnesses (`operations`, `verified`, `stepped_while_parked`, `most_held_bytes`) tell what happened.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from starlette.applications import Starlette
from starlette.routing import BaseRoute

from vllm_hotswap.engines import make_stamp
from vllm_hotswap.errors import (
    ConfigError,
    EngineUnavailable,
    HotswapError,
    NoRoom,
    VerifyFailed,
    WrongStamp,
)
from vllm_hotswap.launch import read_adapter
from vllm_hotswap.models import (
    Adapter,
    EngineFailure,
    EngineMemory,
    Footprint,
    ForeseenRoutes,
    HostStats,
    ModelRoutes,
    Previewed,
    Progress,
    Pulse,
    Usage,
    current_lease,
)
from vllm_hotswap.states import Residency, WakeProgress
from vllm_hotswap.testing.fake_frontend import TASKS, WORDS, FakeFrontend, Manners, Task
from vllm_hotswap.testing.fake_responses import FakeResponses

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


@dataclass(eq=False)
class FakeEngine:
    """One model's fake engine and frontend."""

    alias: str
    host: FakeHost
    settings: FakeSettings = field(default_factory=FakeSettings)
    missing_files: bool = False
    broken_tokenizer: bool = False
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.level: int | None = None
        """0: loaded, 1 or 2: asleep at that level, None: not loaded."""
        self.has_frontend = False
        self.is_left = False
        """Whether it is loaded behind a frontend that has broken."""
        self.loads = 0
        self.canary = "canary"
        """What it generates to be verified; that of the first load is remembered."""
        self.stamp = (self.alias, 0)
        """Alias and epoch of its outputs."""
        self._first_canary: str | None = None
        self.prefetched = 0
        self.slices_done = 0
        """Of a wake before it is asked for."""
        self.aborted = 0
        self._released: set[str] = set()
        self.served = 0
        self.adapters: dict[str, Adapter] = {}
        self._stepped = asyncio.Event()
        self._frontend = FakeFrontend(self, self.settings.tasks, self.settings.manners)
        self._routes = ModelRoutes.of(self.settings.tasks, self._frontend.app.routes)

    def __repr__(self) -> str:
        return f"<FakeEngine {self.alias} loaded={self.is_loaded} stepped={self._stepped.is_set()}>"

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
        return EngineMemory(self.settings.weights_bytes, self.settings.kv_bytes)

    @property
    def footprint(self) -> Footprint:
        weights, kv = self.settings.weights_bytes, self.settings.kv_bytes
        usage = {Residency.PARKED: Usage(weights + kv), Residency.COLD: Usage()}
        if 1 in self.settings.levels:
            residue = self.settings.residue_bytes
            asleep = Usage(residue, weights) if self.settings.offloads else Usage(weights)
            usage[Residency.ASLEEP] = asleep
        if 2 in self.settings.levels:
            usage[Residency.DISCARDED] = Usage()
        return Footprint(usage, Usage(weights + kv))

    @property
    def held_bytes(self) -> int:
        """What it holds now."""
        weights, kv = self.settings.weights_bytes, self.settings.kv_bytes
        asleep = self.settings.residue_bytes if self.settings.offloads else weights
        held = {0: weights + kv, 1: asleep}.get(-1 if self.level is None else self.level, 0)
        return held + self._wake_progress.done_bytes

    @property
    def _wake_progress(self) -> WakeProgress:
        if self.level != 1 or not self.settings.slices:
            return WakeProgress(0, 0)
        usage = self.footprint.usage
        total = usage[Residency.PARKED].device - usage[Residency.ASLEEP].device
        return WakeProgress(total * self.slices_done // self.settings.slices, total)

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
        self.level = 0
        self.host.check_budget()

    async def activate(self, epoch: int, canary_first: bool = False) -> None:
        await self.host.operate("activate", self.alias, self.settings.activate_s)
        if not self.is_loaded:
            raise HotswapError(f"engine {self.alias!r} is not loaded")
        self.stamp = (self.alias, epoch)
        self.host.step_only(self)

    async def verify(self) -> None:
        await self.host.operate("verify", self.alias, 0)
        self._first_canary = self._first_canary or self.canary
        if self.canary != self._first_canary:
            raise VerifyFailed(self.alias, f"the canary is {self.canary!r}")

    def release(self, requests: Collection[str]) -> None:
        self.aborted += len(requests)
        self._released.update(requests)

    async def sleep(self, level: int) -> None:
        await self.host.operate("sleep", self.alias, self.settings.sleep_s)
        self._leave_memory(level)

    async def wake(self) -> None:
        left = 1 - self.slices_done / self.settings.slices if self.settings.slices else 1
        try:
            await self.host.operate("wake", self.alias, self.settings.wake_s * left)
        except NoRoom:
            self.slices_done = 0
            raise
        except HotswapError:
            self.level, self.slices_done = None, 0
            raise
        self.level, self.slices_done = 0, 0
        self.host.check_budget()

    @property
    def wakes_in_slices(self) -> bool:
        return self.settings.slices > 0

    async def wake_some(self) -> WakeProgress:
        duration_s = self.settings.wake_s / max(1, self.settings.slices)
        try:
            await self.host.operate("wake_some", self.alias, duration_s)
        except HotswapError:
            self.slices_done = 0
            raise
        if self.level == 1:
            self.slices_done = min(self.slices_done + 1, self.settings.slices)
            self.host.check_budget()
        return self._wake_progress

    async def give_up_wake(self) -> None:
        await self.host.operate("give_up_wake", self.alias, 0)
        self.slices_done = 0

    async def unload(self) -> None:
        await self.host.operate("unload", self.alias, self.settings.unload_s)
        self._leave_memory(None)

    async def clean_up(self) -> None:
        if self.is_left:
            await self.host.operate("clean_up", self.alias, self.settings.unload_s)
            self.is_left = self.has_frontend = False
            self._leave_memory(None)

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

    def _leave_memory(self, level: int | None) -> None:
        if self.is_stepped:
            self.set_stepped(False)
        self.level, self.slices_done = level, 0

    # --- the engine ---------------------------------------------------------------------

    async def tokens(self, max_tokens: int, name: str | None = None) -> AsyncIterator[str]:
        """The words of an answer, as `name`; each one waits until the engine is stepped."""
        lease, request_id = current_lease.get(), f"fake-{next(self.host.request_ids)}"
        if lease is not None:
            lease.requests.add(request_id)
            if lease.wait_for_turn is not None:
                await lease.wait_for_turn(max_tokens)
        try:
            for number in range(max_tokens):
                await self._stepped.wait()
                if self.settings.token_s:
                    await asyncio.sleep(self.settings.token_s)
                    await self._stepped.wait()  # parked meanwhile, it goes on later
                await self.host.gate("step", self.alias)
                self.host.check_stepped(self)
                self._check_stamp()
                if lease is not None:
                    lease.output_tokens += 1
                yield WORDS[number % len(WORDS)].format(alias=name or self.alias)
            self.served += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += request_id not in self._released
            raise
        finally:
            self._released.discard(request_id)
            if lease is not None:
                lease.requests.discard(request_id)

    def _check_stamp(self) -> None:
        """As the real frontend does for every output."""
        lease = current_lease.get()
        if lease is not None and not lease.accepts_stamp(*self.stamp):
            lease.end(WrongStamp(lease.alias, make_stamp(*self.stamp)))
            raise asyncio.CancelledError

    def set_stepped(self, stepped: bool) -> None:
        if stepped:
            self._stepped.set()
        else:
            self._stepped.clear()

    @property
    def is_stepped(self) -> bool:
        return self._stepped.is_set()

    # --- the frontend -------------------------------------------------------------------

    def add_route(self, route: BaseRoute) -> None:
        """Have the application answer one more route."""
        self._frontend.app.router.routes.append(route)
        self._routes = ModelRoutes.of(self.settings.tasks, self._frontend.app.routes)

    def knows(self, name: str) -> bool:
        return name in (self.alias, *self.aliases, *self.adapters)

    def is_adapter(self, name: str) -> bool:
        return name in self.adapters


class FakeHost:
    """Holds fake engines; steps the active one."""

    engine_type: type[FakeEngine] = FakeEngine
    is_fake = True

    def __init__(
        self,
        aliases: tuple[str, ...],
        settings: Mapping[str, FakeSettings] | None = None,
        budget: Usage = UNLIMITED,
        further: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """`further` are names that clients may send besides an alias."""
        settings, further = settings or {}, further or {}
        self.budget = self._whole_budget = budget
        self.base_bytes = 0
        self.is_device_shared = False
        """Whether it looks at what others hold."""
        self.others_bytes = 0
        self.taken_bytes = 0
        """What others hold of the device; seen when it is looked at."""
        self._engines = {
            alias: self.engine_type(
                alias, self, settings.get(alias, FakeSettings()), aliases=further.get(alias, ())
            )
            for alias in aliases
        }
        self.adapter_ids = itertools.count(1)
        self.request_ids = itertools.count(1)
        self._died: asyncio.Future[str] | None = None
        self._gates: dict[tuple[str, str], asyncio.Event] = {}
        self._failures: dict[tuple[str, str], list[HotswapError]] = defaultdict(list)
        self._callbacks: list[EngineFailure] = []
        self._answers = asyncio.Event()
        self._answers.set()
        self.restarts = 0
        self.operations: list[tuple[str, str]] = []
        """What engines were told to do, but for canaries."""
        self.verified: list[str] = []
        self.stepped_while_parked = 0
        self.operated_for_a_request = 0
        """What an engine is told to do is no part of a request, whoever has caused it."""
        self.most_held_bytes = 0
        self.is_running = False
        self.step_s = 0.0
        """How long the step under way has taken, as `ping` tells it."""

    def __repr__(self) -> str:
        stepped = [engine.alias for engine in self._engines.values() if engine.is_stepped]
        return f"<FakeHost engines={list(self._engines)} stepped={stepped}>"

    @property
    def engines(self) -> Mapping[str, FakeEngine]:
        return self._engines

    @property
    def died(self) -> asyncio.Future[str]:
        if self._died is None:
            self._died = asyncio.get_running_loop().create_future()
        return self._died

    async def start(self) -> None:
        self.is_running = True

    async def stop(self) -> None:
        self.is_running = False

    def stats(self) -> HostStats:
        return HostStats(os.getpid(), sum(e.held_bytes for e in self._engines.values()))

    def on_engine_failed(self, callback: EngineFailure) -> None:
        self._callbacks.append(callback)

    async def measure_device(self, used_bytes: int) -> None:
        if self._answers.is_set() and self.died.done():
            raise EngineUnavailable(self.died.result())
        self.others_bytes = self.taken_bytes
        self.budget = replace(
            self._whole_budget, device=self._whole_budget.device - self.others_bytes
        )

    async def restart(self) -> None:
        self.restarts += 1
        self._died = asyncio.get_running_loop().create_future()
        await self.operate("restart", "", 0)

    async def ping(self) -> Pulse:
        died = self.died
        await self._answers.wait()
        if died.done():
            raise EngineUnavailable(died.result())
        return Pulse(self.step_s)

    # --- what engines do through it ---------------------------------------------------------

    async def operate(self, operation: str, alias: str, duration_s: float) -> None:
        died = self.died
        self.operated_for_a_request += current_lease.get() is not None
        if operation == "verify":
            self.verified.append(alias)
        else:
            self.operations.append((operation, alias))
        if duration_s:
            await asyncio.wait([died], timeout=duration_s)
        await self.gate(operation, alias)
        if not self._answers.is_set():
            await self._answers.wait()
        if died.done():
            raise EngineUnavailable(died.result())
        if failures := self._failures[operation, alias]:
            raise failures.pop(0)

    async def gate(self, operation: str, alias: str) -> None:
        if gate := self._gates.get((operation, alias)):
            await gate.wait()

    def step_only(self, active: FakeEngine) -> None:
        for engine in self._engines.values():
            engine.set_stepped(engine is active)

    def check_stepped(self, engine: FakeEngine) -> None:
        if not engine.is_stepped:
            self.stepped_while_parked += 1

    def check_budget(self) -> None:
        """Note the most that all engines have ever held."""
        self.most_held_bytes = max(self.most_held_bytes, self.stats().used_bytes)

    # --- what tests do ------------------------------------------------------------------------

    def hold(self, operation: str, alias: str) -> None:
        """Have `load`, `activate`, `sleep`, `step` ... of the alias wait for `release`."""
        self._gates[operation, alias] = asyncio.Event()

    def release(self, operation: str, alias: str) -> None:
        self._gates.pop((operation, alias)).set()

    def fail_next(self, operation: str, alias: str, error: HotswapError | None = None) -> None:
        """Have the next `load`, `wake`, `activate` ... of the alias fail."""
        failure = error or HotswapError(f"{operation} of {alias!r} was made to fail")
        self._failures[operation, alias].append(failure)

    def kill(self, why: str = "the engine host was killed by signal 9") -> None:
        """End the host as a signal would: nothing is stepped, and what is asked of it fails."""
        for engine in self._engines.values():
            engine.set_stepped(False)
            engine.level, engine.slices_done = None, 0
            engine.is_left = False
        for (operation, _), gate in self._gates.items():
            if operation not in ("step", "restart"):
                gate.set()
        self._answers.set()
        self.step_s = 0.0
        if not self.died.done():
            self.died.set_result(why)

    def kill_engine(self, alias: str, cause: str = "RuntimeError: step failed") -> None:
        """End one engine as an exception in its step would."""
        engine = self._engines[alias]
        engine.set_stepped(False)
        engine.level, engine.slices_done = None, 0
        for callback in self._callbacks:
            callback(alias, cause, engine.loads)

    def break_frontend(self, alias: str, cause: str = "its frontend is broken") -> None:
        """Have what one engine generates reach nobody; it stays where it is, and is stepped."""
        engine = self._engines[alias]
        engine.is_left = True
        for callback in self._callbacks:
            callback(alias, cause, engine.loads)

    def hang(self) -> None:
        """Do nothing and answer nothing any more, until it is killed."""
        for engine in self._engines.values():
            engine.set_stepped(False)
        self._answers.clear()

    def corrupt(self, alias: str) -> None:
        """Have an engine generate something else from now on."""
        self._engines[alias].canary = "corrupt"
