"""Signals before there is an event loop, and the end of a terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from vllm_hotswap.system.signals import EarlyStop, Stopped, has_terminal, interruptible


@pytest.fixture
def early() -> Iterator[EarlyStop]:
    before = signal.getsignal(signal.SIGTERM)
    early = EarlyStop()
    early.listen(signal.SIGTERM)
    yield early
    signal.signal(signal.SIGTERM, before)


def told_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_start_that_is_told_to_stop_can_clear_away(early: EarlyStop) -> None:
    """A start that is stopped raises, so that its caller can clean up what it has made."""
    with pytest.raises(Stopped):
        told_to_stop()


def test_what_must_not_be_left_half_done_is_finished_first(early: EarlyStop) -> None:
    """A protected block finishes before a stop, or a process could run that no one knows of."""
    made = []

    def make() -> None:
        with early.held():
            told_to_stop()
            made.append("process")

    with pytest.raises(Stopped):
        make()

    assert ["process"] == made


def test_a_stop_that_a_library_has_swallowed_still_counts(early: EarlyStop) -> None:
    """A stop counts even if a library, as an import, swallowed its exception."""
    with pytest.raises(Stopped):
        told_to_stop()

    with pytest.raises(Stopped):
        early.hold()


def test_a_stop_while_things_are_cleared_away_interrupts_nothing(early: EarlyStop) -> None:
    """A second stop during cleanup interrupts nothing."""
    with early.ended():
        pass

    told_to_stop()

    assert early.is_signalled


@pytest.mark.parametrize("number", [0, 1, 2, None])
def test_a_terminal_is_seen_on_any_standard_stream(number: int | None) -> None:
    """A terminal on any standard stream is found, and none if all lead elsewhere."""
    code = (
        "import sys; from vllm_hotswap.system.signals import has_terminal; sys.exit(has_terminal())"
    )
    main, other = pty.openpty()
    streams = [other if number == each else subprocess.DEVNULL for each in range(3)]
    try:
        command = [sys.executable, "-c", code]
        ended = subprocess.run(
            command, stdin=streams[0], stdout=streams[1], stderr=streams[2], check=False
        )
    finally:
        os.close(main)
        os.close(other)

    assert (number is not None) == bool(ended.returncode)


def test_streams_that_are_closed_are_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed streams are neither a terminal nor an error."""
    monkeypatch.setattr(os, "isatty", lambda _: (_ for _ in ()).throw(OSError()))

    assert not has_terminal()


class Interrupted(Exception):
    """Raised by a signal's handler."""


@pytest.fixture
def interrupting() -> Iterator[None]:
    """Make SIGUSR1 raise."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("interrupting")
def test_what_a_signal_interrupts_leaves_no_lock_locked() -> None:
    """A signal in the middle leaves no lock locked, as cleanup needs the library's locks."""
    lock, may_go_on = threading.Lock(), threading.Event()

    def ask() -> None:
        lock.acquire()  # the handler must not run between this and the release
        signal.raise_signal(signal.SIGUSR1)
        may_go_on.wait(60)
        lock.release()

    with pytest.raises(Interrupted):
        interruptible(ask)
    may_go_on.set()

    assert lock.acquire(timeout=60)


def test_what_is_asked_is_given_or_raised() -> None:
    """An interruptible call returns or raises like a plain one."""

    def fail() -> None:
        raise TimeoutError("of its own")

    assert 3 == interruptible(lambda: 3)
    with pytest.raises(TimeoutError, match="of its own"):
        interruptible(fail)
