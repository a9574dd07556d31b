"""Runs a soak: starts a server, takes the goldens, lets the actors work, checks what is left."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from benchmarks.residency.processes import SHARED_MEMORY
from benchmarks.servers import COMMON_FLAGS, Server, free_port
from benchmarks.soak.actors import client, killer, sampler, seeded, switcher
from benchmarks.soak.cases import ALIASES, all_cases
from benchmarks.soak.growth import files_in
from benchmarks.soak.ledger import FAULTS
from benchmarks.soak.run import QUIET_CALL, Plan, Run, take_references
from benchmarks.wire import ask
from vllm_hotswap.demo import quickstart as demo

KV_BYTES = 64 << 20
LOG_EVERY_S = 30.0
BAR_EVERY_S = 1.0

log = logging.getLogger("benchmarks")


@dataclass(frozen=True, slots=True)
class Found:
    """A run, and what was left after it."""

    run: Run
    counters: Mapping[str, float]
    """The server's own counters, summed over their labels."""
    exit_status: int | None
    """The status after SIGTERM; None if it had to be killed."""
    processes_left: int
    temp_left: tuple[str, ...]
    shm_left: int
    """Files in /dev/shm, of any process, that were not there at the start."""


def configuration(models: Path, plan: Plan) -> dict[str, Any]:
    """Return a configuration of the three tiny models, with deadlines short enough to expire."""
    entries = {
        alias: {
            "model": str(models / alias),
            "max_model_len": 512,
            "enforce_eager": True,
            "kv_cache_memory_bytes": KV_BYTES,
        }
        for alias in ALIASES
    }
    config: dict[str, Any] = {"default_model": ALIASES[0], "models": entries}
    if "park" in plan.policies:
        config["switching"] = {"parked_timeout": 6.0, "wait_timeout": 60.0}
    if plan.kill_every_s:
        config["recovery"] = {"max_restarts": 1000, "hang_timeout": 5.0}
    return config


async def run_soak(plan: Plan, folder: Path, log_file: Path) -> Found:
    """Soak a server whose files are below `folder`.

    Raises:
        ServerFailed: it did not start.
        BadAnswer: it did not answer as it should before the soak.
    """
    shm_before = set(files_in(SHARED_MEMORY))
    async with _server(plan, folder, log_file) as server:
        family = server.family()
        log.info("recording the reference answers of %d cases", len(all_cases()))
        references = await take_references(server, all_cases())
        run = Run(server, plan, references, folder / "tmp", clients_left=plan.clients)
        await _work(run)
        counters = await _counters(server)
        family += server.family()
        exit_status = server.exit_status
        if exit_status is not None:
            run.problem(f"the server exited by itself with status {exit_status}")
        else:
            exit_status = await server.terminate()
        left = sum(1 for process in set(family) if _is_alive(process))
    return Found(
        run=run,
        counters=counters,
        exit_status=exit_status,
        processes_left=left,
        temp_left=tuple(sorted(str(p.relative_to(run.temp)) for p in files_in(run.temp))),
        shm_left=len(set(files_in(SHARED_MEMORY)) - shm_before),
    )


@asynccontextmanager
async def _server(plan: Plan, folder: Path, log_file: Path) -> AsyncIterator[Server]:
    """Run the server, with its own folder for temporary files."""
    config = folder / "soak.yaml"
    models = demo.write(folder / "models").parent
    config.write_text(json.dumps(configuration(models, plan), indent=1), encoding="utf-8")
    (folder / "tmp").mkdir()
    port = free_port()
    command = [sys.executable, "-m", "vllm_hotswap", "serve", str(config), *COMMON_FLAGS]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # What torch compiles stays for the next start, so it is not a temporary file.
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    variables = {"TMPDIR": str(folder / "tmp"), **caches}
    log.info("starting the server")
    server = Server("hotswap", command, port, log_file, variables)
    try:
        await server.ready()
        yield server
    finally:
        await server.stop()


async def _work(run: Run) -> None:
    """Run all actors, until the time is over and every client has its last answer."""
    plan = run.plan
    numbers = seeded(plan.seed, ["switcher", "killer", *map(str, range(plan.clients))])
    async with asyncio.TaskGroup() as actors:
        others = [actors.create_task(sampler(run)), actors.create_task(_tell(run))]
        if plan.kill_every_s:
            others.append(actors.create_task(killer(run, numbers["killer"])))
        for number in range(plan.clients):
            actors.create_task(client(run, numbers[str(number)]))
        await actors.create_task(switcher(run, numbers["switcher"]))
        for task in others:
            task.cancel()


async def _tell(run: Run) -> None:
    """Show progress: a bar in a terminal, log lines elsewhere."""
    if not sys.stderr.isatty():
        while True:
            await asyncio.sleep(LOG_EVERY_S)
            log.info("soak: %.0f of %.0f s, %s", run.elapsed_s, run.plan.duration_s, summary(run))
    with tqdm(total=round(run.plan.duration_s), desc="soak", unit="s") as bar:
        while True:
            await asyncio.sleep(BAR_EVERY_S)
            bar.n = min(bar.total, round(run.elapsed_s))
            bar.set_postfix_str(summary(run))


def summary(run: Run) -> str:
    """Return the state of a run in a few words."""
    faults = run.ledger.total(*FAULTS) + len(run.problems)
    return (
        f"{len(run.switched)} switches, {sum(run.ledger.counts.values())} requests, "
        f"{len(run.ledger.open)} open, {len(run.kills)} kills, {faults} faults"
    )


async def _counters(server: Server) -> dict[str, float]:
    """Return the server's own counters; none if it is gone."""
    reply = await ask(server.port, "/metrics", manner=QUIET_CALL)
    totals: dict[str, float] = {}
    if reply.status != 200:
        return totals
    for family in text_string_to_metric_families(reply.body.decode()):
        for one in family.samples:
            if one.name.startswith("hotswap_") and one.name.endswith("_total"):
                totals[one.name] = totals.get(one.name, 0.0) + one.value
    return totals


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
