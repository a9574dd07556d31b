"""Work done ahead for the next model, announced or predicted, before a request asks for it.

The files of a cold model are read. A sleeping model wakes in slices, where its device can do that.
Nothing is given up for this: it uses memory that the budget has to spare. It is done for one
prediction at a time, and stops when a switch goes elsewhere. How useful it was is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from vllm_hotswap.events import Observer, PredictionSettled, PrefetchSettled
from vllm_hotswap.models import Model, Prefetch, Registry, Waking
from vllm_hotswap.residency.prediction import Prediction, TransitionCounts
from vllm_hotswap.residency.prefetch import Prefetches
from vllm_hotswap.residency.prewake import Prewakes, can_wake_beside
from vllm_hotswap.states import Residency

PrefetchOutcome = Literal["begun", "under_way", "done", "not_needed", "no_room"]
"""The outcome of starting to read a model's files, or to wake it."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What was done for a model that was announced."""

    model: Model
    prefetch: PrefetchOutcome
    limit_bytes: int
    """Bytes that are read at most."""
    wake: PrefetchOutcome


@dataclass(frozen=True, slots=True)
class PrefetchRun:
    """The work under way for a model that may be next."""

    model: Model
    prefetch: Prefetch | None
    """The reading of its files. None: they need not be read, or there is no room."""
    waking: Waking | None = None
    """Its wake. None: it does not sleep, cannot wake in slices, or there is no room."""


@dataclass(frozen=True, slots=True)
class PredictionStats:
    """How useful predictions and announcements have been so far."""

    hits: int = 0
    misses: int = 0
    used_bytes: int = 0
    wasted_bytes: int = 0


class Lookahead:
    """One announcement and one prediction at a time.

    The mutable state is `_transitions`, `_announced`, `_predicted`, `_run` (what is done for
    the prediction) and `stats`.
    """

    def __init__(
        self,
        registry: Registry,
        prefetches: Prefetches,
        wakes: Prewakes,
        observer: Observer,
        epoch: Callable[[], int],
        predicts: bool,
    ) -> None:
        self._registry = registry
        self._prefetches = prefetches
        self._wakes = wakes
        self._observer = observer
        self._epoch = epoch
        self._predicts = predicts
        self._transitions = TransitionCounts()
        self._announced: PrefetchRun | None = None
        self._predicted: Prediction | None = None
        self._run: PrefetchRun | None = None
        self.stats = PredictionStats()

    def __repr__(self) -> str:
        return f"<Lookahead predicted={self._predicted} {self.stats}>"

    @property
    def predicted(self) -> Prediction | None:
        """The model that is expected to follow the active one."""
        return self._predicted

    def announce(self, model: Model) -> Announcement:
        """Work ahead for the model that a caller announces, instead of a predicted one."""
        if self._run is not None and self._run.model is not model:
            self._settle(self._run, is_used=False)
        self._run = None
        if self._announced is not None and self._announced.model is not model:
            self._settle(self._announced, is_used=False)
        outcome, prefetch = self._start_prefetch(model)
        wake, waking = self._start_wake(model)
        self._announced = PrefetchRun(model, prefetch, waking)
        return Announcement(model, outcome, prefetch.limit_bytes if prefetch else 0, wake)

    def switch_started(self, target: Model) -> None:
        """Cancel the work for a predicted model that is not the target: it would be in the way."""
        run = self._run
        if run is not None and run.model is not target:
            self._cancel(run)

    def switched(self, target: Model) -> None:
        """Judge prediction and announcement by the model that is active now, and look ahead."""
        if self._announced is not None and self._announced.model is target:
            self._settle(self._announced, is_used=True)
            self._announced = None
        if target.alias != self._transitions.current:  # it was not just brought back
            self._judge(target)
            self._transitions.observe(target.alias)
            self._predict_next()
        if (announced := self._announced) is not None and announced.model.waking is None:
            _, waking = self._start_wake(announced.model)  # there may be room now
            self._announced = replace(announced, waking=waking)

    def _judge(self, target: Model) -> None:
        predicted, self._predicted = self._predicted, None
        if predicted is None:
            return
        is_hit = predicted.alias == target.alias
        stats = self.stats
        self.stats = replace(stats, hits=stats.hits + is_hit, misses=stats.misses + (not is_hit))
        event = PredictionSettled(self._epoch(), predicted.alias, target.alias, is_hit)
        self._observer.notify(event)
        if self._run is not None:
            self._settle(self._run, is_hit)
            self._run = None

    def _predict_next(self) -> None:
        self._predicted = self._transitions.predict() if self._predicts else None
        if self._predicted is not None:
            model = self._registry.model(self._predicted.alias)
            outcome, prefetch = self._start_prefetch(model)
            wake, waking = self._start_wake(model)
            is_started = "begun" in (outcome, wake)
            self._run = PrefetchRun(model, prefetch, waking) if is_started else None

    def _start_prefetch(self, model: Model) -> tuple[PrefetchOutcome, Prefetch | None]:
        if model.residency not in (Residency.COLD, Residency.DISCARDED):
            return "not_needed", None
        if (known := model.prefetch) is not None and (known.is_under_way or known.read_bytes):
            return "under_way" if known.is_under_way else "done", known
        if not self._prefetches.spare_bytes(model):
            return "no_room", None
        return "begun", self._prefetches.begin(model)

    def _start_wake(self, model: Model) -> tuple[PrefetchOutcome, Waking | None]:
        if not can_wake_beside(model):
            return "not_needed", None
        if (known := model.waking) is not None and not known.is_given_up:
            return "done" if known.is_done else "under_way", known
        waking = self._wakes.begin(model)
        return ("begun" if waking else "no_room"), waking

    def _settle(self, run: PrefetchRun, is_used: bool) -> None:
        """Count what was read; if it is of no use, give back its place in the budget.

        A prefetch that a caller asked for explicitly is neither counted nor given up.
        """
        if not is_used:
            self._give_up_wake(run)
        if run.prefetch is None or run.prefetch.is_explicit:
            return
        stats, read_bytes = self.stats, run.prefetch.read_bytes
        if is_used:
            self.stats = replace(stats, used_bytes=stats.used_bytes + read_bytes)
        else:
            self.stats = replace(stats, wasted_bytes=stats.wasted_bytes + read_bytes)
            self._cancel(run)
        self._observer.notify(PrefetchSettled(self._epoch(), run.model.alias, read_bytes, is_used))

    def _give_up_wake(self, run: PrefetchRun) -> None:
        if run.waking is not None and run.model.waking is run.waking:
            self._wakes.give_up(run.model)

    def _cancel(self, run: PrefetchRun) -> None:
        self._give_up_wake(run)
        prefetch = run.prefetch
        if prefetch is None or prefetch.is_explicit:
            return
        if run.model.prefetch is prefetch:
            self._prefetches.cancel(run.model)
