"""The benchmark of policies, and the page about it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import scheduling
from vllm_hotswap.scheduling.policy import Policy, PolicySettings
from vllm_hotswap.simulation.costs import Costs
from vllm_hotswap.simulation.generate import Shape, generate
from vllm_hotswap.simulation.report import figures
from vllm_hotswap.simulation.run import World, simulate
from vllm_hotswap.simulation.trace import TracedModel, TracedSwitching

pytestmark = [pytest.mark.slow, pytest.mark.wide]

DOCS = Path(__file__).parents[2] / "docs"


def test_a_quick_run_tells_of_every_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quick run has times of decisions, memory, waits at both costs, and a plot."""
    assert 0 == scheduling.main(["--quick", "--out", str(tmp_path)])

    content = json.loads((tmp_path / "scheduling.json").read_text())
    assert ["fifo", "batch", "round_robin"] == [row["policy"] for row in content["scale"]]
    assert all(row["decision_us"]["p50"] > 0 for row in content["scale"])
    assert {"parked", "cold"} == {point["cost"] for point in content["curves"]}
    assert (tmp_path / "scheduling.png").stat().st_size > 10_000
    assert "| round_robin |" in capsys.readouterr().out


def test_the_policy_of_the_page_works() -> None:
    """The policy of the page runs over a whole trace exactly as printed."""
    text = (DOCS / "guides" / "automatic-switching.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example is not None
    names: dict[str, object] = {}
    exec(example.group(1), names)  # noqa: S102  # it is our own page
    make = names["longest_queue"]
    assert callable(make)
    policy: Policy = make(PolicySettings(slice_s=1.0))
    trace = generate(Shape(kind="poisson", rate=5.0), TracedModel(), TracedSwitching())

    found = figures("longest_queue", simulate(trace, policy, World(Costs(0.01))))

    assert 300 == found.requests
    assert 0 < found.switches < 300


def test_the_page_shows_what_was_measured() -> None:
    """The page's figures of the bar are those of the stored results."""
    content = json.loads((DOCS / "benchmarks" / "scheduling.json").read_text())
    page = re.sub(r" +", " ", (DOCS / "internals" / "scheduling.md").read_text())

    for row in content["scale"]:
        median_us = row["decision_us"]["p50"]
        assert median_us <= 50
        assert f"| {row['policy']} | {row['decisions']} | {median_us:.1f} |" in page
