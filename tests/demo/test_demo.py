"""The demo: its files and its output; every printed command works when it is pasted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.helpers.ports import free_port
from tests.helpers.remote_server import listening_server
from vllm_hotswap.cli.main import main
from vllm_hotswap.config.reader import load_config
from vllm_hotswap.demo import quickstart as demo
from vllm_hotswap.demo.quickstart import Steps, closing, write
from vllm_hotswap.errors import ConfigError

pytestmark = pytest.mark.slow


def test_a_configuration_that_was_edited_is_left_alone(tmp_path: Path) -> None:
    """The refusal names the edited file, and nothing is written beside it."""
    (tmp_path / "models.yaml").write_text("models: {mine: {model: org/mine}}")

    with pytest.raises(ConfigError, match="exists with other content; name another folder"):
        write(tmp_path)

    assert [tmp_path / "models.yaml"] == list(tmp_path.iterdir())
    assert "org/mine" in (tmp_path / "models.yaml").read_text()


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    """Writing to a folder that was written before changes nothing."""
    first = write(tmp_path).read_text()

    assert first == write(tmp_path).read_text()


def printed(text: str) -> list[str]:
    """Return the commands in the printed text."""
    return [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]


def shell(command: str, **kwargs: object) -> str:
    """Return what a command prints on standard output; it must succeed."""
    ran = subprocess.run(
        ["/bin/sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        **kwargs,  # type: ignore[call-overload]
    )
    return str(ran.stdout)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_requests_are_printed_as_commands_that_get_the_same_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each request is printed as a command that works, whatever characters it has."""
    question = "What's \"up\" in 'Köln'? $HOME `ls` \\n"
    with (
        listening_server() as running,
        httpx.Client(base_url=running.url, trust_env=False) as client,
    ):
        answers = [
            demo.call(client, "GET", "/v1/models"),
            demo.call(client, "POST", "/v1/models/switch", {"model": "qwen"}),
            demo.chat(client, "qwen", question),
        ]
        commands = printed(capsys.readouterr().out)
        again = [json.loads(shell(command)) for command in commands]

    listed, switched, said = again
    assert answers[0] == listed | {"data": answers[0]["data"]}
    assert ("qwen", False) == (switched["current_model"], switched["switched"])
    assert answers[2]["choices"] == said["choices"]
    assert "Content-Type: application/json" in commands[1]


def test_what_to_do_next_works_as_it_is_printed(tmp_path: Path) -> None:
    """The printed next steps work: the models are written, and can be served."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    _, writing = printed(closing(8000))

    path = shell(writing, cwd=tmp_path, env=environment).strip()

    assert ("llama", "qwen", "embed") == load_config(tmp_path / path).aliases


def test_command_that_a_missing_file_is_answered_with_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command for a missing file works as printed, with a folder in the place of DIR."""
    monkeypatch.chdir(tmp_path)
    assert 1 == main(["check", "models.yaml"])
    (command,) = re.findall("`vllm-hotswap (.*?)`", capsys.readouterr().err)

    assert 0 == main(command.replace("DIR", ".").split())
    assert ("llama", "qwen", "embed") == load_config(Path("models.yaml")).aliases


def test_the_end_says_how_to_go_on_at_the_same_address() -> None:
    """The end names the served models, and keeps the address, so that commands can be pasted."""
    serving, _ = printed(closing(8123))

    assert serving.endswith(" demo --serve --port 8123")
    assert "two models" not in closing(8123)
    assert "third model" in closing(8123)


def test_steps_of_the_start_are_shown_as_they_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step is shown before the log has a line for it; each line of the log is shown once."""
    log = tmp_path / "server.log"
    steps = Steps(log)
    steps.show()
    first = capsys.readouterr().out

    for stage in ("weights", "ready"):
        with log.open("a") as file:
            file.write(f"INFO now vllm_hotswap event=load model=llama stage={stage}\nnoise\n")
        steps.show()
    steps.show()

    assert first.startswith("# loading vLLM")
    assert ["# event=load model=llama stage=weights", "# event=load model=llama stage=ready"] == (
        capsys.readouterr().out.splitlines()
    )


def test_a_server_that_does_not_come_up_shows_the_end_of_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed start shows the end of the log, and an error of one line."""
    monkeypatch.setattr(demo, "SERVER_MODULE", "vllm_hotswap.nowhere")
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    assert 1 == main(["demo"])

    said = capsys.readouterr()
    assert "# loading vLLM" in said.out
    assert "No module named vllm_hotswap.nowhere" in said.out
    assert 1 == len(said.err.splitlines())


def test_a_port_that_is_taken_is_left_to_who_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If its port is taken, the demo uses another one."""
    monkeypatch.setattr(demo, "SERVER_MODULE", "vllm_hotswap.nowhere")
    with listening_server() as running:
        port = int(running.url.rpartition(":")[2])
        monkeypatch.setattr(demo, "PORT", port)
        assert 1 == main(["demo"])

    assert f"127.0.0.1:{port}," not in capsys.readouterr().out


WAITING_DEMO = """
import sys
from vllm_hotswap.demo import quickstart as demo

demo.SERVER_MODULE = "tests.helpers.serving"  # its model answers nothing until it is told to stop
demo.STOP_S = 2  # it would wait a minute for its request
demo.online_flow = lambda client: demo.chat(client, "llama")
sys.exit(demo.run(int(sys.argv[1])))
"""


INTERRUPTED_DEMO = """
import _thread, signal, threading, time

def interrupt(client):
    time.sleep(0.5)  # until the answer is waited for
    _thread.interrupt_main(signal.SIGHUP)  # as a signal does, but that no system call ends early

def ask(client):
    threading.Thread(target=interrupt, args=(client,), daemon=True).start()
    demo.chat(client, "llama")
"""


def test_a_signal_that_wakes_nobody_ends_a_demo_too(tmp_path: Path) -> None:
    """A signal that arrives just before an answer is read ends the demo, too."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    program = INTERRUPTED_DEMO + WAITING_DEMO.replace(
        'lambda client: demo.chat(client, "llama")', "ask"
    )

    ended = subprocess.run(
        [sys.executable, "-c", program, str(free_port())],
        env=os.environ | {"PYTHONPATH": paths, "TMPDIR": str(tmp_path)},
        capture_output=True,
        timeout=60,
        check=False,
    )

    assert 129 == ended.returncode


@pytest.mark.parametrize(
    ("number", "status", "left"),
    [
        (signal.SIGTERM, 143, 0),
        (signal.SIGHUP, 129, 0),
        (signal.SIGKILL, -signal.SIGKILL, 1),  # nothing removes the folder later
    ],
)
def test_a_demo_that_is_told_to_stop_leaves_no_server(
    number: signal.Signals, status: int, left: int, tmp_path: Path
) -> None:
    """A stopped demo leaves no folder, and no server, which would keep the port for ever."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    demo_process = subprocess.Popen(
        [sys.executable, "-c", WAITING_DEMO, str(free_port())],
        env=os.environ | {"PYTHONPATH": paths, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    servers: list[psutil.Process] = []
    try:
        assert demo_process.stdout is not None
        assert any(line.startswith("$ curl ") for line in demo_process.stdout)
        servers = psutil.Process(demo_process.pid).children(recursive=True)

        demo_process.send_signal(number)

        assert status == demo_process.wait(60)
        assert servers
        assert [] == psutil.wait_procs(servers, timeout=60)[1]
        assert left == len(list(tmp_path.iterdir()))
    finally:
        demo_process.kill()
        demo_process.communicate()
        for process in psutil.wait_procs(servers, timeout=0)[1]:
            process.kill()
