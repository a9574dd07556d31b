"""The commands that hold a model, or switch to one, against a server that listens."""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.faults import wait_until
from tests.helpers.remote_server import Listening, listening_server
from vllm_hotswap.access.roles import Access
from vllm_hotswap.cli import remote
from vllm_hotswap.cli.main import main
from vllm_hotswap.hints import program


@pytest.fixture
def listening() -> Iterator[Listening]:
    """Start a server on fake engines: llama is active, qwen is parked, mistral is cold."""
    with listening_server() as running:
        yield running


@pytest.fixture
def url(listening: Listening) -> str:
    return listening.url


def test_model_is_held_shown_and_released(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Holding, showing and releasing print one line each; so does a refusal, with status 1."""
    hold = ["lease", "--url", url, "--owner", "ann", "--ttl", "60"]

    assert 0 == main([*hold, "qwen", "--note", "nightly"])
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("qwen: leased for another 60 s to ann (nightly), lease lease-")
    lease = said.rpartition(" ")[2]

    assert 0 == main(["leases", "--url", url])
    assert said == capsys.readouterr().out.strip()

    assert 1 == main([*hold, "llama"])
    (refused,) = capsys.readouterr().err.splitlines()
    assert f"end the lease with {program()} release {lease} --url {url}" in refused

    assert 0 == main(["release", "--url", url, lease])
    assert 0 == main(["leases", "--url", url])
    assert [f"qwen: {lease} has ended", "no model is leased"] == (
        capsys.readouterr().out.splitlines()
    )


@pytest.mark.parametrize("lease", ["", "/", "a/b", "../status"])
def test_what_is_no_leases_id_is_refused(
    url: str, lease: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text that is not a lease's id is refused, because it would be another path."""
    assert 1 == main(["release", "--url", url, lease])
    (refused,) = capsys.readouterr().err.splitlines()
    assert f"{lease!r} is not the id of a lease; {program()} leases lists them" in refused


@pytest.mark.parametrize(
    ("command", "says"),
    [("release", "does not exist, or has ended"), ("load", "is not configured")],
)
@pytest.mark.parametrize("name", [".", ".."])
def test_a_name_of_dots_stays_a_name(
    url: str, command: str, says: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name made of dots stays a name, and is not read as a relative path."""
    assert 1 == main([command, "--url", url, name])
    (refused,) = capsys.readouterr().err.splitlines()
    assert f"{name!r}" in refused
    assert says in refused


def hint(refused: str) -> str:
    """Return the command of ours that an error names."""
    (command,) = re.findall(rf"{re.escape(program())} [^;]*?(?= first$|$| lists)", refused)
    return str(command)


@pytest.mark.parametrize(
    ("before", "refused", "says"),
    [
        (["pin", "qwen"], ["unload", "qwen"], "qwen: not pinned"),
        (["lease", "qwen", "--owner", "a", "--ttl", "60"], ["switch", "llama"], "has ended"),
        (["leases"], ["release", "nobody's"], "no model is leased"),
    ],
)
def test_commands_that_errors_name_work_as_they_are_printed(
    before: list[str],
    refused: list[str],
    says: str,
    url: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Errors name commands that work as printed, on the same server, instead of HTTP requests."""
    at = ["--url", url]
    assert 0 == main([*before, *at])
    capsys.readouterr()
    assert 1 == main([*refused, *at])
    (error,) = capsys.readouterr().err.splitlines()
    assert not re.search(r"\b(GET|POST|DELETE) /", error)

    done = subprocess.run(
        ["/bin/sh", "-c", hint(error)], capture_output=True, text=True, check=False
    )

    assert (0, "") == (done.returncode, done.stderr)
    assert done.stdout.strip().endswith(says)


@pytest.mark.parametrize("key", ["sk-wrong", "sk-user"])
def test_a_refused_key_is_told_by_the_flags_that_give_another(
    key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refused key names the flags for another one, whether it is unknown or not an admin's."""
    access = Access(user_keys=["sk-user"], admin_keys=["sk-admin"])
    with listening_server(access=access) as running:
        assert 1 == main(["switch", "qwen", "--url", running.url, "--admin-key", key])

    (error,) = capsys.readouterr().err.splitlines()
    assert "give --admin-key-file FILE or --admin-key KEY, or set VLLM_HOTSWAP_ADMIN_KEY" in error
    assert key not in error
    assert "Bearer" not in error


def test_users_look_with_a_key_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's key works by flag, file or variable; an admin's wins; an error names all ways."""
    access = Access(user_keys=["sk-user"], admin_keys=["sk-admin"])
    file = tmp_path / "users"
    file.write_text("sk-user  # ann\n")
    file.chmod(0o600)
    with listening_server(access=access) as running:
        status = ["status", "--url", running.url]
        assert 1 == main(status)
        assert "give --api-key-file FILE or --api-key KEY, or set VLLM_API_KEY" in (
            capsys.readouterr().err
        )
        for words in (["--api-key", "sk-user"], ["--api-key-file", str(file)]):
            assert 0 == main([*status, *words])
            assert 0 == main(["plan", "qwen", "--url", running.url, *words])
            assert 0 == main(["leases", "--url", running.url, *words])
        for name, value in (("VLLM_HOTSWAP_API_KEY_FILE", file), ("VLLM_API_KEY", "sk-user")):
            monkeypatch.setenv(name, str(value))
            assert 0 == main(status)
            monkeypatch.delenv(name)
        monkeypatch.setenv("VLLM_API_KEY", "sk-wrong")
        monkeypatch.setenv("VLLM_HOTSWAP_ADMIN_KEY", "sk-admin")
        assert 0 == main(status)
        assert 1 == main([*status, "--api-key", "sk-wrong"])
        assert (
            "does not accept the key of --api-key; give --api-key-file" in capsys.readouterr().err
        )


@pytest.mark.parametrize("path", ["/run/x.sock", "./x.sock", "x.sock"])
def test_the_path_of_a_socket_is_told_with_what_is_missing(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path of a socket is reported with what is missing: it could be a file of a host."""
    assert 1 == main(["status", "--url", path])
    assert (
        f"--url {path} is not a valid server address; give unix:{path}" in capsys.readouterr().err
    )


def test_a_server_on_which_switching_is_closed_says_how_to_open_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A server with switching closed says how to open it: no key of the caller would help."""
    with listening_server(access=Access()) as running:
        assert 1 == main(["switch", "qwen", "--url", running.url])

    assert "start the server with --admin-key" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["unix:", "unix://"])
def test_commands_reach_a_unix_domain_socket(
    scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands reach a Unix socket by its banner's address, past any proxy; hints name it, too."""
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    path = tmp_path / "s.sock"
    with listening_server(path) as running:
        assert running.url == f"unix:{path}"
        at = ["--url", f"{scheme}{path}"]
        assert 0 == main(["lease", *at, "--owner", "ann", "--ttl", "60", "qwen"])
        assert 1 == main(["lease", *at, "--owner", "ann", "--ttl", "60", "llama"])
        assert 0 == main(["switch", *at, "qwen"])

    said = capsys.readouterr()
    assert said.out.startswith("qwen: leased for another 60 s to ann")
    assert f"--url unix:{path}" in said.err


def test_a_unix_domain_socket_without_a_server_is_named(tmp_path: Path) -> None:
    """A Unix socket without a server is named in one line."""
    command = [sys.executable, "-m", "vllm_hotswap", "status", "--url", f"unix:{tmp_path}/none"]

    ended = subprocess.run(command, capture_output=True, text=True, check=False)

    (error,) = ended.stderr.splitlines()
    assert f"no response from unix:{tmp_path}/none: " in error
    assert 1 == ended.returncode


@pytest.mark.parametrize(
    ("given", "uds"),
    [
        ("unix:s.sock", "s.sock"),
        ("unix:/run/a b", "/run/a b"),
        ("unix:8000", ""),
        ("http://unix:8000", ""),
    ],
)
def test_a_unix_domain_socket_is_told_from_a_host(given: str, uds: str) -> None:
    """A Unix socket is distinguished from a host, even from one with that name."""
    assert uds == remote.Address.of(argparse.Namespace(url=given)).uds


@pytest.mark.parametrize("given", ["unix:", "unix://run/s.sock", "unix://"])
def test_an_address_without_the_path_of_a_socket_is_refused(given: str) -> None:
    """An address without the path of a socket is refused with the right form."""
    with pytest.raises(remote.RemoteError, match="give http://HOST:PORT or unix:PATH"):
        remote.Address.of(argparse.Namespace(url=given))


def test_what_takes_a_while_is_told_meanwhile(
    listening: Listening, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress goes to standard error while a command runs; its output is still one line."""
    said = io.StringIO()
    monkeypatch.setattr(remote, "QUIET_S", 0.1)
    monkeypatch.setattr("sys.stderr", said)
    host, feed = listening.server.host, listening.server.app.feed
    for operation in ("load", "activate"):
        host.hold(operation, "mistral")

    def go_on_when_it_is_told() -> None:
        release = listening.loop.call_soon_threadsafe
        wait_until(lambda: "subscribers=1" in repr(feed))
        release(host.release, "load", "mistral")
        wait_until(lambda: " s  mistral: activate\n" in said.getvalue())
        release(host.release, "activate", "mistral")

    telling = threading.Thread(target=go_on_when_it_is_told)
    telling.start()

    assert 0 == main(["switch", "--url", listening.url, "mistral"])
    telling.join()

    assert capsys.readouterr().out.startswith("mistral: active after ")


def test_what_is_over_at_once_is_not_followed(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that ends at once follows no events: an unread stream would stay open."""
    began: list[threading.Thread] = []
    follow = remote._follow

    def noted(*args: Any) -> None:
        began.append(threading.current_thread())
        follow(*args)

    monkeypatch.setattr(remote, "_follow", noted)
    monkeypatch.setattr(remote, "QUIET_S", 600)
    assert 0 == main(["lease", "--url", listening.url, "--owner", "ann", "--ttl", "60", "qwen"])

    wait_until(lambda: began and not began[0].is_alive())
    wait_until(lambda: not listening.http.server_state.connections)
    assert "subscribers=0" in repr(listening.server.app.feed)


def test_a_model_that_wakes_before_it_is_asked_for_is_shown() -> None:
    """An early wake is shown with its progress, and a plan says that it would end it."""
    model = {
        "residency": "asleep",
        "in_flight": 0,
        "held": {"device_bytes": 6 << 20, "host_bytes": 4 << 20},
        "waking": {"done_bytes": 2 << 20, "total_bytes": 5 << 20},
        "pinned": False,
        "switch_cost_s": 0.1,
    }
    memory = {"device": {"used": 6 << 20, "budget": 9 << 20}}
    status = {"active": "llama", "phase": "idle", "memory": memory, "models": {"qwen": model}}
    assert remote.status_text(status).endswith("0.1  waking: 2.0 of 5.0 MiB")

    size = {"device_bytes": 0}
    plan = {
        "active": "llama",
        "model": "mistral",
        "evict": [],
        "give_up_wake": ["qwen"],
        "bring_up": None,
        "memory": dict.fromkeys(["before", "peak", "after", "budget"], size),
        "cost_s": 0,
    }
    assert "  qwen: waking is cancelled" in remote.plan_text(plan).splitlines()
