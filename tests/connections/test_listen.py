"""Where the server listens, and what uvicorn gets: every mistake is named before the start."""

from __future__ import annotations

import errno
import os
import resource
import secrets
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from tests.helpers.ports import free_port
from tests.helpers.serving import flags
from vllm_hotswap.connections.listen import (
    Listener,
    ListenFlags,
    bind,
    check_address,
    most_connections,
)
from vllm_hotswap.connections.port_file import PortFile
from vllm_hotswap.demo.quickstart import _is_free
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.system.file_limit import raised_file_limit


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """Do nothing: an application."""


def test_an_address_in_use_is_named() -> None:
    """An address in use is named, with the flag that chooses another one."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--port"):
            bind("127.0.0.1", port)


def test_a_free_address_is_bound() -> None:
    """A free address is bound before the models are loaded, so no other program takes it."""
    port = free_port()
    with bind("127.0.0.1", port) as sock:
        assert ("127.0.0.1", port) == sock.getsockname()


def test_a_server_that_still_loads_has_its_port() -> None:
    """A server that is loading holds its port, although Linux would let a second one bind it."""
    loading = Listener.open(flags())
    port = loading.port

    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use; .*--port"):
        Listener.open(flags(port=port))

    loading.close()
    Listener.open(flags(port=port)).close()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (None, "127.0.0.1"),
        ("127.0.0.1", None),
        ("::", "127.0.0.1"),
        (None, "::"),
        ("::1", "::"),
    ],
)
def test_a_port_of_all_addresses_is_one_of_each(first: str | None, second: str | None) -> None:
    """A port on all addresses collides with the same port on one, whichever server came first."""
    loading = Listener.open(flags(host=first))
    port = loading.port

    with pytest.raises(ConfigError, match="Address already in use; choose another --port"):
        Listener.open(flags(host=second, port=port))

    loading.close()
    Listener.open(flags(host=second, port=port)).close()


@pytest.mark.parametrize("host", [None, "127.0.0.1", "::"])
def test_the_demo_leaves_a_port_to_a_server_that_still_loads(host: str | None) -> None:
    """The demo does not choose the port of a server that is still loading."""
    loading = Listener.open(flags(host=host))
    port = loading.port or 0

    assert not _is_free(port)
    loading.close()
    assert _is_free(port)


def test_a_port_in_use_is_told_before_vllm_is_loaded(tmp_path: Path) -> None:
    """A port in use is reported in one line before vLLM loads, also while its server loads."""
    models = tmp_path / "models.yaml"
    models.write_text("models: {a: {model: org/a}}")
    code = """
import sys
from vllm_hotswap.cli.main import main
status = main(["serve", *sys.argv[1:]])
print("vllm" in sys.modules)
sys.exit(status)
"""
    loading = Listener.open(flags(host="127.0.0.1"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        for port in (other.getsockname()[1], loading.port):
            command = [sys.executable, "-c", code, str(models)]
            command += ["--host", "127.0.0.1", f"--port={port}"]
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=120, check=False
            )
            (line,) = ended.stderr.splitlines()

            assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in line
            assert "False" == ended.stdout.strip()
            assert 0 != ended.returncode
    loading.close()


@pytest.mark.parametrize(
    "given",
    [
        ["--port", "0"],
        ["--port", "many"],
        ["--port"],
        ["--uds", "/run/nowhere/s"],
        ["--config", "flags.yaml"],
        ["--port", "0", "--max-model-len", "8", "--enforce-eager"],
    ],
)
def test_what_only_vllm_can_read_of_the_flags_is_left_to_it(given: list[str]) -> None:
    """The address check refuses no flag that only vLLM can read."""
    check_address(given)


def test_nothing_is_kept_of_a_look_at_the_address() -> None:
    """The address check holds no socket: the server binds the address later."""
    port = free_port()
    check_address(["--host", "127.0.0.1", "--port", str(port)])

    Listener.open(flags(host="127.0.0.1", port=port)).close()


@pytest.mark.parametrize(
    ("first", "second"), [("127.0.0.1", "127.0.0.2"), ("0.0.0.0", "::1"), ("::1", "127.0.0.1")]
)
def test_two_addresses_may_have_the_same_port(first: str, second: str) -> None:
    """Two servers on one machine can use the same port on two addresses."""
    loading = Listener.open(flags(host=first))

    other = Listener.open(flags(host=second, port=loading.port))

    assert loading.port == other.port
    other.close()
    loading.close()


@pytest.mark.parametrize("error", [errno.EPERM, errno.EAFNOSUPPORT])
def test_a_system_that_allows_no_claims_can_serve(
    error: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The server runs where a sandbox refuses claims or has none; port and path stay free."""

    class Refusing(socket.socket):
        def bind(self, address: Any) -> None:
            if isinstance(address, bytes):
                raise OSError(error, os.strerror(error))
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Refusing)

    for given in (flags(), flags(uds=str(tmp_path / "s"))):
        Listener.open(given).close()


