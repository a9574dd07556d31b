"""What is shown while a step takes long."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from vllm_hotswap.telemetry.progress import LINE_S, ProgressTimer, waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_something_long_is_told_at_once_and_again_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a terminal, a long step is reported at once and again with the seconds so far."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    now, said = [100.0], []
    shown = ProgressTimer(
        "loading", lambda what, after_s: said.append((what, after_s)), lambda: now[0]
    )
    for now[0] in (100.5, 100 + LINE_S, 100.5 + LINE_S, 100 + 2 * LINE_S):
        shown.tick()
    shown.close()

    assert [("loading", 0), ("loading", LINE_S), ("loading", 2 * LINE_S)] == said


def test_a_terminal_has_one_line_that_counts_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal has one line that counts, and nothing of it is left at the end."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = ProgressTimer("loading", lambda *_: pytest.fail("a line was told"))
    shown.tick()
    counting = terminal.getvalue()
    shown.close()

    assert "loading 00:00" in counting
    assert "\n" not in terminal.getvalue()
    assert "" == terminal.getvalue().rpartition("\r")[2].strip()


class Lines(logging.Handler):
    """Keep what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def test_a_step_of_the_start_is_logged_before_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the start is logged before it runs, not after it."""
    lines, logger = Lines(), logging.getLogger("vllm_hotswap")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(logger, "handlers", [lines])
    before = logger.level
    logger.setLevel(logging.INFO)
    with waiting("loading vLLM"):
        said = lines.said[:]
    logger.setLevel(before)

    assert ["event=start step='loading vLLM' elapsed_s=0"] == said
