"""The commands that hold a model, against a server that listens."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn

from tests.support import Server
from vllm_hotswap.cli import main


@pytest.fixture
def url() -> Iterator[str]:
    """A server on fake engines, in a thread of its own."""
    listening = socket.create_server(("127.0.0.1", 0))
    http: list[uvicorn.Server] = []
    is_up = threading.Event()

    async def serve() -> None:
        server = await Server().start()
        http.append(uvicorn.Server(uvicorn.Config(server.app, lifespan="off", log_level="error")))
        is_up.set()
        await http[0].serve([listening])
        await server.stop()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    is_up.wait()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    http[0].should_exit = True
    thread.join()


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
