"""Bounds the log lines that any client may cause, so that no client can fill a disk with them.

One line of a kind is written. Lines like it are left out for `QUIET_S`, and counted in the next
one, as `left_out=`. If none follows, a separate line has the count: with the next line of any kind
after that time, or at the end.

A kind is a place in the code, with the type of the logged exception and the place that raised it.
Our own code may give a name instead of the type. So clients cannot choose how many kinds there are.

Our own such lines have a logger of their own, `log_of_clients`. Those of other code are caught at
their loggers (uvicorn's, asyncio's and uvloop's, python-multipart's) or at handlers. Handlers get
every warning and error of vLLM in this process, and of libraries whose loggers are not configured;
in the engine host, vLLM is one of those. Lines below a warning there are logged on demand only.
Lines about requests belong to the access log, which is on demand, too.
"""

from __future__ import annotations

import logging
import os.path
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

QUIET_S = 10.0
"""Seconds between two lines of a kind."""

log_of_clients = logging.getLogger("vllm_hotswap.clients")
"""For lines that a client may cause with each request; `extra` may have the `kind`."""

LOGGERS = (log_of_clients.name, "uvicorn.error", "asyncio", "python_multipart.multipart")

VLLM = "vllm"

NOT_CLIENTS = ("vllm_hotswap", "uvicorn")
"""Loggers whose lines are not bounded at handlers: those that clients cause are at `LOGGERS`."""

ACCESS = '%s - "WebSocket %s"'
"""The start of uvicorn's lines about WebSockets, which do not go to its access log."""

DECIDED = "_is_decided"
"""The attribute of a decided record. JSON formatters leave out names that begin with `_`."""

Place = tuple[str, int] | None
Kind = tuple[str, int, object, Place]


@dataclass(slots=True)
class _Logged:
    """When a line of a kind was last written, and how many were left out since."""

    at_s: float
    left_out: int = 0


class Quiet(logging.Filter):
    """Leaves lines out.

    The mutable state is `_logged`, the last line of each kind, and `_checked_s`, when the counts
    that no line has reported were last looked at.
    """

    def __init__(
        self, has_access_log: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._has_access_log = has_access_log
        self._clock = clock
        self._logged: dict[Kind, _Logged] = {}
        self._checked_s = clock()
        self._handler_filter = _HandlerFilter(self)

    def __repr__(self) -> str:
        return f"<Quiet kinds={len(self._logged)}>"

    def begin(self) -> None:
        """Leave lines out from now on, in this process."""
        for name in LOGGERS:
            logging.getLogger(name).addFilter(self)
        for handler in _handlers():
            handler.addFilter(self._handler_filter)

    def end(self) -> None:
        """Log counts that no line has reported, and leave nothing out from now on. Idempotent."""
        self._log_counts(0.0)
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(self)
        for handler in _handlers():
            handler.removeFilter(self._handler_filter)

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.msg, str) and record.msg.startswith(ACCESS):
            return self._has_access_log
        return record.levelno < logging.INFO or self.may_log(record)

    def may_log(self, record: logging.LogRecord) -> bool:
        """Whether a line is the first of its kind for some time; then it may get a count.

        A record is decided on once: it may pass the filter of its logger and of each handler.
        """
        decided: bool | None = getattr(record, DECIDED, None)
        if decided is None:
            decided = self._decide(record)
            setattr(record, DECIDED, decided)
            self.log_due_counts()
        return decided

    def log_due_counts(self) -> None:
        """Log the counts of kinds that have had no line for some time."""
        if self._clock() - self._checked_s >= QUIET_S:
            self._log_counts(QUIET_S)

    def _decide(self, record: logging.LogRecord) -> bool:
        kind, now_s = _kind_of(record), self._clock()
        logged = self._logged.get(kind)
        if logged is not None and now_s - logged.at_s < QUIET_S:
            logged.left_out += 1
            return False
        self._logged[kind] = _Logged(now_s)
        if logged is not None and logged.left_out:
            _add(record, logged.left_out)
        return True

    def _log_counts(self, after_s: float) -> None:
        self._checked_s = now_s = self._clock()
        for (path, line, *_), logged in list(self._logged.items()):
            if logged.left_out and now_s - logged.at_s >= after_s:
                left_out, logged.left_out = logged.left_out, 0
                log_of_clients.warning(
                    "event=lines_left_out place=%s:%d left_out=%d",
                    os.path.basename(path),  # noqa: PTH119
                    line,
                    left_out,
                    extra={DECIDED: True},
                )


class _HandlerFilter(logging.Filter):
    """The filter for handlers: loggers of vLLM and libraries are many, and made at any time."""

    def __init__(self, quiet: Quiet) -> None:
        super().__init__()
        self._quiet = quiet

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or record.name.partition(".")[0] in NOT_CLIENTS:
            self._quiet.log_due_counts()
            return True
        return self._quiet.may_log(record)


def _handlers() -> list[logging.Handler]:
    """Return vLLM's handlers, and the one of loggers that have none."""
    last = [logging.lastResort] if logging.lastResort is not None else []
    return [*logging.getLogger(VLLM).handlers, *last]


def _kind_of(record: logging.LogRecord) -> Kind:
    error, _, trace = record.exc_info or (None, None, None)
    named = getattr(record, "kind", None) if record.name == log_of_clients.name else None
    return record.pathname, record.lineno, named or error, _raised_at(trace)


def _raised_at(trace: TracebackType | None) -> Place:
    """Return file and line of the innermost frame that is in a file.

    Code made from text, such as a chat template's, has as many lines as a client likes.
    """
    found = None
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith("<"):
            found = name, trace.tb_lineno
        trace = trace.tb_next
    return found


def _add(record: logging.LogRecord, left_out: int) -> None:
    """Append a count. The message is not formatted here: an error would hit the code that logs."""
    if isinstance(record.msg, str):
        record.msg += f" left_out={left_out}"
    elif not record.args:
        record.msg, record.args = "%s left_out=%d", (record.msg, left_out)
