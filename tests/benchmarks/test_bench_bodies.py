"""The benchmark of large bodies."""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path

import pytest

from benchmarks import bodies
from vllm_hotswap.api.model_name import from_json
from vllm_hotswap.demo.quickstart import free_port

pytestmark = [pytest.mark.slow, pytest.mark.wide]


@pytest.mark.parametrize("shape", bodies.SHAPES)
def test_every_body_is_json_that_names_its_model(shape: str) -> None:
    """Bodies are valid: otherwise the benchmark would measure how a mistake is answered."""
    body = bodies.body_of(shape, 100_000, "nobody")

    assert "nobody" == json.loads(body)["model"] == from_json(body)
    assert 90_000 < len(body) < 110_000


def test_a_quick_run_tells_of_every_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each shape has rows for an unknown model, which is refused, and for a known one."""
    assert 0 == bodies.main(["--quick", "--out", str(tmp_path)])

    rows = json.loads((tmp_path / "bodies.json").read_text())["rows"]
    assert list(bodies.SHAPES) == [row["shape"] for row in rows[1::2]]
    assert {404} == {row["status"] for row in rows if row.get("model") == "nobody"}
    assert all(row["probes"] > 0 for row in rows)
    assert all(row["worst_chat_ms"] > 0 for row in rows)
    assert 2 == capsys.readouterr().out.count("| token lists")


def test_a_server_that_ends_is_not_waited_for() -> None:
    """A server that exits is not waited for: the benchmark reports how it exited."""
    server = multiprocessing.get_context("spawn").Process(target=sys.exit, args=(3,))
    server.start()

    with pytest.raises(OSError, match="the server ended with 3"):
        bodies.until_it_serves(free_port(), server)


def test_a_body_that_cannot_be_sent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that cannot be sent is reported with the error that sending raised."""

    def fail(_port: int, body: bytes) -> tuple[int, float]:
        raise ConnectionResetError("reset")

    monkeypatch.setattr(bodies, "health_s", lambda _port: 0.0)
    monkeypatch.setattr(bodies, "chat_s", lambda _port: 0.0)
    monkeypatch.setattr(bodies, "send", fail)

    with pytest.raises(ConnectionResetError, match="reset"):
        bodies.measure(free_port(), "numbers", 1, "nobody")
