"""The benchmark of large bodies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_hotswap.bench import bodies
from vllm_hotswap.model_field import from_json


@pytest.mark.parametrize("shape", bodies.SHAPES)
def test_every_body_is_json_that_names_its_model(shape: str) -> None:
    """Otherwise it would measure how a mistake is answered."""
    body = bodies.body_of(shape, 100_000, "nobody")

    assert "nobody" == json.loads(body)["model"] == from_json(body)
    assert 90_000 < len(body) < 110_000


def test_a_quick_run_tells_of_every_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused where nobody has the model, and read where one has."""
    assert 0 == bodies.main(["--quick", "--out", str(tmp_path)])

    rows = json.loads((tmp_path / "bodies.json").read_text())["rows"]
    assert list(bodies.SHAPES) == [row["shape"] for row in rows[1::2]]
    assert {404} == {row["status"] for row in rows if row.get("model") == "nobody"}
    assert all(row["probes"] > 0 for row in rows)
    assert "| token lists" in capsys.readouterr().out
