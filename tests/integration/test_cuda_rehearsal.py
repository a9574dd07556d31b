"""A server over the stand-in for a CUDA device, whose driver fails: `make rehearse-cuda`.

Each call of the driver that `host.cuda_driver` makes fails once in each move of a model: the first
of its name, the one in the middle, and the last. `tests/host/test_cuda_memory.py` lets every one
fail.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cuda_standin.board import OUT_OF_MEMORY, UNKNOWN, Board
from tests.helpers.faults import wait_until
from tests.helpers.ports import free_port
from tests.helpers.rehearsal_results import record
from tests.integration.processes import ROOT, ServerProcess
from vllm_hotswap.demo.quickstart import MODELS

pytestmark = [
    pytest.mark.wide,
    pytest.mark.timeout(1500),
    pytest.mark.skipif("FAKEGPU_BOARD" not in os.environ, reason="there is no stand-in"),
]

MIB = 1 << 20
SOURCE, TARGET = "llama", "qwen"
WORKSPACE_BYTES = 40 * MIB
"""Matrix multiplications on one more stream; torch may have this workspace or not."""

START_S = 600
"""Kernels may have to be compiled first."""

GRAPHS = "{mode: 0, cudagraph_mode: FULL_DECODE_ONLY, cudagraph_capture_sizes: [1, 2, 4]}"

KV = "kv_cache_memory_bytes: 32M"
"""Little, because it is zeroed at each of the many wakes."""

OURS = sorted(
    set(
        re.findall(
            r'_call\(\s*"(cu\w+)"',
            (ROOT / "src/vllm_hotswap/host/cuda_driver.py").read_text(encoding="utf-8"),
        )
    )
)
"""The driver's functions that are called for a model."""


@pytest.fixture(autouse=True)
def llama_is_active() -> None:
    """Do nothing: this module's server has llama, but not the usual models."""


