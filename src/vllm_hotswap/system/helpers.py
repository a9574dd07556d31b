"""Helpers: processes for a request's work that may take long or grow large, and can be killed.

A helper is a process of its own, started afresh by `exec`, without this process's environment. It
listens nowhere and ends with this process. It is killed when the caller that waits for it gives up,
when it has used too much processor time, or when it outgrows its memory. Its work has the usual
priority for `QUICK_S`, so that small work is not held up, and the lowest from then on.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vllm_hotswap.system import helper_process

log = logging.getLogger("vllm_hotswap")

QUICK_S = 0.05
"""Work that takes longer continues with the lowest priority."""

LOOK_S = 0.02
"""Seconds between checks of a helper's memory and time while it works."""

WARM = 1
"""How many helpers that have nothing to do are kept."""

_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class HelperEnd(BaseException):
    """A helper did not do its work. Not an `Exception`, so no code takes it for the work's own."""


class HelperStopped(HelperEnd):
    """The caller that asked for the work has given up."""


class HelperFailed(HelperEnd):
    """The process died of its work; the text says how."""


class NoHelper(HelperEnd):
    """No helper can be started here."""


class OutOfBounds(HelperEnd):
    """The work takes more than it may of `memory`, or of processor `time`."""

    def __init__(self, of: str) -> None:
        super().__init__(of)
        self.of = of


class RefusedByHelper(Exception):
    """The work raised an exception in the helper: its name is `kind`, with its text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one piece of work may take: bytes of memory, and seconds of processor time."""

    memory_bytes: int = 512 << 20
    cpu_s: float = 60.0


STARTING = Bounds(1 << 30, 120.0)
"""What a helper may take to start, or to read a tokenizer's vocabulary."""


class Helper:
    """One process. Only `kill` may be called while another thread uses it."""

    def __init__(self, command: Sequence[str] | None = None) -> None:
        """Start the process.

        Args:
            command: a program to run instead of a helper's own; its socket's number is appended.
        """
        ours, its = socket.socketpair()
        with its, ExitStack() as unless_started:
            unless_started.callback(ours.close)
            self._process = subprocess.Popen(
                [*(command or _command()), str(its.fileno())],
                pass_fds=[its.fileno()],
                env=_environment(os.environ),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            unless_started.pop_all()
        self._channel = ours
        self._lock = threading.Lock()
        self._is_killed = self._has_started = False
        self.tokenizer: object = None
        """The key of the tokenizer that it has a compiler for."""
        self.took_s = 0.0
        """Seconds that its last work took, without its start."""

    def __repr__(self) -> str:
        return f"<Helper pid={self.pid}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """Kill it, from any thread; a caller that waits gets `HelperStopped`. Idempotent."""
        with self._lock:
            self._is_killed = True
            if self._process.returncode is None:
                self._process.kill()

    def close(self) -> None:
        """Kill it, and wait for its end."""
        self.kill()
        self._process.wait()
        self._channel.close()

    def do(self, bounds: Bounds, what: str, *arguments: Any) -> None:
        """Let it work, and wait. After any error except `RefusedByHelper` it is of no more use.

        Raises:
            RefusedByHelper: the work itself raised an exception.
            OutOfBounds, HelperStopped, HelperFailed
        """
        try:
            if not self._has_started:
                self._watch(STARTING)
                self._has_started, _ = helper_process.receive(self._channel)
            began_s = time.monotonic()
            helper_process.send(self._channel, [2 * bounds.memory_bytes, what, arguments])
            self._watch(bounds)
            self.took_s = time.monotonic() - began_s
            is_done, *error = helper_process.receive(self._channel)
        except (OSError, EOFError):
            self._raise_cause_of_death()
        if not is_done:
            kind, message = error
            if kind == "MemoryError" or "bad_alloc" in message:
                raise OutOfBounds("memory")
            raise RefusedByHelper(kind, message)

    def _watch(self, bounds: Bounds) -> None:
        """Wait for the answer; raise `OutOfBounds` if the work goes beyond its bounds."""
        began_s = time.monotonic()
        memory, cpu_s = self._resident(), self._cpu_s()
        while not select.select([self._channel], [], [], LOOK_S)[0]:
            if time.monotonic() - began_s > QUICK_S:
                self._lower_priority()
            if self._resident() - memory > bounds.memory_bytes:
                raise OutOfBounds("memory")
            if self._cpu_s() - cpu_s > bounds.cpu_s:
                raise OutOfBounds("time")

    def _raise_cause_of_death(self) -> NoReturn:
        status = self._process.wait()
        if self._is_killed:
            raise HelperStopped
        if status == helper_process.BEGIN_ABORTED:
            raise NoHelper("xgrammar cannot be loaded without the rest of its package")
        raise HelperFailed(f"signal {-status}" if status < 0 else f"exit status {status}")

    def _lower_priority(self) -> None:
        """Lower the priority of working threads, and so of those they start; not the main one's."""
        with suppress(OSError):
            for thread in Path(f"/proc/{self.pid}/task").iterdir():
                if int(thread.name) != self.pid:
                    with suppress(OSError):  # it may have ended
                        os.setpriority(os.PRIO_PROCESS, int(thread.name), 19)

    def _resident(self) -> int:
        with suppress(OSError, ValueError, IndexError):
            return int(Path(f"/proc/{self.pid}/statm").read_bytes().split()[1]) * _PAGE
        return 0

    def _cpu_s(self) -> float:
        with suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b")")[2].split()
            return (int(fields[11]) + int(fields[12])) / _TICKS
        return 0.0


