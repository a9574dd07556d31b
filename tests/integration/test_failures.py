"""Engine host death, and starts that cannot work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.helpers.ports import free_port
from tests.integration.conftest import events
from tests.integration.processes import QUICKSTART_MODULE, ServerProcess
from vllm_hotswap.demo.quickstart import MODELS

ONE_MODEL = f"""\
models:
  llama:
    model: {MODELS / "llama"}
    max_model_len: 2048
    enforce_eager: true
"""


def test_the_hosts_death_fails_every_request_and_ends_the_server_with_status_1(
    tmp_path: Path,
) -> None:
    """Where the host may not restart, its death fails every request and ends the server with 1."""
    (tmp_path / "models.yaml").write_text(ONE_MODEL + "recovery: {max_restarts: 0}\n")
    environment = {"VLLM_HOTSWAP_CONFIG": str(tmp_path / "models.yaml")}
    command = ["-m", QUICKSTART_MODULE]
    server = ServerProcess.start(command, free_port(), tmp_path / "log", environment)
    try:
        body = {
            "model": "llama",
            "prompt": "Hello",
            "max_tokens": 1500,
            "ignore_eos": True,
        }
        with ThreadPoolExecutor() as pool:
            stream = server.client.stream("POST", "/v1/completions", json={**body, "stream": True})
            with stream as response:
                received = events(response.iter_lines())
                next(received)
                waiting = pool.submit(server.post, "/v1/completions", body)
                host = server.status()["host"]["pid"]  # type: ignore[index]
                os.kill(host, signal.SIGKILL)
                rest = list(received)
            answer = waiting.result(timeout=10)

        assert "engine_unavailable" == rest[-1]["error"]["code"]  # type: ignore[index]
        assert "[DONE]" not in rest
        assert (503, "engine_unavailable") == (answer.status_code, answer.json()["error"]["code"])
        assert 1 == server.process.wait(timeout=20)
    finally:
        server.stop()


@pytest.mark.wide
def test_the_hosts_death_while_models_load_ends_the_start_with_status_1(tmp_path: Path) -> None:
    """The host's death while models load ends the start with status 1 and one line on why."""
    path = tmp_path / "models.yaml"
    path.write_text(ONE_MODEL)
    command = [sys.executable, "-m", "vllm_hotswap", "serve", str(path)]
    command += ["--port", str(free_port())]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stderr is not None
        while "stage=frontend" not in process.stderr.readline():
            assert process.poll() is None
        kill_host_of(process.pid)
        rest = process.stderr.read()

    errors = [line for line in rest.splitlines() if line.startswith("vllm-hotswap:")]
    assert 1 == process.returncode
    assert 1 == len(errors)
    assert "killed by signal 9 while models were loaded" in errors[0]
    assert "Traceback" not in rest


@pytest.mark.wide
def test_a_start_that_is_told_to_stop_leaves_nothing_behind(tmp_path: Path) -> None:
    """A stopped start, even before the event loop, leaves nothing behind and has status 0."""
    path, sock, temporary = tmp_path / "models.yaml", tmp_path / "s", tmp_path / "tmp"
    path.write_text(ONE_MODEL)
    temporary.mkdir()
    command = [sys.executable, "-m", "vllm_hotswap", "serve", str(path), "--uds", str(sock)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    with process:
        assert process.stderr is not None
        while not sock.exists():  # flags have been read, models are inspected
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        rest = process.stderr.read()

    _, alive = psutil.wait_procs(children, timeout=10)
    assert (0, []) == (process.returncode, alive)
    assert not sock.exists()
    assert [] == list(temporary.glob("vllm-hotswap-*"))
    assert b"event=stopped phase=start" in rest
    assert b"Traceback" not in rest


def kill_host_of(pid: int) -> None:
    for child in psutil.Process(pid).children():
        if "vllm_hotswap.host" in child.cmdline():
            child.kill()


def test_switching_is_closed_unless_it_is_opened(tmp_path: Path, server: ServerProcess) -> None:
    """Switching is closed unless VLLM_SERVER_DEV_MODE opens it; a bad body is named even so."""
    bad = [
        {},
        {"model": 3},
        {"model": "qwen", "drain_timeout": -1},
        {"model": "qwen", "drain_timeout": "soon"},
        {"model": "qwen", "drain": 1},
    ]

    assert [400] * len(bad) == [server.post("/v1/models/switch", b).status_code for b in bad]
    assert 400 == server.client.post("/v1/models/switch", content=b"{").status_code


BAD_FILES = {
    "a misspelt key": (
        "models: {llama: {model: LLAMA, max_model_length: 512}}",
        "unknown key 'max_model_length'; did you mean 'max_model_len'?",
    ),
    "a model folder that does not exist": (
        "models: {llama: {model: /no/such/folder}}",
        "the folder '/no/such/folder' does not exist",
    ),
    "a default that is not configured": (
        "{default_model: lama, models: {llama: {model: LLAMA}}}",
        "default_model 'lama' is not configured; configured: llama; did you mean 'llama'?",
    ),
    "a KV size beyond the budget": (
        "{memory: {device: 1GiB}, models: {llama: {model: LLAMA, kv_cache_memory_bytes: 2G}}}",
        "model 'llama' can never be loaded: kv_cache_memory_bytes gives it 2.00 GiB of KV memory",
    ),
}


@pytest.mark.wide
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_start_that_cannot_work_ends_with_one_clear_line(name: str, tmp_path: Path) -> None:
    """A start that cannot work ends non-zero with one line that names the place, and no engine."""
    text, expected = BAD_FILES[name]
    path = tmp_path / "models.yaml"
    path.write_text(text.replace("LLAMA", str(MODELS / "llama")))

    ended = start_in_vain(str(path))
    errors = [line for line in ended.stderr.splitlines() if line.startswith("vllm-hotswap:")]
    assert 1 == ended.returncode
    assert 1 == len(errors)
    assert expected in errors[0]
    assert "Traceback" not in ended.stderr
    assert "Initializing a V1 LLM engine" not in ended.stdout + ended.stderr


@pytest.mark.wide
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--ssl-certfile", "/no/cert.pem"], "--ssl-certfile: the file '/no/cert.pem'"),
        (["--uds", "/no/folder/socket"], "--uds: the folder '/no/folder' does not exist"),
    ],
)
def test_a_server_that_could_not_listen_loads_nothing(
    flags: list[str], expected: str, tmp_path: Path
) -> None:
    """A server that could not listen loads nothing and names the flag, wherever the file stands."""
    path = tmp_path / "models.yaml"
    path.write_text(ONE_MODEL)

    ended = start_in_vain(*flags, str(path))

    assert 1 == ended.returncode
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "event=load" not in ended.stderr


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A missing file is named, with the command that writes one that works."""
    missing = start_in_vain(str(tmp_path / "none.yaml"))

    assert 1 == missing.returncode
    assert "does not exist" in missing.stderr
    assert "vllm-hotswap demo --write" in missing.stderr


def start_in_vain(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_hotswap", "serve", *arguments, "--port", str(free_port())],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
