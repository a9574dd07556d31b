"""`serve --audit-log FILE`: one JSON line for each call that changes what the server does.

Lines are only ever appended. A separate thread writes them, so that a slow disk does not delay
requests. If a line cannot be written, the log says so, and the call is not affected. SIGHUP reopens
the file, so that it can be moved away.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import queue
import stat
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_hotswap.access import Access, Caller, Role
from vllm_hotswap.api.cross_site import SAFE_METHODS
from vllm_hotswap.api.vllm_routes import RouteTable
from vllm_hotswap.errors import ConfigError, HotswapError
from vllm_hotswap.models import MODEL_HEADER, request_of
from vllm_hotswap.system import log_of_clients, refuse_foreign

log = logging.getLogger("vllm_hotswap")

MAX_PENDING = 10_000
"""Most lines that wait for the disk; additional ones are lost."""

MAX_PATH = 500
"""Characters of a path, and of a model's name, that are kept."""

MAX_BODY = 4096
"""Bytes of a request's body; a longer one is left out of its line."""

MAX_ANSWER = 64 << 10
"""Bytes of an answer; none that names a model is longer, even if some hundred models moved."""

ASKED = ("model", "base_model_name")
ANSWERED = ("current_model", "model")
"""Fields of bodies that name a model; the first one found counts."""

LATE_BODY_S = 0.2
"""How long to wait for the body of a call that is refused before its body was read."""

CLOSE_S = 5.0
"""How long a stopping server waits for the last lines."""


@dataclass(frozen=True, slots=True)
class AuditLine:
    """One call."""

    time: str
    """When it was answered: ISO 8601, UTC."""
    method: str
    path: str
    model: str | None
    """The alias that it was for, by the answer; after a switch, the active one."""
    asked: str | None
    """The alias that the caller wrote into the path or the body, if that is not `model`."""
    role: str
    """`admin`, `user`, or `anybody` without a key."""
    group: str | None
    """The group of the key, if it has one."""
    key: str | None
    """The fingerprint of the caller's key."""
    name: str | None
    """The name of the key in its file."""
    client: str | None
    """The address that the call came from."""
    status: int | None
    """None: the client left, or the server stopped, before there was one."""
    seconds: float
    request: Any = None
    """The body, if it is short and valid JSON."""


FIELDS = [field.name for field in fields(AuditLine)]


class AuditLog:
    """The audit log's file.

    The mutable state is the queue of lines, how many are in it (`_pending`, under the lock), and
    the open file, which belongs to the thread.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or create it.

        Raises:
            ConfigError: it cannot be written, or another user could change it.
        """
        self._path = path
        try:
            self._descriptor = _open(path)
        except OSError as error:
            reason = error.strerror
            raise ConfigError(f"{_what(path)} cannot be written: {reason}") from None
        self._lines: queue.SimpleQueue[str | Literal["reopen", "stop"]] = queue.SimpleQueue()
        self._pending = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._write_all, name="audit-log", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<AuditLog path={str(self._path)!r} pending={self._pending}>"

    def write(self, line: AuditLine) -> None:
        """Queue a line for writing. Never raises and never waits."""
        with self._lock:
            is_full = self._pending >= MAX_PENDING
            self._pending += not is_full
        if is_full:
            self._log_lost_line("the disk is too slow")
        else:
            values = {name: getattr(line, name) for name in FIELDS}
            self._lines.put(json.dumps(values, allow_nan=False) + "\n")

    def reopen(self) -> None:
        """Reopen the path, and write the lines that follow there."""
        self._lines.put("reopen")

    def close(self) -> None:
        """Write the remaining lines, for `CLOSE_S` at most."""
        self._lines.put("stop")
        self._thread.join(CLOSE_S)

    def _write_all(self) -> None:
        while (line := self._lines.get()) != "stop":
            if line == "reopen":
                self._reopen()
                continue
            try:
                _write(self._descriptor, line.encode())
            except OSError as error:
                self._log_lost_line(error.strerror)
            with self._lock:
                self._pending -= 1
        os.close(self._descriptor)

    def _reopen(self) -> None:
        try:
            descriptor = _open(self._path)
        except (OSError, ConfigError) as error:
            cause = str(getattr(error, "strerror", None) or error)
            log.error(
                "event=audit_log_not_reopened path=%r cause=%r then='still writing to the "
                "previous file'",
                str(self._path),
                cause,
            )
            return
        os.close(self._descriptor)
        self._descriptor = descriptor
        log.info("event=audit_log_reopened path=%r", str(self._path))

    def _log_lost_line(self, cause: str | None) -> None:
        log_of_clients.error(
            "event=audit_line_lost path=%r cause=%r then='the request was not affected'",
            str(self._path),
            cause,
        )


