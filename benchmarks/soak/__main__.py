"""The command line of the soak."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import environment, report
from benchmarks.__main__ import environment_table, run_until_told, status_of, warn_if_busy
from benchmarks.soak import results
from benchmarks.soak.run import POLICIES, Plan
from benchmarks.soak.runner import Found, run_soak

log = logging.getLogger("benchmarks")

MIN_CLIENTS = 2


@dataclass(frozen=True, slots=True)
class Options:
    """What to do, from the command line."""

    plan: Plan
    out: Path


@dataclass(slots=True)
class Soak:
    """One soak, and where its results go. The mutable state is whether all checks passed."""

    options: Options
    stamp: str
    environment: dict[str, object]
    passed: bool = False

    @property
    def path(self) -> Path:
        return self.options.out / f"soak-{self.stamp}.json"

    async def run(self) -> None:
        log_file = self.options.out / f"soak-{self.stamp}.log"
        with tempfile.TemporaryDirectory(prefix="hotswap-soak-") as folder:
            found = await run_soak(self.options.plan, Path(folder), log_file)
        self._finish(found)

    def _finish(self, found: Found) -> None:
        """Print the results, and write them to files."""
        part = results.part(found)
        self.environment["load_average_after"] = round(os.getloadavg()[0], 2)
        tables = (
            f"{report.render_table(environment_table(self.environment))}\n\n{report.render(part)}"
        )
        print(tables, flush=True)
        report.write(self.path, report.document(self.environment, {}, [part]))
        self.path.with_suffix(".md").write_text(f"# Soak\n\n{tables}\n", encoding="utf-8")
        failed = [check for check in results.checks(found) if check.count]
        for check in failed:
            print(f"soak: FAILED: {check.name}: {check.count}", file=sys.stderr)
        self.passed = not failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak. Returns 1 if any count that must be 0 is not."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    described = environment.describe([Path(word).name for word in arguments])
    soak = Soak(options, datetime.now(UTC).strftime("%Y%m%d-%H%M%S"), described)
    warn_if_busy(described)
    if status := status_of("soak", lambda: run_until_told(soak.run())):
        return status
    print(f"All figures: {soak.path}")
    return 0 if soak.passed else 1


def parse(arguments: Sequence[str]) -> Options:
    parser = make_parser()
    args = parser.parse_args(arguments)
    policies = tuple(args.policies.split(","))
    if unknown := sorted({*policies} - {*POLICIES}):
        parser.error(f"--policies: unknown {', '.join(unknown)}; known: {','.join(POLICIES)}")
    if not (args.minutes > 0 and math.isfinite(args.minutes)):
        parser.error("--minutes must be above 0")
    if not (args.kill_every >= 0 and math.isfinite(args.kill_every)):
        parser.error("--kill-every must be at least 0; 0 for no kills")
    if args.clients < MIN_CLIENTS:
        parser.error(f"--clients must be at least {MIN_CLIENTS}")
    plan = Plan(args.minutes * 60, args.seed, args.kill_every, args.clients, policies)
    return Options(plan, args.out)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description="Start a server with three tiny models, switch it continually under mixed "
        "load, kill its engine host at intervals, and account for every request. The exit status "
        "is 1 if one was lost, hung or answered wrongly.",
    )
    add = parser.add_argument
    add("--minutes", type=float, default=15.0, help="minutes to run (default: 15)")
    add("--seed", type=int, default=1, help="seed of the random choices (default: 1)")
    add("--out", type=Path, default=Path("bench-results"), help="folder for results and the log")
    add(
        "--kill-every",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="seconds between two kills of the engine host (default: 120; 0 for none)",
    )
    add("--clients", type=int, default=12, help="number of clients (default: 12)")
    add(
        "--policies",
        default=",".join(POLICIES),
        metavar="POLICY[,POLICY]",
        help=f"what happens at a drain's deadline: some of {','.join(POLICIES)} (default: all)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
