"""The quickstart's whole online flow on tiny models that ship with the package."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_hotswap.config import SCHEMA
from vllm_hotswap.errors import ConfigError, HotswapError, one_line
from vllm_hotswap.hints import program
from vllm_hotswap.launch import EDITOR_LINE
from vllm_hotswap.system import (
    EarlyStop,
    Stopped,
    claimed_port,
    give_back,
    interruptible,
    signal_when_orphaned,
)
from vllm_hotswap.telemetry import ProgressTimer

if TYPE_CHECKING:
    import httpx

    from vllm_hotswap.server import Engines

MODELS = Path(__file__).parent / "models"
PORT = 8000
"""Default port of vLLM's server, of ours, and of the commands that call it."""

SERVER_MODULE = "vllm_hotswap.entrypoints.openai.multi_model_api_server"

STOP_S = 30.0
"""Seconds that the server gets to stop by itself."""

START_TIMEOUT_S = 600.0

STARTING = "starting ..."
LOADING = "loading vLLM (the first start compiles its modules, which may take minutes) ..."

QUESTION = "Explain Intel Gaudi in one sentence."
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}

CONFIGURATION = f"""\
{EDITOR_LINE.format(SCHEMA.name)}
# Three tiny models that ship with vllm-hotswap. Every key below a model, other than `model`, is a
# flag of `vllm serve` with underscores. Paths that begin with ./ or ../ are relative to this file.
default_model: llama
models:
  llama:
    model: ./llama
    tensor_parallel_size: 1
    max_model_len: 2048
    enforce_eager: true
    kv_cache_memory_bytes: 64M
    enable_auto_tool_choice: false
  qwen:
    model: ./qwen
    tensor_parallel_size: 1
    max_model_len: 2048
    enforce_eager: true
    kv_cache_memory_bytes: 64M
    enable_auto_tool_choice: true
    tool_call_parser: hermes
  embed:
    model: ./embed
    max_model_len: 512
    enforce_eager: true
    kv_cache_memory_bytes: 64M
"""


