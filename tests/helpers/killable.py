"""`python -m tests.helpers.killable PORT [SETTINGS]`: a server whose engine host can be killed.

Everything except vLLM is real: uvicorn, the coordinator, the link, the host process. SETTINGS is
JSON: `switching`, `limits` and `recovery` as in the YAML file; `shutdown_timeout`, `token_s`,
`slices`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

from tests.helpers.faults import Faults
from tests.helpers.ports import free_port
from tests.helpers.serving import flags
from vllm_hotswap import failpoints
from vllm_hotswap.access.roles import Access
from vllm_hotswap.api.app import HotswapApp
from vllm_hotswap.config.settings import LimitsConfig, RecoveryConfig, SwitchingConfig
from vllm_hotswap.connections.listen import Listener
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.server.run import serve
from vllm_hotswap.system.log_lines import configure_logging
from vllm_hotswap.tasks import event_loop
from vllm_hotswap.telemetry.progress import EventLog, StartupProgress
from vllm_hotswap.testing.fake_process import FakeProcessHost
from vllm_hotswap.testing.fake_settings import FakeSettings

ALIASES = ("llama", "qwen", "mistral")
LOADED = ("llama", "qwen")
TWO_MODELS = 4 << 20
"""The memory budget: a third model makes the server put another one to sleep."""


def main(port: int, settings: dict[str, Any]) -> int:
    configure_logging()
    if specification := os.environ.get(failpoints.VARIABLE):
        failpoints.enable(specification)
    slices = settings.get("slices", 0)
    model = FakeSettings(token_s=settings.get("token_s", 0.01), slices=slices, offloads=slices > 0)
    models = dict.fromkeys(ALIASES, model)
    host = FakeProcessHost(ALIASES, models, Usage(TWO_MODELS, TWO_MODELS))
    progress = StartupProgress(LOADED)
    app = HotswapApp(
        host,
        Access(dev_mode=True),
        SwitchingConfig(**settings.get("switching", {})),
        observers=(EventLog(), progress),
        limits=LimitsConfig(**settings.get("limits", {})),
        recovery=RecoveryConfig(**settings.get("recovery", {})),
    )
    timeout_s = settings.get("shutdown_timeout", 0)
    listener = Listener.open(flags(port=port, shutdown_timeout=timeout_s))
    return event_loop.run(serve(app, listener, LOADED, "llama", progress))


class KillableServer:
    """Such a server in a separate process, with failpoints; the context's end stops it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.port = free_port()
        self.log = folder / "server.log"
        self._command = [sys.executable, "-m", "tests.helpers.killable", str(self.port)]
        self._command.append(json.dumps(settings))
        self.faults = Faults(folder / "failpoints")
        self._environment = {**os.environ, failpoints.VARIABLE: self.faults.variable}

    def __enter__(self) -> KillableServer:
        with self.log.open("wb") as log:
            self.process = psutil.Popen(self._command, env=self._environment, stderr=log)
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False
        )
        deadline = time.monotonic() + 60
        while not self.is_ready:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.client.close()
        for process in [*self.children(), self.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def children(self) -> list[psutil.Process]:
        try:
            found: list[psutil.Process] = self.process.children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return found

    @property
    def is_ready(self) -> bool:
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    @property
    def status(self) -> Any:
        return self.client.get("/admin/status").json()

    @property
    def host(self) -> psutil.Process:
        return psutil.Process(self.status["host"]["pid"])

    @property
    def restarts(self) -> int:
        return int(self.status["host"]["restarts"])

    def switch(self, alias: str, **body: object) -> httpx.Response:
        return self.client.post("/v1/models/switch", json={"model": alias, **body})

    def serves_all(self) -> bool:
        """Check that every model can be switched to and gives its own answers."""
        for alias in ALIASES:
            switched = self.switch(alias)
            assert switched.status_code == 200, switched.text
            answer = self.ask(alias)
            assert answer.status_code == 200, answer.text
            assert f"I am {alias}," == answer.json()["choices"][0]["text"]
        return True

    def ask(self, alias: str, words: int = 3) -> httpx.Response:
        body = {"model": alias, "max_tokens": words}
        return self.client.post("/v1/completions", json=body)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}))
