"""`serve --fake` and `demo --fake`: a complete server where no vLLM is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.faults import wait_until
from vllm_hotswap import demo
from vllm_hotswap.cli import main
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.testing.fake_server import parse_flags

pytestmark = pytest.mark.slow

WITHOUT_VLLM = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vllm", "torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from vllm_hotswap.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line in an environment that has none of them."""


@contextmanager
def fake_server(folder: Path, *flags: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """A server on the demo's file; it has been told to stop at the end."""
    config, port_file = demo.write(folder), folder / "port"
    command = [sys.executable, "-c", WITHOUT_VLLM, "serve", str(config), "--fake"]
    command += ["--port", "0", "--port-file", str(port_file), *flags]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"},
    )
    try:
        wait_until(lambda: port_file.exists() or process.poll() is not None)
        assert process.poll() is None
        url = f"http://127.0.0.1:{port_file.read_text().strip()}"
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield client, process
    finally:
        process.send_signal(signal.SIGTERM)


def test_a_whole_server_runs_without_vllm(tmp_path: Path) -> None:
    """It lists, answers, switches, and says in each place that it is fake."""
    with fake_server(tmp_path, "--max-model-len", "2048") as (client, process):
        listed = client.get("/v1/models").json()["data"]
        assert ["llama", "qwen", "embed"] == [model["id"] for model in listed]
        body = {"model": "llama", "messages": [{"role": "user", "content": "Hi"}]}
        answer = client.post("/v1/chat/completions", json=body).json()
        assert "llama" in answer["choices"][0]["message"]["content"]
        switched = client.post("/v1/models/switch", json={"model": "qwen"}).json()
        assert "qwen" == switched["current_model"]
        assert {"version": "fake"} == client.get("/version").json()
        status = client.get("/admin/status").json()
        assert (True, process.pid) == (status["host"]["is_fake"], status["host"]["pid"])
    said, _ = process.communicate(timeout=60)

    assert 0 == process.returncode
    assert "event=fake_engines" in said
    assert "flags='--max-model-len 2048'" in said
    assert "fake engines: answers are made up, no model is loaded" in said


def test_the_demo_runs_on_fake_engines(capsys: pytest.CaptureFixture[str]) -> None:
    """All but the tool call, which no fake engine makes."""
    assert 0 == main(["demo", "--fake"])

    said = capsys.readouterr().out
    assert "4. Generate with the other model" in said
    assert "5. Tool calls" not in said
    assert "demo --serve --fake" in said


def test_flags_are_vllms() -> None:
    """Those of the server; others are told, and have no effect."""
    args, unused = parse_flags(["--uds", "/run/x", "--api-key", "a", "b", "--dtype", "auto"])

    assert ("/run/x", ["a", "b"], 8000) == (args.uds, args.api_key, args.port)
    assert "--dtype auto" == unused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "many"], "argument --port: invalid int value: 'many'"),
        (["--allowed-origins", "nobody"], "argument --allowed-origins"),
    ],
)
def test_a_value_that_no_flag_takes_is_refused(flags: list[str], message: str) -> None:
    """In one line."""
    with pytest.raises(ConfigError, match=message):
        parse_flags(flags)
