"""`make rehearse-gaudi` itself: what it refuses, and that its parts are there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import rehearse_gaudi
from tools.rehearse_gaudi import PARTS, RehearsalError, check_base, main, surroundings
from tools.setup import ROOT


def test_every_part_of_the_rehearsal_is_there() -> None:
    """Each has its tests, and a limit of time."""
    for part in PARTS:
        assert (ROOT / part.tests).is_file()
        assert 0 < part.limit_s <= 3600


def test_a_folder_without_the_plugin_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is made or installed."""
    folder = tmp_path / "rehearsal"
    assert 1 == main(["--plugin", str(tmp_path), "--folder", str(folder)])
    assert not folder.exists()
    assert capsys.readouterr().err == (
        f"rehearsal: error: PLUGIN is '{tmp_path}', and there is no vllm_gaudi/platform.py in it; "
        "clone vllm-project/vllm-gaudi at v0.26.0 and name its folder\n"
    )


def test_an_environment_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(RehearsalError, match=r"python is missing; make an environment with vLLM"):
        check_base(tmp_path / "bin/python")


def test_an_environment_with_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin is for one version."""
    monkeypatch.setattr(rehearse_gaudi, "VERSION", "0.1.0")
    with pytest.raises(RehearsalError, match=r"and the plugin is for 0\.1\.0; name another"):
        check_base(Path(sys.executable))


def test_tests_find_the_stand_in_and_where_results_go(tmp_path: Path) -> None:
    found = surroundings(tmp_path, tmp_path / "rehearsal.jsonl")

    assert str(tmp_path / "standin/libhpu.so") == found["FAKEHPU_LIBRARY"]
    assert found["PYTHONPATH"].startswith(str(ROOT / "tests/gaudi_standin/site"))
    assert str(tmp_path / "rehearsal.jsonl") == found["REHEARSAL_RESULTS"]
