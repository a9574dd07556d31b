"""What a phase has to know, passed from the check to the phase's own process as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SHORTEST_S, END_S = 15.0, 10.0
"""Kept for a round whose length is not known yet; and for servers to stop."""

RESULTS = "results.jsonl"

REVISION = "REVISION"
"""A file that `pack` puts beside the product, where there is no git."""


@dataclass(frozen=True, slots=True)
class Task:
    """One phase's orders."""

    out: Path
    """Where results and logs go."""
    models: Path
    """Where large models are made."""
    is_rehearsal: bool
    """Everything is small, and what only kernels could show is not checked."""
    ends_at: float
    """In the clock of `time.monotonic`, which all processes of a machine share."""

    @property
    def left_s(self) -> float:
        return self.ends_at - time.monotonic()

    def write(self) -> str:
        return json.dumps(
            {
                "out": str(self.out),
                "models": str(self.models),
                "is_rehearsal": self.is_rehearsal,
                "ends_at": self.ends_at,
            }
        )

    @staticmethod
    def read(text: str) -> Task:
        told = json.loads(text)
        return Task(Path(told["out"]), Path(told["models"]), told["is_rehearsal"], told["ends_at"])


class Rounds:
    """Run rounds as far as time allows. Mutable: how long the longest one has taken."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._longest_s = 0.0

    def of(self, rounds: Iterable[T]) -> Iterator[T]:
        """Yield each, while there is time for one and a half of the longest so far."""
        for each in rounds:
            if self._task.left_s <= max(SHORTEST_S, 1.5 * self._longest_s) + END_S:
                return
            before_s = time.monotonic()
            yield each
            self._longest_s = max(self._longest_s, time.monotonic() - before_s)
