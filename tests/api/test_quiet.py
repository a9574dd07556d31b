"""However often a client asks, the log has a few lines of it, and a count of the rest."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from tests.conftest import MakeServer
from tests.helpers.faults import RawClient
from tests.helpers.listening import Raw, Told, listening_to, listening_with
from tests.helpers.support import Server
from vllm_hotswap.access.roles import Access
from vllm_hotswap.api.cross_site import CrossSite
from vllm_hotswap.config.settings import LimitsConfig
from vllm_hotswap.errors import EngineUnavailable
from vllm_hotswap.system.quiet import QUIET_S, Quiet, log_of_clients

MANY = 1000

AS_IT_IS: dict[str, Any] = {"version": 1, "disable_existing_loggers": False, "incremental": True}
"""A configuration of the log that changes nothing."""


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


BELOW = ("uvicorn.access", "uvicorn.error", log_of_clients.name)
"""Loggers that pass records to their parents; servers of other tests may have changed that."""


@pytest.fixture
def lines(clock: Clock) -> Iterator[Callable[[], list[str]]]:
    """Collect what reaches the log through all filters."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handlers = {name: [handler] for name in ("uvicorn", "asyncio", "vllm_hotswap", "vllm")}
    handlers["vllm"].append(logging.NullHandler())
    loggers = {name: logging.getLogger(name) for name in (*handlers, *BELOW)}
    kept = {name: (each.handlers[:], each.propagate, each.level) for name, each in loggers.items()}
    for name, logger in loggers.items():
        logger.handlers[:], logger.propagate = handlers.get(name, []), name in BELOW
        logger.setLevel(logging.NOTSET if name in BELOW else "INFO")
    yield lambda: written.getvalue().splitlines()
    for name, logger in loggers.items():
        logger.handlers[:], logger.propagate, level = kept[name]
        logger.setLevel(level)


@pytest.fixture
def filtered(lines: object, clock: Clock) -> Iterator[Quiet]:
    found = Quiet(clock=clock)
    found.begin()
    yield found
    found.end()


Lines = Callable[[], list[str]]


# --- the filter -----------------------------------------------------------------------------


def test_one_line_of_a_kind_is_told_and_the_others_are_counted(
    lines: Lines, filtered: Quiet, clock: Clock
) -> None:
    """One line of a kind is logged, the next one counts those between, and then it starts over."""

    def tell(number: int) -> None:
        log_of_clients.warning("event=refused number=%d name=%r", number, "100%s")

    for number in range(5):
        tell(number)
    clock.now_s += QUIET_S
    tell(5)
    clock.now_s += QUIET_S
    tell(6)

    assert [
        "event=refused number=0 name='100%s'",
        "event=refused number=5 name='100%s' left_out=4",
        "event=refused number=6 name='100%s'",
    ] == lines()


def test_kinds_do_not_hide_each_other(lines: Lines, filtered: Quiet) -> None:
    """Different places, exceptions and declared kinds do not hide each other."""
    for _ in range(3):
        log_of_clients.warning("event=a")
        log_of_clients.warning("event=b")
        for kind in ("c", "d"):
            log_of_clients.warning("event=%s", kind, extra={"kind": kind})
        for error in (ValueError("x"), OSError("y")):
            log_of_clients.error("event=failed", exc_info=error)

    told = [line for line in lines() if line.startswith("event=")]
    assert ["a", "b", "c", "d", "failed", "failed"] == [line.partition("=")[2] for line in told]


def test_what_a_client_writes_makes_no_kind(lines: Lines, filtered: Quiet) -> None:
    """A client's text makes no kind of its own, and does not fill the memory."""
    for number in range(MANY):
        logging.getLogger("uvicorn.error").error(f"no such thing: {number}")  # noqa: G004

    assert 1 == len(lines())
    assert "<Quiet kinds=1>" == repr(filtered)


@pytest.mark.parametrize("name", ["vllm_hotswap", "uvicorn.access"])
def test_lines_that_no_client_causes_are_all_there(
    lines: Lines, filtered: Quiet, name: str
) -> None:
    """Lines that no client causes are all logged, and so is the access log, which is optional."""
    for _ in range(3):
        logging.getLogger(name).warning("once more")

    assert 3 == len(lines())


@pytest.mark.parametrize(
    "name",
    [
        "vllm.entrypoints.openai.serving",
        "vllm.sampling_params",
        "vllm.tool_parsers.hermes_tool_parser",
        "vllm.multimodal.media.audio",
        "vllm.a_module_of_a_later_version",
    ],
)
def test_what_vllm_warns_of_for_each_request_is_told_once(
    lines: Lines, filtered: Quiet, name: str
) -> None:
    """A warning of vLLM's for each request is logged once; its optional lines are all there."""
    logger = logging.getLogger(name)
    for number in range(3):
        logger.warning("bad request %d", number)
        logger.info("Received request %d", number)

    assert ["bad request 0", *(f"Received request {n}" for n in range(3))] == lines()


