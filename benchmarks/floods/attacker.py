"""The attacker: a process of its own, which yields to all others if cores are short."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from benchmarks.floods.kinds import KINDS, Kind
from benchmarks.floods.line import Attack, Target
from vllm_hotswap.system.file_limit import raised_file_limit
from vllm_hotswap.tasks import event_loop

READY_S = 60.0
"""How long the process may take to start."""

BEGIN_S = 30.0
"""How long its first outcome may take; after that, its time starts without one."""

GRACE_S = 20.0
"""How much longer than its time it may take to end."""

PAUSE_S = 0.01
"""The pause after a failed connection, so that refused connections do not keep it busy alone."""


class AttackerFailed(Exception):
    """The attacker's process did not start, or did not report what it had done."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What an attacker did."""

    outcomes: dict[str, int]
    sent_bytes: int
    seconds: float
    cpu_s: float
    """CPU time of its process, while it attacked."""


@dataclass(frozen=True, slots=True)
class Attacker:
    """A process that is ready to attack, and does so once for each `go`."""

    process: SpawnProcess
    _pipe: Connection

    def go(self, seconds: float) -> None:
        self._pipe.send(seconds)

    async def sent(self, seconds: float) -> Sent:
        """Return what it did in its time. Raises `AttackerFailed` if it does not report."""
        result = await asyncio.to_thread(self._receive, BEGIN_S + seconds + GRACE_S)
        if not isinstance(result, Sent):
            raise AttackerFailed(f"the attacker's process failed: {result!r}")
        return result

    def wait_until_ready(self) -> None:
        """Wait until it is ready. Raises `AttackerFailed` if it does not get ready."""
        if (said := self._receive(READY_S)) != "ready":
            raise AttackerFailed(f"the attacker's process did not start: {said!r}")

    def _receive(self, timeout_s: float) -> object:
        try:
            return self._pipe.recv() if self._pipe.poll(timeout_s) else "it sent no message"
        except EOFError:
            return f"it ended with {self.process.exitcode}"


@contextmanager
def attacker(kind: Kind, target: Target, nice: int) -> Iterator[Attacker]:
    """Keep a process that is ready to flood; it is stopped with the context.

    Args:
        nice: by how much its priority is lowered, 0 to 19.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, kind.name, target, nice), daemon=True)
    process.start()
    theirs.close()
    try:
        found = Attacker(process, ours)
        found.wait_until_ready()
        yield found
    finally:
        process.kill()
        process.join()
        ours.close()


def _serve(pipe: Connection, name: str, target: Target, nice: int) -> None:
    os.nice(nice)
    raised_file_limit()
    pipe.send("ready")
    while True:
        try:
            seconds = pipe.recv()
        except EOFError:
            return
        pipe.send(event_loop.run(flood(KINDS[name], target, seconds)))


async def flood(kind: Kind, target: Target, seconds: float) -> Sent:
    """Flood for so long, from the first outcome on. All connections are closed at the end."""
    attack = Attack(target)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(again(kind, attack)) for _ in range(kind.connections)]
        with suppress(TimeoutError):
            await asyncio.wait_for(attack.has_begun.wait(), BEGIN_S)
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
    took_s = time.perf_counter() - began_s
    used_s = time.process_time() - cpu_s
    return Sent(dict(attack.outcomes), attack.sent_bytes, took_s, used_s)


async def again(kind: Kind, attack: Attack) -> None:
    """Do the work of one of its connections, for ever."""
    while True:
        try:
            await kind.once(attack)
        except (OSError, EOFError) as error:  # the server closed it; `IncompleteReadError` is one
            if isinstance(error, OSError):
                attack.note(type(error).__name__)
            await asyncio.sleep(PAUSE_S)
