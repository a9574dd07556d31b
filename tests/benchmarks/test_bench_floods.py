"""The benchmark of floods, on fake engines."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks.floods import __main__ as floods
from benchmarks.floods.attacker import AttackerFailed, again, attacker
from benchmarks.floods.kinds import KINDS
from benchmarks.floods.line import Attack, Target
from benchmarks.floods.victim import first_token, whole_answer
from benchmarks.wire import End, Reply
from tests.conftest import MakeServer
from tests.helpers.listening import listening
from vllm_hotswap.access.keys import Keys, KeySource
from vllm_hotswap.access.rights import Group, PerMinute, Rights
from vllm_hotswap.access.roles import Access
from vllm_hotswap.config.settings import LimitsConfig

pytestmark = [pytest.mark.slow, pytest.mark.wide]

RATED = Group(
    Rights("rated", per_minute=PerMinute(requests=1)),
    "rights.rated",
    KeySource(Keys.of(["slow"], "x")),
)
ACCESS = Access(user_keys=["eve", "ann"], admin_keys=["root"], groups=[RATED])
SMALL = LimitsConfig(held_bytes=512 << 20, connections=64)
"""Limits so low that few connections reach them."""

VLLM_ALONE = {"items", "conversations"}
"""Floods of routes that the fake engine lacks."""

TOKEN = b'data: {"choices": [{"text": "I"}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("name", [name for name in KINDS if name not in VLLM_ALONE])
async def test_every_flood_gets_to_what_it_is_meant_for(make_server: MakeServer, name: str) -> None:
    """Every flood reaches its target, or the benchmark would measure something else."""
    kind = KINDS[name]
    server = await make_server(access=ACCESS, limits=SMALL)
    async with listening(server, SMALL) as port:
        attack = Attack(Target(port, "llama", "eve", "slow"))
        connections = [
            asyncio.create_task(again(kind, attack)) for _ in range(min(kind.connections, 16))
        ]
        async with asyncio.timeout(60):
            while kind.shows.isdisjoint(attack.outcomes):  # noqa: ASYNC110  # the attack goes on
                await asyncio.sleep(0.01)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


@pytest.mark.parametrize("name", sorted(VLLM_ALONE))
async def test_routes_of_vllm_alone_are_asked(make_server: MakeServer, name: str) -> None:
    """Requests to routes that an engine lacks get 404, and the bounds admit them."""
    server = await make_server(access=ACCESS)
    async with listening(server) as port:
        attack = Attack(Target(port, "llama", "eve", "slow"))
        await KINDS[name].once(attack)

    assert {"sent": 1, "404": 1} == attack.outcomes


def test_a_run_tells_of_each_flood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run reports watched clients before, during and after each flood, memory, and the flood."""
    names = ["busy process", "connects", "wrong keys"]
    times = [
        "--seconds",
        "1",
        "--around",
        "1",
        "--warm-up",
        "0.1",
        "--per-second",
        "10",
        "--nice",
        "0",
    ]
    given = ["--quick", "--fake", "--only", ",".join(names), *times, "--out", str(tmp_path)]

    assert 0 == floods.main(given)

    content = json.loads((tmp_path / "floods.json").read_text())
    rows = content["rows"]
    assert names == [row["flood"] for row in rows]
    assert "fake" == content["options"]["engines"]
    assert all(row["reached"] and not row["errors"] for row in rows)
    assert all(row["p95_during_by_before"] > 0 and row["p95_after_by_before"] > 0 for row in rows)
    phases = [phase for row in rows for phase in row["phases"].values()]
    assert 9 == len(phases)
    assert all(phase[name]["n"] > 0 for phase in phases for name in ("stream", "health", "admin"))
    assert all(row["memory_mib"]["during"]["api_rss"] > 10 for row in rows)
    assert {"401"} == set(rows[2]["outcomes"])
    shown = capsys.readouterr().out
    assert "| (busy process)" in shown
    assert "| wrong keys" in shown


def test_a_flood_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown flood is refused with a list of the existing ones."""
    with pytest.raises(SystemExit):
        floods.parse(["--only", "wrong keys,frogs"])

    assert "unknown flood frogs; known: nobody" in capsys.readouterr().err


async def test_an_attacker_that_ends_is_not_waited_for() -> None:
    """An attacker that exits is reported: the flood must not look as if it was withstood."""
    with attacker(KINDS["busy process"], Target(1, "llama", "", ""), 0) as process:
        process.process.kill()
        process.process.join()

        with pytest.raises(AttackerFailed, match="it ended with -9"):
            await process.sent(60)


# --- the watched clients ----------------------------------------------------------------------


def reply(*pieces: bytes, status: int = 200, end: End = End.COMPLETE) -> Reply:
    """A reply whose pieces came a second after each other, from second 1 on."""
    found = Reply(end, status, is_stream=True, ended_s=10.0)
    for number, piece in enumerate(pieces, 1):
        found.body += piece
        found.arrivals.append((len(found.body), float(number)))
    return found


def test_a_wait_counts_from_when_the_request_was_due() -> None:
    """A wait counts from when the request was due, not sent, and to the first token."""
    assert 1.5 == first_token(reply(TOKEN, TOKEN, DONE), -0.5).waited_s
    assert "" == first_token(reply(TOKEN, TOKEN, DONE), -0.5).error


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (reply(TOKEN), "200"),
        (reply(DONE), "200"),
        (reply(TOKEN, DONE, end=End.LOST), "lost"),
        (reply(end=End.HUNG), "hung"),
        (reply(b'{"error": "queue_full"}', status=429), "429: {"),
    ],
)
def test_all_but_a_whole_stream_is_an_error(found: Reply, said: str) -> None:
    """Everything except a whole stream is an error: a fast refusal is not a short wait."""
    assert said in first_token(found, 0.0).error


def test_an_answer_that_is_no_200_is_an_error() -> None:
    """A health check that gets 503 has failed, however fast it was."""
    assert "" == whole_answer(reply(b"{}"), 0.0).error
    assert "503: no" == whole_answer(reply(b"no", status=503), 0.0).error
