"""Part `transformers`: the same models brought up by `transformers`, in a warm process.

With `transformers serve` where it can run (it needs the package `accelerate`, which vLLM does not),
and always with its stand-in, which loads and drops models without a server.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.client import BadAnswer, Connection
from benchmarks.load import prompts
from benchmarks.report import Part, Table
from benchmarks.residency import standin
from benchmarks.residency.checkpoints import Checkpoint
from benchmarks.residency.steps import steps
from benchmarks.residency.switches import Measured
from benchmarks.servers import Launcher, Server, free_port, running
from benchmarks.stats import median

DISCARDED = 2
SERVE, STANDIN, OURS = "transformers serve", "transformers, stand-in", "vllm-hotswap, cold"
TIMEOUT_S = 300

log = logging.getLogger("benchmarks")


@dataclass(frozen=True, slots=True)
class Load:
    """A model brought up once. Milliseconds."""

    way: str
    model: str
    load_ms: float
    first_token_ms: float
    drop_ms: float


def can_serve(extra: Path | None) -> bool:
    """Whether `transformers serve` finds what it needs, in the environment or in `extra`."""
    here = importlib.util.find_spec("accelerate") is not None
    return here or (extra is not None and (extra / "accelerate").is_dir())


async def measure(
    launcher: Launcher, checkpoints: Sequence[Checkpoint], runs: int, extra: Path | None
) -> list[Load]:
    """Bring each model up and drop it again, `runs` times after the discarded runs."""
    found = await asyncio.to_thread(_stand_in, checkpoints, runs)
    if can_serve(extra):
        async with _serving(launcher, extra) as server:
            log.info("transformers serve was ready after %.1f s", server.health_s)
            turns = [(n, c) for n in range(DISCARDED + runs) for c in checkpoints]
            for number, checkpoint in steps(turns, "transformers serve"):
                load = await _load(server, checkpoint)
                found += [load] if number >= DISCARDED else []
    else:
        log.warning(
            "transformers serve cannot run here: accelerate is not installed; see --serve-extra"
        )
    return found


def _serving(launcher: Launcher, extra: Path | None) -> AbstractAsyncContextManager[Server]:
    port = free_port()
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    command += ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    variables = {"PYTHONPATH": _python_path(extra)} if extra else {}
    log_file = launcher.folder / f"transformers-{port}.log"
    return running(Server("transformers", command, port, log_file, variables))


def _python_path(extra: Path) -> str:
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(extra.resolve()), *([before] if before else [])])


async def _load(server: Server, checkpoint: Checkpoint) -> Load:
    model = str(checkpoint.folder)
    async with Connection(server.port) as connection:
        loaded = await connection.post("/load_model", {"model": model})
        if b'"ready"' not in loaded.body or b'"cached": true' in loaded.body:
            raise BadAnswer(f"{checkpoint.alias!r} was not loaded: {loaded.body[-300:]!r}")
        # Not streamed: its event streams have neither a usage nor an end that could be checked.
        body = {"model": model, "prompt": next(prompts("residency", words=1)), "max_tokens": 1}
        token = await connection.post("/v1/completions", body)
        dropped = await connection.post("/reset", {})
    return Load(
        SERVE,
        checkpoint.alias,
        loaded.duration_s * 1000,
        token.duration_s * 1000,
        dropped.duration_s * 1000,
    )


def _stand_in(checkpoints: Sequence[Checkpoint], runs: int) -> list[Load]:
    log.info("transformers: stand-in, %d loads of each model", runs)
    aliases = {str(c.folder): c.alias for c in checkpoints}
    command = [sys.executable, str(standin.__file__), str(DISCARDED + runs), *aliases]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    if done.returncode != 0:
        raise BadAnswer(f"the transformers stand-in failed:\n{done.stderr[-800:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    loads = [
        Load(STANDIN, aliases[folder], *(seconds * 1000 for seconds in times))
        for folder, *times in lines
    ]
    return loads[DISCARDED * len(aliases) :]


def part(aliases: Sequence[str], found: Sequence[Load], measured: Measured | None) -> Part:
    """Return all ways side by side; ours if part `switch` has been measured."""
    loads = [*found, *(_ours(aliases, measured) if measured else [])]
    rows = []
    for alias in aliases:
        for way in (OURS, SERVE, STANDIN):
            chosen = [one for one in loads if (one.way, one.model) == (way, alias)]
            if chosen:
                rows.append((f"{alias}, {way}", *_figures(chosen)))
    columns = ("model, by", "load", "first token", "both", "both, max", "drop", "n")
    title = "Bring a model up in a warm process, ms (medians)"
    note = {"transformers_serve_ran": any(one.way == SERVE for one in found)}
    samples = {**note, "loads": [asdict(one) for one in found]}
    return Part("transformers", (Table(title, columns, tuple(rows)),), (), samples)


def _figures(loads: Sequence[Load]) -> tuple[str, ...]:
    both = [one.load_ms + one.first_token_ms for one in loads]
    values = (
        median([one.load_ms for one in loads]),
        median([one.first_token_ms for one in loads]),
        median(both),
        max(both),
        median([one.drop_ms for one in loads]),
    )
    return (*(f"{value:.0f}" for value in values), str(len(loads)))


def _ours(aliases: Sequence[str], measured: Measured) -> list[Load]:
    return [
        Load(OURS, alias, switch.call_ms, switch.first_token_ms, switch.down_ms)
        for alias in aliases
        for switch in measured.of(alias, "cold")
    ]
