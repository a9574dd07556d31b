"""The benchmark of request heads and connections."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks import heads
from tests.conftest import MakeServer
from tests.helpers.listening import listening

pytestmark = [pytest.mark.slow, pytest.mark.wide]


def test_a_run_tells_of_both_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both servers have as many turns in each case, and every turn has answers."""
    assert 0 == heads.main(["--rounds", "1", "--seconds", "0.2", "--out", str(tmp_path)])

    rows = json.loads((tmp_path / "heads.json").read_text())["rows"]
    cases = [(case, side) for case in heads.CASES for side in heads.SIDES]
    assert sorted(cases) == sorted((row["case"], row["side"]) for row in rows)
    assert all(row["requests"] > 0 for row in rows)
    assert "new connections, CPU, us/request" in capsys.readouterr().out


async def test_an_answer_that_is_none_ends_it(make_server: MakeServer) -> None:
    """A wrong answer ends the run: it would measure how something is refused."""
    async with listening(await make_server()) as port:
        loop = asyncio.get_running_loop()
        request = heads.CLOSED.replace(b"/health", b"/nowhere")
        _, client = await loop.create_connection(lambda: heads.Client(request), "127.0.0.1", port)

        with pytest.raises(OSError, match=r"the server answered b'HTTP/1\.1 404"):
            await client.ended
