"""Commands in unexpected environments: one line, an exit status, no traceback."""

from __future__ import annotations

import _thread
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.remote_server import Canned, Listening, canned_server, listening_server
from vllm_hotswap.__main__ import main as program
from vllm_hotswap.access.roles import Access
from vllm_hotswap.cli import remote
from vllm_hotswap.cli.main import COMMANDS, INTERRUPTED, main

pytestmark = pytest.mark.slow

ERROR = "vllm-hotswap: error: "

REMOTE: Mapping[str, list[str]] = {
    "load": ["load", "mistral"],
    "unload": ["unload", "mistral"],
    "wake": ["wake", "模型"],
    "switch": ["switch", "llama"],
    "sleep": ["sleep", "模型"],
    "prefetch": ["prefetch", "mistral", "--cancel"],
    "pin": ["pin", "模型", "--off"],
    "plan": ["plan", "模型"],
    "lease": ["lease", "llama", "--owner", "ann", "--ttl", "1", "--note", "Prüfung"],
    "leases": ["leases"],
    "release": ["release", "lease-of-nobody"],
    "status": ["status"],
}
REFUSED = {"release"}
"""Requests to which the server answers with an error."""

LOCAL: Mapping[str, list[str]] = {
    "serve": ["serve", "models.yaml"],
    "check": ["check", "models.yaml"],
    "schema": ["schema"],
    "demo": ["demo", "--write", "demo"],
    "simulate": ["simulate", "--generate", "agents", "--requests", "10", "--policy", "fifo"],
}


