"""The command line of the residency benchmark."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import environment, report
from benchmarks.__main__ import environment_table, run_until_told, status_of, warn_if_busy
from benchmarks.residency import (
    alternative,
    drift,
    number,
    plot,
    residue,
    restart,
    switches,
)
from benchmarks.residency.checkpoints import (
    KV_BYTES,
    LARGEST,
    SIZES,
    TINY,
    TINY_KV_BYTES,
    Checkpoint,
    make_all,
)
from benchmarks.servers import Launcher

log = logging.getLogger("benchmarks")

PARTS = ("switch", "restart", "transformers", "number", "residue", "drift", "compiled")


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each measurement is done."""

    rounds: int = 12
    restarts: int = 2
    loads: int = 5
    switches: int = 200
    residue_rounds: int = 2
    cycles: int = 100
    warm_up: int = drift.WARM_UP


QUICK = Counts(3, 1, 2, 40, 1, 10, 2)


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure, from the command line."""

    out: Path
    only: tuple[str, ...]
    counts: Counts
    quick: bool
    has_plot: bool
    serve_extra: Path | None


@dataclass(slots=True)
class Bench:
    """One run. The mutable state is the list of finished parts."""

    options: Options
    environment: dict[str, Any]
    checkpoints: Sequence[Checkpoint]
    launcher: Launcher
    results: Path
    finished: list[report.Part] = field(default_factory=list)
    measured: switches.Measured | None = None

    async def run(self) -> None:
        """Measure the requested parts, in the order of `PARTS`."""
        parts = {
            "switch": self._switch,
            "restart": self._restart,
            "transformers": self._transformers,
            "number": self._number,
            "residue": self._residue,
            "drift": self._drift,
            "compiled": self._compiled,
        }
        for name in self.options.only:
            log.info("part %s", name)
            self._finish(await parts[name]())

    async def _switch(self) -> report.Part:
        counts = self.options.counts
        self.measured = await switches.measure(self.launcher, self.checkpoints, counts.rounds)
        return switches.part(self.measured)

    async def _restart(self) -> report.Part:
        runs = self.options.counts.restarts
        found = await restart.measure(self.launcher, self._find(LARGEST), runs)
        cold_s = self.measured.cold_call_s(LARGEST) if self.measured else None
        return restart.part(LARGEST, found, cold_s)

    async def _transformers(self) -> report.Part:
        chosen = [self._find(TINY), self._find(LARGEST)]
        options = self.options
        found = await alternative.measure(
            self.launcher, chosen, options.counts.loads, options.serve_extra
        )
        return alternative.part([c.alias for c in chosen], found, self.measured)

    async def _number(self) -> report.Part:
        return number.part(await number.measure(self.launcher, self.options.counts.switches))

    async def _residue(self) -> report.Part:
        rounds = self.options.counts.residue_rounds
        readings = await residue.measure(self.launcher, self.checkpoints, rounds)
        return residue.part(self.checkpoints, readings)

    async def _drift(self) -> report.Part:
        return await self._drift_of("drift", compiled=False)

    async def _compiled(self) -> report.Part:
        return await self._drift_of("compiled", compiled=True)

    async def _drift_of(self, name: str, *, compiled: bool) -> report.Part:
        counts = self.options.counts
        found = await drift.measure(self.launcher, counts.cycles, counts.warm_up, compiled=compiled)
        return drift.part(name, found)

    def _find(self, alias: str) -> Checkpoint:
        return next(c for c in self.checkpoints if c.alias == alias)

    def _finish(self, part: report.Part) -> None:
        """Print a part, and write all finished parts, so that a later failure loses nothing."""
        self.finished.append(part)
        print(f"\n{report.render(part)}\n", flush=True)
        self.environment["load_average_after"] = round(os.getloadavg()[0], 2)
        content = report.document(self.environment, self._settings(), self.finished)
        report.write(self.results, content)
        text = markdown(self.environment, self.finished)
        self.results.with_suffix(".md").write_text(text, encoding="utf-8")
        if part.name == "switch" and self.options.has_plot:
            plot.draw(part.samples, self.results.with_suffix(".png"))

    def _settings(self) -> dict[str, Any]:
        return {
            "only": self.options.only,
            "quick": self.options.quick,
            "sizes": {name: dict(sizes) for name, sizes in SIZES.items()},
            "kv_cache_memory_bytes": KV_BYTES,
            "kv_cache_memory_bytes_of_part_number": TINY_KV_BYTES,
        }


def markdown(values: Mapping[str, Any], finished: Sequence[report.Part]) -> str:
    """Return all tables of a run in Markdown."""
    tables = [report.render_table(environment_table(values)), *map(report.render, finished)]
    return "\n\n".join(["# Residency benchmark", *tables]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit status; a missed bar is not a failure."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)

    def measure() -> None:
        if options.has_plot:
            plot.check_installed()
        bench = prepare(options, arguments)
        print(report.render_table(environment_table(bench.environment)), flush=True)
        warn_if_busy(bench.environment)
        run_until_told(bench.run())
        written = sorted(bench.results.parent.glob(f"{bench.results.stem}.*"))
        print(f"Samples, tables and plot: {' '.join(map(str, written))}")

    return status_of("bench", measure)


def parse(arguments: Sequence[str]) -> Options:
    parser = make_parser()
    args = parser.parse_args(arguments)
    asked = args.only.split(",")
    if unknown := sorted({*asked} - {*PARTS}):
        parser.error(f"--only: unknown part {', '.join(unknown)}; parts: {','.join(PARTS)}")
    return Options(
        out=args.out,
        only=tuple(name for name in PARTS if name in asked),
        counts=QUICK if args.quick else Counts(),
        quick=args.quick,
        has_plot=not args.no_plot,
        serve_extra=args.serve_extra,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.residency",
        description="Measure what bringing a model up costs from each residency. Takes some "
        "minutes; do not run anything else at the same time.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("bench-results"), help="folder for results and models")
    add("--only", default=",".join(PARTS), metavar="PART[,PART]", help=f"of {','.join(PARTS)}")
    add("--quick", action="store_true", help="few repetitions, to see that everything works")
    add("--no-plot", action="store_true", help="tables only; matplotlib is not needed then")
    add(
        "--serve-extra",
        type=Path,
        metavar="DIR",
        help="folder with packages that only `transformers serve` gets "
        "(pip install --no-deps --target DIR accelerate)",
    )
    return parser


def prepare(options: Options, arguments: Sequence[str]) -> Bench:
    """Describe the machine before anything runs on it, and make the models."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    described = environment.describe([Path(word).name for word in arguments])
    return Bench(
        options=options,
        environment=described,
        checkpoints=make_all(options.out / "residency-models"),
        launcher=Launcher((options.out / f"logs-residency-{stamp}").resolve()),
        results=options.out / f"residency-{stamp}.json",
    )


if __name__ == "__main__":
    sys.exit(main())