@pytest.mark.parametrize("port", [99999, -1])
def test_a_number_that_is_no_port_is_named(port: int) -> None:
    """An invalid port is named, with the valid range."""
    with pytest.raises(
        ConfigError, match=f"--port {port} is not a valid port; choose one from 0 to 65535"
    ):
        bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b"])
def test_a_host_that_is_not_known_is_named(host: str) -> None:
    """An unknown host is named; another port is not suggested, because it would not help."""
    with pytest.raises(ConfigError, match=f"cannot listen on {host}:8000: .*--host"):
        bind(host, 8000)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "fe80::1"])
def test_an_address_of_another_machine_is_named(host: str) -> None:
    """An address of another machine is named; another port is not suggested."""
    with pytest.raises(ConfigError, match=f"cannot listen on .*{host}.*; choose another --host"):
        bind(host, 0)


def test_an_address_of_a_family_that_the_system_has_not_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An address of a family that the system lacks is named: IPv6 may be switched off."""

    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    monkeypatch.setattr(socket, "socket", refuse)

    with pytest.raises(ConfigError, match="not supported by protocol; choose another --host"):
        bind("::1", 0)


def test_an_empty_path_of_a_socket_is_refused() -> None:
    """An empty socket path is refused: an unset variable would open a TCP port to everyone."""
    with pytest.raises(ConfigError, match="--uds is empty; name a file, or leave it out for TCP"):
        Listener.open(flags(uds=""))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing/server.sock", "missing' does not exist"),
        ("file", "exists and is not a socket"),
        ("x" * 120, "is longer than 107 bytes"),
    ],
)
def test_a_socket_that_cannot_be_made_is_named(path: str, expected: str, tmp_path: Path) -> None:
    """A socket that cannot be made is named before anything slow starts."""
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match=expected) as caught:
        Listener.open(flags(uds=str(tmp_path / path)))

    assert caught.value.message.startswith("--uds: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named() -> None:
    """An unwritable folder is named as the place of the socket."""
    with pytest.raises(ConfigError, match="--uds: the folder '/' cannot be written"):
        Listener.open(flags(uds="/server.sock"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"ssl_certfile": "no.pem"}, "--ssl-certfile: the file 'no.pem' cannot be read"),
        ({"ssl_keyfile": "no.pem"}, "--ssl-keyfile: the file 'no.pem' cannot be read"),
        ({"ssl_ca_certs": "no.pem"}, "--ssl-ca-certs: the file 'no.pem' cannot be read"),
        ({"ssl_keyfile": __file__}, "--ssl-keyfile needs --ssl-certfile"),
        (
            {"ssl_certfile": __file__, "ssl_keyfile": __file__},
            f"TLS cannot be set up with --ssl-certfile {__file__} --ssl-keyfile {__file__}: ",
        ),
    ],
)
def test_tls_files_that_cannot_be_used_are_named(given: dict[str, str], expected: str) -> None:
    """TLS files that cannot be used are named before anything slow starts."""
    with pytest.raises(ConfigError) as caught:
        Listener.open(flags(**given))

    assert caught.value.message.startswith(expected)


def test_a_log_that_cannot_be_configured_is_named() -> None:
    """A log that cannot be configured is named with the reason that `logging.config` hides."""
    config = {"version": 1, "handlers": {"file": {"class": "no.such.Handler"}}}

    with pytest.raises(ConfigError, match=r"--log-config-file cannot be used: .*no\.such"):
        Listener.open(flags(), config)


def test_a_time_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time that is not a number is named, also in a variable of vLLM's that its server reads."""
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "soon")

    with pytest.raises(ConfigError, match="VLLM_HTTP_TIMEOUT_KEEP_ALIVE='soon'"):
        Listener.open(flags())


