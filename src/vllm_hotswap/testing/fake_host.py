"""A complete engine host without vLLM: fake engines in this process.

Tests drive it: `hold` and `release` gate an operation, `fail_next` makes it fail, `kill` ends the
host or one engine, `hang` has nothing go on any more, `corrupt` spoils what an engine generates;
witnesses (`operations`, `verified`, `stepped_while_parked`, `most_held_bytes`) tell what happened.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Mapping
from dataclasses import replace

from vllm_hotswap.errors import EngineUnavailable, HotswapError
from vllm_hotswap.models import EngineFailure, HostStats, Pulse, Usage, current_lease
from vllm_hotswap.testing.fake_engine import FakeEngine
from vllm_hotswap.testing.fake_gates import Gates
from vllm_hotswap.testing.fake_settings import UNLIMITED, FakeSettings


class FakeHost:
    """Holds fake engines; steps the active one.

    The mutable state: `_died` and `_answers` say whether it lives and answers, and are changed by
    `kill`, `hang` and `restart`. `budget` and `others_bytes` are as the device was last looked at.
    Witnesses are counted by `operate`, `check_stepped` and `check_budget`. Tests set
    `taken_bytes`, `step_s` and `is_device_shared`.
    """

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
        self.adapter_ids = itertools.count(1)
        self.request_ids = itertools.count(1)
        self._engines = {
            alias: self.engine_type(
                alias, self, settings.get(alias, FakeSettings()), aliases=further.get(alias, ())
            )
            for alias in aliases
        }
        self._died: asyncio.Future[str] | None = None
        self._gates = Gates()
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

    def report_failure(self, alias: str, cause: str, load: int) -> None:
        """Tell everyone who asked that the engine of a load has failed."""
        for callback in self._callbacks:
            callback(alias, cause, load)

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
        self._gates.check(operation, alias)

    async def gate(self, operation: str, alias: str) -> None:
        await self._gates.wait(operation, alias)

    def step_only(self, active: FakeEngine) -> None:
        for engine in self._engines.values():
            engine.set_stepped(engine is active)

    def check_stepped(self, engine: FakeEngine) -> None:
        if not engine.is_stepped:
            self.stepped_while_parked += 1

    def check_budget(self) -> None:
        """Note the most that all engines have ever held."""
        self.most_held_bytes = max(self.most_held_bytes, self.stats().used_bytes)

    def hold(self, operation: str, alias: str) -> None:
        """Have `load`, `activate`, `sleep`, `step` ... of the alias wait for `release`."""
        self._gates.hold(operation, alias)

    def release(self, operation: str, alias: str) -> None:
        self._gates.release(operation, alias)

    def fail_next(self, operation: str, alias: str, error: HotswapError | None = None) -> None:
        """Have the next `load`, `wake`, `activate` ... of the alias fail."""
        self._gates.fail_next(operation, alias, error)

    def kill(self, why: str = "the engine host was killed by signal 9") -> None:
        """End the host as a signal would: nothing is stepped, and what is asked of it fails."""
        for engine in self._engines.values():
            engine.leave_memory(None)
            engine.is_left = False
        self._gates.open_all(but=("step", "restart"))
        self._answers.set()
        self.step_s = 0.0
        if not self.died.done():
            self.died.set_result(why)

    def kill_engine(self, alias: str, cause: str = "RuntimeError: step failed") -> None:
        """End one engine as an exception in its step would."""
        engine = self._engines[alias]
        engine.leave_memory(None)
        self.report_failure(alias, cause, engine.loads)

    def break_frontend(self, alias: str, cause: str = "its frontend is broken") -> None:
        """Have what one engine generates reach nobody; it stays where it is, and is stepped."""
        engine = self._engines[alias]
        engine.is_left = True
        self.report_failure(alias, cause, engine.loads)

    def hang(self) -> None:
        """Do nothing and answer nothing any more, until it is killed."""
        for engine in self._engines.values():
            engine.set_stepped(False)
        self._answers.clear()

    def corrupt(self, alias: str) -> None:
        """Have an engine generate something else from now on."""
        self._engines[alias].canary = "corrupt"
