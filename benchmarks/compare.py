"""`python -m benchmarks.compare --before SRC`: two versions of this server, in turn.

`SRC` is the `src` folder of another checkout, of the commit before, for example. A server of each
runs on the same models with the same flags. They take turns, with a different one first in each
round, and the idle one is stopped (SIGSTOP). In each turn: 32 clients that stream completions; one
client that does so alone; and switches back and forth. Ratios are of the two turns of one round, so
that slow drifts of the machine cancel out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import vllm_hotswap
from benchmarks import environment, report
from benchmarks.__main__ import choose, run_until_told, status_of, warn_if_busy
from benchmarks.client import BadAnswer, Connection
from benchmarks.load import Load, run_load
from benchmarks.report import Part, Table
from benchmarks.servers import (
    COMMON_FLAGS,
    FAKE_FLAGS,
    Model,
    Server,
    alone,
    free_port,
    hotswap_config,
    running,
)
from benchmarks.stats import Bar, median, percentile, summarize
from vllm_hotswap.config.reader import load_config
from vllm_hotswap.demo import quickstart as demo
from vllm_hotswap.errors import ConfigError

log = logging.getLogger("benchmarks")

NOW, BEFORE = "now", "before"
SIDES = (NOW, BEFORE)
OURS = Path(vllm_hotswap.__file__).parent.parent
BAR = 0.99
"""The least ratio of this version to the one before."""

CONFIDENCE = 1.96
"""95 %, in standard deviations of the normal distribution."""

Models = tuple[Model, Model]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a turn consists of, and how many rounds there are."""

    rounds: int
    many: Load
    one: Load
    switches: int


FULL = Plan(16, Load(clients=32, requests=2, output_tokens=64), Load(1, 30, 4), switches=20)
QUICK = Plan(2, Load(clients=8, requests=1, output_tokens=8), Load(1, 4, 4), switches=4)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one server did in one turn. Times are in milliseconds."""

    side: str
    tokens_per_s: float
    """With many clients."""
    many_ms: list[float]
    """Times to the first token, with many clients."""
    one_ms: list[float]
    """The same with one client."""
    switch_ms: list[float]
    """Times of calls that switch."""
    many_cpu_ms: float
    """CPU time of all processes of the server, for one token, with many clients."""
    one_cpu_ms: float
    """The same for one request, with one client."""


Round = Mapping[str, Turn]
"""The two turns of a round, by side."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that is reported of each turn."""

    name: str
    of: Callable[[Turn], float]
    is_time: bool = True
    """Whether less is better."""

    def ratio(self, now: Turn, before: Turn) -> float:
        """Return the ratio, above 1 if it is better now; `nan` if the clock has seen nothing."""
        value, other = self.of(now), self.of(before)
        if not (value and other):
            return math.nan
        return other / value if self.is_time else value / other


FIGURES = (
    Figure("throughput of many clients, tokens/s", lambda t: t.tokens_per_s, is_time=False),
    Figure("first token, many clients, p50, ms", lambda t: percentile(t.many_ms, 50)),
    Figure("first token, many clients, p95, ms", lambda t: percentile(t.many_ms, 95)),
    Figure("first token, one client, p50, ms", lambda t: percentile(t.one_ms, 50)),
    Figure("first token, one client, p95, ms", lambda t: percentile(t.one_ms, 95)),
    Figure("CPU of the server, many clients, ms/token", lambda t: t.many_cpu_ms),
    Figure("CPU of the server, one client, ms/request", lambda t: t.one_cpu_ms),
    Figure("switch call, p50, ms", lambda t: percentile(t.switch_ms, 50)),
    Figure("switch call, p95, ms", lambda t: percentile(t.switch_ms, 95)),
)


@dataclass(frozen=True, slots=True)
class Sides:
    """The two versions, and how a server of either is started."""

    trees: Mapping[str, Path]
    is_fake: bool
    folder: Path
    """For the configuration."""
    out: Path
    """For logs."""

    @asynccontextmanager
    async def server(self, side: str, models: Models) -> AsyncIterator[Server]:
        """Run a server of one version. Raises `ServerFailed`."""
        config = self.folder / "models.yaml"
        config.write_text(json.dumps(hotswap_config(models), indent=1), encoding="utf-8")
        port = free_port()
        command = [sys.executable, "-P", "-m", "vllm_hotswap", "serve", str(config)]
        command += ["--host", "127.0.0.1", *COMMON_FLAGS, *(FAKE_FLAGS if self.is_fake else [])]
        variables = {"PYTHONPATH": str(self.trees[side])}
        log_file = self.out / f"compare-{side}-{port}.log"
        command += ["--port", str(port)]
        async with running(Server("hotswap", command, port, log_file, variables)) as server:
            yield server


def checked(tree: Path) -> Path:
    """Return a `src` folder as absolute. Raises `ConfigError` if it does not have this package."""
    tree = tree.resolve()
    code = "import vllm_hotswap; print(vllm_hotswap.__file__)"
    variables = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-P", "-c", code]
    asked = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if Path(asked.stdout.strip()).parent.parent.resolve() != tree:
        raise ConfigError(f"{str(tree)!r} has no package vllm_hotswap; name a checkout's `src`")
    return tree