class Audited:
    """An application whose calls that change state are recorded.

    Those are all calls that require an admin and change something: our own routes, and vLLM's that
    an admin may use. A refused call is recorded only if its key is known: otherwise, strangers
    could fill the disk.
    """

    def __init__(self, app: ASGIApp, routes: RouteTable, access: Access, audit: AuditLog) -> None:
        self._app = app
        self._routes = routes
        self._access = access
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (parameters := self._changing(scope)) is None:
            await self._app(scope, receive, send)
            return
        call = _Call(scope, parameters.get("alias"), self._access.caller(Headers(scope=scope)))
        try:
            await self._app(scope, call.receiving(receive), call.sending(send, receive))
        finally:
            if call.is_recorded:
                self._audit.write(call.line())

    def _changing(self, scope: Scope) -> dict[str, str] | None:
        """Return the path parameters of a call that changes state; None for any other call."""
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS:
            return None
        try:
            route, parameters = self._routes.find(*request_of(scope))
        except HotswapError:
            return None
        is_admins = route.role in (Role.ADMIN, Role.ADMIN_KEY)
        return dict(parameters) if is_admins else None


class _Call:
    """What is recorded of one call: the start of its body and of its answer, and the status."""

    def __init__(self, scope: Scope, alias: str | None, caller: Caller) -> None:
        self._scope = scope
        self._alias = alias
        self._caller = caller
        self._began_s = time.monotonic()
        self._request, self._answer = bytearray(), bytearray()
        self._is_body_read = False
        self._status: int | None = None
        self._answered_by: str | None = None

    def receiving(self, receive: Receive) -> Receive:
        async def seen() -> Message:
            message = await receive()
            self._is_body_read = True
            _keep(self._request, message.get("body", b""), MAX_BODY)
            return message

        return seen

    def sending(self, send: Send, receive: Receive) -> Send:
        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                if self._status >= 400 and not self._is_body_read and self._has_small_body:
                    await self._read_body(receive)
                named = Headers(raw=message.get("headers", [])).get(MODEL_HEADER)
                self._answered_by = named and unquote(named)
            _keep(self._answer, message.get("body", b""), MAX_ANSWER)
            await send(message)

        return seen

    @property
    def _has_small_body(self) -> bool:
        """Whether a known caller sends a small body without waiting for `100 Continue`."""
        headers = Headers(scope=self._scope)
        size = headers.get("content-length", "")
        is_small = size.isdecimal() and len(size) < 10 and 0 < int(size) <= MAX_BODY
        return bool(self._caller.key) and is_small and "expect" not in headers

    async def _read_body(self, receive: Receive) -> None:
        """Read the body of a call that was refused unread: it says what the caller wanted."""
        read = self.receiving(receive)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LATE_BODY_S):
                while (await read()).get("more_body", False):
                    pass

    @property
    def is_recorded(self) -> bool:
        return bool(self._caller.key) or self._status not in (401, 403)

    def line(self) -> AuditLine:
        request, caller = _json(self._request, MAX_BODY), self._caller
        method, path = request_of(self._scope)
        model, asked = self._model(), _cut(self._alias or _text(request, ASKED))
        client = self._scope.get("client")
        return AuditLine(
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            method=method,
            path=path[:MAX_PATH],
            model=model,
            asked=None if asked == model else asked,
            role=caller.role,
            group=caller.group or None,
            key=caller.key or None,
            name=caller.name or None,
            client=client[0] if client else None,
            status=self._status,
            seconds=round(time.monotonic() - self._began_s, 3),
            request=request,
        )

    def _model(self) -> str | None:
        """Return the model that the server's answer names; never text that the caller wrote."""
        if self._answered_by is None and (self._status or 500) < 400:
            return _cut(_text(_json(self._answer, MAX_ANSWER), ANSWERED))
        return _cut(self._answered_by)


def _keep(kept: bytearray, more: bytes, most: int) -> None:
    """Keep up to `most` bytes, and one more as a sign that there are too many."""
    kept += more[: most + 1 - len(kept)]


def _json(body: bytearray, most: int) -> Any:
    if len(body) > most:
        return None
    try:
        value = json.loads(body or b"null")
        json.dumps(value, allow_nan=False)  # Python accepts more than JSON has
    except (ValueError, RecursionError):
        return None
    return value


def _text(body: Any, names: Iterable[str]) -> str | None:
    """Return the first text under one of these names."""
    fields = body if isinstance(body, dict) else {}
    values = (fields.get(name) for name in names)
    return next((value for value in values if isinstance(value, str)), None)


def _cut(name: str | None) -> str | None:
    return name and name[:MAX_PATH]


def _open(path: Path) -> int:
    """Open the file to append. Raises `OSError`, or `ConfigError` if it is not safe."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(f"{_what(path)} is not a regular file")
        refuse_foreign(descriptor, path, _what(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _write(descriptor: int, line: bytes) -> None:
    while line:
        line = line[os.write(descriptor, line) :]


def _what(path: Path) -> str:
    return f"audit log {str(path)!r}"
