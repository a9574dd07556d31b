"""Every call that changes state leaves an audit line that names the caller; no other call does."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from tests.conftest import MakeServer
from tests.helpers.adapters import write_adapter_for
from tests.helpers.support import Server
from vllm_hotswap.access.roles import Access, Role
from vllm_hotswap.api import audit as module
from vllm_hotswap.api.audit import Audited, AuditLine, AuditLog
from vllm_hotswap.api.feed import event_fields
from vllm_hotswap.api.vllm_routes import Route, RouteTable
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.events import JobLeaseChanged, SwitchEnded
from vllm_hotswap.telemetry.progress import EventLog

SWITCH = "/v1/models/switch"
ADMIN = {"authorization": "Bearer admin"}
USER = {"authorization": "Bearer user"}


@pytest.fixture
def audit(tmp_path: Path) -> Iterator[AuditLog]:
    log = AuditLog(tmp_path / "audit.jsonl")
    yield log
    log.close()


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Return an adapter that may be added."""
    return write_adapter_for(tmp_path / "adapters" / "a", {"model.layers.0.q_proj": (8, 8)})


class Audit:
    """A server with an audit log."""

    def __init__(self, server: Server, log: AuditLog, path: Path) -> None:
        self._log = log
        self._path = path
        app = Audited(server.app, server.app.routes, server.app.access, log)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, client=("10.0.0.7", 1)), base_url="http://test"
        )

    async def call(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        return await self.client.request(method, path, **{"headers": ADMIN, **kwargs})

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines that are in the file at the end."""
        self._log.close()
        return [json.loads(line) for line in self._path.read_text().splitlines()]


@pytest.fixture
async def audited(make_server: MakeServer, audit: AuditLog, tmp_path: Path) -> AsyncIterator[Audit]:
    keys = tmp_path / "admins"
    keys.write_text("admin  # ann's laptop\n")
    keys.chmod(0o600)
    access = Access(["user"], admin_key_files=[keys])
    server = await make_server(access=access, adapter_folders=[tmp_path / "adapters"])
    found = Audit(server, audit, tmp_path / "audit.jsonl")
    yield found
    await found.client.aclose()


async def test_a_line_says_what_was_done_by_whom(audited: Audit) -> None:
    """It has time, call, model, role, key fingerprint and name, address, status, duration, body."""
    key = Access(admin_keys=["admin"]).caller(as_headers(ADMIN)).key

    await audited.call("POST", SWITCH, json={"model": "qwen", "drain_timeout": 1})

    (line,) = audited.lines()
    assert line.pop("time").endswith("+00:00")
    assert 0 <= line.pop("seconds") < 60
    assert {
        "method": "POST",
        "path": SWITCH,
        "model": "qwen",
        "asked": None,
        "role": "admin",
        "group": None,
        "key": key,
        "name": "ann's laptop",
        "client": "10.0.0.7",
        "status": 200,
        "request": {"model": "qwen", "drain_timeout": 1},
    } == line
    assert "admin" not in key


def as_headers(headers: dict[str, str]) -> Headers:
    return Headers(headers)


async def test_every_changing_route_leaves_a_line(audited: Audit) -> None:
    """Moves, leases, announcements and adapters leave a line, with the model if it is named."""
    lease = await audited.call(
        "POST", "/admin/leases", json={"model": "qwen", "owner": "a", "ttl": 9}
    )
    lease_path = f"/admin/leases/{lease.json()['id']}"
    calls = [
        ("POST", lease_path, {"ttl": 8}),
        ("DELETE", lease_path, None),
        ("POST", "/admin/next", {"model": "llama"}),
        ("POST", "/admin/models/llama/sleep", {"level": 1}),
        ("POST", "/admin/models/llama/wake", None),
        ("POST", "/admin/models/llama/pin", {"pinned": True}),
        ("POST", "/admin/models/llama/prefetch", {"cancel": True}),
        ("POST", "/admin/models/llama/unload", None),
        ("POST", "/admin/models/llama/adapters", {"name": "a", "path": "b"}),
        ("DELETE", "/admin/models/llama/adapters/a", None),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "b", "model": "llama"}),
    ]
    for method, path, body in calls:
        await audited.call(method, path, **({} if body is None else {"json": body}))

    lines = audited.lines()

    assert [("POST", "/admin/leases"), *((m, p) for m, p, _ in calls)] == [
        (line["method"], line["path"]) for line in lines
    ]
    assert ["qwen"] * 3 + ["llama"] * 9 == [line["asked"] or line["model"] for line in lines]
    assert {line["status"] < 400 for line in lines if line["model"]} == {True}
    assert {line["status"] < 400 for line in lines if line["asked"]} == {False}
    assert {200, 400, 404, 409} >= {line["status"] for line in lines}
    assert 1 == len({line["key"] for line in lines})


async def test_what_changes_nothing_leaves_no_line(audited: Audit) -> None:
    """Reading, inference, pings and unknown routes leave no line."""
    for method, path in [
        ("GET", "/admin/status"),
        ("GET", "/v1/models"),
        ("POST", "/ping"),
        ("POST", "/nowhere"),
    ]:
        await audited.call(method, path)
    await audited.call("POST", "/v1/chat/completions", json={"model": "llama", "messages": []})

    assert [] == audited.lines()


async def test_who_may_not_is_told_if_he_is_known(audited: Audit) -> None:
    """A user's attempt is logged; callers without a key cannot fill the disk."""
    for headers in (USER, {}, {"authorization": "Bearer guess"}):
        response = await audited.call("POST", SWITCH, headers=headers, json={"model": "qwen"})
        assert response.status_code in (401, 403)

    (line,) = audited.lines()
    assert ("user", 403) == (line["role"], line["status"])


@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_call_that_is_refused_says_what_was_asked(audited: Audit, is_whole: bool) -> None:
    """The line has the refused body, though no route reads it; a late body is not waited for."""
    kept = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b'{"model": '
        if not is_whole:
            await kept.wait()
        yield b'"qwen"}'

    headers = {**USER, "content-length": "17"}
    response = await audited.call("POST", SWITCH, headers=headers, content=body())
    kept.set()

    assert 403 == response.status_code
    (line,) = audited.lines()
    expected = ("qwen", {"model": "qwen"}) if is_whole else (None, None)
    assert expected == (line["asked"], line["request"])


async def test_failed_calls_leave_their_status(audited: Audit) -> None:
    """A wrong alias or a wrong body leaves a line with its status."""
    await audited.call("POST", SWITCH, json={"model": "nobody"})
    await audited.call("POST", SWITCH, content=b"{")

    lines = audited.lines()

    assert [(404, "nobody"), (400, None)] == [(one["status"], one["asked"]) for one in lines]
    assert [None, None] == [one["model"] for one in lines]


async def test_the_model_is_what_the_answer_says(audited: Audit, lora: Path) -> None:
    """The model is the answer's; the caller's text is a separate field, and truncated."""
    lease = await audited.call(
        "POST", "/admin/leases", json={"model": "qwen", "owner": "a", "ttl": 9}
    )
    path = f"/admin/leases/{lease.json()['id']}"
    await audited.call("DELETE", path, content=b'{"model": "llama"}')
    await audited.call("POST", "/admin/models/llama/pin", json={"pinned": True})
    await audited.call("POST", SWITCH, json={"model": "x" * 3000})
    adapter = {"lora_name": "a", "lora_path": str(lora), "base_model_name": "mistral"}
    await audited.call("POST", "/v1/load_lora_adapter", json=adapter)
    await audited.call("POST", "/v1/unload_lora_adapter", json={"lora_name": "a"})

    found = [(line["model"], line["asked"]) for line in audited.lines()]

    assert [
        ("qwen", None),
        ("qwen", "llama"),
        ("llama", None),
        (None, "x" * 500),
        ("mistral", None),
        ("mistral", None),
    ] == found


async def test_a_long_answer_still_names_its_model(audit: AuditLog, tmp_path: Path) -> None:
    """A long answer, of a switch that moved many models, still names its model."""
    body = {"previous_model": "a", "current_model": "b", "evicted": ["x" * 100] * 200}
    table = RouteTable([Route("POST", "/a", Role.ADMIN)])
    app = Audited(JSONResponse(body), table, Access(), audit)
    scope = {"type": "http", "method": "POST", "path": "/a", "headers": []}

    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"model": "c"}'}

    async def send(_: Any) -> None:
        pass

    await app(scope, receive, send)
    audit.close()

    line = json.loads((tmp_path / "audit.jsonl").read_text())
    assert "b" == line["model"]


