"""`serve --record FILE`: a trace of requests and switches, one line each.

`vllm-hotswap simulate` reads the file. A line is written, and flushed, when a request or a switch
has ended: a server that is killed leaves a trace of everything before. Requests that never had
their turn are left out: the length of their responses is unknown.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from vllm_hotswap.config import ServerConfig
from vllm_hotswap.errors import one_line
from vllm_hotswap.events import Event, RequestEnded, SwitchEnded
from vllm_hotswap.simulation.trace import (
    Head,
    Line,
    TracedModel,
    TracedRequest,
    TracedSwitch,
    TracedSwitching,
    as_text,
    create,
)

log = logging.getLogger("vllm_hotswap")


class Recorder:
    """An observer that writes a trace.

    The mutable state is the open file (None after a failed write), the number of requests, and
    whether it has warned of a line that could not be recorded.
    """

    def __init__(self, path: Path, head: Head, clock: Callable[[], float] = time.monotonic) -> None:
        """Create the file.

        Raises:
            ConfigError: the file exists or cannot be written.
        """
        self._path = path
        self._clock = clock
        self._began_s = clock()
        self._requests = 0
        self._has_warned = False
        self._file: TextIO | None = create(path)
        self._write(head)

    def __repr__(self) -> str:
        return f"<Recorder path={str(self._path)!r} requests={self._requests}>"

    def notify(self, event: Event) -> None:
        """Write a line for the event. Never raises: the server continues without the line."""
        try:
            self._note(event)
        except ValueError as error:  # pydantic's is one
            self._warn(error)

    def _note(self, event: Event) -> None:
        match event:
            case RequestEnded(service_s=float(), is_connection=False):
                self._write(self._request(event))
            case SwitchEnded():
                self._write(self._switch(event))

    def _warn(self, error: ValueError) -> None:
        if not self._has_warned:
            self._has_warned = True
            path, cause = str(self._path), one_line(error)
            log.warning(
                "event=line_not_recorded path=%r cause=%r then='further lines dropped silently'",
                path,
                cause,
            )

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # of a last line, on a full disk
                file.close()

    def _request(self, event: RequestEnded) -> TracedRequest:
        self._requests += 1
        return TracedRequest(
            id=self._requests,
            model=event.model,
            arrived_s=max(0.0, event.arrived_s - self._began_s),
            priority=event.priority,
            max_wait_s=event.max_wait_s,
            prompt_tokens=event.prompt_tokens,
            output_tokens=event.output_tokens,
            prepared_s=event.prepared_s,
            waited_s=event.waited_s,
            service_s=event.service_s,
            switched=event.switched,
            result=event.result,
        )

    def _switch(self, event: SwitchEnded) -> TracedSwitch:
        return TracedSwitch(
            at_s=max(0.0, self._clock() - self._began_s - event.duration_s),
            source=event.source,
            target=event.target,
            residency=event.residency,
            cost_s=max(0.0, event.duration_s - event.queued_s - event.drain_s),
            drain_s=event.drain_s,
            result=event.status,
            automatic=event.automatic,
        )

    def _write(self, line: Line) -> None:
        if self._file is None:
            return
        try:
            self._file.write(f"{as_text(line)}\n")
            self._file.flush()
        except OSError as error:
            log.error("event=recording_ended path=%r cause=%r", str(self._path), error.strerror)
            self.close()


def trace_header(config: ServerConfig) -> Head:
    """Return what the configuration says about models and switching."""
    switching = config.switching
    return Head(
        models={
            model.alias: TracedModel(
                model.priority,
                switching.max_wait if model.max_wait is None else model.max_wait,
                model.weight,
            )
            for model in config.models
        },
        active=config.default_model,
        switching=TracedSwitching(
            switching.policy, switching.min_active, switching.slice, switching.drain_timeout
        ),
    )
