"""Which model is likely to be active next, from counts of which model followed which.

A first-order Markov chain, estimated from what has been seen. At each observation, earlier ones
after the same model count less, by `DECAY`. So the estimate follows a workload that changes: what
happened six times in a row is expected, whatever was usual before. One observation of "something
else" is always counted in, so that nothing is certain, and one time is not a habit.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

DECAY = 0.8
"""The part of earlier counts that is left at a new one in the row; so they sum to 5 at most."""

PRIOR = 1.0
"""Count of "something else" in every row."""

LIKELY = 0.6
"""The least probability of a prediction. A habit has it from the second time on."""

NEGLIGIBLE = 0.01
"""A count below it is forgotten."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model that is likely to follow the active one."""

    alias: str
    probability: float


class TransitionCounts:
    """Counts of which model has followed which.

    The mutable state is `current`, the model that is active, and a row of counts for each model
    that was active.
    """

    def __init__(self) -> None:
        self.current: str | None = None
        self._counts: dict[str, dict[str, float]] = defaultdict(dict)

    def __repr__(self) -> str:
        return f"<TransitionCounts current={self.current} rows={len(self._counts)}>"

    def observe(self, alias: str) -> None:
        """Count a model that has become active. One that was active already follows nothing."""
        before, self.current = self.current, alias
        if before is None or before == alias:
            return
        row = {model: DECAY * count for model, count in self._counts[before].items()}
        row[alias] = row.get(alias, 0.0) + 1.0
        self._counts[before] = {model: n for model, n in row.items() if n >= NEGLIGIBLE}

    def predict(self) -> Prediction | None:
        """Return the model that is likely to follow the active one; None if none is."""
        row = self._counts.get(self.current or "", {})
        if not row:
            return None
        alias = max(row, key=row.__getitem__)
        probability = row[alias] / (sum(row.values()) + PRIOR)
        return Prediction(alias, probability) if probability >= LIKELY else None
