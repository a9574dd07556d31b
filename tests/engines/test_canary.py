"""Secrets and folders are planted wherever the server sees them; they must not appear outside.

The whole server runs on fake engines, behind the real HTTP server, whose access log is on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.helpers.serving import flags
from tests.helpers.support import CHAT, settled
from vllm_hotswap.access.roles import Access, KeyFlags
from vllm_hotswap.api.app import HotswapApp
from vllm_hotswap.config.reader import load_config
from vllm_hotswap.connections.listen import Listener
from vllm_hotswap.errors import ConfigError, HotswapError
from vllm_hotswap.server import run as server
from vllm_hotswap.telemetry.progress import EventLog, StartupProgress
from vllm_hotswap.testing.fake_host import FakeHost

pytestmark = pytest.mark.slow

KEYS = {"user": "sk-canary-user", "admin": "sk-canary-admin", "filed": "sk-canary-filed"}
IN_ENVIRONMENT = "canary-in-environment"
IN_CONFIGURATION = "canary-in-configuration"
WRONG_KEY = "sk-canary-wrong"
FOLDER = "canary-folder"

SECRETS = [*KEYS.values(), WRONG_KEY, IN_ENVIRONMENT, IN_CONFIGURATION]
LOG_CONFIG = {"version": 1, "disable_existing_loggers": False}

TRACE = """engine failed
Traceback (most recent call last):
  File "{folder}/worker.py", line 1, in load
RuntimeError: out of luck"""


@dataclass
class Planted:
    """A running server, and all its output."""

    host: FakeHost
    app: HotswapApp
    client: httpx.AsyncClient
    folder: Path
    heard: list[str] = field(default_factory=list)

    async def ask(self, method: str, path: str, key: str | None = "admin", **body: object) -> int:
        headers = {} if key is None else {"authorization": f"Bearer {KEYS.get(key, WRONG_KEY)}"}
        response = await self.client.request(method, path, headers=headers, json=body)
        self.heard.append(f"{response.headers} {response.text}")
        return response.status_code

    async def events(self) -> None:
        """Record events in the background until the server ends."""
        headers = {"authorization": f"Bearer {KEYS['user']}"}
        async with self.client.stream("GET", "/admin/events", headers=headers) as stream:
            async for line in stream.aiter_lines():
                self.heard.append(line)


def is_reached(path: Path) -> bool:
    """Whether a server listens on the socket, which exists while models are loaded."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


@pytest.fixture
async def planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Planted]:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(logging.getLogger("vllm_hotswap"), "propagate", True)
    folder = tmp_path / FOLDER
    folder.mkdir()
    (folder / "keys").touch(0o600)
    (folder / "keys").write_text(KEYS["filed"])
    monkeypatch.setenv("VLLM_API_KEY", KEYS["user"])
    monkeypatch.setenv("VLLM_HOTSWAP_API_KEY_FILE", str(folder / "keys"))
    monkeypatch.setenv("CANARY", IN_ENVIRONMENT)
    monkeypatch.setenv("CANARY_OF_FILE", IN_CONFIGURATION)
    (folder / "models.yaml").write_text(
        'models: {llama: {model: a/b, hf_token: "${CANARY_OF_FILE}"}, qwen: {model: c/d}}'
    )
    config = load_config(folder / "models.yaml")
    access = Access.from_environment(os.environ, KeyFlags(admin_keys=[KEYS["admin"]]))
    host = FakeHost(("llama", "qwen"))
    policies = server.model_settings(config)
    app = HotswapApp(host, access, observers=(EventLog(),), model_settings=policies)
    given = flags(uds=str(tmp_path / "s"), uvicorn_log_level="debug")
    given.disable_uvicorn_access_log = False
    listener = Listener.open(given, LOG_CONFIG)
    serving = asyncio.create_task(
        server.serve(app, listener, ["llama"], "llama", StartupProgress(["llama"]))
    )
    while not is_reached(tmp_path / "s") and not serving.done():  # noqa: ASYNC110  # it loads
        await asyncio.sleep(0)
    transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "s"))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield Planted(host, app, client, folder)
        os.kill(os.getpid(), signal.SIGTERM)
        await serving


async def ask_everything(planted: Planted) -> None:
    """Use every route and method with every kind of key; then trigger everything that can fail."""
    host, folder = planted.host, planted.folder
    for route in planted.app.routes:
        path = route.path.replace("{alias:path}", "qwen").replace("{response_id}", "r")
        if route.path != "/admin/events" and route.method != "WEBSOCKET":
            for key in (None, "wrong", "user", "filed", "admin"):
                await planted.ask(route.method, path, key)
    listening = asyncio.create_task(planted.events())
    await settled()
    missing = ConfigError(f"model 'qwen': the folder '{folder}/qwen' no longer exists")
    host.fail_next("load", "qwen", missing)
    assert 503 == await planted.ask("POST", "/v1/models/switch", model="qwen")
    host.fail_next("load", "qwen", HotswapError(TRACE.format(folder=folder)))
    assert 503 == await planted.ask("POST", "/v1/models/switch", model="qwen")
    host.fail_next("load", "qwen", RuntimeError(TRACE.format(folder=folder)))  # type: ignore[arg-type]
    assert 500 == await planted.ask("POST", "/admin/models/qwen/load")
    host.hold("load", "llama")
    host.kill_engine("llama", f"OSError: {folder}/llama/model.safetensors: cannot be read")
    assert 503 == await planted.ask("POST", CHAT, model="qwen")
    for path in ("/health", "/admin/status", "/metrics", "/v1/models", "/nowhere", "/docs"):
        await planted.ask("GET", path, "user")
    (folder / "keys").chmod(0o604)
    planted.app.access.read_again()
    listening.cancel()


async def test_nothing_that_was_planted_is_told(
    planted: Planted, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing planted is in an answer, a header, a metric or an event, and no secret in the log.

    The log has the folders: it is for the operator, and answers leave them out.
    """
    await ask_everything(planted)

    answers = "\n".join(planted.heard)
    ours = [record for record in caplog.records if not record.name.startswith("http")]
    log = "\n".join(logging.Formatter().format(record) for record in ours)
    assert [] == [secret for secret in [*SECRETS, FOLDER, "Traceback"] if secret in answers]
    assert [] == [secret for secret in SECRETS if secret in log]
    assert "event: switch_ended" in answers
    assert '"code":"internal_error"' in answers
    assert "the folder '.../qwen' no longer exists" in answers
    assert f"the folder '{planted.folder}/qwen' no longer exists" in log
    assert "uvicorn.access" in {record.name for record in ours}
    assert len(planted.heard) > 200
