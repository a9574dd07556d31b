"""Keys of a real server, and what it reveals of secrets that it was given."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.ports import free_port
from tests.integration.processes import ServerProcess
from vllm_hotswap.demo.quickstart import write
from vllm_hotswap.launch.vllm_config import serve_parser

USER, ADMIN = "sk-canary-user", "sk-canary-admin"
IN_VARIABLE = "sk-canary-variable"
IN_CONFIGURATION = "canary-in-configuration"
OF_SESSION = "canary-of-session"
SECRETS = (USER, ADMIN, IN_VARIABLE, IN_CONFIGURATION, OF_SESSION)
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


HITS = "vllm:prefix_cache_hits_total{"
IMPORTED_BY_ALL = ("argparse", "logging", "multiprocessing", "psutil", "torch")
LEAVES_A_MARK = """\
import os, pathlib
pathlib.Path(__file__).with_suffix(f".{os.getpid()}").touch()
raise ImportError("taken from the start folder")
"""


def as_caller(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


@dataclass
class Guarded:
    """A server that requires keys; those of users are in a file."""

    server: ServerProcess
    keys: Path
    started_in: Path
    """A folder with a module whose name every process imports."""

    def status(self, method: str, path: str, key: str | None, body: object = None) -> int:
        response = self.server.client.request(method, path, headers=as_caller(key), json=body)
        return response.status_code


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("canary-folder")
    models = write(folder)
    text = models.read_text().replace("  llama:\n", '  llama:\n    hf_token: "${CANARY}"\n', 1)
    models.write_text(text + "isolation: {prefix_cache: key}\n")
    python_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    keys = folder / "keys"
    keys.touch(0o600)
    keys.write_text(f"{USER}  # canary\n")
    environment = {
        "VLLM_HOTSWAP_ADMIN_KEY": ADMIN,
        "VLLM_API_KEY": IN_VARIABLE,
        "CANARY": IN_CONFIGURATION,
        "SESSION_TOKEN": OF_SESSION,
        "TORCHINDUCTOR_CACHE_DIR": "",  # torch sets it in every process that imports it
        "VLLM_CACHE_ROOT": str(folder / "cache"),  # a separate process inspects architectures
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, python_path))),
    }
    started_in = tmp_path_factory.mktemp("start")
    for name in IMPORTED_BY_ALL:
        (started_in / f"{name}.py").write_text(LEAVES_A_MARK)
    command = ["-m", "vllm_hotswap", "serve", str(models), "--api-key-file", str(keys)]
    running = ServerProcess.start(
        command, free_port(), folder / "server.log", environment, started_in
    )
    yield Guarded(running, keys, started_in)
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
    """Keys admit those that they are for: no key, a user and an admin."""
    body = {**CHAT, "model": "llama"} if path.endswith("completions") else {"model": "llama"}
    sent = body if method == "POST" else None

    assert expected == tuple(guarded.status(method, path, key, sent) for key in (None, USER, ADMIN))


def test_a_hangup_has_the_key_file_read_again(guarded: Guarded) -> None:
    """A hangup reads the key file again while the server runs; then the old keys count again."""
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
    """No answer reveals a key, a value of the environment or a folder, and no log a secret."""
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


def test_what_vllm_warns_of_for_each_request_makes_few_lines(guarded: Guarded) -> None:
    """Twenty requests with a temperature that vLLM raises make few lines, though each warns."""
    body = {"model": "llama", "prompt": [5], "max_tokens": 1, "temperature": 0.001}
    sent = [guarded.status("POST", "/v1/completions", USER, body) for _ in range(20)]
    told = guarded.server.log.read_text().count("temperature 0.001 is less than")

    assert {200} == set(sent)
    assert 1 <= told <= 5


def environment_of(pid: int) -> str:
    """Return what the system shows of a process's variables to its user."""
    return Path(f"/proc/{pid}/environ").read_text(errors="replace")


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_no_process_shows_a_key(guarded: Guarded) -> None:
    """No process shows a key, not even the one started with them; the host has no session data."""
    shown = {p.pid: environment_of(p.pid) for p in guarded.server.all_processes()}
    status = guarded.server.client.get("/admin/status", headers=as_caller(ADMIN)).json()
    host = shown[status["host"]["pid"]]

    assert len(shown) >= 2
    assert [] == [key for key in (ADMIN, IN_VARIABLE) if key in "".join(shown.values())]
    assert "VLLM_CACHE_ROOT=" in host
    assert OF_SESSION not in host


def test_nothing_is_imported_from_the_start_folder(guarded: Guarded) -> None:
    """Neither the server nor a child, as for an architecture, imports from the start folder."""
    left = {path.name for path in guarded.started_in.iterdir()}

    assert {f"{name}.py" for name in IMPORTED_BY_ALL} == left


def test_a_key_finds_no_prompt_of_another_in_the_prefix_cache(guarded: Guarded) -> None:
    """A key finds only its own prompts in the prefix cache, as the cache's metric shows."""

    def hits_of(key: str) -> float:
        before = hits()
        body = {"model": "llama", "prompt": list(range(5, 405)), "max_tokens": 1}
        assert 200 == guarded.status("POST", "/v1/completions", key, body)
        return hits() - before

    def hits() -> float:
        text = guarded.server.client.get("/metrics", headers=as_caller(ADMIN)).text
        lines = [line for line in text.splitlines() if line.startswith(HITS)]
        return sum(float(line.split()[-1]) for line in lines)

    assert [0, 0] == [hits_of(USER), hits_of(IN_VARIABLE)]
    assert hits_of(USER) > 0


def test_compiled_code_is_kept_in_private(guarded: Guarded) -> None:
    """Compiled code is in a folder private to the user, and so are the host's temporary files."""
    status = guarded.server.client.get("/admin/status", headers=as_caller(ADMIN)).json()
    text = environment_of(status["host"]["pid"])
    variables = dict(line.partition("=")[::2] for line in text.split("\0"))

    for name in ("TORCHINDUCTOR_CACHE_DIR", "TMPDIR"):
        assert 0o700 == Path(variables[name]).stat().st_mode & 0o777


def test_pages_of_other_origins_are_let_in_by_nobody_by_default() -> None:
    """By default no answer lets pages of other origins in, whatever vLLM's own default is."""
    assert [] == serve_parser("test").parse_args([]).allowed_origins


def until(is_so: object, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_so():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False
