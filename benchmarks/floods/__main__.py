"""The command line of the floods."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import environment, report
from benchmarks.__main__ import run_until_told, status_of, warn_if_busy
from benchmarks.floods import results
from benchmarks.floods.attacker import AttackerFailed
from benchmarks.floods.kinds import KINDS, Kind
from benchmarks.floods.run import CONNECTIONS, Found, Plan, flood, flooded

log = logging.getLogger("benchmarks")

DEFAULT = Plan(seconds=60, around_s=30, warm_up_s=5, rest_s=2, per_second=8, nice=19)
QUICK = Plan(seconds=6, around_s=4, warm_up_s=2, rest_s=0.5, per_second=8, nice=19)

KEPT = (
    "date",
    "arguments",
    "cpu",
    "cores",
    "memory_gib",
    "python",
    "versions",
    "git_revision",
    "load_average_before",
)
"""What is kept of the environment."""


@dataclass(slots=True)
class Floods:
    """All requested floods. The mutable state is the list of those that are over."""

    plan: Plan
    kinds: Sequence[Kind]
    out: Path
    is_fake: bool
    environment: dict[str, Any]
    found: list[Found] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.out / "floods.json"

    async def run(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="hotswap-floods-") as folder:
                await self._flood(Path(folder))
        finally:
            if self.found:
                tables = results.tables(self.found)
                print("\n\n".join(map(report.render_table, tables)), flush=True)

    async def _flood(self, folder: Path) -> None:
        log.info("starting the server")
        async with flooded(folder, self.out, self.is_fake) as at:
            for number, kind in enumerate(self.kinds, 1):
                log.info("flood %d of %d: %s", number, len(self.kinds), kind.name)
                self.found.append(await flood(at, kind, self.plan))
                self._write()

    def _write(self) -> None:
        """Write all floods that are over, so that a later failure loses nothing."""
        options = {
            **asdict(self.plan),
            "engines": "fake" if self.is_fake else "vLLM",
            "limits.connections": CONNECTIONS,
        }
        rows = [results.row(found) for found in self.found]
        content = {"environment": self.environment, "options": options, "rows": rows}
        report.write(self.path, content)


def main(argv: Sequence[str] | None = None) -> int:
    """Flood, print tables, write JSON. Returns 1 if another user met an error."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    floods = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    warn_if_busy(floods.environment)
    if status := status_of("floods", lambda: run_until_told(floods.run()), AttackerFailed):
        return status
    print(f"All figures: {floods.path}")
    return int(any("errors" in results.missed(found) for found in floods.found))


def parse(arguments: Sequence[str]) -> Floods:
    parser = make_parser()
    args = parser.parse_args(arguments)
    names = args.only.split(",") if args.only else list(KINDS)
    if unknown := [name for name in names if name not in KINDS]:
        parser.error(f"--only: unknown flood {', '.join(unknown)}; known: {', '.join(KINDS)}")
    usual = QUICK if args.quick else DEFAULT
    plan = Plan(
        args.seconds if args.seconds is not None else usual.seconds,
        args.around if args.around is not None else usual.around_s,
        args.warm_up if args.warm_up is not None else usual.warm_up_s,
        usual.rest_s,
        args.per_second,
        args.nice,
    )
    least = (plan.seconds, plan.around_s, plan.per_second)
    if not all(0 < value < math.inf for value in least) or not 0 <= plan.warm_up_s < math.inf:
        parser.error("--seconds, --around and --per-second must be above 0, --warm-up at least 0")
    described = environment.describe([word for word in arguments if not word.startswith("/")])
    here = {name: described[name] for name in KEPT}
    return Floods(plan, [KINDS[name] for name in names], args.out, args.fake, here)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.floods",
        description="Flood a server on loopback, in one way after the other, and note how long "
        "another user waits for a first token before, during and after. With the defaults it takes "
        f"about {round(len(KINDS) * _total_s(DEFAULT) / 60)} minutes, with --quick "
        f"{round(len(KINDS) * _total_s(QUICK) / 60)}; do not run anything else at the same time.",
        epilog=f"floods, in their order: {', '.join(KINDS)}",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("bench-results"), help="folder for floods.json and logs")
    add("--only", metavar="FLOOD[,FLOOD]", help="only these floods (default: all)")
    add("--seconds", type=float, help=f"seconds of each flood (default: {DEFAULT.seconds:g})")
    add("--around", type=float, help=f"seconds before and after it (default: {DEFAULT.around_s:g})")
    add(
        "--warm-up",
        type=float,
        help="seconds of a first flood that does not count "
        f"(default: {DEFAULT.warm_up_s:g}; 0: none)",
    )
    add(
        "--per-second",
        type=float,
        default=DEFAULT.per_second,
        help=f"streams of the other user per second (default: {DEFAULT.per_second:g})",
    )
    add(
        "--nice",
        type=int,
        choices=range(20),
        metavar="N",
        default=DEFAULT.nice,
        help="by how much the attacker's priority is lowered, 0 to 19, so that its own load is "
        f"not taken for the server's (default: {DEFAULT.nice})",
    )
    add("--quick", action="store_true", help="a few seconds of each, to see that everything works")
    add("--fake", action="store_true", help="a server on fake engines, without vLLM")
    return parser


def _total_s(plan: Plan) -> float:
    """Return the seconds that one flood takes."""
    return plan.warm_up_s + 2 * plan.rest_s + plan.seconds + 2 * plan.around_s


if __name__ == "__main__":
    sys.exit(main())
