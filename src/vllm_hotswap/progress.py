"""Progress and events for people: a bar in a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from tqdm import tqdm

from vllm_hotswap.events import Event, LoadProgress, PhaseChanged, ResidencyChanged, SwitchEnded

log = logging.getLogger("vllm_hotswap")

STAGES = ("weights", "kv_cache", "warm_up", "frontend", "ready")


class StartupProgress:
    """An observer that shows how far the loads of the start-up have come."""

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
        """Take the bar away; later loads are shown by the log alone."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, event: LoadProgress) -> None:
        if event.stage == "ready":
            self._ready.add(event.model)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{event.model}: {event.stage}")
            self._bar.update()


class EventLog:
    """An observer that writes one line per event, in the words of metrics and events."""

    def notify(self, event: Event) -> None:
        match event:
            case LoadProgress(model=model, stage=stage, elapsed_s=seconds):
                log.info("event=load model=%s stage=%s elapsed_s=%.2f", model, stage, seconds)
            case SwitchEnded(status="switched"):
                log.info(
                    "event=switch source=%s target=%s epoch=%d seconds=%.4f cut=%d operation=%s",
                    event.source,
                    event.target,
                    event.epoch,
                    event.duration_s,
                    event.requests_cut,
                    event.operation_id,
                )
            case SwitchEnded():
                log.error(
                    "event=switch_failed source=%s target=%s cause=%r operation=%s",
                    event.source,
                    event.target,
                    event.cause,
                    event.operation_id,
                )
            case PhaseChanged(status="failed"):
                log.error("event=phase_failed phase=%s target=%s", event.phase.value, event.target)
            case ResidencyChanged(after=after, model=model) if after.value == "failed":
                log.error("event=engine_failed model=%s", model)
            case _:
                log.debug("event=%r", event)


def configure_logging(level: str = "INFO") -> None:
    """Send this package's log to standard error, one `key=value` line per event."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s %(message)s"))
    logger = logging.getLogger("vllm_hotswap")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
