"""The engine host's compute thread, on a real thread with engines that only count."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from vllm_hotswap.host.loop import EngineLoop

T = TypeVar("T")
LONG_S = 10.0
"""No test waits this long unless it fails."""


class Tensor:
    """An object that a step holds."""


class CountingEngine:
    """An engine whose inputs are numbers of steps to run."""

    def __init__(self, name: str, stage: Stage) -> None:
        self.name = name
        self.stage = stage
        self.inputs: list[int] = []
        self.work = 0
        self.dead = False
        self.die_fails = False
        self.fails_at: str | None = None
        self.steps_end_at = 0
        self.finished = threading.Event()
        self.tensor: Callable[[], object] = lambda: None
        """The tensor of the step that has failed."""
        self.left: object = None

    def send(self, steps: int) -> None:
        """Leave work, then ring, as a client does."""
        self.inputs.append(steps)
        self.stage.loop.ring()

    def has_input(self) -> bool:
        return bool(self.inputs)

    def take_input(self) -> None:
        self._happens("input")
        while self.inputs:
            self.work += self.inputs.pop()

    def has_work(self) -> bool:
        return self.work > 0

    def run_step(self) -> None:
        self._happens("step")
        self.work -= 1
        if not self.work:
            self.finished.set()

    def die(self) -> None:
        if self.die_fails:
            raise OSError("socket is closed")
        self.left = self.tensor()
        self.dead, self.fails_at = True, None

    def _happens(self, what: str) -> None:
        self.stage.happened.append(f"{self.name} {what}")
        if self.fails_at == what:
            tensor = Tensor()
            self.tensor = weakref.ref(tensor)
            try:
                raise OSError("no such kernel")
            except OSError as error:
                raise RuntimeError(f"{self.name} cannot {what}") from error


class Stage:
    """A loop with engines `a` and `b`, and everything that happened in it."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.failed: list[tuple[str, str]] = []
        self.failure = threading.Event()
        self.loop = EngineLoop(self._failed, self._idles)
        self.a, self.b = CountingEngine("a", self), CountingEngine("b", self)
        self.loop.add("a", self.a)
        self.loop.add("b", self.b)
        self.idle = threading.Event()
        self.is_over = False
        self.thread = threading.Thread(target=self._run)

    def end(self) -> None:
        """Let the thread end after its current turn; a real one ends with its process."""
        self.is_over = True
        deadline = time.monotonic() + LONG_S
        while self.thread.is_alive() and time.monotonic() < deadline:
            self.loop.ring()  # again: a turn that has just started misses the first ring
            self.thread.join(0.01)

    def do(self, command: Callable[[], T]) -> T:
        """Run a command in the loop and return its result."""
        results: list[T] = []
        obeyed = threading.Event()

        def obey() -> None:
            results.append(command())
            obeyed.set()

        self.loop.submit(obey)
        assert obeyed.wait(LONG_S)
        return results[0]

    def activate(self, alias: str) -> None:
        self.do(lambda: self.loop.activate(alias))

    def _run(self) -> None:
        while not self.is_over:
            self.loop.run_once()

    def _idles(self) -> None:
        self.happened.append("idle")
        self.idle.set()

    def _failed(self, alias: str, error: Exception) -> None:
        self.failed.append((alias, str(error)))
        self.failure.set()


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    stage.thread.start()
    yield stage
    stage.end()
    assert not stage.thread.is_alive()


@pytest.fixture
def soon_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """End a pause as soon as it starts."""
    monkeypatch.setattr("vllm_hotswap.host.loop.IDLE_S", 0.0)


def test_active_engine_is_stepped_until_it_has_no_work(stage: Stage) -> None:
    """The active engine is stepped for all of its work, and no further."""
    stage.activate("a")

    stage.a.send(3)

    assert stage.a.finished.wait(LONG_S)
    stage.do(lambda: None)
    assert ["a input", "a step", "a step", "a step"] == stage.happened


def test_engine_that_is_not_active_is_serviced_but_not_stepped(stage: Stage) -> None:
    """An engine that is not active reads its messages, so no caller hangs; its work waits."""
    stage.activate("a")

    stage.b.send(2)
    stage.a.send(2)

    assert stage.a.finished.wait(LONG_S)
    stage.do(lambda: None)
    assert 2 == stage.b.work
    assert "b step" not in stage.happened


def test_work_that_waited_is_done_after_activation(stage: Stage) -> None:
    """Work that arrived for an inactive engine is done once that engine is activated."""
    stage.activate("a")
    stage.b.send(2)
    stage.do(lambda: None)

    stage.activate("b")

    assert stage.b.finished.wait(LONG_S)


def test_work_is_frozen_by_a_switch_and_goes_on_later(stage: Stage) -> None:
    """An engine that is no longer active keeps its unfinished work, and continues it later."""
    stage.do(lambda: stage.loop.activate("a") or stage.a.inputs.append(10**9))
    stage.activate("b")
    left = stage.do(lambda: stage.a.work)

    assert left == stage.do(lambda: stage.a.work)

    stage.do(lambda: setattr(stage.a, "work", 1))
    stage.a.finished.clear()
    stage.activate("a")
    assert stage.a.finished.wait(LONG_S)