def write(folder: Path) -> Path:
    """Write the tiny models, a `models.yaml` that serves them, and its JSON schema.

    Returns the path of `models.yaml`.

    Raises:
        ConfigError: the folder cannot be written, or has another `models.yaml` already.
    """
    path = folder / "models.yaml"
    try:
        if path.exists() and path.read_text(encoding="utf-8") != CONFIGURATION:
            raise ConfigError(f"{str(path)!r} exists with other content; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        for model in sorted(path for path in MODELS.iterdir() if path.is_dir()):
            shutil.copytree(model, folder / model.name, dirs_exist_ok=True)
        shutil.copy(SCHEMA, folder)
        path.write_text(CONFIGURATION, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot write the demo to {str(folder)!r}: {one_line(error)}") from error
    return path


def serve(port: int, is_fake: bool = False) -> int:
    """Serve the tiny models on 127.0.0.1 until a signal stops it, with switching open.

    Args:
        is_fake: use fake engines, without vLLM.
    """
    from vllm_hotswap.config import load_config
    from vllm_hotswap.server import run as server
    from vllm_hotswap.system import configure_logging

    configure_logging()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    with tempfile.TemporaryDirectory(prefix="vllm-hotswap-demo-") as folder:
        config = load_config(write(Path(folder)))
        flags = ["--host", "127.0.0.1", "--port", str(port)]
        return server.run(config, flags, engines=fake_engines() if is_fake else None)


def fake_engines() -> Engines:
    from vllm_hotswap.testing import FakeEngines

    return FakeEngines()


def run(port: int | None = None, is_fake: bool = False) -> int:
    """Start a server, run the quickstart's requests, show each with its answer, stop.

    The default port is `PORT`, or a free one if that is taken.

    Args:
        is_fake: use fake engines, without vLLM.

    Returns:
        The exit status: 0 if every answer was what it should be, 128 plus the number of a signal
        that stopped it.
    """
    early = EarlyStop()
    with _listening(early):
        try:
            _run(port or (PORT if _is_free(PORT) else free_port()), is_fake, early)
        except Stopped:
            return 128 + early.number
    return 0


@contextmanager
def _listening(early: EarlyStop) -> Iterator[None]:
    """Stop on SIGTERM, and on SIGHUP unless `nohup` ignores it."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            early.listen(number)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def _run(port: int, is_fake: bool, early: EarlyStop) -> None:
    with ExitStack() as exits, early.ended():
        with early.held():
            made = tempfile.TemporaryDirectory(prefix="vllm-hotswap-demo-")
            folder = Path(exits.enter_context(made))
        path = write(folder)
        client = _start_server(path, folder / "server.log", port, is_fake, exits, early)
        online_flow(client)
    _print(closing(port, is_fake))


def closing(port: int, is_fake: bool = False) -> str:
    """Return the closing text: what has been shown, and what to do next."""
    fake = " --fake" if is_fake else ""
    made_up = " All three were fake, and what they said was made up." if is_fake else ""
    return f"""
Done: one server process answered as llama and then as qwen, without a restart. The third model,
embed, was loaded beside them.{made_up}

Next, leave such a server running, and paste the commands above into another terminal:
$ {program()} demo --serve{fake} --port {port}

To serve models of your own, write these ones with their models.yaml, and edit that:
$ {program()} demo --write hotswap-demo"""


def online_flow(client: httpx.Client) -> None:
    """Run the quickstart's requests; show each answer. Raises `HotswapError` if one is wrong."""
    _title("1. List the models")
    listed = call(client, "GET", "/v1/models")
    _expect([m["id"] for m in listed["data"]] == ["llama", "qwen", "embed"], "three aliases")

    _title("2. Generate with the default model")
    answer = chat(client, "llama")
    _expect("llama" in answer["choices"][0]["message"]["content"], "an answer of llama")

    _title(
        "3. Switch in the running process; the first switch to a model verifies it with one token"
    )
    switched = call(client, "POST", "/v1/models/switch", {"model": "qwen", "drain_timeout": 60})
    _expect(switched["switched"] and switched["current_model"] == "qwen", "qwen to be active")

    _title("4. Generate with the other model")
    answer = chat(client, "qwen")
    _expect("qwen" in answer["choices"][0]["message"]["content"], "an answer of qwen")

    _title("5. Tool calls, which only qwen is configured for")
    answer = chat(client, "qwen", "What is the weather in Paris?", tools=[WEATHER_TOOL])
    calls = answer["choices"][0]["message"]["tool_calls"]
    _expect(bool(calls) and calls[0]["function"]["name"] == "get_weather", "a tool call")


def chat(
    client: httpx.Client, alias: str, question: str = QUESTION, **extra: object
) -> dict[str, Any]:
    """Send a chat request to a model, and show it."""
    body = {
        "model": alias,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 64,
        "temperature": 0,
        **extra,
    }
    return call(client, "POST", "/v1/chat/completions", body)


def call(
    client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Send one request and show it, as a command to paste, with its answer."""
    _print(f"$ {curl_line(client, path, body)}")
    started = time.perf_counter()
    response = interruptible(lambda: client.request(method, path, json=body))
    elapsed_ms = (time.perf_counter() - started) * 1000
    answer: dict[str, Any] = response.json()
    _print(json.dumps(_without_nulls(answer), indent=2, ensure_ascii=False))
    _print(f"# HTTP {response.status_code} in {elapsed_ms:.1f} ms")
    _expect(response.status_code == 200, "status 200")
    return answer


def curl_line(client: httpx.Client, path: str, body: dict[str, Any] | None) -> str:
    """Return the command that sends the same request."""
    words = ["curl", "-s", str(client.base_url).rstrip("/") + path]
    if body is not None:
        words += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return shlex.join(words)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _print(text: str) -> None:
    """Print a line without buffering, so that a reader of a pipe sees it at once."""
    print(text, flush=True)


def _title(text: str) -> None:
    _print(f"\n=== {text}")


def _expect(fulfilled: bool, what: str) -> None:
    if not fulfilled:
        raise HotswapError(f"the demo expected {what}, but the answer above is different")


def _start_server(
    path: Path, log: Path, port: int, is_fake: bool, exits: ExitStack, early: EarlyStop
) -> httpx.Client:
    """Start a server process as the quickstart does; it stops with `exits`, or this process."""
    import httpx

    environment = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_HPU_MULTI_MODEL_CONFIG": str(path),
    }
    where = ["--host", "127.0.0.1", "--port", str(port)]
    if is_fake:
        command = [sys.executable, "-m", "vllm_hotswap", "serve", str(path), "--fake", *where]
        _print(f"# one server on FAKE engines, for three models, on 127.0.0.1:{port}")
    else:
        command = [sys.executable, "-m", SERVER_MODULE, *where]
        _print(
            f"# one server for three tiny models, on 127.0.0.1:{port}, "
            "started as the quickstart says"
        )
    with early.held(), log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=output,
            preexec_fn=_end_when_orphaned,  # noqa: PLW1509  # there is no other thread yet
        )
        exits.callback(_stop, process)
    url = f"http://127.0.0.1:{port}"
    client = exits.enter_context(httpx.Client(base_url=url, timeout=120, trust_env=False))
    _wait_until_ready(client, process, Steps(log, STARTING if is_fake else LOADING))
    return client


def _end_when_orphaned() -> None:
    """Stop the server if the demo is killed, so that it does not keep the port."""
    signal_when_orphaned(signal.SIGTERM)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], steps: Steps) -> None:
    """Poll `/health`, and show what the server does and for how long."""
    import httpx

    started = time.monotonic()
    try:
        while process.poll() is None and time.monotonic() - started < START_TIMEOUT_S:
            steps.show()
            with suppress(httpx.TransportError):
                if interruptible(lambda: client.get("/health")).status_code == 200:
                    steps.show()
                    _print(f"# ready after {time.monotonic() - started:.1f} s")
                    return
            time.sleep(0.2)
    finally:
        steps.close()
    for line in steps.last_lines():
        _print(f"# {line}")
    raise HotswapError("the demo server did not start; the last lines of its log are above")


class Steps:
    """Shows the steps of a starting server as they appear in its log."""

    def __init__(self, log: Path, what: str = LOADING) -> None:
        """`what` is shown first."""
        self._log = log
        self._shown = 0
        self._waiting: ProgressTimer | None = ProgressTimer(what, _print_elapsed)

    def last_lines(self) -> list[str]:
        """Return the last lines of the log, to explain why the server did not start."""
        return self._log.read_text(errors="replace").splitlines()[-20:]

    def show(self) -> None:
        """Show new steps in the log; until the first one, show how long it has taken."""
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        lines = [line for line in text.splitlines() if " vllm_hotswap event=load " in line]
        for line in lines[self._shown :]:
            self.close()
            _print("# " + line.split(" vllm_hotswap ", 1)[1])
        self._shown = len(lines)
        if self._waiting is not None:
            self._waiting.tick()

    def close(self) -> None:
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None


def _print_elapsed(what: str, after_s: float) -> None:
    _print(f"# {what}" + (f" {after_s:.0f} s" if after_s else ""))


def _is_free(port: int) -> bool:
    """Whether no server listens on the port, or will once its models are loaded."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
            with claimed_port("127.0.0.1", port) as claim:
                give_back(claim)
        except OSError:
            return False
    return True


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
