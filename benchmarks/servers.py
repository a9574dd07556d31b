"""The two servers that are compared: started, watched, frozen, stopped.

Both get the same model, the same flags and the same environment, thread binding included. While
one is measured, the other is frozen (SIGSTOP), because an idle vLLM server is not idle: its
worker polls shared memory, and would take that time from the server under test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.client import BadAnswer, Connection
from benchmarks.stats import Side

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.02
LOG_TAIL_LINES = 15
EXIT_NOISE = re.compile(r"nanobind: | - leaked | - \.\.\. skipped|See https://nanobind|\s*$")
"""Lines that a library of vLLM prints when a process ends, after the line that matters."""
COMMON_FLAGS = ("--disable-uvicorn-access-log",)
"""Given to both: a log line per request is not part of the comparison."""
FAKE_FLAGS = ("--fake", "--fake-pace", "0.001")
"""For a server on fake engines, which are fast, so that the server around them is measured."""


class ServerFailed(Exception):
    """A server did not start, or did not keep running; the message has the tail of its log."""


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint with the engine settings that both servers get for it."""

    alias: str
    folder: Path
    settings: Mapping[str, Any]


class Server:
    """A running server process with everything that it started."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        log: Path,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.port = port
        self.log = log
        self.started_s = time.perf_counter()
        self.health_s = 0.0
        """Seconds from the start to the first successful `GET /health`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(name) | dict(variables or {}),
                start_new_session=True,
            )

    def __repr__(self) -> str:
        return f"<Server {self.name} pid={self._process.pid} port={self.port}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> None:
        """Wait for the first successful `GET /health`.

        Raises:
            ServerFailed: the process ended or the time is over.
        """
        while time.perf_counter() - self.started_s < START_TIMEOUT_S:
            if (status := self._process.poll()) is not None:
                raise self.failure(f"ended with status {status} before it was ready")
            if await self._is_healthy():
                self.health_s = time.perf_counter() - self.started_s
                return
            await asyncio.sleep(POLL_S)
        raise self.failure(f"was not ready after {START_TIMEOUT_S:g} s")

    async def _is_healthy(self) -> bool:
        try:
            async with asyncio.timeout(5), Connection(self.port) as connection:
                await connection.get("/health")
        except (OSError, BadAnswer):
            return False
        return True

    @property
    def exit_status(self) -> int | None:
        """Return the exit status; None while the server runs."""
        return self._process.poll()

    async def stop(self) -> None:
        """Send SIGTERM, wait for the exit, then kill all processes that are left."""
        family = self.family()
        self.thaw()
        try:
            await self.terminate()
        finally:
            self._kill(family)
            self._process.wait()

    async def terminate(self) -> int | None:
        """Send SIGTERM. Returns the exit status; None if it still runs after `STOP_TIMEOUT_S`."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)
        try:
            return await asyncio.to_thread(self._process.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None

    def _kill(self, family: Iterable[psutil.Process]) -> None:
        """Kill all processes that are left, also the children of a process that has died."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def freeze(self) -> None:
        """Stop all its processes, so that it takes no time from the other server."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def family(self) -> list[psutil.Process]:
        """Return the process and all that it has started, directly or not."""
        try:
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.Error:
            return []

    def cpu_s(self) -> float:
        """Return the CPU time that all its processes have taken."""
        total = 0.0
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def failure(self, what: str) -> ServerFailed:
        """Return the error to raise, with the tail of the server's log."""
        tail = log_tail(self.log.read_text(errors="replace"))
        return ServerFailed(f"the {self.name} server {what}; the end of {self.log.name}:\n{tail}")