@pytest.fixture(scope="module")
def board() -> Board:
    return Board(Path(os.environ["FAKEGPU_BOARD"]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("rehearsal")
    lines = [
        f"  {alias}: {{model: {MODELS / alias}, compilation_config: {GRAPHS}, {KV}}}"
        for alias in (SOURCE, TARGET)
    ]
    config = folder / "models.yaml"
    config.write_text("\n".join(["models:", *lines]), encoding="utf-8")
    running = ServerProcess.start(
        ["-m", "vllm_hotswap", "serve", str(config)],
        free_port(),
        folder / "server.log",
        {"VLLM_SERVER_DEV_MODE": "1"},
        within_s=START_S,
    )
    try:
        yield running
    finally:
        status = running.stop()
    assert status == 0, running.log_tail()


# --- moves of a model -----------------------------------------------------------------------------


def post(server: ServerProcess, path: str, **body: Any) -> httpx.Response:
    return server.client.post(path, json=body)


def message(response: httpx.Response) -> str:
    """Return an error's message, shortened."""
    return str(response.json()["error"]["message"])[:200]


def well(response: httpx.Response) -> None:
    assert 200 == response.status_code, response.text


def switch(server: ServerProcess, alias: str = TARGET) -> httpx.Response:
    return post(server, "/v1/models/switch", model=alias)


def sleep(server: ServerProcess) -> httpx.Response:
    return post(server, f"/admin/models/{TARGET}/sleep", level=1)


def unload(server: ServerProcess) -> httpx.Response:
    return post(server, f"/admin/models/{TARGET}/unload")


def residency(server: ServerProcess, alias: str = TARGET) -> str:
    return str(server.client.get("/admin/status").json()["models"][alias]["residency"])


def park(server: ServerProcess) -> None:
    """Leave the target awake, wherever it was, and the source active."""
    well(switch(server))
    well(switch(server, SOURCE))


def park_again(server: ServerProcess) -> None:
    """Do the same after a sleep: the target's host copy exists."""
    put_to_sleep(server)
    park(server)


def park_anew(server: ServerProcess) -> None:
    """Do the same, freshly loaded: the target has never slept."""
    park(server)
    well(unload(server))
    park(server)


def put_to_sleep(server: ServerProcess) -> None:
    park(server)
    well(sleep(server))


def make_cold(server: ServerProcess) -> None:
    park(server)
    well(unload(server))


def tokens(server: ServerProcess, alias: str) -> list[int]:
    body = {"prompt": "Hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    answer = post(server, "/v1/completions", model=alias, return_token_ids=True, **body)
    well(answer)
    return list(answer.json()["choices"][0]["token_ids"])


@dataclass(frozen=True)
class Move:
    """A move of the target while the source is active."""

    name: str
    prepare: Callable[[ServerProcess], None]
    do: Callable[[ServerProcess], httpx.Response]


MOVES = (
    Move("first sleep", park_anew, sleep),
    Move("later sleep", park_again, sleep),
    Move("wake", put_to_sleep, switch),
    Move("load", make_cold, switch),
    Move("unload awake", park, unload),
    Move("unload asleep", put_to_sleep, unload),
)

HARMLESS = ("cuCtxGetCurrent", "cuCtxSynchronize")
"""Torch works without the first. Memory is freed without the others, and a failure is logged."""


def places(count: int) -> list[int]:
    """Return the first, the middle and the last of so many calls: loads take their time."""
    return sorted({1, (count + 1) // 2, count})


def calls_of(server: ServerProcess, board: Board, move: Move) -> dict[str, int]:
    """Return how often a move calls each of our functions when all goes well."""
    move.prepare(server)
    before = board.calls()
    well(move.do(server))
    after = board.calls()
    counts = {call: after.get(call, 0) - before.get(call, 0) for call in OURS}
    return {call: count for call, count in counts.items() if count}


def log_since(server: ServerProcess, place: int) -> str:
    with server.log.open("rb") as log:
        log.seek(place)
        return log.read().decode(errors="replace")


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.name.replace(" ", "_"))
def test_a_driver_call_that_fails_once_costs_the_source_nothing(
    server: ServerProcess, board: Board, move: Move
) -> None:
    """A driver call that fails once is reported, the source stays active, and a retry works."""
    park_anew(server)
    expected = tokens(server, SOURCE)
    park(server)
    before = board.books()
    for call, count in calls_of(server, board, move).items():
        for place in places(count):
            move.prepare(server)
            told_before, failed_before = server.log.stat().st_size, board.failed
            # A wake without room tries again by itself, and nothing is logged then.
            lacks_room = call == "cuMemCreate" and move.name != "wake"
            code = OUT_OF_MEMORY if lacks_room else UNKNOWN
            with board.failing(call, place, code):
                response = move.do(server)
            if call in HARMLESS and board.failed == failed_before:
                continue  # Triton also asks for the context, and not always as often
            where = f"{move.name}: {call}, place {place} of {count}"
            facts = {
                "move": move.name,
                "call": call,
                "place": place,
                "of": count,
                "status": response.status_code,
                "residency": residency(server),
                "answer": "" if response.status_code == 200 else message(response),
            }

            assert 1 == board.failed - failed_before, where
            told = log_since(server, told_before)
            if response.status_code != 200:
                assert response.json()["error"]["message"], where
            assert call in told or call in HARMLESS, (where, told)
            serving = SOURCE if response.status_code != 200 or move.do is not switch else TARGET
            assert expected == tokens(server, serving), where
            record("a call fails", **facts)

            park(server)
            assert expected == tokens(server, SOURCE), where
            after = board.books()
            assert abs(after["used"] - before["used"]) <= WORKSPACE_BYTES, (where, before, after)
            assert after["handles"] == before["handles"], (where, before, after)
            assert after["reserved"] == before["reserved"], (where, before, after)


# --- other processes on the device ----------------------------------------------------------


def test_another_process_that_takes_memory_moves_the_idle_model_down(
    server: ServerProcess, board: Board
) -> None:
    """When another process takes memory, the idle model moves down, and can come back later."""
    park(server)
    expected, free = tokens(server, SOURCE), board.total - board.used
    before = server.status()["memory"]["device"]["others"]  # type: ignore[index]
    board.others = free - 100 * MIB
    try:
        wait_until(lambda: residency(server) != "parked", timeout_s=60)
        assert expected == tokens(server, SOURCE)
        seen = server.status()["memory"]["device"]["others"]  # type: ignore[index]
        assert seen - before >= free - 200 * MIB
        record("another process takes memory", bytes=board.others, then=residency(server))
    finally:
        board.others = 0
    assert "event=device_taken" in server.log.read_text(errors="replace")

    wait_until(lambda: switch(server).status_code == 200, timeout_s=60)
    well(switch(server, SOURCE))
    assert expected == tokens(server, SOURCE)


# --- growth -----------------------------------------------------------------------------------


def host_anonymous_bytes(server: ServerProcess) -> int:
    """Return memory of the engine host and the API process that is not the device's."""
    total = 0
    for process in server.all_processes():
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        total += int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    return total


CYCLES, WARM_UP = 12, 4
HOST_SLACK_BYTES = 48 * MIB
"""What the allocator of the host may keep more at the end than at the start."""


def test_twelve_cold_switches_grow_nothing(server: ServerProcess, board: Board) -> None:
    """Twelve cold switches grow neither device memory, pinned memory nor the host's own."""
    park(server)
    seen = []
    for number in range(1 - WARM_UP, CYCLES + 1):
        alias = (SOURCE, TARGET)[number % 2]
        well(post(server, f"/admin/models/{alias}/unload"))
        well(switch(server, alias))
        assert tokens(server, alias)
        if number >= 1:
            seen.append({**board.books(), "host": host_anonymous_bytes(server)})
            record("a cold switch", number=number, to=alias, **seen[-1])

    for book in ("used", "reserved", "handles", "streams", "pinned"):
        slack = WORKSPACE_BYTES if book == "used" else 0
        assert seen[-1][book] <= seen[1][book] + slack, (book, seen)
    assert seen[-1]["host"] <= seen[1]["host"] + HOST_SLACK_BYTES, [each["host"] for each in seen]