def test_the_configuration_of_the_log_reaches_uvicorn(tmp_path: Path) -> None:
    """The log configuration reaches uvicorn in the same form as from vLLM's own server."""
    log = {"version": 1, "disable_existing_loggers": False}
    listener = Listener.open(flags(uds=str(tmp_path / "s")), log)
    config = listener.uvicorn_config(nothing)
    listener.close()

    assert log == config.log_config


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ({}, "http://127.0.0.1:{port}"),
        ({"host": None}, "http://0.0.0.0:{port}"),
        ({"host": "::1"}, "http://[::1]:{port}"),
        ({"host": "localhost", "ssl_certfile": "c"}, "https://localhost:{port}"),
    ],
)
def test_the_address_is_told_in_the_form_that_clients_use(
    given: dict[str, Any], address: str
) -> None:
    """The banner gives the address as clients use it, with the port that the system chose for 0."""
    args = flags(**given)
    with bind(args.host, 0) as sock:
        listener = Listener(args, sock)

        assert 0 != listener.port
        assert address.format(port=listener.port) == listener.address


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        (None, False),
    ],
)
def test_loopback_is_told_by_what_was_bound(host: str | None, expected: bool) -> None:
    """Loopback is recognised from the bound address, not from its spelling."""
    with bind(host, 0) as sock:
        assert expected is Listener(flags(host=host), sock).is_loopback


def test_the_port_is_in_a_file_from_the_first_connection_to_the_end(tmp_path: Path) -> None:
    """The port file is complete from the first connection to the end; a stale one is replaced."""
    path = tmp_path / "port"
    path.write_text("8000\n")
    listener = Listener.open(flags(), flags=ListenFlags(port_file=path))
    before = path.read_text()

    listener.announce()

    assert ("8000\n", f"{listener.port}\n") == (before, path.read_text())
    assert [path] == list(tmp_path.iterdir())
    listener.close()
    assert [] == list(tmp_path.iterdir())


def test_a_link_that_waits_for_the_port_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link planted at the port file's temporary name is not followed to another file."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    monkeypatch.setattr(secrets, "token_hex", lambda _: "foreseen")
    for name in (f".port.{os.getpid()}", ".vllm-hotswap-foreseen"):
        (tmp_path / name).symlink_to(precious)

    with pytest.raises(FileExistsError):
        PortFile.write(tmp_path / "port", 8000)

    assert "mine" == precious.read_text()
    assert not (tmp_path / "port").exists()


@pytest.mark.parametrize(
    ("given", "expected"), [({}, 0o775), ({"uds_mode": 0o600}, 0o600), ({"uds_mode": 0o777}, 0o777)]
)
def test_the_umask_of_whoever_started_it_counts_for_the_socket(
    tmp_path: Path, given: dict[str, int], expected: int
) -> None:
    """The socket's mode follows the umask of the parent process, not the server's stricter own."""
    path = tmp_path / "s"
    listener = Listener.open(flags(uds=str(path)), flags=ListenFlags(umask=0o002, **given))

    assert expected == stat.S_IMODE(path.stat().st_mode)
    listener.close()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_who_may_read_the_port_file_is_for_the_umask_to_say(tmp_path: Path, umask: int) -> None:
    """The port file's mode follows the umask, as for every other file."""
    before = os.umask(umask)
    try:
        PortFile.write(tmp_path / "port", 8000)
    finally:
        os.umask(before)

    assert 0o666 & ~umask == stat.S_IMODE((tmp_path / "port").stat().st_mode)


def test_a_name_of_a_port_file_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    """A port file's name can be as long as the system allows: its temporary name is not longer."""
    path = tmp_path / ("x" * 255)
    listener = Listener.open(flags(), flags=ListenFlags(port_file=path))

    listener.announce()

    assert f"{listener.port}\n" == path.read_text()
    listener.close()


