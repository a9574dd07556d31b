"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import environment, gap, medium, parts, report
from benchmarks.client import BadAnswer
from benchmarks.load import Load
from benchmarks.servers import Launcher, Model, Server, ServerFailed
from benchmarks.stats import Side
from vllm_hotswap.config.reader import ServerConfig, load_config
from vllm_hotswap.demo import quickstart as demo
from vllm_hotswap.errors import ConfigError, HotswapError
from vllm_hotswap.tasks import event_loop

log = logging.getLogger("benchmarks")

BUSY_LOAD = 0.5
PARTS = ("switch", "steady", "gap", "restart", "startup")
KV_CACHE_BYTES = {"tiny": 256 << 20, "medium": 1 << 30}

TINY_LOADS = (Load(clients=1, requests=30, output_tokens=64), Load(32, 6, 64))
MEDIUM_LOADS = (Load(clients=32, requests=1, output_tokens=16, prompt_words=8),)
QUICK_TINY_LOADS = (Load(clients=1, requests=4, output_tokens=32), Load(32, 1, 32))
QUICK_MEDIUM_LOADS = (Load(clients=8, requests=1, output_tokens=16, prompt_words=8),)


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure, from the command line."""

    out: Path
    models: Path | None
    aliases: tuple[str, str] | None
    only: frozenset[str]
    sizes: tuple[str, ...]
    runs: int
    switches: int
    quick: bool


@dataclass(slots=True)
class Bench:
    """One run of the benchmark. The mutable state is the list of finished parts."""

    options: Options
    environment: Mapping[str, Any]
    models: tuple[Model, Model]
    launcher: Launcher
    results: Path
    finished: list[report.Part] = field(default_factory=list)

    async def run(self) -> None:
        """Measure the requested parts, in the order of `PARTS`."""
        options, started_any = self.options, False
        if options.only & {"switch", "steady"}:
            await self._switch_and_steady()
            started_any = True
        if "gap" in options.only:
            rounds, restarts = (3, 1) if options.quick else (12, min(options.runs, 3))
            self._finish(await gap.gap(self.launcher, self.models, rounds, restarts))
            started_any = True
        if "restart" in options.only:
            self._finish(
                await parts.restart(self.launcher, self.models, options.runs, self._switch_ms())
            )
            started_any = True
        if "startup" in options.only:
            part = await parts.startup(
                self.launcher, self.models, options.runs, discard=not started_any
            )
            self._finish(part)

    async def _switch_and_steady(self) -> None:
        steady = "steady" in self.options.only
        if "switch" in self.options.only or (steady and "tiny" in self.options.sizes):
            log.info("starting hotswap with %s", " and ".join(m.alias for m in self.models))
            async with self.launcher.hotswap(*self.models) as hotswap:
                await self._with_tiny_models(hotswap)
        if steady and "medium" in self.options.sizes:
            await self._steady_medium()

    async def _with_tiny_models(self, hotswap: Server) -> None:
        options = self.options
        if "switch" in options.only:
            aliases = (self.models[0].alias, self.models[1].alias)
            self._finish(await parts.switch(hotswap, aliases, options.switches))
        if "steady" in options.only and "tiny" in options.sizes:
            loads, blocks = (QUICK_TINY_LOADS, 2) if options.quick else (TINY_LOADS, 8)
            plan = parts.Steady("tiny", loads, options.runs, blocks)
            await self._steady(hotswap, self.models[0], plan)

    async def _steady_medium(self) -> None:
        model = medium_model(self.models, self.options.out)
        # A tiny model is loaded beside it: the server is made for several models.
        beside = next(m for m in self.models if m.alias != model.alias)
        log.info("starting hotswap with the medium model")
        async with self.launcher.hotswap(model, beside) as hotswap:
            loads = QUICK_MEDIUM_LOADS if self.options.quick else MEDIUM_LOADS
            plan = parts.Steady("medium", loads, self.options.runs)
            await self._steady(hotswap, model, plan)

    async def _steady(self, hotswap: Server, model: Model, plan: parts.Steady) -> None:
        log.info("starting plain vLLM with %s", model.alias)
        async with self.launcher.plain(model) as plain:
            servers: dict[Side, Server] = {"hotswap": hotswap, "plain": plain}
            self._finish(await parts.steady(servers, model.alias, plan))

    def _switch_ms(self) -> Sequence[float]:
        for part in self.finished:
            if part.name == "switch":
                samples: Sequence[float] = part.samples["switch_to_first_token_ms"]
                return samples
        return ()

    def _finish(self, part: report.Part) -> None:
        """Print a part, and write all finished parts, so that a later failure loses nothing."""
        self.finished.append(part)
        print(f"\n{report.render(part)}\n", flush=True)
        settings = {
            "only": sorted(self.options.only),
            "runs": self.options.runs,
            "quick": self.options.quick,
            "models": {m.alias: dict(m.settings) for m in self.models},
            "medium": {"seed": medium.SEED, **medium.SIZES, "parameters": medium.parameters()},
        }
        content = report.document(self.environment, settings, self.finished)
        report.write(self.results, content)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit status; a missed bar is not a failure."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)

    def measure() -> None:
        with tempfile.TemporaryDirectory(prefix="hotswap-bench-") as folder:
            bench = prepare(options, arguments, Path(folder))
            print(report.render_table(environment_table(bench.environment)), flush=True)
            warn_if_busy(bench.environment)
            run_until_told(bench.run())
        print(f"Samples and environment: {bench.results}")

    return status_of("bench", measure)


def parse(arguments: Sequence[str]) -> Options:
    parser = make_parser()
    args = parser.parse_args(arguments)
    only = frozenset(args.only.split(","))
    if unknown := only - set(PARTS):
        parser.error(f"--only: unknown part {', '.join(sorted(unknown))}; parts: {','.join(PARTS)}")
    if args.runs is not None and args.runs < 1:
        parser.error("--runs must be at least 1")
    sizes = _sizes(args.size or "tiny")
    return Options(
        out=args.out,
        models=args.models,
        aliases=tuple(args.aliases) if args.aliases else None,
        only=only,
        sizes=sizes,
        runs=args.runs or (1 if args.quick else 3),
        switches=40 if args.quick else 200,
        quick=args.quick,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare vllm-hotswap with plain vLLM on this machine. Takes some minutes; "
        "do not run anything else at the same time.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("bench-results"), help="folder for results and logs")
    add("--models", type=Path, metavar="DIR", help="folder with models.yaml (default: the demo's)")
    add("--aliases", nargs=2, metavar="ALIAS", help="two generating models (default: first two)")
    add("--only", default=",".join(PARTS), metavar="PART[,PART]", help=f"of {','.join(PARTS)}")
    add(
        "--size",
        choices=("tiny", "medium", "both"),
        help="model for steady (default: tiny; medium takes minutes)",
    )
    add("--runs", type=int, help="repetitions of each side (default: 3; 1 with --quick)")
    add("--quick", action="store_true", help="small loads, to see that everything works")
    return parser


def prepare(options: Options, arguments: Sequence[str], folder: Path) -> Bench:
    """Find the models, and describe the machine before anything runs on it."""
    models = options.models or demo.write(folder / "models").parent
    config = load_config(models / "models.yaml")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return Bench(
        options=options,
        environment=environment.describe(_public(arguments)),
        models=choose(config, options.aliases),
        launcher=Launcher(options.out / f"logs-{stamp}"),
        results=options.out / f"bench-{stamp}.json",
    )


def choose(config: ServerConfig, aliases: tuple[str, str] | None) -> tuple[Model, Model]:
    """Return the two models to measure with, each with the same KV memory on both servers.

    Raises:
        ConfigError: an alias is not configured, or there is only one model.
    """
    wanted = aliases or config.aliases[:2]
    by_alias = {model.alias: model for model in config.models}
    for alias in wanted:
        if alias not in by_alias:
            raise ConfigError(f"{alias!r} is not configured in {config.path.name}")
    if len(set(wanted)) != 2:
        raise ConfigError(f"{config.path.name} must have two models to switch between")
    kv = {"kv_cache_memory_bytes": KV_CACHE_BYTES["tiny"]}
    first, second = (
        Model(alias, Path(by_alias[alias].model), {**by_alias[alias].settings, **kv})
        for alias in wanted
    )
    return first, second


def medium_model(models: Sequence[Model], out: Path) -> Model:
    """Make the medium model from the first Qwen3 checkpoint, and return it with its settings.

    Raises:
        ConfigError: none of the models is a Qwen3 checkpoint.
    """
    for model in models:
        if medium.is_source(model.folder):
            log.info("making the medium model, %.2f billion weights", medium.parameters() / 1e9)
            folder = medium.make(model.folder, out / "medium-model")
            kv = {"kv_cache_memory_bytes": KV_CACHE_BYTES["medium"]}
            return Model(model.alias, folder.resolve(), {**model.settings, **kv})
    raise ConfigError(f"--size medium needs a {medium.ARCHITECTURE} checkpoint to start from")


def warn_if_busy(values: Mapping[str, Any]) -> None:
    """Warn if the machine is so busy that the figures will be worth little."""
    load = values["load_average_before"]
    if load > BUSY_LOAD:
        log.warning("load average %.2f: other programs run, expect noise", load)


def environment_table(values: Mapping[str, Any]) -> report.Table:
    """Return the environment as rows of texts."""
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            text = ", ".join(f"{key} {item}" for key, item in value.items())
        else:
            text = " ".join(value) if isinstance(value, list) else str(value)
        rows.append((name, text))
    return report.Table("Environment", ("", ""), tuple(rows), is_text=True)


def _public(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, with absolute paths cut to their last part."""
    return [Path(word).name if word.startswith(("/", "~")) else word for word in arguments]


def _sizes(size: str) -> tuple[str, ...]:
    return ("tiny", "medium") if size == "both" else (size,)


def status_of(name: str, measure: Callable[[], object], *failures: type[Exception]) -> int:
    """Measure. Returns the exit status: 1 if that failed, 130 if it was stopped.

    Args:
        name: the benchmark's name, for the line about a failure.
        failures: exceptions that count as failures, besides those of servers.
    """
    told: tuple[type[Exception], ...] = (HotswapError, ServerFailed, BadAnswer, *failures)
    try:
        measure()
    except told as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    return 0


def run_until_told(work: Coroutine[Any, Any, None]) -> None:
    """Do the work; SIGTERM ends it as SIGINT does, and with it all servers."""

    async def until_told() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await work

    event_loop.run(until_told())


if __name__ == "__main__":
    sys.exit(main())
