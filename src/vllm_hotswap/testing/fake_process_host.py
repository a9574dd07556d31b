"""What an engine host without vLLM does: `testing.fake_process_main` is its process.

It is started, asked, watched, stopped and killed like the real one, and steps with the same loop on
a thread of the same kind; only that its engines make a token by waiting for a while.
`testing.fake_process` is its other end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vllm_hotswap.errors import HotswapError, one_line
from vllm_hotswap.failpoints import failpoint
from vllm_hotswap.host import (
    Activate,
    CommandResult,
    EngineFailed,
    EngineLoop,
    GiveUpWake,
    Load,
    LoadStage,
    Ping,
    Sleep,
    Unload,
    Wake,
    WakeSlice,
)


@dataclass(frozen=True, slots=True)
class Durations:
    """How long things take, in seconds. It travels where a real model's configuration does."""

    load_s: float = 0.0
    token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Ask:
    """Generate `tokens` tokens, one in each step. Answer: None, before the first of them."""

    id: int
    alias: str
    request: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Generate no more for a request. Answer: None."""

    id: int
    alias: str
    request: int


@dataclass(frozen=True, slots=True)
class Token:
    """One more token of a request, stamped like every output of an engine."""

    request: int
    stamp: str


class SteppedFake:
    """An engine: a number of tokens to be made for each request."""

    def __init__(self, send: Callable[[object], None]) -> None:
        self._send = send
        self._left: dict[int, int] = {}
        self.durations: Durations | None = None
        """None while it is not loaded."""
        self.is_asleep = False
        self.stamp = ""

    def ask(self, request: int, tokens: int) -> None:
        self._left[request] = tokens

    def drop(self, request: int) -> None:
        self._left.pop(request, None)

    def has_input(self) -> bool:
        return False

    def take_input(self) -> None:
        raise AssertionError("requests come as commands")

    def has_work(self) -> bool:
        return self.durations is not None and not self.is_asleep and bool(self._left)

    def run_step(self) -> None:
        assert self.durations is not None
        time.sleep(self.durations.token_s)
        for request in list(self._left):
            self._send(Token(request, self.stamp))
            self._left[request] -= 1
            if not self._left[request]:
                del self._left[request]

    def die(self) -> None:
        self.durations = None
        self._left.clear()


class FakeCommandHandler:
    """What is done for each command, on the compute thread."""

    def __init__(self, send: Callable[[object], None]) -> None:
        self._channel_send = send
        self._send_lock = threading.Lock()
        self._loads: dict[str, int] = {}
        self._engines: dict[str, SteppedFake] = {}
        self.loop = EngineLoop(self._engine_failed)

    def prepare(self) -> None:
        """There is nothing to import."""

    def submit(self, command: Any) -> None:
        if isinstance(command, Ping):
            self._send(CommandResult(command.id, result=self.loop.step_s))
        else:
            self.loop.submit(lambda: self._answer(command))

    def _answer(self, command: Any) -> None:
        try:
            self._execute(command)
            self._send(CommandResult(command.id))
        except HotswapError as error:
            self._send(CommandResult(command.id, error=error.message))
        except Exception as error:  # noqa: BLE001  # told as the real host tells it
            self._send(CommandResult(command.id, error=one_line(error)))

    def _execute(self, command: Any) -> None:
        match command:
            case Load(alias=alias, number=number, vllm_config=durations):
                failpoint("host.load", alias)
                self._load(alias, number, durations)
            case Activate(alias=alias, stamp=stamp):
                failpoint("host.activate", alias)
                self._loaded(alias).stamp = stamp
                self.loop.activate(alias)
            case Sleep(alias=alias):
                failpoint("host.sleep", alias)
                self.loop.park(alias)
                self._loaded(alias).is_asleep = True
            case Wake(alias=alias):
                failpoint("host.wake", alias)
                self._loaded(alias).is_asleep = False
            case WakeSlice(alias=alias):
                failpoint("host.wake_slice", alias)
                self._loaded(alias)
            case GiveUpWake(alias=alias):
                self._loaded(alias)
            case Unload(alias=alias):
                failpoint("host.unload", alias)
                self.loop.park(alias)
                self._engine(alias).die()
            case Ask(alias=alias, request=request, tokens=tokens):
                self._loaded(alias).ask(request, tokens)
            case Drop(alias=alias, request=request):
                self._engine(alias).drop(request)
            case _:
                raise TypeError(f"unknown command {command!r}")

    def _load(self, alias: str, number: int, durations: Durations) -> None:
        self._loads[alias] = number
        for stage in ("weights", "kv_cache", "warm_up"):
            self._send(LoadStage(alias, stage))
            failpoint(f"host.load.{stage}", alias)
            time.sleep(durations.load_s / 3)
        engine = self._engine(alias)
        engine.durations, engine.is_asleep = durations, False
        self.loop.add(alias, engine)

    def _engine(self, alias: str) -> SteppedFake:
        return self._engines.setdefault(alias, SteppedFake(self._send))

    def _loaded(self, alias: str) -> SteppedFake:
        engine = self._engine(alias)
        if engine.durations is None:
            raise HotswapError(f"engine {alias!r} is not loaded")
        return engine

    def _engine_failed(self, alias: str, error: Exception) -> None:
        self._send(EngineFailed(alias, self._loads[alias], one_line(error)))

    def _send(self, message: object) -> None:
        with self._send_lock, suppress(OSError):
            self._channel_send(message)
