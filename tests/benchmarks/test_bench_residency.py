"""The residency benchmark's own arithmetic, tables and files. No server."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from benchmarks import medium, report
from benchmarks.residency import (
    alternative,
    drift,
    number,
    plot,
    residue,
    restart,
    switches,
)
from benchmarks.residency.__main__ import PARTS, QUICK, Counts, markdown, parse
from benchmarks.residency.checkpoints import SIZES, Checkpoint, home, settings, tiny
from benchmarks.residency.fit import Line, least_squares, residual
from benchmarks.residency.limits import Limit, LimitMeter
from benchmarks.residency.processes import Held, fields, held
from benchmarks.residency.remote import DOWN, PHASES, STATES, Switch
from benchmarks.residency.steps import steps
from benchmarks.servers import flags, hotswap_config
from vllm_hotswap.config.reader import load_config
from vllm_hotswap.demo import quickstart as demo
from vllm_hotswap.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.wide]

NOTHING = Held(0, 0, 0, 0, 0, 0, 0, 0)


def some_checkpoint(folder: Path, alias: str, size: int) -> Checkpoint:
    (folder / alias).mkdir()
    (folder / alias / "model.safetensors").write_bytes(bytes(size))
    return Checkpoint(alias, folder / alias, size // 2)


def some_switch(alias: str, state: str, call_ms: float) -> Switch:
    phases = dict.fromkeys(PHASES, 1.0) | {"bring_up": call_ms - 4}
    return Switch(alias, state, call_ms, call_ms, phases, 10.0, 2.0)


def some_measured(folder: Path) -> switches.Measured:
    """A tiny and a large model, each switched to three times from every residency."""
    models = [some_checkpoint(folder, "tiny", 1000), some_checkpoint(folder, "large", 9000)]
    limits = {c.alias: Limit(c.file_bytes, [0.2], [0.1]) for c in models}
    base = {"parked": 4.0, "asleep": 5.0, "discarded": 104.0, "cold": 204.0}
    found = [
        some_switch(c.alias, state, base[state] + (c.file_bytes / 10 if base[state] > 99 else 0))
        for c, state, _ in product(models, STATES, range(3))
    ]
    return switches.Measured(models, limits, found)


def some_reading(state: str, used: int, server: int = 0) -> residue.Reading:
    api = replace(NOTHING, anonymous_bytes=server)
    return residue.Reading("tiny", state, used, 7_000_000, replace(NOTHING, threads=4), api)


def rows(part: report.Part, table: int = 0) -> dict[str, tuple[str, ...]]:
    """Return the rows of one of a part's tables, by their first column."""
    return {row[0]: row[1:] for row in part.tables[table].rows}


# --- figures ----------------------------------------------------------------------------


def test_a_line_is_found_again() -> None:
    """A line is recovered from points on it: half a second, and 2 GB/s."""
    line = least_squares([(0.0, 0.5), (1e9, 1.0), (4e9, 2.5)])

    assert (0.5, 2e9) == (pytest.approx(line.intercept), pytest.approx(line.bandwidth))
    assert 1.5 == pytest.approx(line.at(2e9))


def test_a_line_lies_between_points_that_are_not_on_one() -> None:
    """A line lies between points that are not on one, and the largest miss is reported."""
    points = [(0.0, 0.0), (1.0, 3.0), (2.0, 0.0)]
    line = least_squares(points)

    assert (1.0, 0.0) == (pytest.approx(line.intercept), pytest.approx(line.slope))
    assert 2.0 == pytest.approx(residual(line, points))


def test_a_line_that_falls_has_no_bandwidth() -> None:
    """A falling line has infinite bandwidth: nothing slows it down."""
    assert float("inf") == Line(1.0, -0.1).bandwidth


def test_one_place_makes_no_line() -> None:
    """Without two places there is an error, instead of a line that was not measured."""
    with pytest.raises(ValueError, match="two places"):
        least_squares([(1.0, 2.0), (1.0, 3.0)])


