"""The four measurements. Each takes running servers or starts them, and returns a `Part`."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field

from vllm_hotswap.bench.client import BadAnswer, Connection
from vllm_hotswap.bench.load import Load, LoadResult, completion, prompts, run_load
from vllm_hotswap.bench.report import SUMMARY_COLUMNS, Part, Table, summary_row
from vllm_hotswap.bench.servers import Launcher, Model, Server, alone, idle_cpu
from vllm_hotswap.bench.stats import (
    SIDES,
    Bar,
    Side,
    alternate,
    median,
    pair_ratios,
    percentile,
    ratio,
    summarize,
)

log = logging.getLogger("vllm_hotswap.bench")

DISCARDED_SWITCHES = 4
DISCARDED_CALLS = 10
IDLE_AFTER_S = 2.0
IDLE_WINDOW_S = 5.0

BySide = Mapping[Side, list[float]]


@dataclass(frozen=True, slots=True)
class Steady:
    """What the steady-state part does with one pair of servers."""

    size: str
    loads: tuple[Load, ...]
    runs: int
    latency_blocks: int = 0
    """Blocks of calls per side for the router's latency; 0 to leave that out."""
    requests_per_block: int = 50
    tokenize_calls_per_block: int = 250


@dataclass(slots=True)
class _Switches:
    """Samples of `switch`, in milliseconds."""

    call_ms: list[float] = field(default_factory=list)
    server_ms: list[float] = field(default_factory=list)
    phases_ms: dict[str, list[float]] = field(default_factory=dict)
    ttft_ms: list[float] = field(default_factory=list)
    switch_to_first_token_ms: list[float] = field(default_factory=list)


# --- switch ---------------------------------------------------------------------------------


async def switch(server: Server, aliases: tuple[str, str], count: int) -> Part:
    """Switch to and fro on one connection; after each switch, one short streamed request."""
    log.info("switch: %d switches", count)
    samples = _Switches()
    texts = prompts("switch", words=16)
    turns = itertools.cycle(aliases[::-1])
    async with Connection(server.port) as connection:
        for _ in range(DISCARDED_SWITCHES):
            await _switch_once(connection, next(turns), next(texts), _Switches())
        for _ in range(count):
            await _switch_once(connection, next(turns), next(texts), samples)
        await connection.post("/v1/models/switch", {"model": aliases[0]})
    return _switch_part(samples)


async def _switch_once(connection: Connection, alias: str, prompt: str, samples: _Switches) -> None:
    started_s = time.perf_counter()
    answer = await connection.post("/v1/models/switch", {"model": alias})
    between_s = time.perf_counter() - started_s
    stream = await connection.stream(completion(alias, prompt, 2))
    told = answer.json()
    if not told["switched"] or told["current_model"] != alias or stream.model != alias:
        raise BadAnswer(f"the switch to {alias!r} did not happen: {told}")
    samples.call_ms.append(answer.duration_s * 1000)
    samples.server_ms.append(told["duration_ms"])
    samples.ttft_ms.append(stream.ttft_s * 1000)
    samples.switch_to_first_token_ms.append((between_s + stream.ttft_s) * 1000)
    for phase, value in told["phases"].items():
        samples.phases_ms.setdefault(phase, []).append(value)


def _switch_part(samples: _Switches) -> Part:
    named = {
        "switch call, by the client's clock": samples.call_ms,
        "duration_ms, by the server's clock": samples.server_ms,
        **{f"phase {name}": values for name, values in samples.phases_ms.items()},
        "first token of the next request": samples.ttft_ms,
        "switch and first token": samples.switch_to_first_token_ms,
    }
    rows = tuple(summary_row(name, summarize(values)) for name, values in named.items())
    call = summarize(samples.call_ms)
    return Part(
        "switch",
        (Table("Switch between loaded models, ms", ("", *SUMMARY_COLUMNS), rows),),
        (Bar("switch call p50, ms", call.p50, 3.0), Bar("switch call p99, ms", call.p99, 15.0)),
        asdict(samples),
    )


# --- restart --------------------------------------------------------------------------------


async def restart(
    launcher: Launcher, models: tuple[Model, Model], runs: int, switch_ms: Sequence[float]
) -> Part:
    """The same job with plain vLLM: end it, start it with the other model, first token.

    Args:
        switch_ms: samples of "switch and first token" to compare with; may be empty.
    """
    stopped_s: list[float] = []
    first_token_s: list[float] = []
    turns = itertools.cycle(models)
    async with launcher.plain(next(turns)) as server:
        await _first_token(server, models[0])
        for number in range(runs):
            model = next(turns)
            log.info("restart: %d of %d, with %s", number + 1, runs, model.alias)
            started_s = time.perf_counter()
            await server.stop()
            stopped_s.append(time.perf_counter() - started_s)
            await server.restart(launcher.plain_command(model))
            await _first_token(server, model)
            first_token_s.append(time.perf_counter() - started_s)
    return _restart_part(stopped_s, first_token_s, switch_ms)


def _restart_part(
    stopped_s: list[float], first_token_s: list[float], switch_ms: Sequence[float]
) -> Part:
    rows = [
        summary_row("SIGTERM until exit", summarize(stopped_s)),
        summary_row("SIGTERM until first token of the other model", summarize(first_token_s)),
    ]
    tables = [Table("Restart of plain vLLM, s", ("", *SUMMARY_COLUMNS), tuple(rows))]
    samples: dict[str, object] = {"stopped_s": stopped_s, "first_token_s": first_token_s}
    if switch_ms:
        factor = ratio(first_token_s, switch_ms) * 1000
        row = ("restart / switch, to the first token", f"{factor:.0f}")
        tables.append(Table("Ratio of medians", ("", "ratio"), (row,)))
        samples["ratio_to_switch"] = factor
    return Part("restart", tuple(tables), (), samples)


async def _first_token(server: Server, model: Model) -> None:
    async with Connection(server.port) as connection:
        await connection.stream(completion(model.alias, "Hello", 1))
