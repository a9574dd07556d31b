"""The commands that hold a model, or switch to one, against a server that listens."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import uvicorn

from tests.support import Server
from vllm_hotswap import remote
from vllm_hotswap.cli import main


@dataclass
class Listening:
    """A server, its loop, and where it listens."""

    url: str
    server: Server
    http: uvicorn.Server
    loop: asyncio.AbstractEventLoop


@pytest.fixture
def listening() -> Iterator[Listening]:
    """A server on fake engines, in a thread of its own."""
    sock = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    found: list[Listening] = []
    is_up = threading.Event()

    async def serve() -> None:
        server = await Server().start()
        config = uvicorn.Config(
            server.app, lifespan="off", log_level="error", timeout_graceful_shutdown=1
        )
        found.append(Listening(url, server, uvicorn.Server(config), asyncio.get_running_loop()))
        is_up.set()
        await found[0].http.serve([sock])
        await server.stop()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert is_up.wait(30)
    yield found[0]
    found[0].http.should_exit = True
    thread.join()


@pytest.fixture
def url(listening: Listening) -> str:
    return listening.url


def test_model_is_held_shown_and_released(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each; a refusal is one line, too, and the status is 1."""
    hold = ["lease", "--url", url, "--owner", "ann", "--ttl", "60"]

    assert 0 == main([*hold, "qwen", "--note", "nightly"])
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("qwen: held for another 60 s for ann (nightly), lease lease-")
    lease = said.rpartition(" ")[2]

    assert 0 == main(["leases", "--url", url])
    assert said == capsys.readouterr().out.strip()

    assert 1 == main([*hold, "llama"])
    (refused,) = capsys.readouterr().err.splitlines()
    assert f"end that with DELETE /admin/leases/{lease}" in refused

    assert 0 == main(["release", "--url", url, lease])
    assert 0 == main(["leases", "--url", url])
    assert [f"qwen: {lease} has ended", "no model is held"] == (
        capsys.readouterr().out.splitlines()
    )


def test_what_takes_a_while_is_told_meanwhile(
    listening: Listening, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stderr; the answer is still one line."""
    monkeypatch.setattr(remote, "QUIET_S", 0.1)
    listening.server.host.hold("activate", "qwen")
    release = partial(listening.server.host.release, "activate", "qwen")
    timer = threading.Timer(1.0, listening.loop.call_soon_threadsafe, (release,))
    timer.start()

    assert 0 == main(["switch", "--url", listening.url, "qwen"])
    timer.join()

    said = capsys.readouterr()
    assert said.out.startswith("qwen: active after ")
    assert any(line.endswith(" s  qwen: verify") for line in said.err.splitlines()), said.err


def test_what_is_over_at_once_is_not_followed(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream of events that nobody reads would stay open until the process ends."""
    monkeypatch.setattr(remote, "QUIET_S", 0.3)
    assert 0 == main(["lease", "--url", listening.url, "--owner", "ann", "--ttl", "60", "qwen"])
    time.sleep(0.6)

    assert 0 == len(listening.http.server_state.connections)
