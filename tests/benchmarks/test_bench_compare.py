"""The benchmark of two source trees, on fake engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.compare import FIGURES, OURS, Turn, interval
from vllm_hotswap.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.wide]


def test_two_equal_trees_are_compared_round_by_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each round has a turn of each tree, all figures, and the revisions of both."""
    given = ["--before", str(OURS), "--fake", "--quick", "--out", str(tmp_path)]

    assert 0 == compare.main(given)

    content = json.loads((tmp_path / "compare.json").read_text())
    rounds = content["parts"]["compare"]["samples"]["rounds"]
    assert [["now", "before"]] * 2 == [[turn["side"] for turn in found] for found in rounds]
    turns = [turn for found in rounds for turn in found]
    assert all(turn["tokens_per_s"] > 0 for turn in turns)
    assert {(8, 4, 4)} == {
        (len(t["many_ms"]), len(t["one_ms"]), len(t["switch_ms"])) for t in turns
    }
    revisions = content["options"]["revisions"]
    assert revisions["now"] == revisions["before"]
    shown = capsys.readouterr().out
    assert all(f"| {figure.name}" in shown for figure in FIGURES)


def test_the_other_side_runs_from_the_other_tree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the other tree cannot serve, the comparison ends and shows its output."""
    package = tmp_path / "src" / "vllm_hotswap"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("raise SystemExit('the other tree')")
    given = ["--before", str(tmp_path / "src"), "--fake", "--quick", "--out", str(tmp_path)]

    assert 1 == compare.main(given)

    assert "the other tree" in capsys.readouterr().err


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    """A folder without the package is refused: Python would import the installed one."""
    with pytest.raises(ConfigError, match="has no package vllm_hotswap"):
        compare.checked(tmp_path)


def test_a_ratio_above_one_is_better_now() -> None:
    """A ratio above one is better, for more tokens as for less time."""
    now = Turn("now", 200, [10.0], [10.0], [10.0], 1.0, 1.0)
    before = Turn("before", 100, [20.0], [20.0], [20.0], 2.0, 2.0)

    assert {2.0} == {figure.ratio(now, before) for figure in FIGURES}


def test_an_interval_of_few_values_is_their_range() -> None:
    """An interval of many values lies around the median: 95 % of 100 coins, 40 to 60 heads."""
    assert (1.0, 4.0) == interval([4.0, 1.0, 3.0, 2.0])
    assert (40.0, 59.0) == interval([float(number) for number in range(100)])
