"""The server's life: starts that fail, serving, the signals that end it, and its exit status."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import resource
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import uvicorn

from tests.conftest import MakeServer
from tests.helpers.ports import free_port
from tests.helpers.serving import flags
from tests.helpers.support import settled
from vllm_hotswap.access.roles import Access
from vllm_hotswap.api.app import HotswapApp
from vllm_hotswap.api.audit import AuditLog
from vllm_hotswap.config.models_file import ModelsFile
from vllm_hotswap.config.reader import parse_config
from vllm_hotswap.config.settings import RecoveryConfig
from vllm_hotswap.connections.listen import Listener, ListenFlags
from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.errors import ConfigError, EngineUnavailable
from vllm_hotswap.host.devices import CUDA_WORKER, device_of
from vllm_hotswap.server import run as server
from vllm_hotswap.system import file_limit
from vllm_hotswap.system.signals import Stopped
from vllm_hotswap.telemetry.progress import StartupProgress
from vllm_hotswap.testing.fake_host import FakeHost

Serving = asyncio.Task[int]
PAGE = "https://page.example"


def serve(
    host: FakeHost,
    listener: Listener,
    access: Access | None = None,
    models_file: ModelsFile | None = None,
    audit: AuditLog | None = None,
    **recovery: Any,
) -> Serving:
    """Start a server of the host's models in this process."""
    app = HotswapApp(host, access or Access(), recovery=RecoveryConfig(**recovery))
    load = list(host.engines)
    progress = StartupProgress(load)
    serving = server.serve(app, listener, load, load[0], progress, models_file, audit=audit)
    return asyncio.create_task(serving)


async def answer(path: Path, **kwargs: object) -> httpx.Response:
    """Return the answer to `GET /v1/models` on a Unix socket, once there is one."""
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        while True:
            try:
                return await client.get("/v1/models", **kwargs)  # type: ignore[arg-type]
            except httpx.ConnectError:
                await asyncio.sleep(0)


def test_an_environment_without_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing vLLM is named before a process is started, and without a traceback."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = parse_config({"models": {"llama": {"model": "org/llama"}}}, Path("models.yaml"))

    with pytest.raises(ConfigError, match="vLLM is not installed"):
        server.run(config, ["--port", "0"])


def test_the_engine_host_may_open_as_many_files_as_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine host may open as many files as the server: the limit is raised first."""
    found: list[tuple[int, int]] = []

    def look(_: HostLink) -> None:
        found.append(resource.getrlimit(resource.RLIMIT_NOFILE))
        raise Stopped

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(before[1], 4096)
    monkeypatch.setattr(file_limit, "WANTED_FILES", wanted)
    monkeypatch.setattr(HostLink, "spawn", look)
    monkeypatch.setattr(server, "require_vllm", lambda: None)
    monkeypatch.setattr(server, "shut_out_others", lambda: None)  # it is for a whole process
    config = parse_config({"models": {"llama": {"model": "org/llama"}}}, Path("models.yaml"))
    hangup = signal.getsignal(signal.SIGHUP)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted // 2, before[1]))
        assert 0 == server.run(config, ["--port", "0"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        signal.signal(signal.SIGHUP, hangup)

    assert [(wanted, before[1])] == found


@pytest.mark.parametrize("umask", [0, 0o077])
def test_nobody_else_writes_to_what_the_server_makes(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders that vLLM makes in this process, and a trace, are writable by the owner only."""
    found: list[int] = []

    def look(_: HostLink) -> None:
        found.append(os.umask(0))
        raise Stopped

    monkeypatch.setattr(HostLink, "spawn", look)
    monkeypatch.setattr(server, "require_vllm", lambda: None)
    monkeypatch.setattr(server, "shut_out_others", lambda: None)  # it is for a whole process
    config = parse_config({"models": {"llama": {"model": "org/llama"}}}, Path("models.yaml"))
    hangup = signal.getsignal(signal.SIGHUP)
    before = os.umask(umask)
    try:
        assert 0 == server.run(config, ["--port", "0"], record=tmp_path / "trace.jsonl")
    finally:
        os.umask(before)
        signal.signal(signal.SIGHUP, hangup)

    assert [umask | 0o022] == found
    assert not (tmp_path / "trace.jsonl").stat().st_mode & 0o022


