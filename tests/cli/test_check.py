"""The output of `check`, without looking at a model."""

from __future__ import annotations

import io
import sys

import pytest

from vllm_hotswap.cli.check import ModelReport, Report, table
from vllm_hotswap.errors import ConfigError, ConfigMistakes, Mistake, one_line
from vllm_hotswap.telemetry.progress import CheckProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def look_at_two_models() -> None:
    with CheckProgress(["llama", "qwen"]) as progress:
        progress.begin("llama")
        progress.begin("qwen")


def test_progress_is_a_line_for_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal, it prints lines; the first comes before vLLM is imported."""
    look_at_two_models()

    assert [
        "checking: reading vLLM's flags ...",
        "checking llama (1 of 2) ...",
        "checking qwen (2 of 2) ...",
    ] == capsys.readouterr().err.splitlines()


def test_progress_is_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal, a bar counts the checked models, and disappears at the end."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    look_at_two_models()

    shown = terminal.getvalue()
    assert "checking: reading vLLM's flags" in shown
    assert "checking llama" in shown
    assert "checking qwen:  50%" in shown
    assert "\n" not in shown


def test_errors_come_last_in_the_order_of_the_file() -> None:
    """Errors follow the file's order, one line each; errors without a line number come last."""
    report = Report(
        [ModelReport("a", problems={"weights": ["x"], "settings": ["y"]})],
        list(ConfigMistakes([Mistake(9, "m:9: y"), Mistake(3, "m:3: x")]).mistakes),
        ["memory: skipped until the errors are fixed"],
    )

    lines = table(report).splitlines()

    assert lines[1].endswith("weights, settings")
    assert [
        "error: m:3: x",
        "error: m:9: y",
        "error: memory: skipped until the errors are fixed",
    ] == (lines[-3:])
    assert not report.is_good


def test_several_mistakes_stay_on_a_line_each() -> None:
    """A mistake stays on one line, whatever it contains; another error is one line as a whole."""
    mistakes = ConfigMistakes([Mistake(2, "b\nc"), Mistake(1, "a"), Mistake(1, "a")])

    assert "a\nb c" == one_line(mistakes)
    assert "a b" == one_line(ConfigError("a\nb"))
