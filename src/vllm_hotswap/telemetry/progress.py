"""Progress and events for people: a bar in a terminal, log lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self

from tqdm import tqdm

from vllm_hotswap.events import (
    ClientEvicted,
    EngineDied,
    Event,
    HostDied,
    HostRestarted,
    JobLeaseChanged,
    LoadProgress,
    OutputRefused,
    PhaseChanged,
    RequestsParked,
    RequestsResumed,
    ServiceDegraded,
    SwitchEnded,
)
from vllm_hotswap.system import log_of_clients, value_text

log = logging.getLogger("vllm_hotswap")

STAGES = ("weights", "kv_cache", "warm_up", "frontend", "ready")


LINE_S = 10.0
"""Without a terminal: seconds between two lines about something that takes long."""

TICK_S = 0.5


class ProgressTimer:
    """Shows that something is under way, and for how long: at once, and until it is closed.

    In a terminal one line counts the time; elsewhere `report` is called now and then.
    """

    def __init__(
        self,
        what: str,
        report: Callable[[str, float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._report, self._clock = what, report, clock
        self._began_s = clock()
        self._next_s = LINE_S
        self._bar: tqdm[None] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(desc=what, bar_format="{desc} {elapsed}", leave=False)
        else:
            report(what, 0)

    def tick(self) -> None:
        """Show the time, if it is due. Call it now and then, from one thread at a time."""
        if self._bar is not None:
            self._bar.refresh()
            return
        after_s = self._clock() - self._began_s
        if after_s >= self._next_s:
            self._next_s += LINE_S
            self._report(self._what, after_s)

    def close(self) -> None:
        """Remove the line from the terminal."""
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def waiting(step: str) -> Iterator[None]:
    """Show on standard error that a step of the start is under way, while it blocks its thread."""
    shown = ProgressTimer(
        step, lambda what, s: log.info("event=start step=%r elapsed_s=%.0f", what, s)
    )
    is_over = threading.Event()

    def tick() -> None:
        while not is_over.wait(TICK_S):
            shown.tick()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        shown.close()


class StartupProgress:
    """An observer that shows how far the loads at start-up have come."""

    def __init__(self, aliases: Sequence[str]) -> None:
        self._aliases = list(aliases)
        self._ready: set[str] = set()
        self._bar: tqdm[None] | None = None
        if sys.stderr.isatty():
            total = len(self._aliases) * len(STAGES)
            self._bar = tqdm(total=total, desc="loading", unit="stage", leave=False)

    def notify(self, event: Event) -> None:
        if isinstance(event, LoadProgress):
            self._show(event)

    def close(self) -> None:
        """Remove the bar; only the log shows later loads."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, event: LoadProgress) -> None:
        if event.stage == "ready":
            self._ready.add(event.model)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{event.model}: {event.stage}")
            self._bar.update()


LINES: Mapping[type[Event], tuple[int, str, tuple[str, ...]]] = {
    HostDied: (logging.ERROR, "event=host_died cause=%r", ("cause",)),
    HostRestarted: (
        logging.WARNING,
        "event=host_restarted restarts=%d seconds=%.2f",
        ("restarts", "duration_s"),
    ),
    EngineDied: (logging.ERROR, "event=engine_failed model=%s cause=%r", ("model", "cause")),
    ServiceDegraded: (logging.ERROR, "event=degraded cause=%r retry_s=%.0f", ("cause", "retry_s")),
    OutputRefused: (logging.ERROR, "event=output_refused model=%s stamp=%s", ("model", "stamp")),
    ClientEvicted: (logging.WARNING, "event=client_evicted model=%s", ("model",)),
    RequestsParked: (logging.INFO, "event=requests_parked model=%s count=%d", ("model", "count")),
    RequestsResumed: (logging.INFO, "event=requests_resumed model=%s count=%d", ("model", "count")),
    JobLeaseChanged: (
        logging.INFO,
        "event=job_lease change=%s lease=%s model=%s owner=%r expires_in_s=%.0f key=%s",
        ("change", "lease", "model", "owner", "expires_in_s", "key"),
    ),
    LoadProgress: (
        logging.INFO,
        "event=load model=%s stage=%s elapsed_s=%.2f",
        ("model", "stage", "elapsed_s"),
    ),
}
"""Level, text and its fields, for events whose line always has the same form."""

WORDS = frozenset(["model", "stamp"])
"""Fields that hold an alias, which may need quotes."""


def _value(event: Event, name: str) -> object:
    value = getattr(event, name)
    return value_text(value) if name in WORDS else value


class EventLog:
    """An observer that writes one line per event, in the words of metrics and events."""

    def notify(self, event: Event) -> None:
        match event:
            case SwitchEnded(status="switched"):
                log.info(
                    "event=switch source=%s target=%s epoch=%d seconds=%.4f cut=%d parked=%d "
                    "lost=%d operation=%s key=%s",
                    value_text(event.source),
                    value_text(event.target),
                    event.epoch,
                    event.duration_s,
                    event.requests_cut,
                    event.requests_parked,
                    event.requests_lost,
                    event.operation_id,
                    event.key,
                )
            case SwitchEnded():
                log.log(
                    logging.WARNING if event.status == "refused" else logging.ERROR,
                    "event=switch_%s source=%s target=%s cause=%r operation=%s key=%s",
                    event.status,
                    value_text(event.source),
                    value_text(event.target),
                    event.cause,
                    event.operation_id,
                    event.key,
                )
            case PhaseChanged(status="failed"):
                target = value_text(event.target)
                log.error("event=phase_failed phase=%s target=%s", event.phase.value, target)
            case _ if type(event) in LINES:
                level, text, fields = LINES[type(event)]
                logger = log_of_clients if isinstance(event, ClientEvicted) else log
                logger.log(level, text, *(_value(event, name) for name in fields))
            case _:
                log.debug("event=%r", event)


class CheckProgress:
    """Shows which model is checked: a bar in a terminal, a line for each model elsewhere."""

    def __init__(self, aliases: Sequence[str]) -> None:
        self._count = len(aliases)
        self._started_count = 0
        self._bar: tqdm[None] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._count, unit="model", leave=False)

    def __enter__(self) -> Self:
        self._show_step("checking: reading vLLM's flags")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, alias: str) -> None:
        """Show that a model is next; the one before is done."""
        if self._bar is not None:
            self._bar.update(min(1, self._started_count))
        self._started_count += 1
        self._show_step(f"checking {alias}")

    def _show_step(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_description(what)
        else:
            is_model = 0 < self._started_count <= self._count
            number = f" ({self._started_count} of {self._count})" if is_model else ""
            sys.stderr.write(f"{what}{number} ...\n")
            sys.stderr.flush()
