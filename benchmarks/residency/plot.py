"""The plot: switch times by residency, and bring-up times by bytes with their fit."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.residency.fit import Line
from benchmarks.residency.remote import STATES
from benchmarks.stats import median, percentile
from vllm_hotswap.errors import ConfigError

GB = 1e9
LOWEST_MS = 0.5
COLORS = {"parked": "#009e73", "asleep": "#56b4e9", "discarded": "#e69f00", "cold": "#0072b2"}
"""Colours that colour-blind readers can tell apart, too."""

Samples = Mapping[str, Any]


def check_installed() -> None:
    """Raise ConfigError before anything is measured, if the plot could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "the plot needs matplotlib, which is not installed: "
            "pip install --no-deps -r requirements/dev.txt; or leave it out with --no-plot"
        )


def draw(samples: Samples, path: Path) -> None:
    """Write the plot of part `switch`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _by_residency(left, samples)
    _over_bytes(right, samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def call_ms(samples: Samples, alias: str, state: str) -> list[float]:
    """Return the samples of one model from one residency."""
    return [
        switch["call_ms"]
        for switch in samples["switches"]
        if (switch["model"], switch["state"]) == (alias, state)
    ]


def size_text(size: int) -> str:
    """Return a size in readable form: 1.4 MB, 52 MB, 0.89 GB."""
    return f"{size / GB:.2f} GB" if size >= GB / 10 else f"{size / GB * 1000:.2g} MB"


def _by_residency(axes: Any, samples: Samples) -> None:
    models = samples["models"]
    width = 0.8 / len(STATES)
    for place, state in enumerate(STATES):
        found = [call_ms(samples, model["model"], state) for model in models]
        heights = [median(values) for values in found]
        above = [max(0.0, percentile(v, 95) - h) for v, h in zip(found, heights, strict=True)]
        places = [number + (place - 1.5) * width for number in range(len(models))]
        axes.bar(
            places,
            heights,
            width,
            label=state,
            color=COLORS[state],
            yerr=[[0.0] * len(above), above],
            error_kw={"elinewidth": 1, "capsize": 2},
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom=LOWEST_MS)
    names = [f"{model['model']}\n{size_text(model['file_bytes'])}" for model in models]
    axes.set_xticks(range(len(models)), names)
    axes.set_ylabel("switch call, ms (median, line to p95)")
    axes.set_title("Switch to a model, by where it was")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(ncols=2)


def _over_bytes(axes: Any, samples: Samples) -> None:
    sizes = {model["model"]: model["file_bytes"] for model in samples["models"]}
    ends = [0.0, max(sizes.values()) * 1.05]
    for state, values in samples["fits"].items():
        found = [switch for switch in samples["switches"] if switch["state"] == state]
        places = [sizes[switch["model"]] / GB for switch in found]
        times = [switch["phases_ms"]["bring_up"] / 1000 for switch in found]
        axes.plot(places, times, ".", color=COLORS[state], alpha=0.6)
        line = Line(**values)
        label = f"{state}: {line.intercept:.2f} s + bytes / {line.bandwidth / GB:.1f} GB/s"
        _line(axes, ends, [line.at(x) for x in ends], label, COLORS[state])
    limit = samples["limits"][max(sizes, key=lambda alias: sizes[alias])]
    slope = (median(limit["read_s"]) + median(limit["copy_s"])) / limit["file_bytes"]
    _line(axes, ends, [x * slope for x in ends], "read + copy, nothing else", "#777777", "--")
    axes.set_xlabel("weight files, GB")
    axes.set_ylabel("bring-up, s")
    axes.set_ylim(bottom=0)
    axes.set_title("Bring-up over bytes")
    axes.grid(alpha=0.3)
    axes.legend()


def _line(
    axes: Any, ends: list[float], values: list[float], label: str, color: str, style: str = "-"
) -> None:
    axes.plot([x / GB for x in ends], values, style, color=color, label=label)