def test_command_is_obeyed_between_two_steps(stage: Stage) -> None:
    """A command runs on the compute thread between two steps, however busy the active engine is."""
    stage.activate("a")
    stage.a.send(10**9)

    assert stage.thread is stage.do(threading.current_thread)
    assert stage.a.has_work()


def test_commands_are_obeyed_in_order(stage: Stage) -> None:
    """Commands run in the order in which they came."""
    order: list[int] = []
    stage.loop.submit(lambda: order.append(1))
    stage.loop.submit(lambda: order.append(2))

    stage.do(lambda: order.append(3))

    assert [1, 2, 3] == order


def test_nothing_is_stepped_before_the_first_activation(stage: Stage) -> None:
    """Without an active engine, nothing is stepped."""
    stage.a.send(1)
    stage.do(lambda: None)

    assert ["a input"] == stage.happened
    assert stage.loop.active is None


@pytest.mark.parametrize("at", ["step", "input"])
def test_death_of_the_active_engine_ends_that_engine_only(stage: Stage, at: str) -> None:
    """When the active engine dies, its clients and owner learn it, and another can be activated."""
    stage.activate("a")
    stage.a.fails_at = at

    stage.a.send(1)

    assert stage.failure.wait(LONG_S)
    assert stage.do(lambda: stage.a.dead)
    assert stage.a.left is None  # nothing that the step held keeps its model's memory
    assert [("a", f"a cannot {at}")] == stage.failed
    assert stage.loop.active is None

    stage.activate("b")
    stage.b.send(1)
    assert stage.b.finished.wait(LONG_S)


def test_engine_that_cannot_even_die_ends_the_loop() -> None:
    """If an engine cannot even fail cleanly, the loop ends: the process must be replaced."""
    stage = Stage()
    stage.loop.activate("a")
    stage.a.fails_at = "step"
    stage.a.die_fails = True
    stage.a.send(1)

    with pytest.raises(OSError, match="socket is closed"):
        stage.loop.run_once()

    assert [("a", "a cannot step")] == stage.failed


def test_death_of_another_engine_leaves_the_active_one_serving(stage: Stage) -> None:
    """An engine that dies while it reads messages leaves the active one serving."""
    stage.activate("a")
    stage.b.fails_at = "input"

    stage.b.send(1)
    assert stage.failure.wait(LONG_S)
    stage.a.send(1)

    assert stage.a.finished.wait(LONG_S)
    assert "a" == stage.loop.active


def test_engine_that_is_not_loaded_cannot_be_activated(stage: Stage) -> None:
    """Activation of an engine that is not loaded names it, and the active one stays active."""
    stage.activate("a")

    with pytest.raises(KeyError, match="engine 'c' is not loaded"):
        stage.loop.activate("c")

    assert "a" == stage.loop.active


def test_parked_engine_is_stepped_no_more(stage: Stage) -> None:
    """A parked engine is not stepped and none is active; it stays and can be activated again."""
    stage.activate("a")
    stage.do(lambda: stage.loop.park("b"))
    assert "a" == stage.loop.active

    stage.do(lambda: stage.loop.park("a"))
    stage.a.send(1)
    stage.do(lambda: None)

    assert (None, 1) == (stage.loop.active, stage.a.work)
    stage.activate("a")
    assert stage.a.finished.wait(LONG_S)


def test_removed_engine_is_forgotten(stage: Stage) -> None:
    """A removed engine is neither stepped nor serviced; removing an absent one changes nothing."""
    stage.activate("a")

    stage.do(lambda: stage.loop.remove("a"))
    stage.do(lambda: stage.loop.remove("a"))
    stage.a.send(1)
    stage.do(lambda: None)

    assert (None, None) == (stage.loop.active, stage.loop.find("a"))
    assert [] == stage.happened
    assert stage.b is stage.loop.find("b")


@pytest.mark.usefixtures("soon_idle")
def test_pause_leaves_time_for_what_may_wait(stage: Stage) -> None:
    """Deferred work runs once per pause on the compute thread; later work is done as before."""
    assert stage.idle.wait(LONG_S)
    assert ["idle"] == stage.happened
    stage.activate("a")

    stage.a.send(1)

    assert stage.a.finished.wait(LONG_S)


def test_work_leaves_no_time_for_what_may_wait(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the active engine has work, no pause occurs, however short one would be."""
    stage.activate("a")
    stage.a.send(10**9)
    stage.do(lambda: None)

    monkeypatch.setattr("vllm_hotswap.host.loop.IDLE_S", 0.0)
    stage.do(lambda: None)
    stage.do(lambda: None)

    assert "idle" not in stage.happened
    stage.do(lambda: setattr(stage.a, "work", 1))


def test_loop_tells_its_state(stage: Stage) -> None:
    """The loop's state is readable in logs and failing tests."""
    stage.activate("b")

    assert "<EngineLoop active=b engines=['a', 'b']>" == repr(stage.loop)
