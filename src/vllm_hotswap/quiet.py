"""Lines of the log that any client may cause: so few that nobody can fill a disk with them.

One line of a kind is written. What is like it is left out for `QUIET_S`, and counted in the next
one, as `left_out=`. Where none follows, a line of its own has the count: with the next line of any
kind after that time, or at the end. A kind is a place in the code, with the type of the exception
that is told and the place that raised it, or with what our own code calls it: how many there are is
no client's to say. Our own such lines have a logger of their own, `log_of_clients`. Those of others
are caught at their loggers (uvicorn's, asyncio's and uvloop's, python-multipart's) or at handlers:
every warning and error of vLLM's in this process, and of libraries whose loggers nobody has set
up, of which vLLM is one in the engine host. What is no warning there is told on demand. Lines about
requests are the access log's, which is there on demand, too.
"""

from __future__ import annotations

import logging
import os.path
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

QUIET_S = 10.0
"""Between two lines of a kind."""

log_of_clients = logging.getLogger("vllm_hotswap.clients")
"""For lines of which a client may cause one with each request; `extra` may have the `kind`."""

LOGGERS = (log_of_clients.name, "uvicorn.error", "asyncio", "python_multipart.multipart")

VLLM = "vllm"

NOT_CLIENTS = ("vllm_hotswap", "uvicorn")
"""Whose lines are not bounded at handlers: what clients cause of them is at `LOGGERS`."""

ACCESS = '%s - "WebSocket %s"'
"""How uvicorn's lines about websockets begin: they do not go to its access log."""

DECIDED = "_is_told"
"""Of a record that has been decided on. JSON formatters leave out what begins like that."""

Place = tuple[str, int] | None
Kind = tuple[str, int, object, Place]


@dataclass(slots=True)
class _Told:
    """When a line of a kind was written last, and how many were left out since."""

    at_s: float
    left_out: int = 0


class Quiet(logging.Filter):
    """Leaves lines out. Its mutable state is what has been told of each kind, and when counts were
    looked at that no line has told."""

    def __init__(
        self, has_access_log: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._has_access_log = has_access_log
        self._clock = clock
        self._told: dict[Kind, _Told] = {}
        self._looked_s = clock()
        self._of_others = _OfOthers(self)

    def __repr__(self) -> str:
        return f"<Quiet kinds={len(self._told)}>"

    def begin(self) -> None:
        """From now on, in this process."""
        for name in LOGGERS:
            logging.getLogger(name).addFilter(self)
        for handler in _handlers():
            handler.addFilter(self._of_others)

    def end(self) -> None:
        """Tell what no line has told yet, and leave nothing out from now on. Idempotent."""
        self._tell_counts(0.0)
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(self)
        for handler in _handlers():
            handler.removeFilter(self._of_others)

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.msg, str) and record.msg.startswith(ACCESS):
            return self._has_access_log
        return record.levelno < logging.INFO or self.may_tell(record)

    def may_tell(self, record: logging.LogRecord) -> bool:
        """Whether a line is the first of its kind for some time; it may have its count then.

        A record is decided on once: it may come by at its logger, and for each handler.
        """
        decided: bool | None = getattr(record, DECIDED, None)
        if decided is None:
            decided = self._decide(record)
            setattr(record, DECIDED, decided)
            self.look()
        return decided

    def look(self) -> None:
        """Tell the counts of kinds of which no line has come for some time."""
        if self._clock() - self._looked_s >= QUIET_S:
            self._tell_counts(QUIET_S)

    def _decide(self, record: logging.LogRecord) -> bool:
        kind, now_s = _kind_of(record), self._clock()
        told = self._told.get(kind)
        if told is not None and now_s - told.at_s < QUIET_S:
            told.left_out += 1
            return False
        self._told[kind] = _Told(now_s)
        if told is not None and told.left_out:
            _add(record, told.left_out)
        return True

    def _tell_counts(self, after_s: float) -> None:
        self._looked_s = now_s = self._clock()
        for (path, line, *_), told in list(self._told.items()):
            if told.left_out and now_s - told.at_s >= after_s:
                left_out, told.left_out = told.left_out, 0
                log_of_clients.warning(
                    "event=lines_left_out place=%s:%d left_out=%d",
                    os.path.basename(path),  # noqa: PTH119
                    line,
                    left_out,
                    extra={DECIDED: True},
                )


class _OfOthers(logging.Filter):
    """The same for handlers: loggers of vLLM and of libraries are many, and made at any time."""

    def __init__(self, quiet: Quiet) -> None:
        super().__init__()
        self._quiet = quiet

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or record.name.partition(".")[0] in NOT_CLIENTS:
            self._quiet.look()
            return True
        return self._quiet.may_tell(record)


def _handlers() -> list[logging.Handler]:
    """vLLM's, and that of loggers that have none."""
    last = [logging.lastResort] if logging.lastResort is not None else []
    return [*logging.getLogger(VLLM).handlers, *last]


def _kind_of(record: logging.LogRecord) -> Kind:
    error, _, trace = record.exc_info or (None, None, None)
    named = getattr(record, "kind", None) if record.name == log_of_clients.name else None
    return record.pathname, record.lineno, named or error, _raised_at(trace)


def _raised_at(trace: TracebackType | None) -> Place:
    """File and line of the innermost frame that is in a file.

    Code that is made from text, such as a chat template's, has as many lines as a client likes.
    """
    found = None
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith("<"):
            found = name, trace.tb_lineno
        trace = trace.tb_next
    return found


def _add(record: logging.LogRecord, left_out: int) -> None:
    """Append a count. Nothing is put together here, where an error would be whoever logs's."""
    if isinstance(record.msg, str):
        record.msg += f" left_out={left_out}"
    elif not record.args:
        record.msg, record.args = "%s left_out=%d", (record.msg, left_out)
