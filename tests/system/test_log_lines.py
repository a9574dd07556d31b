"""Nothing that a client sends makes a line of the log, or hides one."""

from __future__ import annotations

import ast
import io
import json
import logging
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from tests.conftest import MakeServer
from tests.helpers.depth import examples
from tests.helpers.listening import Raw, exchange, listening_with
from tests.helpers.serving import flags
from tests.helpers.support import Server
from vllm_hotswap.access.roles import Access
from vllm_hotswap.connections import forwarded
from vllm_hotswap.connections.listen import Listener, ListenFlags
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.events import Event, LoadProgress, SwitchEnded
from vllm_hotswap.system.log_lines import escape_records, escaped, value_text
from vllm_hotswap.telemetry.progress import EventLog

FORGED = '6.6.6.6 - "POST /v1/models/switch HTTP/1.1" 200 OK'
LINE = re.compile(
    r'INFO: +127\.0\.0\.1:\d+ - "[A-Z]+ [!-~]* HTTP/1\.\d" \d{3} .*|(WARNING|INFO) event=[ -~]+'
)
"""A line about a request, or one of ours; ASCII only here."""


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Collect what the loggers of uvicorn and of this package write."""
    before = logging.getLogRecordFactory()
    ours = logging.getLogger("vllm_hotswap")
    kept = ours.handlers[:], ours.propagate, ours.level
    escape_records()
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    ours.handlers[:], ours.propagate = [handler], False
    ours.setLevel("INFO")
    yield written
    ours.handlers[:], ours.propagate = kept[:2]
    ours.setLevel(kept[2])
    logging.setLogRecordFactory(before)
    for name in ("uvicorn", "uvicorn.access", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()


def uvicorns(written: io.StringIO) -> dict[str, Any]:
    """Use uvicorn's own configuration of the log, with another place to write to."""
    formats = {
        "default": {"()": "uvicorn.logging.DefaultFormatter", "fmt": "%(levelprefix)s %(message)s"},
        "access": {
            "()": "uvicorn.logging.AccessFormatter",
            "fmt": '%(levelprefix)s %(client_addr)s - "%(request_line)s" %(status_code)s',
        },
    }
    stream = {"class": "logging.StreamHandler", "stream": written}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {n: {**f, "use_colors": False} for n, f in formats.items()},
        "handlers": {n: {**stream, "formatter": n} for n in formats},
        "loggers": {
            "uvicorn": {"handlers": ["default"], "level": "INFO", "propagate": False},
            "uvicorn.access": {"handlers": ["access"], "level": "INFO", "propagate": False},
        },
    }


WITH_LINES: dict[str, object] = {"disable_uvicorn_access_log": False, "uvicorn_log_level": "info"}


@pytest.mark.parametrize("trusted", [[], ["127.0.0.1"], ["*"]])
async def test_a_client_cannot_say_in_the_log_who_it_is(
    server: Server, lines: io.StringIO, trusted: list[str]
) -> None:
    """A client cannot set its address in the log: only a trusted proxy's valid addresses count."""
    listen = ListenFlags(forwarded_allow_ips=trusted)
    async with listening_with(server, None, listen, uvicorns(lines), **WITH_LINES) as at:
        client = await Raw.connect(at.port)
        await client.get("/health", f"X-Forwarded-For: {FORGED}")
        await client.get("/health", f"X-Forwarded-For: 9.9.9.9, fe80::1%{FORGED}")
        await client.get("/health", "X-Forwarded-For: 9.9.9.9")
        await client.close()

    requests = [line for line in lines.getvalue().splitlines() if " - " in line]
    last = "9.9.9.9:0" if trusted else "127.0.0.1:"
    assert 3 == len(requests)
    assert all(line.startswith("INFO:     127.0.0.1:") for line in requests[:2])
    assert requests[2].startswith(f"INFO:     {last}")