def test_a_folder_in_which_no_file_can_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder where no file can be made (a full quota) is named; the attempt leaves nothing."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    parsed = flags()  # first: it reads a file
    monkeypatch.setattr(Path, "open", refuse)

    with pytest.raises(ConfigError, match="port' cannot be written: Disk quota exceeded"):
        Listener.open(parsed, flags=ListenFlags(port_file=tmp_path / "port"))
    assert [] == list(tmp_path.iterdir())


def test_the_port_file_of_another_server_stays(tmp_path: Path) -> None:
    """A server that stops leaves the port file of another server: the last writer owns it."""
    path = tmp_path / "port"
    first, second = (Listener.open(flags(), flags=ListenFlags(port_file=path)) for _ in range(2))
    first.announce()
    second.announce()

    first.close()

    assert f"{second.port}\n" == path.read_text()
    second.close()
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("missing/port", {}, "--port-file: the folder .*missing' does not exist"),
        ("models.yaml", {}, "--port-file: .*models.yaml' exists and is not a port file"),
        ("link", {}, "--port-file: .*link' exists and is not a port file"),
        ("x" * 300, {}, "--port-file: .*xxx' cannot be written: File name too long"),
        ("x" * 300 + "/port", {}, "--port-file: .*x/port' cannot be written: File name too long"),
        (".", {}, "--port-file: .* exists and is not a port file"),
        ("port", {"uds": "s"}, "--port-file: with --uds there is no port"),
    ],
)
def test_a_port_file_that_cannot_be_written_is_named(
    name: str, given: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    """A port file that cannot be written is named, and no existing other file is replaced."""
    (tmp_path / "models.yaml").write_text("models: {}")
    (tmp_path / "link").symlink_to("models.yaml")

    with pytest.raises(ConfigError, match=expected):
        Listener.open(flags(**given), flags=ListenFlags(port_file=tmp_path / name))

    assert "models: {}" == (tmp_path / "models.yaml").read_text()


def test_a_mode_without_a_socket_is_refused() -> None:
    """A socket mode without a socket is refused, because it would protect nothing."""
    with pytest.raises(ConfigError, match="--uds-mode needs --uds"):
        Listener.open(flags(), flags=ListenFlags(uds_mode=0o600))


@pytest.mark.parametrize(
    "host", ["*", "*.example.com", "http://", "a b", "a..b", ":8000", "x" * 64, "[::1"]
)
def test_an_allowed_host_that_no_client_could_send_is_named(host: str) -> None:
    """An allowed host that no client could send is named: it would silently allow nothing."""
    with pytest.raises(ConfigError, match="is not a host name; give each name in full") as caught:
        Listener.open(flags(), flags=ListenFlags(allowed_hosts=["models.example", host]))

    assert caught.value.message.startswith(f"--allowed-hosts {host!r} ")


def test_clients_that_vanish_are_noticed() -> None:
    """The system probes silent connections; accepted sockets inherit the setting."""
    with bind("127.0.0.1", 0) as listening:
        listening.listen()
        with (
            socket.create_connection(listening.getsockname()),
            listening.accept()[0] as connection,
        ):
            assert 1 == connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert 30 == connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)


@pytest.mark.parametrize(
    ("limits", "raised", "connections"),
    [
        ((1024, 1 << 20), (65_535, 1 << 20), 57_088),
        ((1024, 4096), (4096, 4096), 3328),
        ((100, 100), None, 50),
        ((1 << 20, 1 << 20), None, (1 << 20) - 256 - 8192),
        ((1024, resource.RLIM_INFINITY), (65_535, resource.RLIM_INFINITY), 57_088),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, 57_088),
    ],
)
def test_connections_leave_files_for_the_models(
    limits: tuple[int, int],
    raised: tuple[int, int] | None,
    connections: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However few files there are, connections leave some for models; the limit is raised."""
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: given.append(new))

    assert connections == most_connections(raised_file_limit())
    assert ([raised] if raised else []) == given