class Helpers:
    """Helpers that are kept warm for the next caller that needs one.

    The mutable state is `_idle`, those with nothing to do, and `_busy`; `_lock` guards both.
    """

    def __init__(self, command: Sequence[str] | None = None) -> None:
        self._command = command
        self._lock = threading.Lock()
        self._idle: list[Helper] = []
        self._busy: set[Helper] = set()

    def __repr__(self) -> str:
        return f"<Helpers idle={len(self._idle)} busy={len(self._busy)}>"

    @property
    def pids(self) -> list[int]:
        with self._lock:
            return [helper.pid for helper in (*self._idle, *self._busy)]

    def take(self) -> Helper:
        """Return one that has nothing to do, or a new one. The caller must give it back.

        Raises:
            NoHelper: a new one cannot be started.
        """
        with self._lock:
            helper = self._idle.pop() if self._idle else None
            if helper is None:
                try:
                    helper = Helper(self._command)
                except OSError as error:
                    raise NoHelper(str(error)) from error
            self._busy.add(helper)
        return helper

    def give_back(self, helper: Helper, is_good: bool) -> None:
        with self._lock:
            self._busy.discard(helper)
            if is_good and len(self._idle) < WARM:
                self._idle.append(helper)
                return
        helper.close()

    def close(self) -> None:
        """Kill all of them. Others may be started later."""
        with self._lock:
            idle, self._idle = self._idle, []
            busy = [*self._busy]
        for helper in busy:
            helper.kill()
        for helper in idle:
            helper.close()


class Errand:
    """The work of helpers for one request, one thing after the other, until it is stopped."""

    def __init__(self, helpers: Helpers, bounds: Bounds) -> None:
        self._helpers = helpers
        self._bounds = bounds
        self._lock = threading.Lock()
        self._at_work: set[Helper] = set()  # several where a library has given one up
        self._is_stopped = False
        self.took_s = 0.0
        """Seconds of all work done for it, without the start of helpers."""

    def stop(self) -> None:
        """Kill what works for it: the request no longer waits. From any thread."""
        with self._lock:
            self._is_stopped = True
            for helper in self._at_work:
                helper.kill()

    def do(self, what: str, *arguments: Any, tokenizer: tuple[object, str] | None = None) -> None:
        """Let a helper do one thing, with a tokenizer if its key and its text are given.

        Raises:
            RefusedByHelper: what the work raised.
            OutOfBounds, HelperStopped, HelperFailed, NoHelper
        """
        if self._is_stopped:
            raise HelperStopped
        helper = self._helpers.take()
        is_good = False
        try:
            with self._lock:
                # Checked again: a `stop` since then has not killed this helper.
                if self._is_stopped:
                    raise HelperStopped
                self._at_work.add(helper)
            if tokenizer is not None and helper.tokenizer != tokenizer[0]:
                helper.do(STARTING, "tokenizer", tokenizer[1])
                helper.tokenizer = tokenizer[0]
            try:
                helper.do(self._bounds, what, *arguments)
            except RefusedByHelper:
                is_good = True
                raise
            is_good = True
        finally:
            self.took_s += helper.took_s if is_good else 0.0
            with self._lock:
                self._at_work.discard(helper)
                is_good = is_good and not self._is_stopped
            self._helpers.give_back(helper, is_good)


def _command() -> list[str]:
    return [sys.executable, "-I", str(Path(helper_process.__file__).resolve())]


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a helper's environment: where programs and libraries are, and no secrets."""
    passed = {name: environment[name] for name in _PASSED_ON if name in environment}
    return {**passed, "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}
