"""Our server with two of the tiny models, started as the quickstart does; and what it holds."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.helpers.ports import free_port
from tools.gaudi.answers import PROMPTS, RANKS, TOKENS, Answer, from_completion
from tools.gaudi.inside.check_gaudi_memory import VARIABLE
from tools.gaudi.judge import Cycle, Device, Processes, Seen, Way
from tools.gaudi.private import ROOT
from tools.gaudi.results import READ_BYTES, TEXT, TOO_LONG

MODELS = ROOT / "src/vllm_hotswap/demo/models"
PAIR = ("llama", "qwen")
MODULE = "vllm_hotswap.entrypoints.openai.multi_model_api_server"
INSIDE, PLUGIN = Path(__file__).with_name("inside"), "check_gaudi_memory"

OWN_ERROR = "vllm-hotswap: error: "

START_LIMIT_S = 1800
CALL_LIMIT_S = 900
STOP_LIMIT_S = 60
LAST_LIMIT_S = 5
"""For what the server has started and leaves behind, once it has ended."""

LOOK_S = 0.5
READ_LIMIT_S = 30

BLOCKS = 512
"""KV blocks of each model: 64 MiB, which stand out from an allocator's rounding. The tiny models'
weights are 2 MiB."""

NOT_PASSED = re.compile(r"VLLM_HOTSWAP_|VLLM_API_KEY$|QUANT_CONFIG$")
"""Variables that are not passed on: the check's server needs no key, and quantises nothing."""

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
"""Nothing is fetched or sent."""

CACHES = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""What is compiled goes into the folder of the server, and is removed with it: no run uses what
another one has compiled."""

CONFIG = """
default_model: llama
memory: {device: 0.5, host: 2GiB}
models:
"""


class Server:
    """One server, and the requests to it. All calls wait."""

    def __init__(
        self,
        folder: Path,
        *,
        eager: bool,
        command: Sequence[str] = (sys.executable, "-m", MODULE),
        environment: Mapping[str, str] = os.environ,
        more: Mapping[str, str] | None = None,
    ) -> None:
        """Start it. `folder` takes its configuration, its log, and the socket in its host.

        What of `environment` would change the check is left out; `more` is added unchanged.
        """
        config = folder / "models.yaml"
        config.write_text(configuration(eager=eager), encoding="utf-8")
        self.log, self._socket = folder / "server.log", folder / "memory.socket"
        port = free_port()
        self._below: set[psutil.Process] = set()
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=CALL_LIMIT_S, trust_env=False
        )
        with self.log.open("wb") as output:
            self._process = psutil.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                env={**surroundings(environment, config, self._socket), **(more or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C is the check's, which then stops the server
            )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> dict[str, Any]:
        """Wait until it serves. Raises `RuntimeError` if it ends before, or takes too long."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self.is_running:
            self._look_below()
            with suppress(httpx.TransportError):
                if self._client.get("/health").status_code == 200:
                    status = self._client.get("/admin/status").json()
                    device = self.device_as_it_is_told()
                    return {
                        "models": {
                            model: {
                                name: status["models"][model][name]
                                for name in ("residency", "weights_bytes", "kv_bytes", "held")
                            }
                            for model in PAIR
                        },
                        "memory": status["memory"],
                        "device": device,
                        "wrong": [device["error"]] if "error" in device else [],
                    }
            time.sleep(LOOK_S)
        status = self._process.poll()
        why = "it is not ready yet" if status is None else f"it has ended with status {status}"
        raise RuntimeError(f"the server does not serve: {why}; its log: {self.last_error()}")

    def last_error(self) -> str:
        """Return our own error, if any: libraries may continue to write when a process ends."""
        lines = last_lines(self.log)
        own = [line for line in lines if line.startswith(OWN_ERROR)]
        told = [line for line in lines if re.search(r"error", line, re.IGNORECASE)]
        return (own or told or lines or [""])[-1]

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Return the response. Raises `RuntimeError` if it is a refusal."""
        response = self._client.post(path, json=body)
        if response.status_code != 200:
            raise RuntimeError(f"{path}: {response.status_code} {response.text}")
        return dict(response.json())

    def refused(self, path: str, **body: Any) -> dict[str, Any]:
        """Return the status and the message of a refusal."""
        response = self._client.post(path, json=body)
        return {"status": response.status_code, "body": response.text}

    def ask(self, model: str, prompts: Sequence[str] = PROMPTS) -> list[Answer]:
        """Send the prompts one after the other."""
        return [
            from_completion(
                self.post(
                    "/v1/completions",
                    model=model,
                    prompt=prompt,
                    max_tokens=TOKENS,
                    temperature=0,
                    ignore_eos=True,
                    logprobs=RANKS,
                    return_token_ids=True,
                    return_tokens_as_token_ids=True,
                )["choices"][0]
            )
            for prompt in prompts
        ]

    def switch(self, model: str) -> float:
        """Switch; return the seconds."""
        start = time.monotonic()
        self.post("/v1/models/switch", model=model, drain_timeout=60)
        return round(time.monotonic() - start, 4)

    def cycle(self, model: str, way: Way, prompts: Sequence[str]) -> tuple[Cycle, list[Answer]]:
        """Run a cycle: the model is active, another one becomes so, then this one again.

        It answers before it is looked at: the first answers after a load take memory, too, and
        `before` has it. Also returns the answers.
        """
        before, kv_bytes = self.seen(model), int(self._status(model)["kv_bytes"])
        self.switch(PAIR[model == PAIR[0]])
        if way == "asleep":
            self.post(f"/admin/models/{model}/sleep", level=1)
        if way == "cold":
            self.post(f"/admin/models/{model}/unload")
        away = self.seen(model)
        back_s = self.switch(model)
        answers = self.ask(model, prompts)
        cycle = Cycle(
            way, model, kv_bytes, weights_bytes(model), before, away, self.seen(model), back_s
        )
        return cycle, answers

    def seen(self, model: str) -> Seen:
        held = self._status(model)["held"]
        return Seen(self.device(), held["device_bytes"], held["host_bytes"], self.processes())

    def residency(self, model: str) -> str:
        return str(self._status(model)["residency"])

    def _status(self, model: str) -> dict[str, Any]:
        return dict(self._client.get("/admin/status").json()["models"][model])

    def device(self) -> Device:
        """Return the device as the engine host sees it. Raises `RuntimeError`."""
        told = self.device_as_it_is_told()
        if "error" in told:
            raise RuntimeError(told["error"])
        return Device(**told)

    def device_as_it_is_told(self) -> dict[str, Any]:
        try:
            with socket.socket(socket.AF_UNIX) as asking:
                asking.settimeout(READ_LIMIT_S)
                asking.connect(str(self._socket))
                told = dict(json.loads(asking.makefile(encoding="utf-8").readline()))
        except (OSError, ValueError) as error:
            return {"error": f"the check's plugin in the engine host does not answer: {error}"}
        if "error" in told:
            return {"error": f"the engine host can't read the device's memory: {told['error']}"}
        return told

    def processes(self) -> Processes:
        """Return its processes, without those that end in the meantime: compilers come and go."""
        each = []
        for process in (self._process, *self._look_below()):
            with suppress(psutil.NoSuchProcess):
                each.append(_held_by(process))
        return Processes(len(each), *map(sum, zip(*each, strict=True)))

    def _look_below(self) -> list[psutil.Process]:
        """Return and remember all processes that the server has started: an engine host has a group
        of its own, and once its parent has gone nothing shows where it belongs."""
        with suppress(psutil.NoSuchProcess):
            found = self._process.children(recursive=True)
            self._below.update(found)
            return list(found)
        return []

    def stop(self) -> dict[str, Any]:
        """Stop the server. Raises `RuntimeError` if it ends with an error, or does not end."""
        if (status := self.end()) is None:
            raise RuntimeError(f"it did not end within {STOP_LIMIT_S} s, and was killed")
        if status != 0:
            raise RuntimeError(f"it ended with status {status}; its log: {self.last_error()}")
        return {}

    def end(self) -> int | None:
        """End it; return the exit status, or None if it had to be killed.

        Nothing that it has started is left then, however it ends, if it has ended before, and if
        this is interrupted: it would hold the device.
        """
        try:
            self._client.close()
            self._look_below()
            if self.is_running:
                self._process.terminate()
            status = int(self._process.wait(STOP_LIMIT_S))
            psutil.wait_procs(self._below, LAST_LIMIT_S)
            return status
        except psutil.TimeoutExpired:
            return None
        finally:
            self._look_below()
            self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in self._below:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(STOP_LIMIT_S)


def last_lines(log: Path) -> list[str]:
    """Return the last `READ_BYTES`. A line that starts before them may start with half of a name
    here, and is left out."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - READ_BYTES))
        lines = file.read().decode(**TEXT).splitlines()
    return lines if size <= READ_BYTES else lines[1:] or [TOO_LONG]