@pytest.mark.parametrize(
    ("trusted", "expected"), [([], 1), (["10.0.0.0/8"], 1), (["127.0.0.1"], 0), (["*"], 0)]
)
async def test_a_proxy_on_loopback_that_is_not_trusted_is_told_of_once(
    server: Server, lines: io.StringIO, trusted: list[str], expected: int
) -> None:
    """An untrusted proxy on loopback is reported once, with the reason and what to do."""
    listen = ListenFlags(forwarded_allow_ips=trusted)
    async with listening_with(server, None, listen) as at:
        client = await Raw.connect(at.port)
        await client.get("/health")
        assert "event=forwarded_ignored" not in lines.getvalue()
        for address in ("9.9.9.9", "8.8.8.8"):
            await client.get("/health", f"X-Forwarded-For: {address}")
        await client.close()

    told = [n for n in lines.getvalue().splitlines() if "event=forwarded_ignored" in n]
    assert expected == len(told)
    assert all(n.endswith("name the proxy with --forwarded-allow-ips") for n in told)
    assert all(LINE.fullmatch(n) for n in told)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"1.2.3.4", True),
        (b"1.2.3.4:80, ::1 , [2001:db8::1]:443", True),
        (b"", False),
        (b"1.2.3.4,", False),
        (b"unknown", False),
        (b"fe80::1%eth0", False),
        (b"1.2.3.4:x", False),
        (b"1.2.3.4:999999", False),
        (b"1.2.3.4:65535, [::1]:1", True),
        (b"1.2.3.4:65536", False),
        (b"[::1]:99999", False),
        (b"1.2.3.4:0", False),
        (b"1.2.3.4:080", False),
        (b"1.2.3.4:-1", False),
        (b"1.2.3.4:", False),
        (b"2001:db8:1:2:3:4:5:6, 1.2.3.4", True),
        (b"12:34", False),
        (b"\xb2.2.3.4", False),
    ],
)
def test_addresses_of_proxies_are_addresses(value: bytes, expected: bool) -> None:
    """Proxy addresses are read with or without a port, in both families, and without a zone."""
    assert expected is forwarded.are_addresses(value)


@pytest.mark.parametrize("name", ["proxy.example", "10.0.0.1/8", "", "1.2.3.4:80"])
def test_a_proxy_that_could_not_be_one_is_named(name: str) -> None:
    """A trusted proxy that cannot be one is named: it would silently never be trusted."""
    with pytest.raises(ConfigError, match="is neither an IP address, nor a network") as caught:
        Listener.open(flags(), flags=ListenFlags(forwarded_allow_ips=[name]))

    assert caught.value.message.startswith(f"--forwarded-allow-ips {name!r} ")


PIECES = [
    *(bytes([n]) for n in range(256)),
    *(b"%%%02x" % n for n in (0, 9, 10, 13, 27, 0x7F, 0x85, 0x9B)),
    b"%e2%80%a8",
    b"%e2%80%ae",
    b"\r\nINFO:     " + FORGED.encode(),
    b"/admin/status",
    b"?model=",
    b"#",
]


async def test_whatever_is_sent_each_line_is_one_of_the_servers(
    make_server: MakeServer, lines: io.StringIO
) -> None:
    """Targets and headers of any bytes, refused or answered, never forge or split a log line."""
    server = await make_server(access=Access(["a-key"]))
    chance = random.Random(16)  # noqa: S311

    def text(most: int) -> bytes:
        usual = [b"abc", b"/", b"x-y", b"%41"]
        some = chance.choices(usual, k=chance.randrange(most))
        return b"".join([*some, chance.choice(PIECES), *chance.choices(usual, k=2)])

    names = ["Host", "Origin", "X-Request-Id", "X-Forwarded-For", "x-hotswap-priority"]
    async with listening_with(server, None, None, uvicorns(lines), **WITH_LINES) as at:
        lines.truncate(lines.seek(0))
        for _ in range(examples(150)):
            method = chance.choice([b"GET", b"POST", b"DELETE"])
            fields = b"".join(b"%s: %s\r\n" % (name.encode(), text(2)) for name in names)
            request = b"%s /%s HTTP/1.1\r\nConnection: close\r\n%s\r\n" % (method, text(4), fields)
            told, _ = await exchange(at.port, request)
            assert told.status >= 400 or told.status == 200
        written = lines.getvalue()

    assert examples(20) < written.count("\n")
    assert [] == [line for line in written.split("\n")[:-1] if not LINE.fullmatch(line)]


async def test_what_an_admin_writes_stays_in_its_line(
    make_server: MakeServer, lines: io.StringIO
) -> None:
    """Owners and notes of job leases, and names of adapters, stay within their log line."""
    server = await make_server(access=Access(dev_mode=True))
    server.events.notify = EventLog().notify  # type: ignore[method-assign]
    evil = f"x\n\r\x1b[2K\x85\u2028INFO:     {FORGED}"
    lease = {"model": "llama", "owner": evil, "note": evil, "ttl": 10}

    assert (await server.post("/admin/leases", json=lease)).status_code == 200
    await server.post("/v1/load_lora_adapter", json={"lora_name": evil, "lora_path": evil})
    await server.post("/v1/models/switch", json={"model": evil})
    await server.post("/v1/completions", json={"model": evil})

    assert "event=job_lease" in lines.getvalue()
    assert [] == [n for n in lines.getvalue().splitlines() if not LINE.fullmatch(n)]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("org/qwen-3.1:8b", "org/qwen-3.1:8b"),
        ("qwen 模型/v1?", "'qwen 模型/v1?'"),
        ("größe", "'größe'"),
        ("a=b", "'a=b'"),
        ('say "a"', "'say \"a\"'"),
        ("", "''"),
        (None, "None"),
    ],
)
def test_a_value_is_quoted_where_it_is_no_word(value: str | None, written: str) -> None:
    """A value that is not a word is quoted, so that a `key=value` line can be parsed again."""
    assert written == value_text(value)


