"""Lines of the log that any client may cause: so few that nobody can fill a disk with them.

One line of a kind is written. What is like it is left out for `QUIET_S`, and counted in the next
one, as `left_out=`. A kind is a place in the code, with the type of the exception that is told, or
with what the place calls it: how many there are is no client's to say. Our own such lines have a
logger of their own, `log_of_clients`. Those of others are caught at their loggers: uvicorn's,
asyncio's and uvloop's, python-multipart's, and what vLLM's API server warns of. Lines about
requests are the access log's, which is there on demand.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

QUIET_S = 10.0
"""Between two lines of a kind."""

log_of_clients = logging.getLogger("vllm_hotswap.clients")
"""For lines of which a client may cause one with each request; `extra` may have the `kind`."""

LOGGERS = (log_of_clients.name, "uvicorn.error", "asyncio", "python_multipart.multipart")

VLLM = "vllm"
OF_REQUESTS = ("vllm.entrypoints.", "vllm.renderers.", "vllm.v1.engine.")
"""Where vLLM's loggers are that tell of requests. What is no warning there is told on demand."""

ACCESS = '%s - "WebSocket %s"'
"""How uvicorn's lines about websockets begin: they do not go to its access log."""

Kind = tuple[str, int, object]


@dataclass(slots=True)
class _Told:
    """When a line of a kind was written last, and how many were left out since."""

    at_s: float
    left_out: int = 0


class Quiet(logging.Filter):
    """Leaves lines out. Its mutable state is what has been told of each kind."""

    def __init__(
        self, has_access_log: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._has_access_log = has_access_log
        self._clock = clock
        self._told: dict[Kind, _Told] = {}
        self._of_vllm = _OfVllm(self)

    def __repr__(self) -> str:
        return f"<Quiet kinds={len(self._told)}>"

    def begin(self) -> None:
        """From now on, in this process."""
        for name in LOGGERS:
            logging.getLogger(name).addFilter(self)
        for handler in logging.getLogger(VLLM).handlers:
            handler.addFilter(self._of_vllm)

    def end(self) -> None:
        """Idempotent."""
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(self)
        for handler in logging.getLogger(VLLM).handlers:
            handler.removeFilter(self._of_vllm)

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith(ACCESS):
            return self._has_access_log
        return record.levelno < logging.INFO or self.may_tell(record)

    def may_tell(self, record: logging.LogRecord) -> bool:
        """Whether a line is the first of its kind for some time; it may have its count then."""
        error = record.exc_info[0] if record.exc_info else None
        what = getattr(record, "kind", error)
        kind, now_s = (record.pathname, record.lineno, what), self._clock()
        told = self._told.get(kind)
        if told is not None and now_s - told.at_s < QUIET_S:
            told.left_out += 1
            return False
        self._told[kind] = _Told(now_s)
        if told is not None and told.left_out:
            record.msg = f"{record.getMessage()} left_out={told.left_out}"
            record.args = None
        return True


class _OfVllm(logging.Filter):
    """The same for handlers of vLLM's: its loggers are many, and made at any time.

    A record comes by once for each handler, and is to be in all or in none.
    """

    def __init__(self, quiet: Quiet) -> None:
        super().__init__()
        self._quiet = quiet
        self._last: tuple[logging.LogRecord | None, bool] = (None, True)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or not record.name.startswith(OF_REQUESTS):
            return True
        last, is_told = self._last
        if record is not last:
            is_told = self._quiet.may_tell(record)
            self._last = (record, is_told)
        return is_told