def test_the_limit_is_reading_and_copying() -> None:
    """The limit is the sum of the medians of reading and copying, with their bandwidths."""
    limit = Limit(1000, [0.1, 0.2, 9.0], [0.1])

    assert (0.3, 5000.0, 10000.0) == (
        pytest.approx(limit.seconds),
        limit.read_bandwidth,
        limit.copy_bandwidth,
    )


def test_limits_are_measured_on_whole_files(tmp_path: Path) -> None:
    """Each sample reads once and copies once; a read that returns less than asked is continued."""
    models = [some_checkpoint(tmp_path, "a", 10), some_checkpoint(tmp_path, "b", 100_000)]
    (models[1].folder / "second.safetensors").write_bytes(bytes(50_000))
    meter = LimitMeter(models)
    meter.warm_up()
    meter.sample("b")

    assert ([], 150_000) == (meter.limits["a"].read_s, meter.limits["b"].file_bytes)
    assert (1, 1) == (len(meter.limits["b"].read_s), len(meter.limits["b"].copy_s))


def test_growth_per_step_is_a_slope() -> None:
    """Growth is a slope, not last less first, which a single outlier would spoil."""
    assert 2.0 == pytest.approx(drift.slope([1, 3, 5, 7]))
    assert 0.0 == drift.slope([5])


# --- models and configuration -----------------------------------------------------------


def test_the_sizes_are_those_that_the_pages_tell() -> None:
    """Sizes are 0.05, 0.44 and 0.89 GB of bfloat16; the largest has 0.45 billion weights."""
    assert [0.05, 0.44, 0.89] == [round(2e-9 * medium.parameters(s), 2) for s in SIZES.values()]
    assert 0.445 == pytest.approx(medium.parameters(SIZES["large"]) / 1e9, abs=5e-4)


def test_the_configuration_is_accepted(tmp_path: Path) -> None:
    """The configuration is valid: the home model loads at the start, others by a switch."""
    models = [home().model(on_demand=False), tiny().model(), tiny("m2").model(kv_bytes=1 << 20)]
    path = tmp_path / "models.yaml"
    path.write_text(json.dumps(hotswap_config(models)))
    config = load_config(path)

    assert ("home", ("home", "tiny", "m2")) == (config.default_model, config.aliases)
    assert ["startup", "on_demand", "on_demand"] == [model.load for model in config.models]
    assert 1 << 20 == config.models[2].settings["kv_cache_memory_bytes"]


def test_plain_vllm_gets_the_same_settings() -> None:
    """Flags for plain vLLM leave out our settings; a compiled model is one without eager mode."""
    assert [
        "--max-model-len=1024",
        "--kv-cache-memory-bytes=268435456",
        "--enforce-eager",
    ] == flags(settings(on_demand=False))
    assert "enforce_eager" not in settings(compiled=True)


def test_every_residency_below_active_has_its_way_down() -> None:
    """Every residency below active is reached with the levels of vLLM's sleep mode."""
    assert ("parked", "asleep", "discarded", "cold") == STATES
    assert (None, ("sleep", {"level": 1})) == (DOWN["parked"], DOWN["asleep"])
    assert (("sleep", {"level": 2}), ("unload", {})) == (DOWN["discarded"], DOWN["cold"])