NAMED = re.compile(r"event=.* (adapter|model|source|target)=%s")


def unquoted(path: Path) -> list[str]:
    """Return a module's functions that write a line with a name, and quote none."""
    return [
        f"{path.name}: {function.name}"
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        and NAMED.search(text := ast.unparse(function))
        and "value_text(" not in text
    ]


def test_every_name_in_a_line_is_quoted_where_it_is_no_word() -> None:
    """Every function that logs the name of a model or an adapter uses `value_text`."""
    modules = (Path(__file__).parents[2] / "src" / "vllm_hotswap").rglob("*.py")

    assert [] == [place for path in modules for place in unquoted(path)]


@pytest.mark.parametrize(
    "event",
    [
        SwitchEnded("s", 1, "llama", "qwen 模型", "switched", 1.0, 0),
        LoadProgress(1, "qwen 模型", "weights", 0.5),
    ],
)
def test_aliases_of_events_are_quoted(event: Event, lines: io.StringIO) -> None:
    """Aliases are quoted in the lines of switches and of all other events in the table."""
    EventLog().notify(event)

    assert "='qwen 模型' " in lines.getvalue()


@pytest.mark.parametrize("name", ["vllm_hotswap", "uvicorn.error", "vllm.entrypoints"])
def test_the_text_of_an_exception_is_no_line(lines: io.StringIO, name: str) -> None:
    """The text of an exception makes no line, neither in a stack trace nor in a message."""
    logger = logging.getLogger(name)
    handler = logging.StreamHandler(lines)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        raise ValueError(f"no such thing: a\nINFO:     {FORGED}\x1b[2K\r")
    except ValueError as error:
        logger.exception("event=request_failed")
        logger.error("cause=%s of=%s", "b\x1b[2K", json.dumps({"a": "b"}))
        logger.error("cause=%s", error)
    logger.removeHandler(handler)

    found = lines.getvalue().splitlines()
    assert any("Traceback" in line for line in found)
    assert [] == [n for n in found if not n.startswith(("ERROR ", "    "))]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lines.getvalue())


class NewLineFormatter(logging.Formatter):
    """Like vLLM's class of that name: each line of a message has the prefix."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", "\nERROR ")


@pytest.mark.parametrize("name", ["vllm.v1.core.sched", "transformers.some", "no_such.logger"])
@pytest.mark.parametrize("how", ["bare", "marked", "both"])
def test_line_breaks_are_kept_only_where_each_line_is_marked(
    lines: io.StringIO, name: str, how: str
) -> None:
    """Line breaks stay only where every handler marks each line, its own or an ancestor's."""
    top = logging.getLogger(name.partition(".")[0])
    made: dict[str, list[type[logging.Formatter]]] = {
        "bare": [logging.Formatter],
        "marked": [NewLineFormatter],
        "both": [NewLineFormatter, logging.Formatter],
    }
    handlers = [logging.StreamHandler(lines) for _ in made[how]]
    for handler, kind in zip(handlers, made[how], strict=True):
        handler.setFormatter(kind("%(levelname)s %(message)s"))
    kept = top.handlers[:], top.propagate
    top.handlers[:], top.propagate = handlers, False
    try:
        logging.getLogger(name).error("Failed to advance FSM for request %s", f"a\n{FORGED}")
        logging.getLogger(name).error(f"no such thing: a\n{FORGED}")  # noqa: G004  # as vLLM does
    finally:
        top.handlers[:], top.propagate = kept

    found = lines.getvalue().splitlines()
    assert (4 if how == "marked" else 2 * len(handlers)) == len(found)
    assert all(line.startswith("ERROR ") for line in found)


HOST = """
import logging, sys
from vllm_hotswap.host.process import set_up_log, _exit
set_up_log()
log = logging.getLogger("vllm.v1.core.sched.scheduler")
log.info("not shown")
for n in range(int(sys.argv[1])):
    log.error("Failed to advance FSM for request %s", f"cmpl-{n}\\nINFO event=forged\\n")
_exit(0)
"""


def test_an_engine_host_writes_few_lines_and_none_of_a_client() -> None:
    """An engine host, where vLLM sets up no log, writes few lines and none that a client forged."""
    run = [sys.executable, "-c", HOST, "1000"]
    told = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True).stderr

    first, last = told.splitlines()
    assert r"Failed to advance FSM for request cmpl-0\nINFO event=forged\n" == first
    assert "event=lines_left_out" in last
    assert last.endswith("left_out=999")


@given(st.text(st.characters()))
def test_what_is_escaped_is_one_line_that_can_be_written(text: str) -> None:
    """Escaped text is one writable line, and harmless text is unchanged."""
    line = escaped(text)

    assert len(line.splitlines()) <= 1
    line.encode()
    assert line.isprintable() or not text.isprintable()
    assert line == text or not text.isprintable()
