"""Keys of a real server, and what it tells of secrets that it was given."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.processes import ServerProcess
from tests.ports import free_port
from vllm_hotswap.compat.configuration import serve_parser
from vllm_hotswap.demo import write

USER, ADMIN = "sk-canary-user", "sk-canary-admin"
IN_CONFIGURATION = "canary-in-configuration"
SECRETS = (USER, ADMIN, IN_CONFIGURATION)
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


def as_caller(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


@dataclass
class Guarded:
    """A server that asks for keys; those of users are in a file."""

    server: ServerProcess
    keys: Path

    def status(self, method: str, path: str, key: str | None, body: object = None) -> int:
        response = self.server.client.request(method, path, headers=as_caller(key), json=body)
        return response.status_code


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("canary-folder")
    models = write(folder)
    text = models.read_text().replace("  llama:\n", '  llama:\n    hf_token: "${CANARY}"\n', 1)
    models.write_text(text)
    keys = folder / "keys"
    keys.touch(0o600)
    keys.write_text(f"{USER}  # canary\n")
    environment = {"VLLM_HOTSWAP_ADMIN_KEY": ADMIN, "CANARY": IN_CONFIGURATION}
    command = ["-m", "vllm_hotswap", "serve", str(models), "--api-key-file", str(keys)]
    running = ServerProcess.start(command, free_port(), folder / "server.log", environment)
    yield Guarded(running, keys)
    assert 0 == running.stop(), running.log_tail()


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/health", (200, 200, 200)),
        ("GET", "/v1/models", (401, 200, 200)),
        ("POST", "/v1/chat/completions", (401, 200, 200)),
        ("POST", "/v1/models/switch", (401, 403, 200)),
        ("POST", "/collective_rpc", (404, 404, 404)),
    ],
)
def test_keys_let_in_whom_they_are_for(
    guarded: Guarded, method: str, path: str, expected: tuple[int, ...]
) -> None:
    """Nobody, a user and an admin."""
    body = {**CHAT, "model": "llama"} if path.endswith("completions") else {"model": "llama"}
    sent = body if method == "POST" else None

    assert expected == tuple(guarded.status(method, path, key, sent) for key in (None, USER, ADMIN))


def test_a_hangup_has_the_key_file_read_again(guarded: Guarded) -> None:
    """While the server runs, models and all; then the old keys count again."""
    before = guarded.keys.read_text()
    guarded.keys.write_text("another")
    guarded.server.process.send_signal(signal.SIGHUP)
    changed = until(lambda: guarded.status("GET", "/v1/models", "another") == 200)
    old = guarded.status("GET", "/v1/models", USER)
    guarded.keys.write_text(before)
    guarded.server.process.send_signal(signal.SIGHUP)

    assert changed
    assert 401 == old
    assert until(lambda: guarded.status("GET", "/v1/models", USER) == 200)


def test_nothing_that_was_planted_is_told(guarded: Guarded) -> None:
    """No key, no value from the environment and no folder, in any answer; no secret in the log."""
    client, folder = guarded.server.client, guarded.keys.parent
    paths = ["/health", "/v1/models", "/v1/models/llama", "/admin/status", "/metrics", "/version"]
    paths += ["/openapi.json", "/admin/openapi.json", "/load", "/nowhere", "/v1/responses/none"]
    answers = [client.get(path, headers=as_caller(key)) for path in paths for key in (USER, None)]
    answers += [
        client.post("/v1/chat/completions", json=body, headers=as_caller(USER))
        for body in ({"model": "llama"}, {"model": "llama", "messages": 3}, {"model": "none"})
    ]
    weights = folder / "qwen" / "model.safetensors"
    moved = weights.rename(folder / "weights")
    answers += [
        client.post(f"/admin/models/qwen/{action}", headers=as_caller(ADMIN))
        for action in ("unload", "load")
    ]
    moved.rename(weights)
    told = "\n".join(f"{answer.headers} {answer.text}" for answer in answers)
    log = guarded.server.log.read_text()

    assert 503 == answers[-1].status_code
    assert [] == [word for word in (*SECRETS, str(folder), "Traceback") if word in told]
    assert [] == [secret for secret in SECRETS if secret in log]


def test_pages_of_other_origins_are_let_in_by_nobody_by_default() -> None:
    """Whatever vLLM's own default is."""
    assert [] == serve_parser("test").parse_args([]).allowed_origins


def until(is_so: object, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_so():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False