@pytest.mark.parametrize("error", [OSError("no more processes"), Stopped()])
def test_a_start_that_fails_closes_its_files(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed start closes its files, whatever ended it, even while the error is held."""

    def fail(_: HostLink) -> None:
        raise error

    monkeypatch.setattr(HostLink, "spawn", fail)
    monkeypatch.setattr(server, "require_vllm", lambda: None)
    monkeypatch.setattr(server, "shut_out_others", lambda: None)  # it is for a whole process
    config = parse_config({"models": {"llama": {"model": "org/llama"}}}, Path("models.yaml"))
    trace, audit = tmp_path / "trace.jsonl", tmp_path / "audit.jsonl"
    before = signal.getsignal(signal.SIGHUP)
    try:
        with suppress(OSError):
            assert 0 == server.run(config, ["--port", "0"], record=trace, audit=audit)
    finally:
        signal.signal(signal.SIGHUP, before)

    assert error.__traceback__ is not None
    opened = [file.path for file in psutil.Process().open_files()]
    for file in (trace, audit):
        assert file.exists()
        assert str(file) not in opened


async def test_death_of_the_host_ends_a_start(tmp_path: Path) -> None:
    """The host's death ends a start, also while a frontend is made, which does not notice."""
    host = FakeHost(("llama", "qwen"))
    host.hold("load", "qwen")
    serving = serve(host, Listener.open(flags(uds=str(tmp_path / "s"))))
    await settled()

    host.died.set_result("the engine host was killed by signal 9")

    with pytest.raises(EngineUnavailable, match="killed by signal 9 while models were loaded"):
        await serving
    assert not host.is_running


async def test_a_signal_ends_a_start(tmp_path: Path) -> None:
    """A signal ends a start with status 0, without waiting for the load."""
    host = FakeHost(("llama",))
    host.hold("load", "llama")
    serving = serve(host, Listener.open(flags(uds=str(tmp_path / "s"))))
    await settled()

    os.kill(os.getpid(), signal.SIGTERM)

    assert 0 == await serving
    assert not host.is_running
    assert not (tmp_path / "s").exists()


async def test_the_banner_is_shown_when_requests_are_accepted_and_a_signal_ends_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The banner has address and active model once requests are accepted; a signal ends with 0."""
    listener = Listener.open(flags(uds=str(tmp_path / "s")))
    serving = serve(FakeHost(("llama", "qwen")), listener)

    response = await answer(tmp_path / "s")
    shown = capsys.readouterr().out
    os.kill(os.getpid(), signal.SIGINT)

    assert 200 == response.status_code
    assert f"unix:{tmp_path}/s  active: llama" in shown
    assert 0 == await serving


async def test_a_hangup_has_key_files_read_again(tmp_path: Path) -> None:
    """A hangup reads key files again: the old key is refused then, and the new one passes."""
    file = tmp_path / "keys"
    file.touch(0o600)
    file.write_text("old")
    listener = Listener.open(flags(uds=str(tmp_path / "s")))
    serving = serve(FakeHost(("llama",)), listener, Access(user_key_files=[file]))
    old, new = ({"authorization": f"Bearer {key}"} for key in ("old", "new"))
    before = [(await answer(tmp_path / "s", headers=h)).status_code for h in (old, new)]

    file.write_text("new")
    os.kill(os.getpid(), signal.SIGHUP)
    await settled()

    after = [(await answer(tmp_path / "s", headers=h)).status_code for h in (old, new)]
    os.kill(os.getpid(), signal.SIGTERM)
    assert ([200, 401], [401, 200]) == (before, after)
    assert 0 == await serving


async def test_a_hangup_has_the_audit_log_opened_anew(tmp_path: Path) -> None:
    """A hangup reopens the audit log, whatever else is read; later calls go to the new file."""
    file, old = tmp_path / "audit", tmp_path / "audit.1"
    audit = AuditLog(file)
    listener = Listener.open(flags(uds=str(tmp_path / "s")))
    serving = serve(FakeHost(("llama",)), listener, Access(dev_mode=True), audit=audit)
    await answer(tmp_path / "s")
    transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "s"))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        await client.post("/admin/models/llama/pin")
        file.rename(old)
        os.kill(os.getpid(), signal.SIGHUP)
        await settled()
        await client.post("/v1/models/switch", json={"model": "llama"})
    os.kill(os.getpid(), signal.SIGTERM)
    assert 0 == await serving

    audit.close()

    lines = [json.loads(path.read_text()) for path in (old, file)]
    assert ["/admin/models/llama/pin", "/v1/models/switch"] == [line["path"] for line in lines]


@pytest.mark.parametrize(
    ("mode", "expected"), [(0o600, ""), (0o644, "it is open to every user of the machine")]
)
def test_a_tls_key_that_others_may_read_is_told(
    mode: int, expected: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A TLS key that others can read is reported, not refused: the flag is vLLM's."""
    path = tmp_path / "key.pem"
    path.touch()
    path.chmod(mode)

    for name in (None, str(tmp_path / "missing"), str(path)):
        server._warn_of_open_key(name)

    assert bool(expected) == len(caplog.messages)
    assert expected in caplog.text


def test_the_audit_log_may_be_named_by_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable can name the audit log; the flag wins, and without either there is none."""
    monkeypatch.setenv("VLLM_HOTSWAP_AUDIT_LOG", str(tmp_path / "variable"))
    with ExitStack() as exits:
        for path in (None, tmp_path / "flag"):
            assert server._audit_log(path, exits) is not None
        monkeypatch.delenv("VLLM_HOTSWAP_AUDIT_LOG")
        assert server._audit_log(None, exits) is None

    assert ["flag", "variable"] == sorted(file.name for file in tmp_path.iterdir())


EDITED = "event=models_file_changed path="


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda file: file.write_text("models: {b: {}}"), EDITED),
        (lambda file: file.write_text("models: {a: {}}"), ""),
        (lambda file: file.touch(), ""),
        (lambda file: file.unlink(), "event=models_file_unreadable path="),
        (lambda file: (file.unlink(), os.mkfifo(file)), "is no longer a regular file"),
        (lambda file: (file.unlink(), file.mkdir()), "is no longer a regular file"),
    ],
)
@pytest.mark.parametrize("has_keys", [False, True])
async def test_a_hangup_says_that_an_edited_models_file_wants_a_restart(
    edit: Callable[[Path], object],
    expected: str,
    has_keys: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A hangup reports that an edited models file needs a restart; of an unchanged one, nothing."""
    caplog.set_level(logging.INFO)
    file, keys = tmp_path / "models.yaml", tmp_path / "keys"
    file.write_text("models: {a: {}}")
    keys.touch(0o600)
    keys.write_text("key")
    access = Access(admin_key_files=[keys] if has_keys else [])
    listener = Listener.open(flags(uds=str(tmp_path / "s")))
    serving = serve(FakeHost(("llama",)), listener, access, ModelsFile.read(file))
    await answer(tmp_path / "s")

    edit(file)
    os.kill(os.getpid(), signal.SIGHUP)
    await settled()

    assert 200 == (await answer(tmp_path / "s")).status_code
    assert expected in caplog.text
    assert bool(expected) == ("event=models_file_" in caplog.text)
    assert has_keys == ("event=keys_read" in caplog.text)
    os.kill(os.getpid(), signal.SIGTERM)
    assert 0 == await serving


@pytest.mark.parametrize(
    ("access", "mode", "expected"),
    [
        (Access(), "manual", "switching is closed: start the server with --admin-key"),
        (Access(), "auto", "admin routes are closed: start the server with --admin-key"),
        (Access(user_keys=["u"]), "manual", "switching is closed: start the server with"),
        (Access(admin_keys=["a"]), "manual", ""),
        (Access(dev_mode=True), "manual", ""),
    ],
)
async def test_the_banner_says_that_switching_is_closed_and_how_to_open_it(
    make_server: MakeServer, access: Access, mode: str, expected: str
) -> None:
    """If no caller can switch, the banner says so, and how to open switching."""
    running = await make_server(access=access, mode=mode)

    shown = server.banner(running.app, "http://127.0.0.1:8000")

    assert expected in shown
    assert bool(expected) == ("closed" in shown)


async def test_a_port_that_the_system_has_chosen_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A port chosen by the system is in the banner, the log and the file, while clients get in."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "port"
    listener = Listener.open(flags(port=0), flags=ListenFlags(port_file=path))
    serving = serve(FakeHost(("llama",)), listener)
    while not path.exists():  # noqa: ASYNC110  # a file tells no more
        await asyncio.sleep(0)
    address = f"http://127.0.0.1:{path.read_text().strip()}"
    async with httpx.AsyncClient(trust_env=False) as client:
        status = (await client.get(f"{address}/health")).status_code
    os.kill(os.getpid(), signal.SIGTERM)

    assert 0 == await serving
    assert 200 == status
    assert f"{address}  active: llama" in capsys.readouterr().out
    assert f"event=listening address={address}" in caplog.text
    assert not path.exists()


async def test_a_server_that_cannot_listen_ends_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A server that cannot listen ends with status 1, a logged reason and no banner."""
    listener = Listener.open(flags(uds=str(tmp_path / "s")))
    (tmp_path / "s").unlink()

    assert 1 == await serve(FakeHost(("llama",)), listener)
    assert "" == capsys.readouterr().out
    assert "event=serving_failed cause=" in caplog.text
    assert f"the socket {tmp_path}/s was removed, or replaced" in caplog.text


async def test_too_many_deaths_of_the_host_end_the_server_with_status_1(tmp_path: Path) -> None:
    """One death of the host is recovered from; too many end the server with status 1."""
    host = FakeHost(("llama",))
    serving = serve(host, Listener.open(flags(uds=str(tmp_path / "s"))), max_restarts=1)
    await answer(tmp_path / "s")

    host.kill()
    while not host.engines["llama"].is_stepped:  # noqa: ASYNC110  # a fake tells no more
        await asyncio.sleep(0.01)
    assert 200 == (await answer(tmp_path / "s")).status_code
    host.kill()

    assert 1 == await serving


async def test_origins_are_those_of_the_flags(tmp_path: Path) -> None:
    """Pages of an allowed origin can read the response, and other pages cannot."""
    listener = Listener.open(flags(uds=str(tmp_path / "s"), allowed_origins=[PAGE]))
    serving = serve(FakeHost(("llama",)), listener)

    allowed = await answer(tmp_path / "s", headers={"origin": PAGE})
    other = await answer(tmp_path / "s", headers={"origin": "https://other.example"})
    os.kill(os.getpid(), signal.SIGTERM)

    assert PAGE == allowed.headers["access-control-allow-origin"]
    assert "access-control-allow-origin" not in other.headers
    assert 0 == await serving


async def test_pages_of_other_origins_are_let_in_by_nobody_unless_a_flag_says_so(
    tmp_path: Path,
) -> None:
    """Without `--allowed-origins` no response has a CORS header, and no preflight passes."""
    serving = serve(FakeHost(("llama",)), Listener.open(flags(uds=str(tmp_path / "s"))))
    simple = await answer(tmp_path / "s", headers={"origin": PAGE})
    transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "s"))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        headers = {"origin": PAGE, "access-control-request-method": "POST"}
        preflight = await client.options("/v1/chat/completions", headers=headers)
    os.kill(os.getpid(), signal.SIGTERM)

    assert [200, 405] == [simple.status_code, preflight.status_code]
    assert [] == [
        name for a in (simple, preflight) for name in a.headers if "access-control" in name
    ]
    assert 0 == await serving


def make_certificate(folder: Path, name: str) -> tuple[str, str]:
    """Return the paths of a self-signed certificate for 127.0.0.1 and of its key."""
    certificate, key = str(folder / f"{name}.pem"), str(folder / f"{name}.key")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", key, "-out", certificate]
    subprocess.run([*command.split(), *subject, *files], check=True, capture_output=True)
    return certificate, key


async def ask_over_tls(port: int, context: ssl.SSLContext) -> int:
    """Return the status of `/health`; 0 if there is no connection."""
    async with httpx.AsyncClient(verify=context, trust_env=False) as client:
        try:
            return (await client.get(f"https://127.0.0.1:{port}/health")).status_code
        except httpx.TransportError:
            return 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates")
async def test_tls_flags_are_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With TLS flags, only a client that trusts the server and has a known certificate connects."""
    certificate, key = make_certificate(tmp_path, "server")
    own, own_key = make_certificate(tmp_path, "client")
    port = free_port()
    given = flags(
        port=port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        ssl_ca_certs=own,
        ssl_cert_reqs=ssl.CERT_REQUIRED,
    )
    serving = serve(FakeHost(("llama",)), Listener.open(given))
    known = ssl.create_default_context(cafile=certificate)
    known.load_cert_chain(own, own_key)
    while not (status := await ask_over_tls(port, known)):  # noqa: ASYNC110  # it is loading
        await asyncio.sleep(0.01)
    others = [ssl.create_default_context(cafile=certificate), ssl.create_default_context()]
    refused = [await ask_over_tls(port, context) for context in others]
    os.kill(os.getpid(), signal.SIGTERM)

    assert (200, [0, 0]) == (status, refused)
    assert f"https://127.0.0.1:{port}  active: llama" in capsys.readouterr().out
    assert 0 == await serving


async def test_certificates_are_watched_while_the_server_runs(tmp_path: Path) -> None:
    """Certificates are watched with the loaded configuration until the server ends."""
    told: list[object] = []

    class Watcher:
        def __init__(self, config: uvicorn.Config) -> None:
            told.append(config.loaded)

        def stop(self) -> None:
            told.append("stopped")

    given = flags(uds=str(tmp_path / "s"), enable_ssl_refresh=True)
    serving = serve(FakeHost(("llama",)), Listener.open(given, None, Watcher))
    await answer(tmp_path / "s")
    os.kill(os.getpid(), signal.SIGTERM)

    assert 0 == await serving
    assert [True, "stopped"] == told


def test_a_second_signal_ends_the_server_at_once(tmp_path: Path) -> None:
    """A second signal ends the server at once, although requests run.

    The socket is removed even then.
    """
    sock = tmp_path / "s"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.serving", "--uds", str(sock)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process, httpx.Client(transport=httpx.HTTPTransport(uds=str(sock))) as client:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            process.stdout.readline()
            url = "http://server/v1/completions"
            with client.stream("POST", url, json={"stream": True}, timeout=60):
                process.terminate()
                while "event=shutdown" not in process.stderr.readline():
                    pass
                assert sock.is_socket()
                process.terminate()
                process.stderr.read()

            assert not sock.exists()
            assert -signal.SIGTERM == process.wait(timeout=10)
        finally:
            process.kill()


@pytest.mark.parametrize("redirect", ["", ">/dev/full", "<&- >&- 2>&-"])
async def test_standard_streams_that_cannot_be_written_do_not_end_a_server(
    redirect: str, tmp_path: Path
) -> None:
    """Standard streams that lack an alias's encoding, are closed or are full never end a server."""
    sock = tmp_path / "s"
    shell = f'exec "$0" -m tests.helpers.serving --uds "$1" --alias 模型 {redirect}'
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", shell, sys.executable, str(sock)),
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    ended = asyncio.create_task(process.communicate())
    try:
        while not sock.exists():  # it is another process
            assert not ended.done(), ended.result()
            await asyncio.sleep(0.02)
        models = (await answer(sock)).json()["data"]
    finally:
        if process.returncode is None:
            process.terminate()
        out, error = await ended

    assert ["模型"] == [model["id"] for model in models]
    assert (0, redirect == "") == (process.returncode, b"active: \\u6a21\\u578b" in out)
    assert b"Traceback" not in error


def test_a_log_whose_reader_has_left_is_given_up_in_silence() -> None:
    """A log whose reader has left is given up silently, also a library's on standard output."""
    code = (
        "import logging, sys; from vllm_hotswap.system import configure_logging; "
        "configure_logging(); logging.basicConfig(stream=sys.stdout); logging.warning('lost'); "
        "import os; os._exit(0)"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" >/dev/full', sys.executable, code]

    ended = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (0, "") == (ended.returncode, ended.stderr)


def test_whether_models_on_cuda_sleep_is_still_known_when_their_configurations_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether CUDA models sleep is known for their configurations, though the variable is gone."""
    monkeypatch.setattr("vllm_hotswap.host.devices.is_rocm", lambda: False)
    monkeypatch.setenv("VLLM_HOTSWAP_CUDA_SLEEP", "0")
    monkeypatch.setenv("VLLM_HOTSWAP_URL", "http://127.0.0.1:8000")

    server._clean_environment()

    assert not [name for name in os.environ if name.startswith("VLLM_HOTSWAP_")]
    config = SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=CUDA_WORKER))
    assert frozenset() == device_of(config).sleep_levels
