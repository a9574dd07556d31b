"""Fake engines in a process of their own: what can be killed, stopped and hung in earnest.

The frontends are those of `testing.fake_engine`. Behind them is an engine host process without vLLM
(`testing.fake_process_host`), started and talked to by the real link. So everything between the
coordinator and the loop that steps is as it will be, and a fault takes milliseconds.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from vllm_hotswap.engines import HostLink, make_stamp, read_stamp
from vllm_hotswap.errors import EngineUnavailable
from vllm_hotswap.host import (
    Activate,
    EngineFailed,
    GiveUpWake,
    Load,
    Message,
    Ping,
    Sleep,
    SocketPaths,
    Unload,
    Wake,
    WakeSlice,
)
from vllm_hotswap.models import HostStats, Pulse, Usage
from vllm_hotswap.testing.fake_engine import FakeEngine
from vllm_hotswap.testing.fake_host import FakeHost
from vllm_hotswap.testing.fake_process_host import Ask, Drop, Durations, Token
from vllm_hotswap.testing.fake_settings import UNLIMITED, FakeSettings
from vllm_hotswap.testing.fake_steps import FakeSteps, word

MODULE = "vllm_hotswap.testing.fake_process_main"

NO_SOCKETS = SocketPaths("", "")
"""Tokens come over the control channel."""


class ProcessEngine(FakeEngine):
    """One model's frontend here and engine there."""

    host: FakeProcessHost

    async def activate(self, epoch: int, canary_first: bool = False) -> None:
        stamp = make_stamp(self.alias, epoch)
        await self.host.send_command(lambda number: Activate(number, self.alias, stamp))
        self.host.step_only(self)

    async def verify(self) -> None:
        """Have it make one token, like the real one."""
        async for _ in self.tokens(1):
            pass

    def _make_steps(self) -> ProcessSteps:
        return ProcessSteps(self.alias, self.host)


class ProcessSteps(FakeSteps):
    """The requests of one model whose engine is in the other process."""

    def __init__(self, alias: str, host: FakeProcessHost) -> None:
        super().__init__(alias, 0, host.request_ids, _nothing)
        self._host = host

    async def tokens(self, max_tokens: int, name: str) -> AsyncIterator[str]:
        try:
            async with self._host.request(self._alias, max_tokens) as stamps:
                for number in range(max_tokens):
                    self.stamp = read_stamp(await stamps.next())
                    self.check_stamp()
                    yield word(number, name)
            self.served += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise


async def _nothing() -> None:
    """The other process makes tokens, and takes the time for them."""


class Stamps:
    """The tokens of one request as they come: their stamps."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self._came: asyncio.Queue[str | EngineUnavailable] = asyncio.Queue()

    async def next(self) -> str:
        came = await self._came.get()
        if isinstance(came, EngineUnavailable):
            raise came
        return came

    def put(self, stamp: str | EngineUnavailable) -> None:
        self._came.put_nowait(stamp)


class FakeProcessHost(FakeHost):
    """An engine host process without vLLM."""

    engine_type = ProcessEngine

    def __init__(
        self,
        aliases: tuple[str, ...],
        settings: Mapping[str, FakeSettings] | None = None,
        budget: Usage = UNLIMITED,
    ) -> None:
        super().__init__(aliases, settings, budget)
        self._link = HostLink(MODULE)
        self._requests = itertools.count(1)
        self._background: set[asyncio.Task[None]] = set()
        self._open: dict[int, Stamps] = {}

    @property
    def died(self) -> asyncio.Future[str]:
        return self._link.died

    @property
    def pid(self) -> int:
        return self._link.pid

    async def start(self) -> None:
        self._link.spawn()
        self._link.watch(self._receive)
        self._link.died.add_done_callback(self._host_died)
        await self._link.ready()

    async def stop(self) -> None:
        await self._link.stop()

    async def restart(self) -> None:
        self.restarts += 1
        await self.start()

    def kill(self, why: str = "the engine host was killed by signal 9") -> None:
        self._link.end(why)

    async def ping(self) -> Pulse:
        return Pulse(await self._link.call(Ping))

    def stats(self) -> HostStats:
        return HostStats(self.pid, super().stats().used_bytes)

    async def operate(self, operation: str, alias: str, duration_s: float) -> None:
        """Have the other process do what there is a command for."""
        self.operations.append((operation, alias))
        engine = self.engines[alias]
        durations = Durations(engine.settings.load_s, engine.settings.token_s)
        commands: dict[str, Callable[[int], Any]] = {
            "load": lambda number: Load(number, alias, engine.loads, durations, False, NO_SOCKETS),
            "sleep": lambda number: Sleep(number, alias, 1),
            "wake": lambda number: Wake(number, alias),
            "wake_some": lambda number: WakeSlice(number, alias),
            "give_up_wake": lambda number: GiveUpWake(number, alias),
            "unload": lambda number: Unload(number, alias),
        }
        if operation in commands:
            await self.send_command(commands[operation])

    @asynccontextmanager
    async def request(self, alias: str, tokens: int) -> AsyncIterator[Stamps]:
        """A request in the engine, as long as the context lasts."""
        request = next(self._requests)
        self._open[request] = stamps = Stamps(alias)
        try:
            await self.send_command(lambda number: Ask(number, alias, request, tokens))
            yield stamps
        finally:
            del self._open[request]
            self._in_background(self.send_command(lambda number: Drop(number, alias, request)))

    async def send_command(self, make: Callable[[int], Any]) -> None:
        """Have a command obeyed. Raises as `HostLink.call` does."""
        await self._link.call(make)

    def _in_background(self, telling: Coroutine[Any, Any, None]) -> None:
        """Tell what a dead host has done already, without waiting for it."""

        async def send_command() -> None:
            with suppress(EngineUnavailable):
                await telling

        task = asyncio.create_task(send_command())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _receive(self, message: Message | Token) -> None:
        match message:
            case Token(request=request, stamp=stamp):
                if request in self._open:
                    self._open[request].put(stamp)
            case EngineFailed(alias=alias, load=load, cause=cause):
                self.engines[alias].leave_memory(None)
                self.report_failure(alias, cause, load)
                self._fail(EngineUnavailable(cause), alias)

    def _host_died(self, died: asyncio.Future[str]) -> None:
        for engine in self.engines.values():
            engine.leave_memory(None)
        if not died.cancelled():
            self._fail(EngineUnavailable(died.result()))

    def _fail(self, error: EngineUnavailable, alias: str | None = None) -> None:
        for request in self._open.values():
            if alias in (None, request.alias):
                request.put(error)
