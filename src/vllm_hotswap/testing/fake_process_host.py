"""What an engine host without vLLM does: `testing.fake_process_main` is its process.

It is started, asked, watched, stopped and killed like the real one, and steps with the same loop on
a thread of the same kind; only that its engines make a token by waiting for a while.
`testing.fake_process` is its other end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_hotswap.errors import HotswapError
from vllm_hotswap.failpoints import failpoint
from vllm_hotswap.host import (
    Activate,
    CommandHandler,
    GiveUpWake,
    Load,
    LoadStage,
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


class FakeCommandHandler(CommandHandler):
    """Carries out commands with engines that make tokens.

    The mutable state is `_engines`, which are made when they are first named, on the compute
    thread.
    """

    def __init__(self, send: Callable[[object], None]) -> None:
        super().__init__(send, when_idle=lambda: None)
        self._engines: dict[str, SteppedFake] = {}

    def execute(self, command: Any) -> None:
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
        self.note_load(alias, number)
        for stage in ("weights", "kv_cache", "warm_up"):
            self.send(LoadStage(alias, stage))
            failpoint(f"host.load.{stage}", alias)
            time.sleep(durations.load_s / 3)
        engine = self._engine(alias)
        engine.durations, engine.is_asleep = durations, False
        self.loop.add(alias, engine)

    def _engine(self, alias: str) -> SteppedFake:
        return self._engines.setdefault(alias, SteppedFake(self.send))

    def _loaded(self, alias: str) -> SteppedFake:
        engine = self._engine(alias)
        if engine.durations is None:
            raise HotswapError(f"engine {alias!r} is not loaded")
        return engine