def test_all_parts_are_measured_by_default() -> None:
    """All parts run by default, in their own order, whatever the order of the names."""
    assert PARTS == parse([]).only
    assert ("switch", "drift") == parse(["--only", "drift,switch"]).only
    assert (Counts(), QUICK) == (parse([]).counts, parse(["--quick"]).counts)
    assert Counts().rounds >= 10


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown part is refused with a list of the parts that exist."""
    with pytest.raises(SystemExit):
        parse(["--only", "swich"])

    assert "unknown part swich; parts: switch,restart" in capsys.readouterr().err


# --- processes --------------------------------------------------------------------------


def test_fields_of_a_process_are_read() -> None:
    """Fields of a process are read as names and values, without blanks."""
    assert {"Threads": "3", "RssAnon": "12 kB"} == fields("Threads:\t3\nRssAnon:\t   12 kB\n")


def test_what_this_process_holds_is_counted() -> None:
    """Of what this process holds, an open pipe is two descriptors, and a child one process."""
    before = held(os.getpid())
    first, second = os.pipe()
    after = held(os.getpid())
    os.close(first)
    os.close(second)

    assert (2, 0) == (after.fds - before.fds, after.sockets - before.sockets)
    assert before.processes == after.processes
    assert before.anonymous_bytes > 1_000_000


async def test_a_child_can_be_left_out() -> None:
    """A child can be left out, as the host is when the API process is measured."""
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=-1)
    together, alone = held(os.getpid()), held(os.getpid(), without=child.pid)
    child.kill()
    await child.wait()

    assert 1 == together.processes - alone.processes


def test_progress_goes_to_the_log_where_there_is_no_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal, the log has a few lines, the last one at the end, each item once."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with caplog.at_level("INFO", logger="benchmarks"):
        assert list(range(12)) == list(steps(range(12), "cycles"))

    assert "cycles: 12 of 12" == caplog.messages[-1]
    assert len(caplog.messages) <= 7


# --- tables -----------------------------------------------------------------------------


def test_switches_are_told_by_model_and_residency(tmp_path: Path) -> None:
    """Switches have medians, the tail, the first token, both, the way down, and the number."""
    found = rows(switches.part(some_measured(tmp_path)), table=1)

    assert [f"{a}, {s}" for a in ("tiny", "large") for s in STATES] == list(found)
    assert ("1104.0", "1104.0", "1104.0", "10.0", "1114.0", "2.0", "3") == found["large, cold"]


def test_phases_are_told_by_model_and_residency(tmp_path: Path) -> None:
    """Phases have times by the server's clock, and the worst bring-up."""
    found = rows(switches.part(some_measured(tmp_path)), table=2)

    assert ("1.00", "1.00", "1.00", "1100.00", "1.00", "1100.0") == found["large, cold"]


def test_the_fit_is_compared_with_the_machine(tmp_path: Path) -> None:
    """The fit is 0.8 s for 8000 bytes; the machine reads 9000 in 0.2 s and copies them in 0.1."""
    found = rows(switches.part(some_measured(tmp_path)), table=3)

    assert ("200", "0.00", "0.22", "0.11", "0.33", "0") == found["cold"]


def test_the_bar_of_a_cold_switch_is_set_by_the_machine(tmp_path: Path) -> None:
    """The bar is 2.5 times reading and copying, plus a second; it can be missed."""
    measured = some_measured(tmp_path)
    bar = switches.part(measured).bars[0]
    slow = replace(measured.switches[-1], call_ms=1800.0)
    measured.switches[-3:] = [slow] * 3

    assert (1.104, 1.75, True) == (pytest.approx(bar.value), bar.limit, bar.met)
    assert not switches.part(measured).bars[0].met


def test_a_restart_is_compared_with_a_cold_switch() -> None:
    """A restart's time to ready is compared with the switch; without one there is no bar."""
    part = restart.part("large", [(30.0, 33.0), (40.0, 44.0)], 0.7)

    assert ("35.0", "30.0 40.0") == rows(part)["start to ready"]
    assert (50.0, True) == (pytest.approx(part.bars[0].value), part.bars[0].met)
    assert () == restart.part("large", [(30.0, 33.0)], None).bars


def test_ways_to_bring_a_model_up_stand_beside_each_other(tmp_path: Path) -> None:
    """Our times are cold switches; a way that could not run is left out and reported."""
    loads = [alternative.Load(alternative.STANDIN, "large", ms, 5.0, 1.0) for ms in (10, 30, 20)]
    part = alternative.part(["large"], loads, some_measured(tmp_path))

    assert ["large, vllm-hotswap, cold", "large, transformers, stand-in"] == list(rows(part))
    assert ("20", "5", "25", "35", "1", "3") == rows(part)["large, transformers, stand-in"]
    assert part.samples["transformers_serve_ran"] is False


