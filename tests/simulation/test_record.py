"""Recordings: what happened, line by line, as a trace that can be simulated."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_hotswap.config.reader import load_config
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.events import RequestEnded, SwitchEnded
from vllm_hotswap.simulation import record, trace as traces
from vllm_hotswap.simulation.record import Recorder, trace_header
from vllm_hotswap.simulation.trace import (
    Head,
    TracedModel,
    TracedRequest,
    TracedSwitch,
    TracedSwitching,
)
from vllm_hotswap.states import Residency

HEAD = Head({"a": TracedModel(), "b": TracedModel()}, "a")
REQUEST = RequestEnded(
    3,
    "b",
    "served",
    arrived_s=1002.0,
    waited_s=0.5,
    prepared_s=0.125,
    service_s=0.25,
    switched=1,
    prompt_tokens=12,
    output_tokens=16,
    priority=2,
    max_wait_s=9.0,
)
SWITCH = SwitchEnded(
    "op",
    3,
    "a",
    "b",
    "switched",
    0.875,
    0,
    automatic=True,
    residency=Residency.COLD,
    drain_s=0.25,
    queued_s=0.125,
)


class Clock:
    """A clock that shows 1000 s first."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_requests_and_switches_are_in_the_file_at_once(tmp_path: Path) -> None:
    """Requests and switches are in the file at once, with times since the recording started."""
    path, clock = tmp_path / "t.jsonl", Clock()
    recorder = Recorder(path, HEAD, clock)
    clock.now_s = 1005.0
    recorder.notify(SWITCH)
    recorder.notify(REQUEST)

    trace = traces.read(path)
    recorder.close()

    assert HEAD == trace.head
    assert trace.requests == (
        TracedRequest(1, "b", 2.0, None, 0.0, 2, 9.0, 12, 16, 0.125, 0.5, 0.25, 1, "served"),
    )
    assert trace.switches == (
        TracedSwitch(4.125, "a", "b", Residency.COLD, 0.5, 0.25, "switched", True),
    )


def test_what_never_asked_for_its_engine_is_not_recorded(tmp_path: Path) -> None:
    """A request that was refused before it needed its engine is not recorded."""
    recorder = Recorder(tmp_path / "t.jsonl", HEAD)
    recorder.notify(RequestEnded(1, "a", "served"))
    recorder.close()

    assert () == traces.read(tmp_path / "t.jsonl").requests


def test_a_connection_is_not_recorded(tmp_path: Path) -> None:
    """A connection is not recorded: how long it was open is not what a request takes."""
    recorder = Recorder(tmp_path / "t.jsonl", HEAD)
    recorder.notify(replace(REQUEST, is_connection=True))
    recorder.close()

    assert () == traces.read(tmp_path / "t.jsonl").requests


def test_a_recording_is_not_overwritten(tmp_path: Path) -> None:
    """An existing file is not overwritten, and an unwritable one is refused."""
    (tmp_path / "t.jsonl").write_text("")

    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        Recorder(tmp_path / "t.jsonl", HEAD)
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        Recorder(tmp_path / "no" / "t.jsonl", HEAD)


def test_a_full_disk_ends_the_recording_and_not_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk ends the recording, not the server, and is logged once."""
    monkeypatch.setattr(record, "log", logging.getLogger("a-test-of-recordings"))
    (tmp_path / "full").symlink_to("/dev/full")
    monkeypatch.setattr(record, "create", lambda path: path.open("w"))
    recorder = Recorder(tmp_path / "full", HEAD)
    recorder.notify(REQUEST)
    recorder.close()

    assert ["event=recording_ended"] == [r.getMessage().split()[0] for r in caplog.records]
    assert "No space left on device" in caplog.text


def test_what_no_trace_can_hold_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no trace can hold is dropped and logged once; the server and the recording continue."""
    monkeypatch.setattr(record, "log", logging.getLogger("a-test-of-recordings"))
    caplog.set_level(logging.WARNING)
    recorder = Recorder(tmp_path / "t.jsonl", HEAD, Clock())
    recorder.notify(replace(REQUEST, waited_s=-1.0))
    recorder.notify(replace(REQUEST, service_s=float("nan")))
    recorder.notify(replace(SWITCH, duration_s=1e12))
    recorder.notify(REQUEST)
    recorder.close()

    trace = traces.read(tmp_path / "t.jsonl")
    assert (["served"], ()) == ([request.result for request in trace.requests], trace.switches)
    assert ["event=line_not_recorded"] == [message.split()[0] for message in caplog.messages]


def test_the_head_says_how_the_server_was_set(tmp_path: Path) -> None:
    """The head has each model's own settings, or those of `switching`."""
    path = tmp_path / "models.yaml"
    path.write_text(
        "switching: {policy: fifo, max_wait: 7, min_active: 1, slice: 3, drain_timeout: 9}\n"
        "models:\n"
        "  a: {model: org/a, priority: 2, weight: 1.5}\n"
        "  b: {model: org/b, max_wait: 4}\n"
    )

    assert trace_header(load_config(path)) == Head(
        {"a": TracedModel(2, 7.0, 1.5), "b": TracedModel(0, 4.0, 1.0)},
        "a",
        TracedSwitching("fifo", 1.0, 3.0, 9.0),
    )


def test_a_file_that_exists_ends_the_start(tmp_path: Path) -> None:
    """An existing file stops the start before anything slow, with one line."""
    (tmp_path / "models.yaml").write_text("models: {llama: {model: org/llama}}")
    (tmp_path / "t.jsonl").write_text("precious")
    flags = ["--port", "0", "--record", str(tmp_path / "t.jsonl")]
    command = ["serve", str(tmp_path / "models.yaml"), *flags]

    ended = subprocess.run(
        [sys.executable, "-m", "vllm_hotswap", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert 1 == ended.returncode
    assert "exists and is not overwritten; name another file" in ended.stderr
    assert 1 == len(ended.stderr.splitlines())
