"""An event loop under virtual time: hours of timers, deadlines and back-offs in milliseconds.

When nothing is ready the loop does not sleep: its clock jumps to the next timer. Without a timer,
nothing can ever happen again, and tasks would wait for ever: that is an error which names the
waiting tasks, not a test timeout. Nothing in a run depends on the speed of the machine, so a
replayed run takes the same path.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

START_S = 1000.0
"""The first time of the clock. Not zero, which code might take for "never"."""

MOST_TURNS = 100_000
"""Turns of the loop at one moment. Code that needs more waits busily for a time."""


class NothingCanHappen(Exception):
    """All tasks wait, without a timer or anything else that could wake one."""


class TimeStandsStill(Exception):
    """Some task keeps running without letting time pass."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it.

    Work for threads runs at once, in the loop's own thread: another one would bring back real time.
    """

    def __init__(self) -> None:
        self._now_s = START_S
        super().__init__(_Jumping(self._jump))

    def time(self) -> float:
        return self._now_s

    @property
    def timers(self) -> int:
        """Number of timers that are set."""
        handles: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return sum(not handle.cancelled() for handle in handles)

    def _jump(self, seconds: float) -> None:
        self._now_s += seconds

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  # the caller gets it, as usual
            future.set_exception(error)
        return future

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine, and leave everything else as it then is."""
        task = self.create_task(main)
        try:
            return self.run_until_complete(task)
        except NothingCanHappen as error:
            raise NothingCanHappen(f"{error}\n{self._who_waits()}") from None

    def _who_waits(self) -> str:
        tasks = sorted(asyncio.all_tasks(self), key=lambda task: task.get_name())
        return "\n".join(f"  {task.get_name()}: {_where(task)}" for task in tasks)


class _Jumping(selectors.DefaultSelector):
    """Never waits: time jumps by as long as the loop would have waited."""

    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._jump_by = jump
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if timeout is None and not ready:
            raise NothingCanHappen("nothing can ever happen again; still waiting are")
        self._count(is_moment_over=bool(timeout))
        if timeout and not ready:
            self._jump_by(timeout)
        return ready

    def _count(self, *, is_moment_over: bool) -> None:
        self._turns = 0 if is_moment_over else self._turns + 1
        if self._turns > MOST_TURNS:
            self._turns = 0
            raise TimeStandsStill(f"{MOST_TURNS} turns of the loop, and no time has passed")


def _where(task: asyncio.Task[Any]) -> str:
    """Return the innermost line at which a task waits."""
    coroutine: Any = task.get_coro()
    while getattr(coroutine, "cr_await", None) is not None and hasattr(
        coroutine.cr_await, "cr_frame"
    ):
        coroutine = coroutine.cr_await
    frame = getattr(coroutine, "cr_frame", None)
    if frame is None:
        return "has ended"
    return f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