def _held_by(process: psutil.Process) -> tuple[int, int, int]:
    """Return threads, file descriptors, and bytes of memory that no other process shares (USS)."""
    return process.num_threads(), process.num_fds(), process.memory_full_info().uss


def weights_bytes(model: str) -> int:
    """Return bytes of the checkpoint, which has the served type; its head is a few KiB."""
    return (MODELS / model / "model.safetensors").stat().st_size


def configuration(*, eager: bool) -> str:
    """Return the YAML file."""
    lines = [
        f"  {model}: {{model: {json.dumps(str(MODELS / model))}, max_model_len: 512, "
        f"max_num_seqs: 2, num_gpu_blocks_override: {BLOCKS}, enforce_eager: {str(eager).lower()}}}"
        for model in PAIR
    ]
    return CONFIG + "\n".join(lines) + "\n"


def surroundings(environment: Mapping[str, str], config: Path, socket_: Path) -> dict[str, str]:
    """Return the server's variables. They lead the engine host to the check's plugin."""
    kept = {name: value for name, value in environment.items() if not NOT_PASSED.match(name)}
    paths = [str(INSIDE), kept.get("PYTHONPATH", "")]
    if plugins := kept.get("VLLM_PLUGINS"):
        kept["VLLM_PLUGINS"] = f"{plugins},{PLUGIN}"
    return {
        **kept,
        **QUIET,
        **{name: str(config.parent / "caches" / name.lower()) for name in CACHES},
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HPU_MULTI_MODEL_CONFIG": str(config),
        VARIABLE: str(socket_),
    }
