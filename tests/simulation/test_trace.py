"""Traces: what is written is read again, and what is wrong is reported with its line."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.simulation import trace as traces
from vllm_hotswap.simulation.trace import (
    Head,
    Trace,
    TracedModel,
    TracedRequest,
    TracedSwitch,
    TracedSwitching,
)
from vllm_hotswap.states import Residency

HEAD = '{"kind": "trace", "version": 1, "models": {"a": {}, "b": {}}, "active": "a"}'
FIRST = '{"kind": "request", "id": 1, "model": "a", "arrived_s": 0.5}'


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Every field of a trace is read as it was written, known or not."""
    trace = Trace(
        Head({"a": TracedModel(2, 5.0, 1.5)}, "a", TracedSwitching("fifo", 1.0, 3.0, 9.0)),
        (
            TracedRequest(1, "a", 0.25, priority=3, max_wait_s=2.0, prompt_tokens=7),
            TracedRequest(2, "a", after=1, think_s=0.5, output_tokens=4),
            TracedRequest(3, "a", 1.0, waited_s=0.5, service_s=0.1, switched=2, result="served"),
        ),
        (TracedSwitch(0.5, None, "a", Residency.COLD, 0.75, 0.25, "failed", False),),
    )

    traces.write(tmp_path / "t.jsonl", trace)

    assert trace == traces.read(tmp_path / "t.jsonl")


def test_what_is_not_known_is_not_written() -> None:
    """Unknown values are not written: a generated request has no result."""
    text = traces.as_text(TracedRequest(1, "a", 0.123456789))

    assert text == (
        '{"kind": "request", "id": 1, "model": "a", "arrived_s": 0.123457, '
        '"prompt_tokens": 0, "output_tokens": 0}'
    )


def test_empty_lines_do_not_matter(tmp_path: Path) -> None:
    """Empty lines are ignored, but counted in line numbers."""
    (tmp_path / "t").write_text(f"{HEAD}\n\n{FIRST}\n\n")

    assert 1 == len(traces.read(tmp_path / "t").requests)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "line 1: the first line must be"),
        ([FIRST], "line 1: the first line must be"),
        ([HEAD, HEAD], "line 2: a second head"),
        ([HEAD, "{"], "line 2: Invalid JSON"),
        ([HEAD, "[]"], "line 2: "),
        ([HEAD, '{"kind": "else"}'], "line 2: Input tag 'else'"),
        ([HEAD, FIRST, FIRST], "line 3: id 1 is already used in line 2"),
        ([HEAD, FIRST.replace('"a"', '"c"')], "line 2: model 'c' is not in the first line"),
        ([HEAD, FIRST.replace("0.5", "-1")], "line 2: arrived_s: "),
        ([HEAD, FIRST.replace("0.5", "NaN")], "line 2: "),
        ([HEAD, FIRST.replace("arrived_s", "arrived")], "line 2: arrived: "),
        ([HEAD, FIRST.replace('"arrived_s": 0.5', '"think_s": 1')], "line 2: either arrived_s"),
        ([HEAD, FIRST.replace("0.5", '0.5, "after": 0')], "line 2: either arrived_s"),
        (
            [HEAD, FIRST.replace('"arrived_s": 0.5', '"after": 1')],
            "line 2: after: there is no request 1",
        ),
        ([HEAD.replace('"active": "a"', '"active": "c"')], "line 1: active model 'c'"),
        ([HEAD.replace('{"a": {}, "b": {}}', "{}")], "line 1: models: "),
        ([HEAD.replace("1", "2")], "line 1: version: "),
        (
            [HEAD, '{"kind": "switch", "at_s": 1, "source": "c", "target": "a", "cost_s": 1}'],
            "line 2: residency: ",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_line(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    """An error names its line of the trace, on one line."""
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))

    with pytest.raises(ConfigError) as caught:
        traces.read(path)

    assert f"trace '{path}', {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", ["{", '{"kind": "request", "id": 2, "mod', FIRST[:-1]])
def test_a_last_line_that_was_cut_is_left_out(
    tmp_path: Path, cut: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An incomplete last line, of a killed server or a full disk, is ignored with a warning."""
    monkeypatch.setattr(traces, "log", logging.getLogger("a-test-of-traces"))
    caplog.set_level(logging.WARNING)
    path = tmp_path / "t.jsonl"
    path.write_text(f"{HEAD}\n{FIRST}\n{cut}")

    assert [1] == [request.id for request in traces.read(path).requests]
    assert f"event=trace_cut path='{path}' line=3: left out" == caplog.messages[0]


def test_only_a_cut_line_is_left_out(tmp_path: Path) -> None:
    """Only an incomplete line is ignored; a complete one without a line end counts or fails."""
    path = tmp_path / "t.jsonl"
    path.write_text(f"{HEAD}\n{FIRST}")
    assert 1 == len(traces.read(path).requests)

    path.write_text(f"{HEAD}\n{FIRST.replace('0.5', '-1')}")
    with pytest.raises(ConfigError, match="line 2: arrived_s"):
        traces.read(path)

    path.write_text(HEAD[:-1])
    with pytest.raises(ConfigError, match="line 1: Invalid JSON"):
        traces.read(path)


def test_the_last_moment_is_not_rounded_up(tmp_path: Path) -> None:
    """The last moment is not rounded up, so that what is written can be read."""
    late_s = 999_999_999.9999999
    trace = Trace(Head({"a": TracedModel()}), (TracedRequest(1, "a", late_s, waited_s=late_s),))

    traces.write(tmp_path / "t.jsonl", trace)

    assert trace == traces.read(tmp_path / "t.jsonl")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A file that is missing or not text is named."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe")

    with pytest.raises(ConfigError, match=r"missing' cannot be read: No such file"):
        traces.read(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"binary' cannot be read: it is not UTF-8"):
        traces.read(tmp_path / "binary")


def test_a_trace_is_not_overwritten(tmp_path: Path) -> None:
    """An existing trace is not overwritten: it may be of a day that does not come again."""
    path = tmp_path / "t.jsonl"
    path.write_text("precious")

    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        traces.write(path, Trace(Head({"a": TracedModel()})))
    with pytest.raises(ConfigError, match="cannot be written"):
        traces.write(tmp_path / "no" / "folder", Trace(Head({"a": TracedModel()})))

    assert "precious" == path.read_text()
