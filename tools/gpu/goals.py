"""What the check is to show, as arithmetic on its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.stats import median
from tools.gpu.results import Row, figure

PARKED_MS = 3.0
WAKE_FACTOR, WAKE_CONSTANT_S = 1.15, 0.3
SLEEP_S = 0.1
COLD_DRIFT_MIB = 40.0
"""One more workspace of matrix multiplications, which torch may have on a stream or not."""

SERVED = ("tiny", "large", "stock", "sharing")
BIG = "big"
GB = 1e9


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure, and its allowed maximum."""

    name: str
    value: float | None
    limit: float | None
    unit: str

    @property
    def is_met(self) -> bool | None:
        """Return whether it is met; None if it has not been measured."""
        if self.value is None or self.limit is None:
            return None
        return self.value <= self.limit

    @property
    def state(self) -> str:
        return {None: "not measured", True: "met", False: "MISSED"}[self.is_met]


def goals(rows: Sequence[Row]) -> list[Goal]:
    """Return all of them, measured or not."""
    theirs = figure(rows, "stock", "first_s.stock")
    return [
        Goal("switch to a parked model, median", figure(rows, "large", "parked"), PARKED_MS, "ms"),
        Goal(
            f"switch to a sleeping {BIG}, median (1.15 x bytes / link + 0.3 s)",
            _of_wake(rows),
            wake_limit_s(
                figure(rows, "large", f"weights_bytes.{BIG}"), figure(rows, "link", "to_device")
            ),
            "s",
        ),
        Goal("sleep after the first, median", figure(rows, "large", f"sleep.{BIG}"), SLEEP_S, "s"),
        Goal(
            "first correct token from asleep, against vLLM's sleep mode",
            figure(rows, "stock", "first_s.ours"),
            theirs,
            "s",
        ),
        Goal("different tokens, all phases", _different(rows), 0.0, "tokens"),
        Goal("drift over sleeps and wakes, tiny", figure(rows, "tiny", "drift.asleep"), 0.0, "MiB"),
        Goal(
            "drift over sleeps and wakes, large", figure(rows, "large", "drift.asleep"), 0.0, "MiB"
        ),
        Goal(
            "drift over cold switches, tiny (a workspace)",
            figure(rows, "tiny", "drift.cold"),
            COLD_DRIFT_MIB,
            "MiB",
        ),
    ]


def wake_limit_s(weights_bytes: float | None, link_gb_s: float | None) -> float | None:
    """Return 1.15 x bytes / bandwidth + 0.3 s; None where either has not been measured."""
    if weights_bytes is None or not link_gb_s:
        return None
    return WAKE_FACTOR * weights_bytes / (link_gb_s * GB) + WAKE_CONSTANT_S


def _of_wake(rows: Sequence[Row]) -> float | None:
    return figure(rows, "large", f"asleep.{BIG}")


def _different(rows: Sequence[Row]) -> float | None:
    found = [figure(rows, phase, "different") for phase in SERVED]
    told = [value for value in found if value is not None]
    return sum(told) if told else None


def drift(samples: Sequence[float]) -> float:
    """Return the growth over some samples: the median of the last quarter less that of the second.

    The first quarter is left out: what is made once (workspaces, host copies) is not drift. With
    fewer than four samples, the last less the first.
    """
    if len(samples) < 4:
        return samples[-1] - samples[0] if samples else 0.0
    quarter = len(samples) // 4
    return median(samples[-quarter:]) - median(samples[quarter : 2 * quarter])
