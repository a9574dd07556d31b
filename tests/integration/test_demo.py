"""The demo's requests on the server that its last words start, both as they are printed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.demo.test_demo import printed, shell
from tests.helpers.ports import free_port
from tests.integration.processes import ServerProcess
from vllm_hotswap.demo.quickstart import closing, online_flow


@pytest.fixture
def left_running(tmp_path: Path) -> Iterator[ServerProcess]:
    """The server that is left running, by the printed command."""
    port = free_port()
    serving, _ = printed(closing(port))
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {serving}"], stdout=output, stderr=subprocess.STDOUT
        )
    server = ServerProcess(process, log, f"http://127.0.0.1:{port}")
    server.wait_until_ready()
    yield server
    assert 0 == server.stop()


@pytest.mark.wide
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_command_that_the_demo_prints_works_when_it_is_pasted(
    left_running: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's whole flow works twice: as it runs, and by its printed lines in a shell."""
    online_flow(left_running.client)
    commands = printed(capsys.readouterr().out)
    left_running.switch("llama")
    answers = [json.loads(shell(command)) for command in commands]

    listed, first, switched, second, called = answers
    assert ["llama", "qwen", "embed"] == [card["id"] for card in listed["data"]]
    assert "llama" in first["choices"][0]["message"]["content"]
    assert (True, "qwen") == (switched["switched"], switched["current_model"])
    assert "qwen" in second["choices"][0]["message"]["content"]
    (tool,) = called["choices"][0]["message"]["tool_calls"]
    assert "get_weather" == tool["function"]["name"]
    log = left_running.log.read_text()
    assert log.index("event=start step='loading vLLM'") < log.index("event=load ")
