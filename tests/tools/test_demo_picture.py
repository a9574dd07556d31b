"""The picture in the README is what a server answers today."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tools import demo_picture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]

COMMITTED = Path(__file__).parents[2] / demo_picture.PICTURE


def test_the_picture_is_the_one_that_is_recorded(tmp_path: Path) -> None:
    """Every text and every line; `python -m tools.demo_picture` records it anew."""
    out = tmp_path / "images" / "demo.svg"
    assert 0 == demo_picture.main(["--out", str(out)])

    recorded, committed = out.read_text(), COMMITTED.read_text()
    assert demo_picture.texts(recorded) == demo_picture.texts(committed)
    assert len(demo_picture.texts(recorded)) > 15
    assert recorded == committed


def test_the_picture_is_a_still_that_needs_no_animation() -> None:
    """Small, self-contained, legible in both themes, and hidden by nothing but the animation."""
    drawing = COMMITTED.read_text()

    assert len(drawing) < 100_000
    assert "prefers-color-scheme: dark" in drawing
    assert ["0"] == re.findall(r"opacity: ?(\S+)", drawing)
    assert [demo_picture.SVG] == re.findall(r"https?://[^\"' ]+", drawing)


def test_the_picture_names_no_time() -> None:
    """Fake engines are as fast as they are told."""
    texts = " ".join(demo_picture.texts(COMMITTED.read_text()))

    assert [] == re.findall(r"\d+(?:\.\d+)? ?m?s\b|_ms|duration", texts)
