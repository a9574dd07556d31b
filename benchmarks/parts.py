"""The four measurements. Each takes running servers or starts them, and returns a `Part`."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field

from benchmarks.client import BadAnswer, Connection
from benchmarks.load import Load, LoadResult, completion, prompts, run_load
from benchmarks.report import SUMMARY_COLUMNS, Part, Table, summary_row
from benchmarks.servers import Launcher, Model, Server, alone, idle_cpu
from benchmarks.stats import (
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

log = logging.getLogger("benchmarks")

DISCARDED_SWITCHES = 4
DISCARDED_CALLS = 10
IDLE_AFTER_S = 2.0
IDLE_WINDOW_S = 5.0

BySide = Mapping[Side, list[float]]


@dataclass(frozen=True, slots=True)
class Steady:
    """The plan of the steady-state part for one pair of servers."""

    size: str
    loads: tuple[Load, ...]
    runs: int
    latency_blocks: int = 0
    """Blocks of calls per side for the router's latency; 0 to skip it."""
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
    """Switch back and forth on one connection; after each switch, one short streamed request."""
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
    """Do the same with plain vLLM: stop it, start it with the other model, get the first token.

    Args:
        switch_ms: samples of "switch and first token" to compare with; may be empty.
    """
    stopped_s: list[float] = []
    first_token_s: list[float] = []
    terminated_s = 0.0
    for number, model in zip(range(runs + 1), itertools.cycle(models), strict=False):
        log.info("restart: start %d of %d, with %r", number + 1, runs + 1, model.alias)
        async with launcher.plain(model) as server:
            await _first_token(server, model)
            if number > 0:
                first_token_s.append(time.perf_counter() - terminated_s)
            terminated_s = time.perf_counter()
        stopped_s.append(time.perf_counter() - terminated_s)
    return _restart_part(stopped_s, first_token_s, switch_ms)


