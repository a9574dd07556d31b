"""The command line of the benchmark of mode `auto`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import environment, report
from benchmarks.__main__ import environment_table, run_until_told, status_of, warn_if_busy
from benchmarks.auto import checkpoints, results, workloads
from benchmarks.auto.run import COSTS, Plan, measure
from benchmarks.auto.workloads import Amount
from benchmarks.servers import Launcher, Model

SETTINGS = {
    "max_model_len": 1024,
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
}


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure, from the command line."""

    plan: Plan
    out: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Returns the exit status; a missed bar is not a failure."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    described = environment.describe([Path(word).name for word in arguments])
    print(report.render_table(environment_table(described)), flush=True)
    warn_if_busy(described)
    return status_of("auto", lambda: run_until_told(_run(options, described)))


def parse(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.auto",
        description="Play traces of requests for three models on servers that switch by "
        "themselves, with the policies fifo and batch in turn. Do not run anything else at "
        "the same time.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("bench-results"), help="folder for results and logs")
    add("--repeats", type=int, default=3, help="repetitions (default: 3)")
    add("--requests", type=int, default=300, help="requests of each trace (default: 300)")
    add("--rate", type=float, default=10.0, help="requests per second of the Zipf trace")
    add("--dear-requests", type=int, default=60, help="the same for costly switches")
    add("--dear-rate", type=float, default=2.0, help="the same for costly switches")
    add("--only", choices=list(COSTS), help="only cheap, or only costly switches")
    args = parser.parse_args(arguments)
    for name in ("repeats", "requests", "rate", "dear_requests", "dear_rate"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    amounts = {
        "cheap": Amount(args.requests, args.rate),
        "dear": Amount(args.dear_requests, args.dear_rate),
    }
    chosen = {cost: amounts[cost] for cost in COSTS if args.only in (None, cost)}
    return Options(Plan(args.repeats, chosen), args.out)


async def _run(options: Options, described: dict[str, Any]) -> None:
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    launcher = Launcher(options.out / f"auto-{stamp}")
    with tempfile.TemporaryDirectory(prefix="hotswap-auto-") as folder:
        models = {
            cost: [
                Model(alias, path, SETTINGS)
                for alias, path in checkpoints.make(Path(folder) / cost, COSTS[cost].width).items()
            ]
            for cost in options.plan.amounts
        }
        part = results.part(await measure(launcher, models, options.plan))
    described["load_average_after"] = round(os.getloadavg()[0], 2)
    settings = {
        "repeats": options.plan.repeats,
        "amounts": {cost: asdict(amount) for cost, amount in options.plan.amounts.items()},
        "costs": {cost: asdict(COSTS[cost]) for cost in options.plan.amounts},
        "models": {alias: dict(SETTINGS) for alias in checkpoints.GREETINGS},
        "agents": workloads.AGENTS,
        "think_s": workloads.THINK_S,
        "zipf": workloads.ZIPF,
        "seed": workloads.SEED,
    }
    print(f"\n{report.render(part)}\n", flush=True)
    path = options.out / f"auto-{stamp}.json"
    report.write(path, report.document(described, settings, [part]))
    print(f"Samples and environment: {path}")


if __name__ == "__main__":
    sys.exit(main())