@dataclass
class Ended:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Return the one line of an error; standard error has nothing else."""
        (line,) = self.err.splitlines()
        assert line.startswith(ERROR)
        assert "unexpected" not in line
        return line.removeprefix(ERROR)


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(autouse=True)
def elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use another folder, no vLLM, none of our variables; restore logging afterwards."""
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in (remote.URL_VARIABLE, remote.KEY_VARIABLE, remote.KEY_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("vllm_hotswap")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process."""

    def ended(*argv: str) -> Ended:
        capsys.readouterr()
        try:
            status = main(argv)
        except SystemExit as end:
            status = int(end.code or 0)
        return Ended(status, *capsys.readouterr())

    return ended


@pytest.fixture(scope="module")
def listening() -> Iterator[Listening]:
    aliases = ("llama", "模型", "mistral")
    with listening_server(aliases=aliases, load=aliases[:2]) as running:
        yield running


@pytest.fixture(scope="module")
def canned() -> Iterator[Canned]:
    with canned_server() as running:
        yield running


def test_every_command_is_tried_here() -> None:
    """The tables below have every command."""
    assert set(COMMANDS) == {*REMOTE, *LOCAL}
    assert set(remote.COMMANDS) == set(REMOTE)


# --- variables of the environment ----------------------------------------------------------

ENVIRONMENTS: Mapping[str, Mapping[str, str | None]] = {
    "GNOME's proxy": {"ALL_PROXY": "socks://127.0.0.1:9/", "NO_PROXY": "127.0.0.1"},
    "a SOCKS proxy": {"ALL_PROXY": "socks5://127.0.0.1:9"},
    "a proxy for everything": {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""},
    "no proxy at all": {"HTTP_PROXY": "nonsense://"},
    "no home": {"HOME": None, "USER": None, "PATH": None},
    "a home that is none": {"HOME": "/nowhere", "XDG_CONFIG_HOME": "/nowhere"},
    "ASCII": {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    "no terminal": {"TERM": "", "COLUMNS": "nonsense"},
    "empty variables": {remote.URL_VARIABLE: "", remote.KEY_VARIABLE: "", "NETRC": ""},
}


@pytest.mark.parametrize("command", REMOTE)
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_server_of_this_machine_is_reached_whatever_the_environment_says(
    command: str, name: str, listening: Listening, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of this machine is reached despite proxies and all else in the environment."""
    for variable, value in ENVIRONMENTS[name].items():
        if value is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, value)

    ended = run(*REMOTE[command], "--url", listening.url)

    assert (1 if command in REFUSED else 0) == ended.status, ended.err
    assert ended.error if command in REFUSED else not ended.err


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:9/", "socks5://127.0.0.1:9", "x", "http://["])
def test_a_proxy_that_cannot_be_used_for_another_machine_is_one_line(
    proxy: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A useless proxy gets one line with the server's address, which is not contacted."""
    monkeypatch.setenv("ALL_PROXY", proxy)

    ended = run("status", "--url", "http://models.invalid:8000")

    assert 1 == ended.status
    assert "http://models.invalid:8000" in ended.error


def test_certificates_that_are_missing_are_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing certificates get one line, for https only."""
    monkeypatch.setenv("SSL_CERT_FILE", "nowhere.pem")

    ended = run("status", "--url", "https://models.invalid:8000")

    assert 1 == ended.status
    assert "https://models.invalid:8000" in ended.error


# --- standard output -----------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("command", sorted(set(REMOTE) - REFUSED))
def test_a_terminal_that_lacks_a_character_shows_an_escape(
    command: str,
    encoding: str,
    listening: Listening,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A character that the terminal lacks is shown as an escape, by every command."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))

    ended = run(*REMOTE[command], "--url", listening.url)

    assert 0 == ended.status, ended.err
    said = written.getvalue().decode(encoding)
    assert said
    if "模型" in REMOTE[command] or command == "status":
        assert r"\u6a21\u578b" in said


PRINTING = {
    **{name: argv for name, argv in REMOTE.items() if name not in REFUSED},
    "status --json": ["status", "--json"],
    "schema": LOCAL["schema"],
    "demo": LOCAL["demo"],
    "simulate": LOCAL["simulate"],
    "simulate --json": [*LOCAL["simulate"], "--json"],
    "help": ["--help"],
    "help of serve": ["serve", "--help"],
    "help of status": ["status", "--help"],
    "version": ["--version"],
    "nothing": [],
}


def at(listening: Listening, argv: list[str]) -> list[str]:
    is_remote = bool(argv) and argv[0] in REMOTE and "--help" not in argv
    return [*argv, "--url", listening.url] if is_remote else argv


@pytest.mark.parametrize("name", PRINTING)
def test_a_reader_that_has_gone_is_no_error(
    name: str, listening: Listening, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `| head`, nothing is printed, and the status is that of a program killed by SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        ended = run(*at(listening, PRINTING[name]))
        monkeypatch.undo()

    assert (128 + signal.SIGPIPE, "") == (ended.status, ended.err)


@pytest.mark.parametrize("name", PRINTING)
def test_a_disk_that_is_full_is_one_line(
    name: str, listening: Listening, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output that a full disk does not take gets one line, and is not a success."""
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        ended = run(*at(listening, PRINTING[name]))
        monkeypatch.undo()
        with suppress(OSError):
            stream.flush()

    assert 1 == ended.status
    assert "No space left" in ended.error


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("status --url {url} >&-", 0),
        ("status --url {url} >&- 2>&- <&-", 0),
        ("status --url {canned} 2>&-", 1),
        ("status --json --url {url} | head -c 0", 128 + signal.SIGPIPE),
    ],
)
def test_closed_streams_of_a_process_change_nothing(
    line: str, status: int, listening: Listening, canned: Canned
) -> None:
    """Closed streams change nothing, not even what Python itself writes at its exit."""
    canned.answer = b""
    line = line.format(url=listening.url, canned=canned.url)
    shell = f'"$0" -m vllm_hotswap {line}; echo "${{PIPESTATUS[0]}}" >status'
    ended = subprocess.run(
        ["/bin/bash", "-c", shell, sys.executable],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ("", "") == (ended.stdout, ended.stderr)
    assert str(status) == Path("status").read_text().strip()


def test_an_interrupt_ends_a_command_without_a_word(canned: Canned) -> None:
    """An interrupt ends a command silently, with the status that shells give to it."""
    canned.answer = None
    canned.asked.clear()
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_hotswap", "switch", "llama", "--url", canned.url],
        stderr=subprocess.PIPE,
        text=True,
        # A shell without job control sets background processes to ignore it.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    assert canned.asked.wait(60)
    process.send_signal(signal.SIGINT)

    assert ("", 130) == (process.communicate(timeout=60)[1], process.returncode)


def test_an_interrupt_that_wakes_nobody_ends_a_command_too(run: Run, canned: Canned) -> None:
    """An interrupt just before the command's thread blocks in a read ends the command, too."""
    canned.answer = None
    canned.asked.clear()

    def interrupt() -> None:
        assert canned.asked.wait(60)
        time.sleep(0.2)  # until it reads
        _thread.interrupt_main()  # as a signal does, but without interrupting a system call

    # A shell without job control sets background processes to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        assert INTERRUPTED == run("switch", "llama", "--url", canned.url).status
    finally:
        signal.signal(signal.SIGINT, before)


class Interrupting:
    """Finds modules, and is interrupted when it searches for one of ours."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "vllm_hotswap.cli.main":
            raise KeyboardInterrupt


def test_an_interrupt_of_the_imports_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt during the imports, as after a typing mistake, gives no traceback."""
    monkeypatch.delitem(sys.modules, "vllm_hotswap.cli.main")
    monkeypatch.delattr("vllm_hotswap.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])

    assert 130 == program()


def test_an_error_that_nobody_thought_of_is_one_line_with_its_place(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error is one line with its place, so that it can be reported."""
    monkeypatch.setattr("vllm_hotswap.cli.remote.call", lambda *_: 1 / 0)

    ended = run("status")

    (line,) = ended.err.splitlines()
    assert 1 == ended.status
    assert re.search(
        r"unexpected ZeroDivisionError in test_environments.py:\d+: division by zero", line
    )


# --- programs that answer, but are not our server -------------------------------------------


def answer(body: str | bytes, status: str = "200 OK", kind: str = "application/json") -> bytes:
    raw = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


ANSWERS = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": answer('{"models": {}')[:-5],
    "HTML": answer("<html>It works!</html>", kind="text/html"),
    "an error of a proxy": answer("<html>\n<h1>Bad gateway</h1>", "502 Bad Gateway", "text/html"),
    "another place": b"HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n",
    "a list": answer("[]"),
    "an empty object": answer("{}"),
    "other types": answer(json.dumps(dict.fromkeys(("models", "memory", "leases", "model"), 3))),
    "null": answer("null"),
    "text that is no UTF-8": answer(b'{"model": "\xff"}'),
    "very deep": answer("[" * 100_000),
    "no gzip": answer("x").replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"),
    "an error of another form": answer('{"error": "no"}', "404 Not Found"),
    "an error without a message": answer('{"error": {}}', "500 Oh"),
    "an error with escapes": answer('{"error": {"message": "a\\n\\u001b[31mb"}}', "409 Conflict"),
}


SHAPES = ("a list", "an empty object", "other types", "null")
"""JSON that each command has to interpret; one place refuses everything else for all of them."""


@pytest.mark.parametrize(
    ("command", "name"),
    [(command, name) for name in ANSWERS for command in (REMOTE if name in SHAPES else ["switch"])],
)
def test_whatever_answers_is_one_line(command: str, name: str, canned: Canned, run: Run) -> None:
    """Any answer gives one printable line, which names the program that answered, or its answer."""
    canned.answer = ANSWERS[name]

    ended = run(*REMOTE[command], "--url", canned.url)

    assert (1, "") == (ended.status, ended.out)
    assert ended.error.isprintable()


# --- words of the command line ----------------------------------------------------------------

URLS = ["", "http://", "http://[::1", "http://x:99999", "http://x:port", "http://x:0", "ftp://x"]
URLS += ["http://a b/", "http://x\ny", "http://x?y", "//", ":8000", "http://\udcff"]


@pytest.mark.parametrize("url", URLS[1:])
def test_an_address_that_is_none_is_one_line(url: str, run: Run) -> None:
    """An invalid address gets one line that shows the form of an address."""
    ended = run("status", "--url", url)

    assert 1 == ended.status
    assert ended.error.startswith("--url ")
    assert ended.error.endswith("is not a valid server address; give http://HOST:PORT or unix:PATH")


@pytest.mark.parametrize(
    ("variable", "value"),
    [(remote.URL_VARIABLE, "http://x:port"), (remote.KEY_VARIABLE, "schlüssel")],
)
def test_what_is_wrong_in_a_variable_is_told_with_its_name(
    variable: str, value: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in a variable is reported with its name: it is not on the command line."""
    monkeypatch.setenv(variable, value)

    ended = run("status")

    assert 1 == ended.status
    assert ended.error.startswith(variable)


@pytest.mark.parametrize("form", ["{host}", "{host}/v1", "{url}/v1", "{url}/v1/", "{url}/"])
def test_other_forms_of_an_address_are_understood(
    form: str, listening: Listening, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag and the variable accept the forms of `OPENAI_BASE_URL`, and a host with a port."""
    url = form.format(url=listening.url, host=listening.url.removeprefix("http://"))
    monkeypatch.setenv(remote.URL_VARIABLE, url)

    assert 0 == run("status", "--url", url).status
    assert 0 == run("status").status


def test_a_password_in_an_address_is_not_shown(canned: Canned, run: Run) -> None:
    """A password in an address is not shown, because it would end in a log."""
    canned.answer = b""
    url = canned.url.replace("://", "://ann:sk-canary@")

    assert "sk-canary" not in run("status", "--url", url).error


@pytest.mark.parametrize(
    "line",
    [
        "switch llama --drain-timeout inf",
        "switch llama --drain-timeout nan",
        "switch llama --drain-timeout -1",
        "switch llama --drain-timeout 1e999",
        "lease llama --owner ann --ttl inf",
        "lease llama --owner ann --ttl soon",
        "sleep llama --level 3",
        "switch",
        "demo --port 0",
        "demo --port 99999",
        "demo --port x",
        "simulate --generate agents --requests many",
        "serve",
        "serve --port 1",
        "check",
        "swich llama",
        "status --jsn",
        "status phi",
    ],
)
def test_a_command_line_that_cannot_be_understood_is_one_line(line: str, run: Run) -> None:
    """A wrong command line gets one line and status 2; the usage does not hide the line."""
    ended = run(*line.split())

    assert (2, "") == (ended.status, ended.out)
    assert "--help)" in ended.error


@pytest.mark.parametrize("command", sorted(set(REMOTE) - {"leases", "status"}))
def test_a_name_that_is_no_text_is_one_line(command: str, canned: Canned, run: Run) -> None:
    """A name that is not text, from a shell in another encoding, gets one line."""
    name, _, *rest = REMOTE[command]

    ended = run(name, "\udcff", *rest, "--url", canned.url)

    assert 1 == ended.status
    assert r"'\udcff' is not UTF-8" in ended.error


@pytest.mark.parametrize(
    ("command", "key"),
    [*((command, "schlüssel") for command in REMOTE)]
    + [("status", key) for key in ("two words", "line\nbreak", "\udcff")],
)
def test_a_key_that_cannot_be_sent_is_one_line(
    command: str, key: str, canned: Canned, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that cannot be sent gets one line with its source, without the key."""
    ended = run(*REMOTE[command], "--url", canned.url, "--admin-key", key)

    assert 1 == ended.status
    assert ended.error.startswith("--admin-key: a key may only have printable ASCII")
    assert key not in ended.error


# --- files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paths(folder: Path) -> dict[str, str]:
    """Paths at which nothing can be read or written."""
    (folder / "file").write_text("")
    (folder / "binary.yaml").write_bytes(b"\xff\x00\xfe")
    (folder / "folder.yaml").mkdir()
    (folder / "circle.yaml").symlink_to("circle.yaml")
    return {
        "missing": "nowhere/at/all.yaml",
        "below a file": "file/x.yaml",
        "binary": "binary.yaml",
        "a folder": "folder.yaml",
        "a circle of links": "circle.yaml",
        "too long": "x" * 5000 + ".yaml",
        "no text": "\udcff.yaml",
    }


UNREADABLE = ["missing", "below a file", "binary", "a folder", "a circle of links", "too long"]
READING = {
    "serve": ["serve", "{}"],
    "check": ["check", "{}"],
    "simulate": ["simulate", "{}"],
    "simulate --measured": ["simulate", "--generate", "agents", "--measured", "{}"],
    "status --admin-key-file": ["status", "--admin-key-file", "{}"],
    "switch --admin-key-file": ["switch", "llama", "--admin-key-file", "{}"],
}


@pytest.mark.parametrize("kind", [*UNREADABLE, "no text"])
@pytest.mark.parametrize("name", READING)
def test_a_file_that_cannot_be_read_is_one_line(
    name: str, kind: str, paths: dict[str, str], canned: Canned, run: Run
) -> None:
    """A file that cannot be read gets one line, whatever its purpose."""
    argv = [paths[kind] if word == "{}" else word for word in READING[name]]

    ended = run(*argv)

    assert (1, "") == (ended.status, ended.out)
    assert ended.error


WRITING = {
    "demo": ["demo", "--write", "{}"],
    "simulate": ["simulate", "--generate", "agents", "--write", "{}"],
}


@pytest.mark.parametrize("kind", ["below a file", "a circle of links", "too long", "a proc file"])
@pytest.mark.parametrize("name", WRITING)
def test_a_place_that_cannot_be_written_is_one_line(
    name: str, kind: str, paths: dict[str, str], run: Run
) -> None:
    """A place that cannot be written gets one line, and nothing is left there."""
    places = {**paths, "a proc file": "/proc/self/nowhere"}

    ended = run(*(places[kind] if word == "{}" else word for word in WRITING[name]))

    assert (1, "") == (ended.status, ended.out)
    assert ended.error


def test_key_file_of_a_client_is_read_as_that_of_the_server(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client's key file is read like the server's: its first key; a variable may name it."""
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsk-first # nightly\nsk-second\n")
    keys.chmod(0o600)
    with listening_server(access=Access(admin_keys=["sk-first"], user_keys=["sk-user"])) as server:
        url = ["--url", server.url]
        refused = run("status", *url)
        assert 0 == run("status", *url, "--admin-key-file", str(keys)).status
        assert 1 == run("status", *url, "--admin-key", "sk-second").status
        monkeypatch.setenv(remote.KEY_FILE_VARIABLE, str(keys))
        assert 0 == run("switch", "qwen", *url).status

    assert "give --api-key-file FILE or --api-key KEY" in refused.error
    assert "--admin-key-file" in refused.error
    assert "Authorization" not in refused.error
