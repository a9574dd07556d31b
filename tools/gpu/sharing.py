"""Phase `sharing`: another process takes the device's memory, and gives it back.

Models must move down before an allocation fails, the active one must stay active, and afterwards
all must be there again.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from benchmarks.client import BadAnswer
from benchmarks.servers import Launcher, Server
from tools.gpu.client import Client, different
from tools.gpu.device import MIB, total_bytes
from tools.gpu.results import Say
from tools.gpu.task import Task
from tools.gpu.tiny import model as tiny_model
from vllm_hotswap.host.cuda_driver import check_driver
from vllm_hotswap.host.devices import reserve_bytes

NAMES = {"one": "llama", "two": "qwen", "three": "llama"}
ACTIVE = "one"
AWAKE = frozenset(["active", "parked"])
KV_BYTES = 512 * MIB
LOOKS_S = 30.0
"""The device is checked every 5 s; this is for slow machines."""

ON_A_STAND_IN_S = 8.0
ALONE = "not checked: the memory of a stand-in is that of one process"
POLL_S = 0.25
LEFT_PART = 8
"""This part of the reserve is left free. Half of it may be gone before models move."""


T = TypeVar("T")


def run(task: Task, say: Say) -> None:
    asyncio.run(_share(task, say))


async def _share(task: Task, say: Say) -> None:
    models = [tiny_model(alias, name, KV_BYTES) for alias, name in NAMES.items()]
    say.step("starting a server with three tiny models")
    async with Launcher(task.out / "servers").hotswap(*models) as server:
        story = Story(Client(server.port), say)
        await story.expect()
        total = total_bytes(check_driver(os.environ))
        left = reserve_bytes(total) // LEFT_PART
        async with hog(left) as taken:
            say.fact("taken", "taken by another process", taken // MIB, "MiB")
            wait_s = ON_A_STAND_IN_S if task.is_rehearsal else LOOKS_S
            await story.taken(wait_s, task.is_rehearsal)
        await story.given_back(server)


class Story:
    """One server while its device is taken."""

    def __init__(self, client: Client, say: Say) -> None:
        self._client, self._say = client, say
        self._wanted: dict[str, list[int]] = {}
        self._different = 0

    async def expect(self) -> None:
        for alias in (*[each for each in NAMES if each != ACTIVE], ACTIVE):
            await self._client.switch(alias)
            _, self._wanted[alias] = await self._client.answer(alias)

    async def taken(self, wait_s: float, is_rehearsal: bool) -> None:
        before_s = time.perf_counter()
        found = await until(self._client.residencies, _has_moved, wait_s)
        moved = [f"{alias}: {state}" for alias, state in found.items() if state not in AWAKE]
        shown = ", ".join(moved) or "none"
        if is_rehearsal and not moved:
            self._say.fact("moved", "models that moved down", shown, note=ALONE)
        else:
            self._say.check("moved", "models that moved down", bool(moved), shown)
            self._say.fact("after", "after", time.perf_counter() - before_s, "s")
        others = (await self._client.status())["memory"]["device"]["others"]
        self._say.fact("others", "held by others, says the server", others // MIB, "MiB")
        self._say.check("active", "the active model stays", found[ACTIVE] == "active")
        await self._check("serves", "the active model still serves", ACTIVE)

    async def given_back(self, server: Server) -> None:
        for alias in NAMES:
            await self._again(alias)
        self._say.check("different", "different tokens", self._different == 0, self._different)
        text = server.log.read_text(errors="replace")
        failed = text.count("OutOfMemory") + text.count("Traceback")
        self._say.check("failed", "allocations that failed", failed == 0, failed)

    async def _again(self, alias: str) -> None:
        """Switch to it once the server has seen that there is room."""

        async def attempt() -> str:
            try:
                await self._client.switch(alias)
            except BadAnswer as error:
                return str(error)
            return ""

        refusal = await until(attempt, lambda told: not told, LOOKS_S)
        self._say.check(f"back.{alias}", f"{alias} is back", not refusal, refusal or "yes")
        if not refusal:
            await self._check(f"same.{alias}", f"{alias} answers as before", alias)

    async def _check(self, key: str, what: str, alias: str) -> None:
        _, found = await self._client.answer(alias)
        wrong = different(found, self._wanted[alias])
        self._different += wrong
        self._say.check(key, what, wrong == 0)


def _has_moved(found: Mapping[str, str]) -> bool:
    return not AWAKE.issuperset(found.values())


async def until(ask: Callable[[], Awaitable[T]], is_there: Callable[[T], bool], wait_s: float) -> T:
    """Poll until it is there, or the time is over. Returns the last answer."""
    ends_at = time.monotonic() + wait_s
    while True:
        found = await ask()
        if is_there(found) or time.monotonic() > ends_at:
            return found
        await asyncio.sleep(POLL_S)


@asynccontextmanager
async def hog(left: int) -> AsyncIterator[int]:
    """Run a process that takes the device except `left` bytes; yield how many it has taken."""
    command = [sys.executable, "-m", "tools.gpu.hog", str(left)]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    try:
        yield await _told(process)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        with suppress(TimeoutError, ProcessLookupError):
            await asyncio.wait_for(process.wait(), LOOKS_S)
        if process.returncode is None:
            process.kill()


async def _told(process: Process) -> int:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise BadAnswer("the process that takes memory has ended; its error is above")
    return int(line)
