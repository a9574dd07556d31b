"""`vllm-hotswap simulate`: how policies would handle a trace."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.scheduling import PolicySettings, make_policy
from vllm_hotswap.simulation import costs, fit, report, trace as traces
from vllm_hotswap.simulation.generate import KINDS, Shape, generate
from vllm_hotswap.simulation.run import World, simulate
from vllm_hotswap.simulation.service import Service
from vllm_hotswap.simulation.trace import Trace, TracedModel, TracedSwitching

QUIET_S = 2.0
"""Time after which progress is shown."""

MOST = 1e9
"""Every number must be below this."""

DEFAULT_COST_S = 0.005
"""About the cost of a switch between parked models."""

SHAPE = {
    "models": (int, 1, "models"),
    "requests": (int, 1, "requests in all"),
    "rate": (float, 0, "requests per second, over all models"),
    "zipf": (float, None, "the popularity of model k is proportional to 1 / k^S; 0: all equal"),
    "agents": (int, 1, "agents, each of which alternates between two models"),
    "think_s": (float, None, "mean seconds from a response to the agent's next request"),
    "prompt_tokens": (float, 0, "mean prompt tokens"),
    "output_tokens": (float, 0, "mean output tokens"),
    "seed": (int, None, "seed of the random numbers"),
}
"""Type, minimum of a value (0: above it; None: 0 or more) and meaning."""

SERVICE = {
    "step_s": "seconds per engine step",
    "per_request_s": "seconds that each running request adds to a step",
    "prefill_s_per_token": "seconds per prompt token",
}

SWITCHING = {
    "max_wait": "seconds after which a request is due, if the trace gives none",
    "min_active": "minimum seconds that `batch` keeps a model active",
    "slice": "seconds that `round_robin` keeps a model active",
    "drain_timeout": "seconds that a switch waits for running requests; then it parks them",
}


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.description = (
        "Run the scheduler of the server under virtual time on a trace, once with each policy, "
        "and print waits, switches and how the time was used."
    )
    add = parser.add_argument
    add("trace", type=Path, nargs="?", help="a trace, from `serve --record` or `--write`")
    add("--generate", choices=KINDS, help="generate a trace instead")
    add("--write", type=Path, metavar="FILE", help="write the generated trace to a new file")
    for name, (kind, _, meaning) in SHAPE.items():
        default = getattr(Shape(), name)
        add(_flag(name), dest=name, type=kind, metavar="N", help=f"{meaning} (default: {default})")
    add(
        "--policy",
        action="append",
        metavar="NAME",
        help="policy to simulate; repeatable (default: the trace's)",
    )
    add(
        "--measured",
        type=Path,
        metavar="FILE",
        help="a recorded trace with the times of switches and service (default: the trace "
        "itself, if it was recorded)",
    )
    add(
        "--switch-cost",
        type=float,
        metavar="S",
        help=f"seconds of every switch (default: as measured, or {DEFAULT_COST_S})",
    )
    for name, meaning in SERVICE.items():
        default = getattr(Service(), name)
        about = f"{meaning} (default: as measured, or {default})"
        add(_flag(name), dest=name, type=float, metavar="S", help=about)
    for name, meaning in SWITCHING.items():
        about = f"{meaning} (default: as in the trace)"
        add(_flag(name), dest=name, type=float, metavar="S", help=about)
    add(
        "--resident",
        type=int,
        metavar="N",
        help="maximum number of parked models, including the active one; others have their "
        "recorded residency, or are cold (default: no limit)",
    )
    add("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, _: Sequence[str] = ()) -> int:
    """Simulate each policy, and print the figures."""
    trace = _trace(args)
    if args.write is not None:
        traces.write(args.write, trace)
    switching = trace.head.switching
    settings = PolicySettings(switching.min_active, switching.slice)
    names = args.policy or ([] if args.write else [switching.policy])
    policies = {name: make_policy(name, settings) for name in names}
    world = _world(args, trace)
    rows = []
    for name, policy in policies.items():
        with tqdm(total=len(trace.requests), desc=name, delay=QUIET_S, leave=False) as bar:
            rows.append(report.figures(name, simulate(trace, policy, world, bar.update)))
    if args.json:
        print(json.dumps([report.as_dict(row) for row in rows], indent=1))
    elif rows:
        print(report.table(rows))
    return 0


def _trace(args: argparse.Namespace) -> Trace:
    """Return the trace that was asked for, with the settings that were given."""
    if (args.trace is None) == (args.generate is None):
        raise ConfigError("give either a trace or --generate")
    given = _checked(args, dict.fromkeys(SWITCHING, (float, None, "")))
    if args.generate is None:
        _refuse(args, {"write": args.write, **{name: getattr(args, name) for name in SHAPE}})
        trace = traces.read(args.trace)
    else:
        shape = Shape(kind=args.generate, **_checked(args, SHAPE))
        trace = generate(shape, TracedModel(), TracedSwitching())
    if given.get("slice") == 0:
        raise ConfigError("--slice must be above 0")
    return _with(trace, given)


def _with(trace: Trace, given: Mapping[str, Any]) -> Trace:
    head = trace.head
    rest = {name: value for name, value in given.items() if name != "max_wait"}
    models = head.models
    requests = trace.requests
    if "max_wait" in given:
        wait_s = given["max_wait"]
        models = {alias: replace(model, max_wait_s=wait_s) for alias, model in models.items()}
        requests = tuple(replace(request, max_wait_s=None) for request in requests)
    head = replace(head, models=models, switching=replace(head.switching, **rest))
    return replace(trace, head=head, requests=requests)


def _refuse(args: argparse.Namespace, flags: Mapping[str, Any]) -> None:
    given = [_flag(name) for name, value in flags.items() if value is not None]
    if given:
        raise ConfigError(f"{given[0]} needs --generate; {args.trace} is an existing trace")


def _checked(
    args: argparse.Namespace, wanted: Mapping[str, tuple[type, int | None, str]]
) -> dict[str, Any]:
    """Return the values that were given for these flags.

    Raises:
        ConfigError: a value cannot be used.
    """
    found = {}
    for name, (_, least, _) in wanted.items():
        value = getattr(args, name)
        if value is None:
            continue
        is_low = value < 0 if least is None else value <= 0 if least == 0 else value < least
        if is_low or not math.isfinite(value):
            needed = {None: "at least 0", 0: "above 0"}.get(least, f"at least {least}")
            raise ConfigError(f"{_flag(name)} must be {needed}")
        if value >= MOST:
            raise ConfigError(f"{_flag(name)} must be below {MOST:g}")
        found[name] = value
    return found


def _world(args: argparse.Namespace, trace: Trace) -> World:
    """Return what switches and service take: as given, else as measured, else the defaults."""
    recorded = traces.read(args.measured) if args.measured else trace
    if args.measured and not recorded.is_recorded:
        raise ConfigError(f"{str(args.measured)!r} has no served requests; give a recorded trace")
    given = _checked(args, dict.fromkeys(SERVICE, (float, None, "")))
    numbers = _checked(args, {"switch_cost": (float, None, ""), "resident": (int, 1, "")})
    cost_s = numbers.get("switch_cost")
    found = costs.measured(() if cost_s is not None else recorded.switches, DEFAULT_COST_S)
    services = {} if len(given) == len(SERVICE) else fit.services(recorded)
    return World(
        costs=found if cost_s is None else costs.Costs(cost_s),
        services={alias: replace(service, **given) for alias, service in services.items()},
        service=replace(fit.common(services.values()), **given),
        drain_timeout_s=trace.head.switching.drain_timeout,
        resident=numbers.get("resident"),
    )


def _flag(name: str) -> str:
    return f"--{name.removesuffix('_s').replace('_s_', '-').replace('_', '-')}"