@dataclass(frozen=True, slots=True)
class Launcher:
    """Starts servers; their logs and files are below one folder."""

    folder: Path

    @contextlib.asynccontextmanager
    async def hotswap(
        self,
        *models: Model,
        sections: Mapping[str, Any] | None = None,
        arguments: Sequence[str] = (),
    ) -> AsyncIterator[Server]:
        """Run this project's server with all the models loaded, the first one active.

        Args:
            models: the models to serve.
            sections: sections of its configuration, besides the models.
            arguments: additional arguments of its command line.
        """
        config = self.folder / f"models-{models[0].alias}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        # JSON is YAML, too.
        content = {**hotswap_config(models), **(sections or {})}
        config.write_text(json.dumps(content, indent=1), encoding="utf-8")
        command = ["-m", "vllm_hotswap", "serve", str(config), *arguments]
        async with self._running("hotswap", command) as server:
            yield server

    @contextlib.asynccontextmanager
    async def plain(
        self,
        model: Model,
        *,
        arguments: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Server]:
        """Run vLLM's own server with one model.

        Args:
            model: the model to serve.
            arguments: additional arguments of its command line.
            variables: additional variables of its environment.
        """
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model.folder)]
        command += ["--served-model-name", model.alias, *flags(model.settings), *arguments]
        async with self._running("plain", command, variables) as server:
            yield server

    @contextlib.asynccontextmanager
    async def _running(
        self, name: Side, command: Sequence[str], variables: Mapping[str, str] | None = None
    ) -> AsyncIterator[Server]:
        port = free_port()
        address = ["--host", "127.0.0.1", "--port", str(port), *COMMON_FLAGS]
        log = self.folder / f"{name}-{port}.log"
        whole = [sys.executable, *command, *address]
        async with running(Server(name, whole, port, log, variables)) as server:
            yield server


@contextlib.asynccontextmanager
async def running(server: Server) -> AsyncIterator[Server]:
    """Keep a started server; stop it at the end. Raises `ServerFailed`, with its log."""
    try:
        await server.ready()
        yield server
    except (BadAnswer, OSError) as error:
        raise server.failure(f"failed: {error}") from error
    finally:
        await server.stop()


@contextlib.contextmanager
def alone(server: Server, servers: Iterable[Server]) -> Iterator[Server]:
    """Freeze all other servers while the body runs."""
    others = [other for other in servers if other is not server]
    for other in others:
        other.freeze()
    try:
        yield server
    finally:
        for other in others:
            other.thaw()


async def idle_cpu(server: Server, settle_s: float, window_s: float) -> float:
    """Return the CPU time per second of a server that has been idle for `settle_s`."""
    await asyncio.sleep(settle_s)
    before_s, started_s = server.cpu_s(), time.perf_counter()
    await asyncio.sleep(window_s)
    return (server.cpu_s() - before_s) / (time.perf_counter() - started_s)


def log_tail(text: str) -> str:
    """Return the last lines that matter, indented."""
    lines = [line for line in text.splitlines() if not EXIT_NOISE.match(line)]
    return "\n".join(f"    {line}" for line in lines[-LOG_TAIL_LINES:])


def hotswap_config(models: Sequence[Model]) -> dict[str, Any]:
    """Return the server's configuration for models that are all loaded at the start."""
    entries = {m.alias: {"model": str(m.folder), **m.settings} for m in models}
    return {"default_model": models[0].alias, "models": entries}


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Return the flags of `vllm serve` for a model's settings."""
    result = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            result.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict | list):
            result.append(f"--{name}={json.dumps(value)}")
        else:
            result.append(f"--{name}={value}")
    return result


def allowed_cores() -> str:
    """Return the cores that this process may use, as the list to which both bind threads."""
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))


def server_variables() -> dict[str, str]:
    """Return the variables that both servers get besides those that they inherit."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": allowed_cores(),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _environment(name: str) -> dict[str, str]:
    environment = {**os.environ, **server_variables()}
    environment.pop("VLLM_SERVER_DEV_MODE", None)
    if name == "hotswap":
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # allows to switch without a key
    # Without compiled modules on disk, every start would compile all sources again.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
