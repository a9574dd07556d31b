"""Signals that the server handles: SIGINT and SIGTERM stop it, SIGHUP reopens files."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import FrameType
from typing import TypeVar

log = logging.getLogger("vllm_hotswap")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1

INTERRUPT_S = 0.2
"""Longest delay until a signal ends an interruptible wait, in seconds."""

T = TypeVar("T")


class Stopped(BaseException):
    """A signal stopped the server before it had an event loop."""


class EarlyStop:
    """A stop signal before there is an event loop: it ends the start with an exception.

    Without it, the system would end the process, and what it has created so far would be left.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal's number; 0 until one comes."""
        self._is_held = False

    @property
    def is_signalled(self) -> bool:
        return self.number != 0

    def listen(self, number: signal.Signals) -> None:
        """Start, on the main thread of a process. An event loop takes the signal over later."""
        signal.signal(number, self._on_signal)

    def hold(self) -> None:
        """Raise no longer: from now on the caller checks `is_signalled` itself.

        Raises:
            Stopped: the signal came before, and a library has swallowed the exception.
        """
        self._is_held = True
        if self.is_signalled:
            raise Stopped

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delay `Stopped` until the end of a block that must not be left half done."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self.is_signalled:
            raise Stopped

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """Raise no longer once this block is left: then everything started is cleaned up."""
        try:
            yield
        finally:
            self._is_held = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if not self._is_held:
            raise Stopped


@contextlib.contextmanager
def stop_signal(
    *further: signal.Signals,
    at_once: Callable[[], None] = lambda: None,
    is_signalled: Callable[[], bool] = lambda: False,
) -> Iterator[asyncio.Future[None]]:
    """Yield a future, done at the first SIGINT or SIGTERM; a second ends the process at once.

    The engine host then sees its channel close, and exits, too.

    Args:
        further: signals that do the same.
        at_once: called before the process ends at once.
        is_signalled: whether a signal came before the event loop took the signals over.
    """
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def on_signal(number: signal.Signals) -> None:
        if stop.done():
            log.warning("event=ended_at_once signal=%s", number.name)
            at_once()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        else:
            stop.set_result(None)

    numbers = (*STOP_SIGNALS, *further)
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    if is_signalled():
        stop.set_result(None)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def interruptible(ask: Callable[[], T]) -> T:
    """Return or raise what `ask` does, or raise what a signal's handler raises during the wait.

    `ask` runs on its own thread. A handler runs between any two instructions of the main thread.
    What it raises inside a library could leave a lock locked for ever, and closing the client
    would then wait for that lock. After an exception, `ask` may still be running.
    """
    if threading.current_thread() is not threading.main_thread():
        return ask()  # signals do not arrive on this thread
    asked: Future[T] = Future()
    done = threading.Event()

    def run() -> None:
        try:
            asked.set_result(ask())
        except BaseException as error:  # noqa: BLE001  # it is raised below
            asked.set_exception(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True).start()
    while not done.wait(INTERRUPT_S):  # a signal may come just before a wait, and not wake it
        pass
    return asked.result()


def signal_when_orphaned(number: signal.Signals) -> None:
    """Make the system send this process a signal when its parent has died; Linux only.

    https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


@contextlib.contextmanager
def on_hangup(callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` at every SIGHUP."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, callback)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


def has_terminal() -> bool:
    """Whether one of the standard streams is a terminal: then SIGHUP means that it has closed."""
    return any(_is_terminal(number) for number in range(3))


def _is_terminal(number: int) -> bool:
    try:
        return os.isatty(number)
    except OSError:
        return False
