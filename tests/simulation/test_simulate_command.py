"""`vllm-hotswap simulate`: from flags to figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_hotswap.cli.main import main
from vllm_hotswap.simulation import trace as traces
from vllm_hotswap.simulation.trace import Head, Trace, TracedModel, TracedRequest, TracedSwitch
from vllm_hotswap.states import Residency

pytestmark = pytest.mark.slow

Printed = pytest.CaptureFixture[str]


def simulated(printed: Printed, *words: str) -> list[dict[str, float]]:
    assert 0 == main(["simulate", *words, "--json"])
    found: list[dict[str, float]] = json.loads(printed.readouterr().out)
    return found


def test_policies_are_compared_on_a_generated_trace(capsys: Printed) -> None:
    """Policies are compared on a generated trace, one per line; the burst favours `batch`."""
    words = ["--generate", "burst", "--rate", "50", "--requests", "90", "--switch-cost", "1"]
    status = main(["simulate", *words, "--policy", "batch", "--policy", "fifo"])

    lines = capsys.readouterr().out.splitlines()
    assert 0 == status
    assert ["policy", "batch", "fifo"] == [line.split()[0] for line in lines]


def test_batch_needs_a_fraction_of_the_switches_of_fifo(capsys: Printed) -> None:
    """On an alternating burst, `batch` needs a fraction of `fifo`'s switches, and waits less."""
    words = ["--generate", "burst", "--rate", "50", "--requests", "90", "--switch-cost", "1"]
    batch, fifo = simulated(capsys, *words, "--policy", "batch", "--policy", "fifo")

    assert batch["switches"] <= fifo["switches"] / 4
    assert batch["wait_p95_s"] <= fifo["wait_p95_s"]


def test_a_generated_trace_is_written_and_read(tmp_path: Path, capsys: Printed) -> None:
    """A generated trace that is written and read gives the same figures."""
    path = str(tmp_path / "trace.jsonl")
    words = ["--generate", "bursty", "--models", "4", "--requests", "80", "--max-wait", "7"]
    made = simulated(capsys, *words, "--write", path, "--policy", "fifo")

    assert made == simulated(capsys, path, "--policy", "fifo")


def test_writing_a_trace_needs_no_policy(tmp_path: Path, capsys: Printed) -> None:
    """Writing a trace needs no policy, and simulates nothing."""
    path = tmp_path / "trace.jsonl"
    status = main(["simulate", "--generate", "agents", "--write", str(path)])

    assert (0, "") == (status, capsys.readouterr().out)
    assert 300 == len(traces.read(path).requests)


def recording(path: Path, step_s: float, cost_s: float) -> str:
    """Write a trace of two requests of 10 tokens in a row, with a switch between them."""
    known = {"prompt_tokens": 0, "output_tokens": 10, "waited_s": 0.0, "result": "served"}
    requests = (
        TracedRequest(0, "a", 0.0, service_s=10 * step_s, **known),  # type: ignore[arg-type]
        TracedRequest(1, "b", 50.0, service_s=10 * step_s, **known),  # type: ignore[arg-type]
    )
    switches = (TracedSwitch(40.0, "a", "b", Residency.PARKED, cost_s),)
    head = Head({"a": TracedModel(), "b": TracedModel()}, "a")
    traces.write(path, Trace(head, requests, switches))
    return str(path)


def test_a_recording_is_simulated_with_its_own_times(tmp_path: Path, capsys: Printed) -> None:
    """A recording is simulated with its own service and switch times."""
    path = recording(tmp_path / "trace.jsonl", step_s=0.5, cost_s=2.0)
    (found,) = simulated(capsys, path)

    assert "batch" == found["policy"]
    assert (1, 57.0) == (found["switches"], pytest.approx(found["end_s"]))
    assert 2.0 == pytest.approx(found["wait_max_s"])


def test_times_of_another_recording_may_be_used(tmp_path: Path, capsys: Printed) -> None:
    """Times of another recording can be used, and flags override any recording."""
    measured = recording(tmp_path / "measured.jsonl", step_s=0.5, cost_s=2.0)
    trace = recording(tmp_path / "trace.jsonl", step_s=9.0, cost_s=9.0)
    (found,) = simulated(capsys, trace, "--measured", measured)
    (flagged,) = simulated(capsys, trace, "--measured", measured, "--switch-cost", "0")

    assert (2.0, 57.0) == pytest.approx((found["wait_max_s"], found["end_s"]))
    assert (0.0, 55.0) == pytest.approx((flagged["wait_max_s"], flagged["end_s"]))


def test_steps_may_take_no_time(capsys: Printed) -> None:
    """With steps that take no time, only prompts take time."""
    words = "--generate poisson --rate 2000 --requests 50 --step 0 --per-request 0 --switch-cost 0"
    (found,) = simulated(capsys, *words.split(), "--prompt-tokens", "1", "--prefill", "0.5")

    assert 25.0 == pytest.approx(found["end_s"], abs=0.1)


def test_a_recording_of_answers_without_tokens_is_simulated(
    tmp_path: Path, capsys: Printed
) -> None:
    """Answers without tokens, as embeddings, are simulated: only their prompts take time."""
    known = {"prompt_tokens": 10, "waited_s": 0.0, "service_s": 1.0, "result": "served"}
    requests = tuple(
        TracedRequest(i, "a", 0.4 * i, **known)  # type: ignore[arg-type]
        for i in range(6)
    )
    traces.write(tmp_path / "t", Trace(Head({"a": TracedModel()}, "a"), requests))
    (found,) = simulated(capsys, str(tmp_path / "t"))

    assert 6 == found["requests"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give either a trace or --generate"),
        ("x.jsonl --generate burst", "give either a trace or --generate"),
        ("missing.jsonl", "trace 'missing.jsonl' cannot be read: No such file or directory"),
        ("x.jsonl --rate 3", "--rate needs --generate; x.jsonl is an existing trace"),
        ("--generate burst --rate 0", "--rate must be above 0"),
        ("--generate burst --models 0", "--models must be at least 1"),
        ("--generate burst --step -1", "--step must be at least 0"),
        ("--generate burst --switch-cost nan", "--switch-cost must be at least 0"),
        ("--generate burst --slice 0", "--slice must be above 0"),
        ("--generate burst --max-wait 1e10", "--max-wait must be below 1e+09"),
        ("--generate burst --policy best", "switching.policy 'best' is not known"),
        ("--generate burst --write no/folder/x", "trace 'no/folder/x' cannot be written"),
    ],
)
def test_what_cannot_be_simulated_is_told_in_one_line(
    words: str, message: str, capsys: Printed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Input that cannot be simulated is reported in one line, with status 1."""
    monkeypatch.chdir(tmp_path)
    status = main(["simulate", *words.split()])

    (line,) = capsys.readouterr().err.splitlines()
    assert 1 == status
    assert line.startswith("vllm-hotswap: error: ")
    assert message in line


def test_a_measurement_must_tell_of_something(tmp_path: Path, capsys: Printed) -> None:
    """A recording is needed to measure: a generated trace was never served."""
    path = str(tmp_path / "t.jsonl")
    main(["simulate", "--generate", "burst", "--write", path])

    assert 1 == main(["simulate", "--generate", "burst", "--measured", path])
    assert "has no served requests" in capsys.readouterr().err
