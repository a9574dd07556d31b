"""Real server processes for tests: start, wait, talk, stop; each on a free port of 127.0.0.1."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests.helpers.ports import free_port
from vllm_hotswap.host.vllm_versions import cache_root

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 30.0

ROOT = Path(__file__).parents[2]
FROM_HERE = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
"""For a process that imports tests: Python does not search the start folder by itself there."""

QUICKSTART_MODULE = "vllm_hotswap.entrypoints.openai.multi_model_api_server"
PLAIN_MODULE = "vllm.entrypoints.openai.api_server"
MANY_REFUSALS = {"VLLM_HOTSWAP_LIMITS_REFUSALS_PER_SECOND": "10000"}
"""One test sends more refused requests than a client may in its time."""


@dataclass
class ServerProcess:
    """A server process with a client for it."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        port: int,
        log: Path,
        environment: Mapping[str, str],
        folder: Path | None = None,
        within_s: float = START_TIMEOUT_S,
    ) -> ServerProcess:
        """Start it, in a folder if one is given, and wait until `/health` answers 200."""
        usual = {} if PLAIN_MODULE in command else MANY_REFUSALS
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)],
                env={**os.environ, **usual, **environment},
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        server = cls(process, log, f"http://127.0.0.1:{port}")
        try:
            server.wait_until_ready(within_s)
        except BaseException:
            server.stop()
            raise
        return server

    def wait_until_ready(self, within_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(f"the server did not come up; its log ends:\n{self.log_tail()}")

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def all_processes(self) -> list[psutil.Process]:
        """Return all processes, the API process first."""
        return [psutil.Process(self.process.pid), *self.descendants()]

    def listening(self) -> set[tuple[int, str, int]]:
        """Return process, address and port of every TCP socket of them that accepts connections."""
        return {
            (process.pid, connection.laddr.ip, connection.laddr.port)
            for process in self.all_processes()
            for connection in process.net_connections(kind="tcp")
            if connection.status == psutil.CONN_LISTEN
        }

    def stop(self) -> int:
        """Send SIGTERM and wait. Return the exit status; kill what does not end in time."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for child in self.descendants():
                child.kill()
            self.process.kill()
            self.process.wait()
            raise AssertionError(
                f"the server did not stop; its log ends:\n{self.log_tail()}"
            ) from None

    # --- requests -----------------------------------------------------------------------

    def post(self, path: str, body: object, **kwargs: object) -> httpx.Response:
        return self.client.post(path, json=body, **kwargs)  # type: ignore[arg-type]

    def switch(self, alias: str, **extra: object) -> dict[str, object]:
        response = self.post("/v1/models/switch", {"model": alias, **extra})
        assert response.status_code == 200, response.text
        result: dict[str, object] = response.json()
        return result

    def status(self) -> dict[str, object]:
        result: dict[str, object] = self.client.get("/admin/status").json()
        return result

    def complete(self, alias: str, prompt: str, max_tokens: int = 48) -> str:
        """Return a greedy completion, up to its end or `max_tokens`."""
        body = {"model": alias, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def chat(self, alias: str, question: str, **extra: object) -> dict[str, object]:
        """Return the message of a greedy chat answer."""
        body = {
            "model": alias,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 64,
            "temperature": 0,
            **extra,
        }
        response = self.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        message: dict[str, object] = response.json()["choices"][0]["message"]
        return message

    def embed(self, alias: str, text: str) -> list[float]:
        response = self.post("/v1/embeddings", {"model": alias, "input": text})
        assert response.status_code == 200, response.text
        vector: list[float] = response.json()["data"][0]["embedding"]
        return vector


@contextlib.contextmanager
def plain_server(
    model: Path, log: Path, max_model_len: int, kv_cache: str = "64M"
) -> Iterator[ServerProcess]:
    """Start vLLM's own server of one model alone, named after its folder."""
    command = ["-m", PLAIN_MODULE, "--model", str(model), "--served-model-name", model.name]
    command += ["--enforce-eager", "--max-model-len", str(max_model_len)]
    command += ["--kv-cache-memory-bytes", kv_cache]
    plain = ServerProcess.start(command, free_port(), log, {})
    try:
        yield plain
    finally:
        plain.stop()


COMPILERS = re.compile(r"([\w.]+-)*(c\+\+|g\+\+|gcc|cc|c89|c99|clang(\+\+)?|icp?[cx])(-[\d.]+)?")


def without_compilers(folder: Path) -> dict[str, str]:
    """Return environment variables for a process that finds every program except compilers.

    It also finds nothing that was compiled before.
    """
    programs = folder / "programs"
    programs.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).glob("*"):
            link = programs / program.name
            if not COMPILERS.fullmatch(program.name) and not link.is_symlink():
                link.symlink_to(program)
    return {
        "PATH": str(programs),
        "CXX": "",
        "CC": "",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "VLLM_CACHE_ROOT": str(cache_of_its_own(folder / "cache")),
    }


def still_there(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return which of a stopped server's processes do not end by themselves.

    Python's resource tracker ends once no process has its pipe open, so after the server.
    """
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (left := [each for each in processes if _is_alive(each)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def cache_of_its_own(folder: Path) -> Path:
    """Make a `VLLM_CACHE_ROOT` that no other server writes to.

    What vLLM knows of its architectures is shared, because each takes seconds to find out.
    """
    inspected = cache_root() / "modelinfos"
    inspected.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    if not (folder / "modelinfos").exists():
        (folder / "modelinfos").symlink_to(inspected)
    return folder