def _restart_part(
    stopped_s: list[float], first_token_s: list[float], switch_ms: Sequence[float]
) -> Part:
    rows = [
        summary_row("SIGTERM to exit", summarize(stopped_s)),
        summary_row("SIGTERM to first token of the other model", summarize(first_token_s)),
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


# --- steady ---------------------------------------------------------------------------------


async def steady(servers: Mapping[Side, Server], alias: str, plan: Steady) -> Part:
    """Measure throughput, time to first token and the router's latency; the sides take turns."""
    runs: dict[int, dict[Side, list[LoadResult]]] = {}
    for load in plan.loads:
        runs[load.clients] = await _throughput(servers, alias, plan, load)
    calls = await _router_latency(servers, alias, plan) if plan.latency_blocks else {}
    idle = {side: await _idle(servers, side) for side in SIDES}
    tables = [_throughput_table(plan.size, runs), _ttft_table(plan.size, runs)]
    tables += [_latency_table(name, by_side) for name, by_side in calls.items()]
    tables.append(_idle_table(idle))
    samples = {"plan": asdict(plan), "idle_cpu": idle, "calls_ms": calls}
    samples["runs"] = [
        {"clients": clients, "side": side, "tokens_per_s": result.tokens_per_s, **asdict(result)}
        for clients, by_side in runs.items()
        for side, results in by_side.items()
        for result in results
    ]
    bars = (*_throughput_bars(plan.size, runs), *_latency_bars(calls))
    return Part(f"steady-{plan.size}", tuple(tables), bars, samples)


async def _throughput(
    servers: Mapping[Side, Server], alias: str, plan: Steady, load: Load
) -> dict[Side, list[LoadResult]]:
    results: dict[Side, list[LoadResult]] = {side: [] for side in SIDES}
    warm_up = Load(load.clients, 1, min(16, load.output_tokens), load.prompt_words)
    for side in alternate(plan.runs):
        number = len(results[side])
        with alone(servers[side], servers.values()) as server:
            await run_load(server.port, alias, warm_up, f"warm-up {number}")
            result = await run_load(server.port, alias, load, f"{load.clients} {number}")
        results[side].append(result)
        log.info(
            "steady %s: %d clients, %s: %.0f tok/s",
            plan.size,
            load.clients,
            side,
            result.tokens_per_s,
        )
    return results


async def _router_latency(
    servers: Mapping[Side, Server], alias: str, plan: Steady
) -> dict[str, BySide]:
    """Time small calls in alternating blocks: one generated token, and no engine at all."""
    generate: dict[Side, list[float]] = {side: [] for side in SIDES}
    tokenize: dict[Side, list[float]] = {side: [] for side in SIDES}
    for side in alternate(plan.latency_blocks):
        seed = f"latency {len(generate[side])}"
        with alone(servers[side], servers.values()) as server:
            generate[side] += await _generate_calls(server, alias, plan.requests_per_block, seed)
            tokenize[side] += await _tokenize_calls(server, alias, plan.tokenize_calls_per_block)
        log.info(
            "latency %s: one token %.2f ms, /tokenize %.2f ms",
            side,
            median(generate[side]),
            median(tokenize[side]),
        )
    return {"one-token completion": generate, "/tokenize (no engine)": tokenize}


async def _generate_calls(server: Server, alias: str, count: int, seed: str) -> list[float]:
    texts = prompts(seed, words=4)
    async with Connection(server.port) as connection:
        calls = [
            await connection.post("/v1/completions", completion(alias, next(texts), 1))
            for _ in range(DISCARDED_CALLS + count)
        ]
    return [call.duration_s * 1000 for call in calls[DISCARDED_CALLS:]]


async def _tokenize_calls(server: Server, alias: str, count: int) -> list[float]:
    body = {"model": alias, "prompt": "Hello there"}
    async with Connection(server.port) as connection:
        calls = [await connection.post("/tokenize", body) for _ in range(DISCARDED_CALLS + count)]
    return [call.duration_s * 1000 for call in calls[DISCARDED_CALLS:]]


async def _idle(servers: Mapping[Side, Server], side: Side) -> float:
    with alone(servers[side], servers.values()) as server:
        return await idle_cpu(server, IDLE_AFTER_S, IDLE_WINDOW_S)


def _throughput_table(size: str, runs: Mapping[int, Mapping[Side, list[LoadResult]]]) -> Table:
    rows = []
    for clients, by_side in runs.items():
        speeds = _speeds(by_side)
        rows += [_speed_row(clients, side, speeds[side]) for side in SIDES]
        pairs = pair_ratios(speeds["hotswap"], speeds["plain"])
        each = " ".join(f"{value:.3f}" for value in pairs)
        middle = f"{ratio(speeds['hotswap'], speeds['plain']):.3f}"
        rows.append((f"{clients} clients, hotswap / plain", middle, "", each))
    columns = ("", "median", "spread", "each run")
    return Table(f"Throughput, {size} model, output tokens/s", columns, tuple(rows))


def _speed_row(clients: int, side: Side, speeds: list[float]) -> tuple[str, ...]:
    summary = summarize(speeds)
    each = " ".join(f"{speed:.0f}" for speed in speeds)
    return (f"{clients} clients, {side}", f"{summary.p50:.1f}", f"{summary.spread:.1%}", each)


def _ttft_table(size: str, runs: Mapping[int, Mapping[Side, list[LoadResult]]]) -> Table:
    rows = tuple(
        summary_row(
            f"{clients} clients, {side}",
            summarize([value for result in by_side[side] for value in result.ttft_ms]),
        )
        for clients, by_side in runs.items()
        for side in SIDES
    )
    return Table(f"Time to first token, {size} model, ms", ("", *SUMMARY_COLUMNS), rows)


def _latency_table(name: str, calls: BySide) -> Table:
    rows = [summary_row(side, summarize(calls[side]), digits=3) for side in SIDES]
    added = [f"{_added_ms(calls, percent):.3f}" for percent in (50, 95, 99)]
    rows.append(("added by hotswap", *added, "", "", ""))
    return Table(f"{name}, one client, ms", ("", *SUMMARY_COLUMNS), tuple(rows))


def _idle_table(idle: Mapping[Side, float]) -> Table:
    rows = tuple((side, f"{idle[side]:.1%}") for side in SIDES)
    return Table(
        "CPU time of an idle server (frozen while the other is measured)", ("", "of one core"), rows
    )


def _throughput_bars(size: str, runs: Mapping[int, Mapping[Side, list[LoadResult]]]) -> list[Bar]:
    bars = []
    for clients, by_side in runs.items():
        speeds = _speeds(by_side)
        value = ratio(speeds["hotswap"], speeds["plain"])
        name = f"throughput / plain, {size}, {clients} clients"
        bars.append(Bar(name, value, 1.0, at_least=True))
    return bars


def _latency_bars(calls: Mapping[str, BySide]) -> list[Bar]:
    return [
        Bar(f"{name}: p50 added, ms", _added_ms(by_side, 50), 0.5)
        for name, by_side in calls.items()
    ]


def _added_ms(calls: BySide, percent: float) -> float:
    return percentile(calls["hotswap"], percent) - percentile(calls["plain"], percent)


def _speeds(by_side: Mapping[Side, list[LoadResult]]) -> dict[Side, list[float]]:
    return {side: [result.tokens_per_s for result in by_side[side]] for side in SIDES}


# --- startup --------------------------------------------------------------------------------


async def startup(
    launcher: Launcher, models: tuple[Model, Model], runs: int, *, discard: bool
) -> Part:
    """Time from the start of the process to `/health` and to the first token.

    Args:
        discard: start each once before, so that caches on disk are warm.
    """
    if discard:
        for side in SIDES:
            log.info("startup: discarded start of %s", side)
            await _start_once(launcher, models, side)
    health_s: dict[Side, list[float]] = {side: [] for side in SIDES}
    first_token_s: dict[Side, list[float]] = {side: [] for side in SIDES}
    for side in alternate(runs):
        health, first_token = await _start_once(launcher, models, side)
        health_s[side].append(health)
        first_token_s[side].append(first_token)
        log.info("startup: %s: %.1f s to /health, %.1f s to a token", side, health, first_token)
    return _startup_part({"/health": health_s, "first token": first_token_s})


async def _start_once(
    launcher: Launcher, models: tuple[Model, Model], side: Side
) -> tuple[float, float]:
    starting: AbstractAsyncContextManager[Server] = (
        launcher.hotswap(*models) if side == "hotswap" else launcher.plain(models[0])
    )
    async with starting as server:
        await _first_token(server, models[0])
        return server.health_s, time.perf_counter() - server.started_s


def _startup_part(seconds: Mapping[str, BySide]) -> Part:
    rows, bars = [], []
    for name, by_side in seconds.items():
        rows.append(summary_row(f"hotswap, two models, to {name}", summarize(by_side["hotswap"])))
        rows.append(summary_row(f"plain, one model, to {name}", summarize(by_side["plain"])))
        value = ratio(by_side["hotswap"], by_side["plain"])
        bars.append(Bar(f"start-up / plain, to {name}", value, 1.3))
    table = Table("Start-up, s", ("", *SUMMARY_COLUMNS), tuple(rows))
    return Part("startup", (table,), tuple(bars), dict(seconds))