def test_what_a_library_warns_of_is_told_once(
    filtered: Quiet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A library's warning is logged once, also where Python writes it to the standard error."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for number in range(3):
        logging.getLogger("a_library.of_images").warning("bad image %d", number)

    assert "bad image 0\n" == capsys.readouterr().err


def test_errors_from_other_places_do_not_hide_each_other(lines: Lines, filtered: Quiet) -> None:
    """Errors from other places are logged: one that clients cause must not hide the next trace."""

    def of_clients() -> None:
        raise ValueError("what a client sent")

    def ours() -> None:
        raise ValueError("a mistake of the server's")

    for cause in (of_clients, of_clients, ours):
        try:
            cause()
        except ValueError:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application")

    told = [line for line in lines() if "ValueError: " in line]
    assert ["what a client sent", "a mistake of the server's"] == [
        line.partition(": ")[2] for line in told
    ]


def test_lines_of_code_that_a_client_writes_make_no_kinds(lines: Lines, filtered: Quiet) -> None:
    """A chat template's error is one kind, at whichever of its lines a client causes it."""
    for number in range(10):
        code = compile("\n" * number + "1 / 0", "<template>", "exec")
        try:
            exec(code)  # noqa: S102
        except ZeroDivisionError:
            logging.getLogger("uvicorn.error").exception("failed")

    assert "<Quiet kinds=1>" == repr(filtered)


@pytest.mark.parametrize("name", [log_of_clients.name, "vllm_hotswap", "vllm.v1.engine"])
def test_what_was_left_out_is_told_where_no_such_line_follows(
    lines: Lines, filtered: Quiet, clock: Clock, name: str
) -> None:
    """A count without a following line of its kind is logged once, with the next other line."""
    for _ in range(5):
        log_of_clients.warning("event=refused")
    clock.now_s += QUIET_S
    for number in range(2):
        logging.getLogger(name).warning("event=other number=%d", number, extra={"kind": number})

    counts = [line for line in lines() if "left_out" in line]
    assert len(counts) == 1
    assert re.fullmatch(r"event=lines_left_out place=test_quiet\.py:\d+ left_out=4", counts[0])


def test_what_was_left_out_is_told_at_the_end(lines: Lines, filtered: Quiet) -> None:
    """The counts left are logged at the end, once only."""
    for _ in range(5):
        log_of_clients.warning("event=refused")
    filtered.end()
    filtered.end()

    assert ["left_out=4"] == [line.rpartition(" ")[2] for line in lines() if "left_out" in line]


def test_an_exception_that_was_told_is_let_go(lines: Lines, filtered: Quiet) -> None:
    """A logged exception is released with its frames, which hold a request's prompt."""

    class Held(Exception):
        pass

    def tell() -> weakref.ref[Held]:
        error = Held()
        record = logging.LogRecord(
            "vllm.some", logging.WARNING, "some.py", 1, "failed", None, (Held, error, None)
        )
        logging.getLogger("vllm").handlers[0].handle(record)
        return weakref.ref(error)

    told = tell()
    gc.collect()

    assert told() is None
    assert lines()[0] == "failed"


@pytest.mark.parametrize(
    ("message", "args", "expected"),
    [
        ("100%", (), "100% left_out=1"),
        ("%(a)s", ({"a": "b"},), "b left_out=1"),
        (ValueError("100%"), (), "100% left_out=1"),
        ("%d", ("no number",), None),
        ("%s %s", ("one",), None),
    ],
)
@pytest.mark.parametrize("name", ["uvicorn.error", "vllm.sampling_params"])
def test_a_count_raises_into_nobody_who_logs(
    lines: Lines,
    filtered: Quiet,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    message: object,
    args: tuple[object, ...],
    expected: str | None,
) -> None:
    """Counting never raises into the code that logs; logging itself reports a malformed line."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    for seconds in (0, 0, QUIET_S):
        clock.now_s += seconds
        logging.getLogger(name).warning(message, *args)

    assert [expected] == (lines()[1:] or [None])


@pytest.mark.parametrize("has_access_log", [True, False])
def test_lines_about_websockets_belong_to_the_access_log(
    lines: Lines, has_access_log: bool
) -> None:
    """Lines about WebSockets are logged only with the access log, though uvicorn writes them."""
    filtered = Quiet(has_access_log)
    filtered.begin()
    for _ in range(3):
        logging.getLogger("uvicorn.error").info('%s - "WebSocket %s" 403', "1.2.3.4:5", "/a")
    filtered.end()

    assert 3 * has_access_log == len(lines())


# --- what clients can do --------------------------------------------------------------------

UPGRADE = "Connection: Upgrade", "Sec-WebSocket-Version: 13"
WEBSOCKET = (*UPGRADE, "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
H2C = "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"
ORIGIN = "Origin: http://other.example"
"""Fields of a request."""


def request(path: str, *fields: str, method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: evil.example", *fields, "", ""]
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (request("/v1/realtime", *WEBSOCKET, ORIGIN), 403),
        (request("/v1/nowhere", *WEBSOCKET), 404),
        (request("/v1/realtime", *WEBSOCKET), 401),
        (request("/v1/realtime", *UPGRADE, "Upgrade: websocket"), 400),
        (request("/v1/realtime", *WEBSOCKET, "Content-Length: 5"), 400),
        (request("/version", *H2C), 200),
        (request("/version", "Connection: Upgrade", "Upgrade: TLS/1.0"), 200),
        (request("/v1/models/switch", ORIGIN, "Content-Length: 0", method="POST"), 403),
        (request("/v1/models"), 401),
        (request("/nowhere"), 404),
        (request("/v1/models", method="DELETE"), 405),
        (request("/version", "X-Forwarded-For: 1.2.3.4"), 200),
        (request("/version", "X-Forwarded-For: nonsense"), 200),
        (request("/v1/completions", "Content-Length: 999999999999", method="POST"), 401),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET /" + b"x" * 20_000, 414),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ],
)
async def test_a_hundred_requests_without_a_key_make_a_few_lines(
    make_server: MakeServer, lines: Lines, sent: bytes, expected: int
) -> None:
    """A hundred requests refused for any reason make a few lines while the access log is off."""
    server = await make_server(access=Access(["a-key"], ["admin"]))
    given = {"uvicorn_log_level": "info"}
    async with listening_with(server, None, None, AS_IT_IS, **given) as at:
        before = len(lines())
        assert {expected} == {told.status for told in await answers_to(at.port, sent, 100)}
        assert len(lines()) - before <= 3, lines()


async def answers_to(port: int, sent: bytes, count: int) -> list[Told]:
    """Return the answers to so many requests, each on its own connection, ten at a time."""

    async def one() -> Told:
        client = await Raw.connect(port)
        await client.send(sent)
        told = await client.answer()
        await client.close()
        return told

    found = []
    for _ in range(count // 10):
        found += await asyncio.gather(*(one() for _ in range(10)))
    return found


async def test_a_hundred_connections_without_a_place_make_a_few_lines(
    server: Server, lines: Lines
) -> None:
    """A hundred connections without a place make a few lines; here another client has it."""
    limits = LimitsConfig(connections=1)
    async with listening_with(server, limits, None, AS_IT_IS, uvicorn_log_level="info") as at:
        with RawClient(at.port) as held:
            held.send(request("/admin/events"))
            await asyncio.to_thread(held.read)
            told = await answers_to(at.port, request("/version"), 100)

    assert {503} == {each.status for each in told}
    assert 1 == sum("event=connection_refused" in line for line in lines())


async def test_a_thousand_names_that_are_not_ours_make_a_few_lines(
    server: Server, lines: Lines
) -> None:
    """A thousand requests for foreign host names make a few lines: a web page can send many."""
    server.app._cross_site = CrossSite(checks_host=lambda: True)
    limits = LimitsConfig(refusals_per_second=MANY)
    async with listening_with(server, limits, None, AS_IT_IS) as at:
        told = await answers_to(at.port, request("/version"), MANY)

    assert {"host_refused"} == {each.code for each in told}

    assert 1 == sum("event=host_refused" in line for line in lines())


async def test_a_hundred_answers_that_fail_make_a_few_lines(
    server: Server, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred failed responses make a few lines, one per code, whichever client caused it."""

    async def fail(*_: object) -> None:
        raise EngineUnavailable("the model is gone")

    monkeypatch.setattr(server.app, "_answer", fail)
    async with listening_with(server, None, None, AS_IT_IS) as at:
        told = await answers_to(at.port, request("/version"), 100)

    assert {"engine_unavailable"} == {each.code for each in told}
    assert 1 == sum("event=request_failed code=engine_unavailable" in line for line in lines())


async def test_answers_that_are_cut_leave_one_stack_trace(lines: Lines) -> None:
    """Aborted responses leave one stack trace, although uvicorn logs each exception."""

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise OSError("the client does not read")

    async with listening_to(broken, None, AS_IT_IS) as at:
        told = await answers_to(at.port, request("/version"), 100)

    assert {500} == {each.status for each in told}
    assert 1 == sum("Exception in ASGI application" in line for line in lines())


async def test_asyncios_lines_are_bounded(lines: Lines, server: Server) -> None:
    """Lines of asyncio about unread exceptions of tasks and raising callbacks are limited."""
    async with listening_with(server, None, None, AS_IT_IS):
        loop = asyncio.get_running_loop()
        for number in range(MANY):
            loop.call_exception_handler({"message": f"failed {number}", "exception": OSError("x")})

    assert 1 == sum(line.startswith("failed ") for line in lines())
