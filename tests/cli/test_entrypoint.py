"""The quickstart's start: which file it serves, and when it runs plain vLLM."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from vllm_hotswap.entrypoints.openai.multi_model_api_server import config_path, main

OURS, QUICKSTARTS = "VLLM_HOTSWAP_CONFIG", "VLLM_HPU_MULTI_MODEL_CONFIG"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({QUICKSTARTS: "a.yaml"}, "a.yaml"),
        ({OURS: "b.yaml"}, "b.yaml"),
        ({QUICKSTARTS: "a.yaml", OURS: "b.yaml"}, "b.yaml"),
        ({QUICKSTARTS: "a.yaml", OURS: ""}, "a.yaml"),
        ({QUICKSTARTS: "", OURS: ""}, None),
        ({}, None),
    ],
)
def test_both_variables_name_the_file(environment: dict[str, str], expected: str | None) -> None:
    """Either variable names the file; the newer one wins, an empty one counts as unset."""
    assert expected == config_path(environment)


@pytest.mark.parametrize("name", [OURS, QUICKSTARTS])
def test_the_named_file_is_served(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The named file is served with all flags; a missing one ends the start with one line."""
    monkeypatch.setenv(name, str(tmp_path / "nowhere.yaml"))

    assert 1 == main(["--port", "1"])
    assert "nowhere.yaml' does not exist" in capsys.readouterr().err


def test_without_a_variable_it_is_vllms_own_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a variable vLLM's server runs, as by `python -m`, with the same arguments."""
    for name in (OURS, QUICKSTARTS):
        monkeypatch.delenv(name, raising=False)
    ran = []
    monkeypatch.setattr("runpy.run_module", lambda name, **kwargs: ran.append((name, kwargs)))
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))

    assert 0 == main(["--model", "x"])
    assert [
        ("vllm.entrypoints.openai.api_server", {"run_name": "__main__", "alter_sys": True})
    ] == ran