def test_transformers_serve_needs_accelerate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`transformers serve` needs accelerate, in the environment or in a separate folder."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert not alternative.can_serve(None)
    assert not alternative.can_serve(tmp_path)
    (tmp_path / "accelerate").mkdir()
    assert alternative.can_serve(tmp_path)


def test_flat_is_told_by_a_ratio_and_a_slope() -> None:
    """Flatness is a ratio and a slope: here each additional model takes 0.1 ms."""
    part = number.part({n: [1.0 + n / 10] * 5 for n in range(2, 9)})

    assert ("1.20", "1.20", "1.20", "5") == rows(part)["2"]
    assert ("1.50", "1.50") == rows(part, table=1)["8 models / 2 models"]
    assert ("+0.100", "+0.100") == rows(part, table=1)["ms per additional model (least squares)"]


def test_residue_is_told_over_what_was_there_before() -> None:
    """Residue is in millions of bytes, for the host and the API process separately."""
    held_in = {"parked": 9_000_000, "asleep": 5_000_000, "discarded": 3_000_000, "cold": 2_500_000}
    readings = [some_reading("without", 2_000_000, 100)]
    readings += [some_reading(state, used, 1_000_100) for state, used in held_in.items()]
    part = residue.part([tiny()], readings)

    assert ("1.7", "7.0", "3.0", "1.0", "0.5", "7.0") == rows(part)["tiny"]
    assert ("1.0", "1.0", "1.0", "1.0") == rows(part, table=1)["tiny"]


def test_drift_is_told_per_cycle() -> None:
    """Drift is a slope over all cycles; memory before and after is shown, too."""
    before = some_reading("parked", 1_000_000)
    after = replace(before, used_bytes=2_000_000, host=replace(before.host, threads=6))
    found = drift.Drift(before, after, [10**6 + n * 10**5 for n in range(10)], [], [5.0] * 10)
    part = drift.part("drift", found)

    assert ("+0.100",) == rows(part)["host, slope over the cycles, MB per cycle"]
    assert ("+0.100",) == rows(part)["host, after minus before, MB per cycle"]
    assert ("4", "6", "+2") == rows(part, table=1)["host: threads"]
    assert ("0", "0", "+0") == rows(part, table=1)["API process: sockets among them"]


def test_all_parts_can_be_written(tmp_path: Path) -> None:
    """All parts can be written as JSON and as Markdown."""
    part = switches.part(some_measured(tmp_path))
    report.write(tmp_path / "new" / "residency.json", report.document({}, {}, [part]))
    content = json.loads((tmp_path / "new" / "residency.json").read_text())

    assert 24 == len(content["parts"]["switch"]["samples"]["switches"])
    assert "### switch: targets" in markdown({"cpu": "EPYC"}, [part])


# --- plot -------------------------------------------------------------------------------


def test_the_plot_is_drawn_from_the_samples(tmp_path: Path) -> None:
    """The plot is one PNG file with two panels."""
    pytest.importorskip("matplotlib")
    part = switches.part(some_measured(tmp_path))
    plot.draw(json.loads(json.dumps(part.samples)), tmp_path / "plots" / "residency.png")

    assert (tmp_path / "plots" / "residency.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A missing matplotlib is reported before anything runs, with what to do."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"requirements/dev.txt; or leave it out with --no-plot"):
        plot.check_installed()


@pytest.mark.parametrize(
    ("size", "text"), [(1_397_512, "1.4 MB"), (52_000_000, "52 MB"), (889_365_480, "0.89 GB")]
)
def test_sizes_are_short(size: int, text: str) -> None:
    """Sizes have two significant figures."""
    assert text == plot.size_text(size)


def test_models_are_those_that_ship() -> None:
    """The models are shipped ones, so that nothing has to be installed first."""
    assert demo.MODELS / "llama" == tiny().folder
    assert medium.is_source(home().folder)
