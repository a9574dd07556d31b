"""What ends the check before its time: Ctrl-C, `kill`, and a terminal that goes away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def take() -> None:
    """From now on each of `SIGNALS` interrupts, so that the server is ended; but only the first.

    Ending a server takes time, and a second signal must not stop it: it would hold the device on.
    SIGHUP stays ignored under `nohup`.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for each in SIGNALS:
        signal.signal(each, _pass_over)
    raise KeyboardInterrupt


def _pass_over(number: int, frame: FrameType | None) -> None:
    """Not `SIG_IGN`, which programs that are started would inherit."""


@contextmanager
def held_back() -> Iterator[None]:
    """Signals that come meanwhile come at its end.

    A process that is started here is not lost before somebody knows that it has to be ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    taken = [number for number, handler in handlers.items() if callable(handler)]
    for number in taken:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, handlers[number])
        if came:
            signal.raise_signal(came[0])
