"""The benchmark of large requests."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks import loop
from tests.conftest import MakeServer
from tests.helpers.listening import listening

CASE = "/v1/completions, prompts"


async def test_servers_take_turns_in_answering_large_calls(
    make_server: MakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every large request is answered while others are sent."""
    async with listening(await make_server()) as one, listening(await make_server()) as other:
        sides = [f"--side=before=http://127.0.0.1:{one}", f"--side=after=http://127.0.0.1:{other}"]
        asked = [*sides, "--rounds=2", "--things=20", f"--case={CASE}", f"--out={tmp_path}"]
        assert 0 == await asyncio.to_thread(loop.main, asked)

    rows = json.loads((tmp_path / "loop.json").read_text())["rows"]
    assert ["before", "after"] * 2 == [row["side"] for row in rows]
    assert all(row["probes"] > 0 and row["worst_ms"] > 0 for row in rows)
    assert "before, median" in capsys.readouterr().out


async def test_a_call_that_is_refused_ends_it(make_server: MakeServer) -> None:
    """A refused request ends the run: it would measure how something is refused."""
    async with listening(await make_server()) as port:
        server = loop.Server(f"http://127.0.0.1:{port}")
        with pytest.raises(OSError, match="was answered with 404"):
            await asyncio.to_thread(loop.measure, server, CASE, "nobody", 2)
