"""The quickstart's whole online flow on tiny models that ship with the package."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from vllm_hotswap.errors import ConfigError, HotswapError
from vllm_hotswap.schema import EDITOR_LINE

MODELS = Path(__file__).parent / "tiny_models"
START_TIMEOUT_S = 240.0

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

SCHEMA = Path(__file__).parent / "models.schema.json"

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
            raise ConfigError(f"{str(path)!r} exists and is another; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        for model in sorted(path for path in MODELS.iterdir() if path.is_dir()):
            shutil.copytree(model, folder / model.name, dirs_exist_ok=True)
        shutil.copy(SCHEMA, folder)
        path.write_text(CONFIGURATION, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the demo to {str(folder)!r}: {error.strerror}") from error
    return path


def serve(port: int) -> int:
    """Serve the tiny models on 127.0.0.1 until told to stop, with switching open."""
    from vllm_hotswap import server
    from vllm_hotswap.config import load_config
    from vllm_hotswap.progress import configure_logging

    configure_logging()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    with tempfile.TemporaryDirectory(prefix="vllm-hotswap-demo-") as folder:
        config = load_config(write(Path(folder)))
        return server.run(config, ["--host", "127.0.0.1", "--port", str(port)])


def run() -> int:
    """Start a server, run the quickstart's requests, show each with its answer, stop.

    Returns 0 if every answer was what it should be.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-hotswap-demo-") as folder:
        path = write(Path(folder))
        with _server(path, Path(folder) / "server.log") as client:
            _online_flow(client)
    print("\nThe quickstart's online flow is complete: one server process, two models, no restart.")
    return 0


def _online_flow(client: httpx.Client) -> None:
    _title("1. List the models")
    listed = _call(client, "GET", "/v1/models")
    _expect([m["id"] for m in listed["data"]] == ["llama", "qwen", "embed"], "three aliases")

    _title("2. Generate with the default model")
    answer = _chat(client, "llama")
    _expect("llama" in answer["choices"][0]["message"]["content"], "an answer of llama")

    _title("3. Switch in the running process")
    switched = _call(client, "POST", "/v1/models/switch", {"model": "qwen", "drain_timeout": 60})
    _expect(switched["switched"] and switched["current_model"] == "qwen", "qwen to be active")

    _title("4. Generate with the other model")
    answer = _chat(client, "qwen")
    _expect("qwen" in answer["choices"][0]["message"]["content"], "an answer of qwen")

    _title("5. Tool calls, which only qwen is configured for")
    answer = _chat(client, "qwen", "What is the weather in Paris?", tools=[WEATHER_TOOL])
    calls = answer["choices"][0]["message"]["tool_calls"]
    _expect(bool(calls) and calls[0]["function"]["name"] == "get_weather", "a tool call")


def _chat(
    client: httpx.Client, alias: str, question: str = QUESTION, **extra: object
) -> dict[str, Any]:
    body = {
        "model": alias,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 64,
        "temperature": 0,
        **extra,
    }
    return _call(client, "POST", "/v1/chat/completions", body)


def _call(
    client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Send one request and show it with its answer."""
    print(f"$ curl -s {client.base_url}{path}" + (f" -d '{json.dumps(body)}'" if body else ""))
    started = time.perf_counter()
    response = client.request(method, path, json=body)
    elapsed_ms = (time.perf_counter() - started) * 1000
    answer: dict[str, Any] = response.json()
    print(json.dumps(_without_nulls(answer), indent=2, ensure_ascii=False))
    print(f"# HTTP {response.status_code} in {elapsed_ms:.1f} ms")
    _expect(response.status_code == 200, "status 200")
    return answer


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _title(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def _expect(fulfilled: bool, what: str) -> None:
    if not fulfilled:
        raise HotswapError(f"the demo expected {what}, but the answer above is different")


@contextmanager
def _server(path: Path, log: Path) -> Iterator[httpx.Client]:
    """A server process on a free port, as the quickstart starts it."""
    port = free_port()
    environment = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_HPU_MULTI_MODEL_CONFIG": str(path),
    }
    module = "vllm_hotswap.entrypoints.openai.multi_model_api_server"
    command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port)]
    print(
        f"$ VLLM_SERVER_DEV_MODE=1 VLLM_HPU_MULTI_MODEL_CONFIG={path} \\\n    {' '.join(command)}"
    )
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
                _wait_until_ready(client, process, log)
                yield client
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    """Poll `/health`, passing the server's progress lines on."""
    started = time.monotonic()
    shown = 0
    while process.poll() is None and time.monotonic() - started < START_TIMEOUT_S:
        shown = _show_progress(log, shown)
        try:
            if client.get("/health").status_code == 200:
                _show_progress(log, shown)
                print(f"# ready after {time.monotonic() - started:.1f} s")
                return
        except httpx.TransportError:
            time.sleep(0.2)
    tail = log.read_text(errors="replace").splitlines()[-20:]
    raise HotswapError("the demo's server did not come up; its log ends with:\n" + "\n".join(tail))


def _show_progress(log: Path, shown: int) -> int:
    lines = [
        line
        for line in log.read_text(errors="replace").splitlines()
        if " vllm_hotswap event=load " in line
    ]
    for line in lines[shown:]:
        print("# " + line.split(" vllm_hotswap ", 1)[1], flush=True)
    return len(lines)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
