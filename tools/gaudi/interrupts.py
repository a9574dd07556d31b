"""What ends the check before its time: Ctrl-C, `kill`, and a terminal that goes away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def take() -> None:
    """Let the first of `SIGNALS` interrupt from now on, so that the server is stopped.

    Stopping a server takes time, and a second signal must not end that: the server would keep the
    device. SIGHUP stays ignored under `nohup`.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for each in SIGNALS:
        signal.signal(each, _pass_over)
    raise KeyboardInterrupt


def _pass_over(number: int, frame: FrameType | None) -> None:
    """Ignore a signal. Not `SIG_IGN`, which programs that are started would inherit."""


@contextmanager
def held_back() -> Iterator[None]:
    """Hold signals back until the end of the block.

    A process that is started here is then always known when it has to be stopped.
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
