"""`python -m benchmarks.scheduling`: how policies scale, and their waits as the load grows.

Nothing is served: the scheduler and its policies run under virtual time, as in `vllm-hotswap
simulate`. There are two parts: the time of decisions and the memory of a run with many models and
requests; and the waits of each policy by the rate of requests, for a cheap and a costly switch.
"""

from __future__ import annotations

import argparse
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from benchmarks import environment, report
from benchmarks.report import Table
from benchmarks.residency.plot import check_installed
from benchmarks.stats import summarize
from vllm_hotswap.errors import HotswapError
from vllm_hotswap.scheduling.policies import POLICIES, make_policy
from vllm_hotswap.scheduling.policy import Decision, PolicySettings, ServeOn
from vllm_hotswap.scheduling.scheduler import Ticket
from vllm_hotswap.simulation.costs import Costs
from vllm_hotswap.simulation.generate import Shape, generate
from vllm_hotswap.simulation.report import Figures, figures
from vllm_hotswap.simulation.run import Simulation, Switched, World, simulate
from vllm_hotswap.simulation.service import Service
from vllm_hotswap.simulation.trace import TracedModel, TracedSwitching

MANY = Shape(models=50, requests=100_000, rate=5.0)
COSTS_S = {"parked": 0.005, "cold": 5.0}
RATES: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 14.0, 20.0, 28.0)
CURVE = Shape(models=5, requests=5000)
SAMPLES = 20
"""How often the memory is read."""
COLORS = {"fifo": "#d55e00", "batch": "#0072b2", "round_robin": "#009e73"}


class Timed(Simulation):
    """Records how long the scheduler takes to decide, when there is something to decide."""

    decisions_us: array[float]

    def decide(self) -> tuple[list[Ticket], Decision]:
        before_ns = time.perf_counter_ns()
        admitted, decision = super().decide()
        if not isinstance(decision, ServeOn):
            self.decisions_us.append((time.perf_counter_ns() - before_ns) / 1000)
        return admitted, decision


def scale(policy: str, shape: Shape) -> dict[str, Any]:
    """Do one long run; return microseconds of decisions, and MiB of the process during the run."""
    trace = generate(shape, TracedModel(), TracedSwitching())
    simulation = Timed(trace, make_policy(policy, PolicySettings()), World(Costs(0.005)))
    simulation.decisions_us = array("d")
    process, memory = psutil.Process(), []
    step = max(1, shape.requests // SAMPLES)
    began_s, next_left, switches = time.perf_counter(), shape.requests, 0
    with tqdm(total=shape.requests, desc=policy, delay=2, leave=False) as bar:
        while simulation.left:
            if simulation.left <= next_left:
                memory.append(round(process.memory_info().rss / (1 << 20), 1))
                bar.update(shape.requests - simulation.left - bar.n)
                next_left -= step
                switches += _forget(simulation.run.switches)
            simulation.step()
    took_s = time.perf_counter() - began_s
    decisions = summarize(simulation.decisions_us)
    return {
        "policy": policy,
        "decisions": decisions.count,
        "decision_us": {"p50": decisions.p50, "p99": decisions.p99, "max": decisions.maximum},
        "run_s": took_s,
        "rss_mib": memory,
        "switches": switches + len(simulation.run.switches),
        "simulated_s": simulation.play().end_s,
    }


def _forget(switches: list[Switched]) -> int:
    """Clear results, so that they do not count as memory; return how many there were."""
    count = len(switches)
    switches.clear()
    return count


def curves(shape: Shape, rates: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Yield the result of every policy at every rate and cost."""
    for kind, cost_s in COSTS_S.items():
        for rate in rates:
            made = Shape(models=shape.models, requests=shape.requests, rate=rate, seed=1)
            trace = generate(made, TracedModel(), TracedSwitching())
            for name in POLICIES:
                run = simulate(trace, make_policy(name, PolicySettings()), World(Costs(cost_s)))
                yield {"cost": kind, "rate": rate, **asdict(figures(name, run))}


def draw(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw mean and p95 of the waits by rate; one plot for each cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (kind, cost_s) in zip(figure.subplots(1, 2), COSTS_S.items(), strict=True):
        for name, color in COLORS.items():
            mine = [p for p in points if (p["policy"], p["cost"]) == (name, kind)]
            rates = [p["rate"] for p in mine]
            axes.plot(rates, [p["wait_mean_s"] for p in mine], "o-", color=color, label=name)
            p95 = [p["wait_p95_s"] for p in mine]
            axes.plot(rates, p95, ".--", color=color, alpha=0.6, label=f"{name}, p95")
        axes.set(xscale="log", yscale="log", xlabel="requests per second", ylabel="wait, s")
        axes.set_title(f"a switch costs {cost_s:g} s ({kind})")
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def scale_table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = ("policy", "decisions", "p50, us", "p99, us", "MiB at first", "at last", "switches")
    return Table(
        "Decisions and memory",
        columns,
        tuple(
            (
                row["policy"],
                str(row["decisions"]),
                f"{row['decision_us']['p50']:.1f}",
                f"{row['decision_us']['p99']:.1f}",
                f"{row['rss_mib'][0]:.0f}",
                f"{row['rss_mib'][-1]:.0f}",
                str(row["switches"]),
            )
            for row in rows
        ),
    )


def curve_table(points: Sequence[dict[str, Any]], kind: str) -> Table:
    """Return a table of mean wait / p95 / mean total, and switches, of every policy."""
    rows = []
    for rate in sorted({point["rate"] for point in points}):
        cells = [f"{rate:g}"]
        for name in COLORS:
            (at,) = (p for p in points if (p["rate"], p["cost"], p["policy"]) == (rate, kind, name))
            waits = f"{at['wait_mean_s']:.2f} / {at['wait_p95_s']:.2f} / {at['took_mean_s']:.2f}"
            cells.append(f"{waits}; {at['switches']}")
        rows.append(tuple(cells))
    return Table(f"A switch costs {COSTS_S[kind]:g} s", ("rate", *COLORS), tuple(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, print tables, write JSON and the plot."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scheduling",
        description="Policies by simulation: time of decisions, memory, waits over the load.",
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder")
    parser.add_argument("--quick", action="store_true", help="a small run, as a test")
    parser.add_argument("--no-plot", action="store_true", help="matplotlib is not needed then")
    args = parser.parse_args(arguments)
    many, curve, rates = MANY, CURVE, RATES
    if args.quick:
        many, curve = Shape(models=5, requests=500), Shape(models=3, requests=200)
        rates = RATES[1:6:4]
    try:
        if not args.no_plot:
            check_installed()
    except HotswapError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1
    described = environment.describe([word for word in arguments if not word.startswith("/")])
    scaled = [scale(name, many) for name in POLICIES]
    points = list(curves(curve, rates))
    for table in (scale_table(scaled), *(curve_table(points, kind) for kind in COSTS_S)):
        print(report.render_table(table), end="\n\n", flush=True)
    kept = ("date", "cpu", "cores", "memory_gib", "python", "git_revision", "load_average_before")
    content = {
        "environment": {name: described[name] for name in kept},
        "shapes": {"scale": asdict(many), "curves": asdict(curve)},
        "service": asdict(Service()),
        "columns": list(Figures.__dataclass_fields__),
        "scale": scaled,
        "curves": points,
    }
    report.write(args.out / "scheduling.json", content)
    if not args.no_plot:
        draw(points, args.out / "scheduling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
