"""What `vllm-hotswap demo --write` leaves in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_hotswap.demo import write
from vllm_hotswap.errors import ConfigError


def test_a_configuration_that_was_edited_is_left_alone(tmp_path: Path) -> None:
    """The message names it, and nothing is written beside it."""
    (tmp_path / "models.yaml").write_text("models: {mine: {model: org/mine}}")

    with pytest.raises(ConfigError, match="exists and is another; name another folder"):
        write(tmp_path)

    assert [tmp_path / "models.yaml"] == list(tmp_path.iterdir())
    assert "org/mine" in (tmp_path / "models.yaml").read_text()


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    """A folder that was written before is as good as an empty one."""
    first = write(tmp_path).read_text()

    assert first == write(tmp_path).read_text()