async def turn(server: Server, side: str, models: Models, plan: Plan, seed: str) -> Turn:
    """Measure one server for one turn. Raises `BadAnswer` if it does not answer as it should."""
    alias, other = (model.alias for model in models)
    warm_up = Load(plan.many.clients, 1, 8)
    await run_load(server.port, alias, warm_up, f"warm-up {seed}")
    cpu_s = [server.cpu_s()]
    many = await run_load(server.port, alias, plan.many, f"many {seed}")
    cpu_s.append(server.cpu_s())
    one = await run_load(server.port, alias, plan.one, f"one {seed}")
    cpu_s.append(server.cpu_s())
    switch_ms = []
    async with Connection(server.port) as connection:
        turns = itertools.islice(itertools.cycle((other, alias)), plan.switches + plan.switches % 2)
        for target in turns:  # an even number: at the end the first one is active
            answer = await connection.post("/v1/models/switch", {"model": target})
            if not answer.json()["switched"]:
                raise BadAnswer(f"the switch to {target!r} did not happen: {answer.json()}")
            switch_ms.append(answer.duration_s * 1000)
    many_cpu_ms = (cpu_s[1] - cpu_s[0]) / many.output_tokens * 1000
    one_cpu_ms = (cpu_s[2] - cpu_s[1]) / len(one.ttft_ms) * 1000
    return Turn(
        side, many.tokens_per_s, many.ttft_ms, one.ttft_ms, switch_ms, many_cpu_ms, one_cpu_ms
    )


async def measure(sides: Sides, models: Models, plan: Plan, rounds: list[Round]) -> None:
    """Run all rounds, with a turn of each side in each; the first round does not count.

    Args:
        rounds: gets each round when it is over.
    """
    async with AsyncExitStack() as stack:
        servers = {}
        for side in SIDES:
            log.info("starting the server: %s", side)
            servers[side] = await stack.enter_async_context(sides.server(side, models))
        for number in range(plan.rounds + 1):
            found: dict[str, Turn] = {}
            for side in SIDES if number % 2 else SIDES[::-1]:
                with alone(servers[side], servers.values()) as server:
                    found[side] = await turn(server, side, models, plan, str(number))
            log.info("round %d: %s", number, _brief(found))
            rounds += [found] if number else []


def _brief(found: Round) -> str:
    return ", ".join(f"{side} {found[side].tokens_per_s:.0f} tokens/s" for side in SIDES)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the median, for any distribution of the values.

    By order statistics, with the normal approximation of the binomial distribution. With few
    values, it is the least and the greatest.
    """
    ordered, count = sorted(values), len(values)
    below = max(0, math.floor((count - CONFIDENCE * math.sqrt(count)) / 2))
    return ordered[below], ordered[count - 1 - below]


def part(rounds: Sequence[Round]) -> Part:
    """Return medians of the turns with their ranges, ratios of the rounds, and the bars."""
    rows, bars = [], []
    for figure in FIGURES:
        cells = []
        for side in SIDES:
            summary = summarize([figure.of(found[side]) for found in rounds])
            cells.append(f"{summary.p50:.2f} ({summary.minimum:.2f} to {summary.maximum:.2f})")
        ratios = [figure.ratio(found[NOW], found[BEFORE]) for found in rounds]
        low, high = interval(ratios)
        rows.append((figure.name, *cells, f"{median(ratios):.3f}", f"{low:.3f} to {high:.3f}"))
        bars.append(Bar(f"{figure.name}: ratio", median(ratios), BAR, at_least=True))
    columns = ("median (least to most)", *SIDES, "ratio", "of it, 95 %")
    table = Table("Now and before; ratios above 1: better now", columns, tuple(rows))
    samples = {"rounds": [[asdict(found[side]) for side in SIDES] for found in rounds]}
    return Part("compare", (table,), tuple(bars), samples)


async def run(args: argparse.Namespace, plan: Plan, described: dict[str, Any]) -> None:
    """Measure, print tables, write JSON; if it is stopped, of the rounds that are over."""
    trees = {NOW: OURS, BEFORE: checked(args.before)}
    revisions = {side: environment.git_revision(tree) for side, tree in trees.items()}
    log.info("now: %s, before: %s", *revisions.values())
    options = {"plan": asdict(plan), "revisions": revisions, "fake": args.fake}
    rounds: list[Round] = []
    try:
        with tempfile.TemporaryDirectory(prefix="hotswap-compare-") as name:
            folder = Path(name)
            models = choose(load_config(demo.write(folder / "demo")), None)
            await measure(Sides(trees, args.fake, folder, args.out), models, plan, rounds)
    finally:
        if rounds:
            path = args.out / "compare.json"
            report.write(path, report.document(described, options, [part(rounds)]))
            print(f"{report.render(part(rounds))}\n\nAll samples: {path}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison. Returns the exit status; a missed bar is not a failure."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Compare this version of the server with another one, in turn, on the tiny "
        "models. Do not run anything else at the same time.",
    )
    add = parser.add_argument
    add("--before", type=Path, required=True, metavar="SRC", help="the other checkout's src folder")
    add("--out", type=Path, default=Path("bench-results"), help="folder for compare.json and logs")
    add("--rounds", type=int, help=f"rounds (default: {FULL.rounds}, quick {QUICK.rounds})")
    add("--quick", action="store_true", help="small loads, to see that everything works")
    add("--fake", action="store_true", help="servers on fake engines, without vLLM")
    args = parser.parse_args(arguments)
    usual = QUICK if args.quick else FULL
    rounds = usual.rounds if args.rounds is None else args.rounds
    if rounds < 1:
        parser.error("--rounds must be at least 1")
    plan = Plan(rounds, usual.many, usual.one, usual.switches)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    described = environment.describe([Path(word).name for word in arguments])
    warn_if_busy(described)
    return status_of("compare", lambda: run_until_told(run(args, plan, described)))


if __name__ == "__main__":
    sys.exit(main())