async def test_nothing_that_is_sent_forges_a_line(audited: Audit) -> None:
    """Line ends in paths, bodies and names stay inside strings; a line is always JSON."""
    forged = '\n{"method": "POST", "path": "/forged"}\n\r\u2028'
    path = "/admin/models/a%0A%7B%22path%22%3A%20%22forged%22%7D%0D/sleep"
    await audited.call("POST", path)
    await audited.call("POST", SWITCH, json={"model": forged})
    await audited.call("POST", SWITCH, json={"model": "x" * 100_000})
    await audited.call("POST", SWITCH, content=b'{"model": "qwen", "drain_timeout": NaN}')
    await audited.call("POST", SWITCH, content=b'{"model": "qwen", "drain_timeout": 1e999}')
    await audited.call("POST", SWITCH, content=b'{"model": "\\ud800"}')
    await audited.call("POST", SWITCH, content=b"[" * 4000)

    lines = audited.lines()

    assert 7 == len(lines)
    assert forged == lines[1]["asked"]
    assert [None] * 3 == [lines[n]["request"] for n in (2, 3, 4)]
    assert all(line["path"] in (SWITCH, lines[0]["path"]) for line in lines)


async def test_switch_and_lease_name_the_callers_key(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Log and lease have the key's name, for admins only; users and events do not get it."""
    access = Access(["user"], ["admin"])
    server = await make_server(access=access)
    key = access.caller(as_headers(ADMIN)).key
    body = {"model": "qwen", "owner": "ann", "ttl": 9}

    taken = await server.post("/admin/leases", headers=ADMIN, json=body)

    assert key == taken.json()["key"]
    listed = [await server.get("/admin/leases", headers=headers) for headers in (ADMIN, USER)]
    assert [key, None] == [answer.json()["leases"][0].get("key") for answer in listed]
    status = await server.get("/admin/status", headers=ADMIN)
    assert key not in status.text
    (ended,) = server.events.of(SwitchEnded)
    (changed,) = server.events.of(JobLeaseChanged)
    assert key == ended.key == changed.key
    assert "key" not in event_fields(ended)
    with caplog.at_level("INFO"):
        for event in (ended, changed):
            EventLog().notify(event)
    assert 2 == sum(f" key={key}" in message for message in caplog.messages)


# --- the file ---------------------------------------------------------------------------------


def line(path: str = "/a") -> AuditLine:
    unknown = None
    return AuditLine(
        "now", "POST", path, None, unknown, "admin", None, "0" * 12, None, None, 200, 0.1
    )


def paths(file: Path) -> list[str]:
    return [json.loads(text)["path"] for text in file.read_text().splitlines()]


def test_file_is_its_owners_alone_and_only_grows(tmp_path: Path) -> None:
    """Only the owner may read the file, and lines of an earlier server stay."""
    file = tmp_path / "audit"
    for path in ("/a", "/b"):
        log = AuditLog(file)
        log.write(line(path))
        log.close()

    assert 0o600 == stat.S_IMODE(file.stat().st_mode)
    assert ["/a", "/b"] == paths(file)


def test_a_file_that_was_moved_away_is_made_anew_when_told_so(tmp_path: Path) -> None:
    """On request the file is reopened, as logrotate needs; old lines stay in the moved file."""
    file, old = tmp_path / "audit", tmp_path / "audit.1"
    log = AuditLog(file)
    log.write(line("/a"))

    file.rename(old)
    log.write(line("/b"))
    log.reopen()
    log.write(line("/c"))
    log.close()

    assert ["/a", "/b"] == paths(old)
    assert ["/c"] == paths(file)


def test_a_file_that_cannot_be_opened_anew_leaves_the_one_from_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that cannot be reopened leaves the earlier one in use, with one line in the log."""
    file, old = tmp_path / "audit", tmp_path / "audit.1"
    log = AuditLog(file)
    file.rename(old)
    file.mkdir()

    log.reopen()
    log.write(line("/b"))
    log.close()

    assert ["/b"] == paths(old)
    (message,) = caplog.messages
    assert "event=audit_log_not_reopened" in message


def test_a_line_that_cannot_be_written_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A full disk raises nothing, and later lines are tried again."""
    log = AuditLog.__new__(AuditLog)
    log._path, log._lines, log._pending = Path("/dev/full"), queue.SimpleQueue(), 0
    log._lock = module.threading.Lock()
    log._descriptor = os.open("/dev/full", os.O_WRONLY)
    log.write(line())
    log.write(line())
    log._lines.put("stop")

    log._write_all()

    assert 2 == len(caplog.messages)
    assert "event=audit_line_lost path='/dev/full' cause='No space left on device'" in caplog.text
    assert 0 == log._pending


def test_lines_that_the_disk_does_not_take_are_bounded(
    audit: AuditLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A call does not wait for the disk, and memory does not grow without limit."""
    is_free = module.threading.Event()
    monkeypatch.setattr(module, "MAX_PENDING", 2)
    monkeypatch.setattr(module, "_write", lambda *_: is_free.wait(30))

    for _ in range(4):
        audit.write(line())
    is_free.set()

    assert 2 == caplog.text.count("the disk is too slow")


def link(path: Path) -> None:
    (path.parent / "target").touch()
    path.symlink_to("target")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (link, "cannot be written: Too many levels of symbolic links"),
        (Path.mkdir, "cannot be written: Is a directory"),
        (os.mkfifo, "cannot be written: No such device"),
        (lambda path: (path.touch(), path.chmod(0o666)), "run: chmod o-w"),
        (lambda path: path.parent.chmod(0o777), "every user of the machine may write to"),
    ],
)
def test_a_file_that_is_none_or_is_not_ours_ends_a_start(
    tmp_path: Path, make: Any, expected: str
) -> None:
    """A link, or another user's file, ends the start: root would write wherever it points."""
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder / "audit")

    with pytest.raises(ConfigError, match=f"^audit log .*{expected}"):
        AuditLog(folder / "audit")


async def test_a_client_that_leaves_is_told_without_a_status(
    audit: AuditLog, tmp_path: Path
) -> None:
    """A call whose client leaves is logged without a status: it may have had its effect."""
    routes = Access()  # no key is needed
    started = asyncio.Event()

    async def app(*_: Any) -> None:
        started.set()
        await asyncio.Event().wait()

    table = RouteTable([Route("POST", "/a", Role.ADMIN)])
    scope = {"type": "http", "method": "POST", "path": "/a", "headers": []}
    task = asyncio.create_task(Audited(app, table, routes, audit)(scope, None, None))  # type: ignore[arg-type]
    await started.wait()
    task.cancel()
    await asyncio.wait([task])

    audit.close()

    (text,) = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert ("/a", None) == (json.loads(text)["path"], json.loads(text)["status"])
