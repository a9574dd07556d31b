"""Runs one flood after the other: a while without it, the flood, and a while after it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from benchmarks.floods.attacker import Attacker, Sent, attacker
from benchmarks.floods.kinds import Kind
from benchmarks.floods.line import Target
from benchmarks.floods.victim import Pace, Sample, paces
from benchmarks.servers import COMMON_FLAGS, FAKE_FLAGS, Server, free_port, idle_cpu, running
from vllm_hotswap.demo import quickstart as demo

log = logging.getLogger("benchmarks")

ALIAS = "llama"
PHASES = ("before", "during", "after")
CONNECTIONS = 2048
"""The server's limit of connections, so that one attacker can take them all."""

RATED_CALLS = 60
"""Requests per minute of the key that has a rate; the others have none."""

FIRST = "first"
"""The memory before any flood of a kind, even the one that does not count."""

LOOK_EVERY_S = 0.5
"""How often the memory is read during a flood."""

CALM_S = 120.0
"""How long the server may be busy with what a flood has left."""

IDLE_CORES = 0.1
"""Below this, the server counts as idle; really idle, it takes 0.02 cores."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long the phases take, and how often requests are sent."""

    seconds: float
    """Length of a flood."""
    around_s: float
    """Length of the phase before it, and of the one after it."""
    warm_up_s: float
    """Length of a first flood that does not count, so that what is slow only once is left out."""
    rest_s: float
    """Pause before each check whether the server is calm."""
    per_second: float
    """Streams per second of the other user."""
    nice: int
    """By how much the attacker's priority is lowered."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of the server's processes, in bytes."""

    api_rss: int
    host_rss: int
    """RSS of all its processes except the one that answers."""
    api_uss: int
    host_uss: int


@dataclass(frozen=True, slots=True)
class Mark:
    """The server's memory and CPU time at one moment."""

    at_s: float
    memory: Memory
    api_cpu_s: float
    host_cpu_s: float

    @classmethod
    def take(cls, server: Server) -> Mark:
        api, hosts = _families(server)
        memory = Memory(_rss(api), _rss(hosts), _uss(api), _uss(hosts))
        return cls(time.perf_counter(), memory, _cpu_s(api), _cpu_s(hosts))


@dataclass(frozen=True, slots=True)
class Phase:
    """The results of all other requests in one of the three phases."""

    seconds: float
    samples: Mapping[str, Sequence[Sample]]
    """By kind of request: stream, health, admin."""
    api_cpu_s: float
    host_cpu_s: float

    @classmethod
    def of(cls, watched: Sequence[Pace], begin: Mark, end: Mark) -> Phase:
        """Return the phase of requests due between two marks, whenever they were answered."""
        return cls(
            end.at_s - begin.at_s,
            {pace.name: pace.between(begin.at_s, end.at_s) for pace in watched},
            end.api_cpu_s - begin.api_cpu_s,
            end.host_cpu_s - begin.host_cpu_s,
        )


@dataclass(slots=True)
class Peak:
    """The highest memory readings, in bytes."""

    api_rss: int = 0
    host_rss: int = 0

    async def watch(self, server: Server) -> None:
        """Read the memory repeatedly, until cancelled."""
        while True:
            api, hosts = _families(server)
            self.api_rss = max(self.api_rss, _rss(api))
            self.host_rss = max(self.host_rss, _rss(hosts))
            await asyncio.sleep(LOOK_EVERY_S)

    def raised(self, memory: Memory) -> Memory:
        """Return the memory of one moment, with its RSS raised to the highest readings."""
        api_rss, host_rss = max(self.api_rss, memory.api_rss), max(self.host_rss, memory.host_rss)
        return replace(memory, api_rss=api_rss, host_rss=host_rss)


@dataclass(frozen=True, slots=True)
class Found:
    """The results of one flood."""

    kind: Kind
    phases: Mapping[str, Phase]
    """By `PHASES`."""
    memory: Mapping[str, Memory]
    """At `FIRST`, and at the end of each of `PHASES`; "during" has the highest RSS."""
    sent: Sent


@dataclass(frozen=True, slots=True)
class Flooded:
    """A server, and the keys of its callers."""

    server: Server
    target: Target
    victim_key: str
    admin_key: str

    def paces(self, plan: Plan, seed: str) -> list[Pace]:
        port, alias = self.target.port, self.target.alias
        return paces(port, alias, self.victim_key, self.admin_key, seed, plan.per_second)


