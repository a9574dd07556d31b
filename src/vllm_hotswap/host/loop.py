"""The engine host's one compute thread: which engine is stepped, and when.

Loading, stepping and everything else that touches torch happens on the thread that calls
`EngineLoop.run`: torch's default dtype, its OpenMP pools and vLLM's module globals are process
wide, so loading one model while another steps could give wrong numbers. Engines that are not
active are *serviced*: their messages (new requests, aborts, utility calls) are read, so that
their clients do not hang, but they are not stepped.

This module does not know vLLM: an engine is any object with the methods of `SteppedEngine`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NoReturn, Protocol

from vllm_hotswap.errors import forget_frames
from vllm_hotswap.failpoints import failpoint

IDLE_S = 1.0
"""After so many idle seconds, the loop calls `when_idle`, for work that may wait."""


class SteppedEngine(Protocol):
    """What the loop needs of an engine."""

    def has_input(self) -> bool:
        """Whether messages wait to be read. May be called from the compute thread only."""

    def take_input(self) -> None:
        """Read every waiting message, without blocking and without stepping."""

    def has_work(self) -> bool:
        """Whether a step would do something."""

    def run_step(self) -> None:
        """Run one step and send its outputs."""

    def die(self) -> None:
        """Give up everything of the model, which has failed; read messages as before."""


class EngineLoop:
    """Steps the active engine, services the others, runs commands between two steps.

    The mutable state is `_engines`, `_active` (both touched by the compute thread only),
    `_commands` (a thread-safe deque that other threads append to), when the step under way began,
    and the doorbell. A thread that leaves work for the loop rings it *after* leaving the work.
    `when_idle` is called on the compute thread once per pause.
    """

    def __init__(
        self,
        on_engine_failed: Callable[[str, Exception], None],
        when_idle: Callable[[], None] = lambda: None,
    ) -> None:
        self._engines: dict[str, SteppedEngine] = {}
        self._active: str | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self._doorbell = threading.Event()
        self._step_began_s: float | None = None
        self._on_engine_failed = on_engine_failed
        self._when_idle = when_idle

    def __repr__(self) -> str:
        return f"<EngineLoop active={self._active} engines={list(self._engines)}>"

    @property
    def step_s(self) -> float:
        """Seconds since the loop began to read messages and step; 0 in between. For any thread."""
        began_s = self._step_began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    @property
    def active(self) -> str | None:
        return self._active

    def ring(self) -> None:
        """Wake the compute thread. May be called from any thread."""
        self._doorbell.set()

    def submit(self, command: Callable[[], None]) -> None:
        """Run `command` on the compute thread between two steps. May be called from any thread."""
        self._commands.append(command)
        self.ring()

    def add(self, alias: str, engine: SteppedEngine) -> None:
        self._engines[alias] = engine

    def find(self, alias: str) -> SteppedEngine | None:
        return self._engines.get(alias)

    def remove(self, alias: str) -> None:
        self.park(alias)
        self._engines.pop(alias, None)

    def park(self, alias: str) -> None:
        """Stop stepping `alias`, if it is the engine that is stepped."""
        if self._active == alias:
            self._active = None

    def activate(self, alias: str) -> None:
        """Step `alias` from now on, and no other. Raises KeyError if it is not loaded."""
        if alias not in self._engines:
            raise KeyError(f"engine {alias!r} is not loaded")
        self._active = alias

    def run(self) -> NoReturn:
        """Step and run commands until the process ends."""
        while True:
            self.run_once()

    def run_once(self) -> None:
        """Run commands, service and step once; if nothing was stepped, wait for the doorbell."""
        # Cleared before looking for work: work left after this line rings again. Cleared later,
        # the ring for work that was just missed would be lost, and the work would wait.
        self._doorbell.clear()
        self._run_commands()
        self._step_began_s = time.monotonic()
        try:
            self._service()
            has_stepped = self._step_active()
        finally:
            self._step_began_s = None
        if not has_stepped and not self._doorbell.wait(IDLE_S):
            self._when_idle()
            self._doorbell.wait()

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _service(self) -> None:
        for alias, engine in list(self._engines.items()):
            self._run_guarded(alias, partial(_take_input, engine))

    def _step_active(self) -> bool:
        if self._active is None:
            return False
        engine = self._engines[self._active]
        return self._run_guarded(self._active, partial(_step, self._active, engine))

    def _run_guarded(self, alias: str, act: Callable[[], bool]) -> bool:
        """Return the result of `act`; its failure ends this engine only."""
        try:
            return act()
        except Exception as error:  # noqa: BLE001  # whatever a model raises, the others run on
            self.fail_engine(alias, error)
            return False

    def fail_engine(self, alias: str, error: Exception) -> None:
        """Report the failure, and give up the engine's model. If that raises, the process ends."""
        self.park(alias)
        self._on_engine_failed(alias, error)
        forget_frames(error)  # they hold tensors of the model
        self._engines[alias].die()


def _step(alias: str, engine: SteppedEngine) -> bool:
    """Step the engine if a step would do something. Returns whether it did."""
    if not engine.has_work():
        return False
    failpoint("host.step", alias)
    engine.run_step()
    return True


def _take_input(engine: SteppedEngine) -> bool:
    """Read the messages that wait. Returns whether there were any."""
    if not engine.has_input():
        return False
    engine.take_input()
    return True