@asynccontextmanager
async def flooded(folder: Path, out: Path, is_fake: bool) -> AsyncIterator[Flooded]:
    """Run a server with keys, one of which has a rate. Raises `ServerFailed`."""
    attacker_key, victim_key, rated_key, admin_key = (secrets.token_hex(16) for _ in range(4))
    config = folder / "floods.yaml"
    config.write_text(_configuration(demo.write(folder / "models").parent), encoding="utf-8")
    port = free_port()
    command = ["-m", "vllm_hotswap", "serve", str(config), *COMMON_FLAGS]
    command += ["--host", "127.0.0.1", "--port", str(port), *(FAKE_FLAGS if is_fake else [])]
    variables = {
        "VLLM_API_KEY": f"{attacker_key},{victim_key}",
        "VLLM_HOTSWAP_ADMIN_KEY": admin_key,
        "FLOODS_RATED_KEY": rated_key,
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    }
    log_file = out / f"floods-{port}.log"
    server = Server("flooded", [sys.executable, "-P", *command], port, log_file, variables)
    async with running(server):
        target = Target(port, ALIAS, attacker_key, rated_key)
        yield Flooded(server, target, victim_key, admin_key)


def _configuration(models: Path) -> str:
    return f"""\
default_model: {ALIAS}
models:
  {ALIAS}:
    model: {models / ALIAS}
    max_model_len: 2048
    enforce_eager: true
    kv_cache_memory_bytes: 256M
limits:
  connections: {CONNECTIONS}
rights:
  rated:
    keys: ["${{FLOODS_RATED_KEY}}"]
    requests_per_minute: {RATED_CALLS}
isolation:
  prefix_cache: shared
"""


async def flood(at: Flooded, kind: Kind, plan: Plan) -> Found:
    """Measure one flood.

    Raises:
        ServerFailed: the server has ended.
        AttackerFailed: the attacker did not attack.
    """
    with attacker(kind, at.target, plan.nice) as process:
        await _calm(at.server, plan)
        first = Mark.take(at.server).memory
        if plan.warm_up_s:
            process.go(plan.warm_up_s)
            await process.sent(plan.warm_up_s)
            await _calm(at.server, plan)
        try:
            found = await _watched(at, kind, plan, process, first)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
    if (status := at.server.exit_status) is not None:
        raise at.server.failure(f"ended with status {status} in the flood {kind.name!r}")
    return found


async def _calm(server: Server, plan: Plan) -> None:
    """Wait until the server is idle, but at most `CALM_S`."""
    until_s = time.perf_counter() + CALM_S
    while time.perf_counter() < until_s:
        if await idle_cpu(server, plan.rest_s, LOOK_EVERY_S) < IDLE_CORES:
            return
    log.warning("the server is still busy after %.0f s", CALM_S)


async def _watched(at: Flooded, kind: Kind, plan: Plan, process: Attacker, first: Memory) -> Found:
    watched = at.paces(plan, kind.name)
    peak = Peak()
    async with asyncio.TaskGroup() as group:
        for pace in watched:
            group.create_task(pace.run())
        marks = [Mark.take(at.server)]
        await asyncio.sleep(plan.around_s)
        marks.append(Mark.take(at.server))
        process.go(plan.seconds)
        looking = group.create_task(peak.watch(at.server))
        sent = await process.sent(plan.seconds)
        looking.cancel()
        marks.append(Mark.take(at.server))
        await asyncio.sleep(plan.around_s)
        marks.append(Mark.take(at.server))
        for pace in watched:
            pace.until_s = marks[-1].at_s
    memory = {FIRST: first} | dict(zip(PHASES, (mark.memory for mark in marks[1:]), strict=True))
    memory["during"] = peak.raised(memory["during"])
    phases = {
        name: Phase.of(watched, begin, end)
        for name, (begin, end) in zip(PHASES, itertools.pairwise(marks), strict=True)
    }
    return Found(kind, phases, memory, sent)


def _families(server: Server) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Return the process that answers, and all others."""
    family = server.family()
    return family[:1], family[1:]


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _rss(processes: Sequence[psutil.Process]) -> int:
    total = 0
    for process in processes:
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def _uss(processes: Sequence[psutil.Process]) -> int:
    total = 0
    for process in processes:
        with suppress(psutil.Error):
            total += process.memory_full_info().uss
    return total
