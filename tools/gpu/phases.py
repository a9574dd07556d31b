"""The phases of the check, the most important first, and which of them there is time for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

END_S = 20.0
"""Kept for ending a phase, and for the report."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase. Seconds are estimates for an 8B model and a GPU of a data centre."""

    name: str
    what: str
    usual_s: int
    least_s: int
    """With less time it is not started."""
    limit_s: int
    """After this it is stopped."""

    @property
    def module(self) -> str:
        return f"tools.gpu.{self.name}"


PHASES = (
    Phase("facts", "driver, device, memory, versions", 10, 10, 90),
    Phase("kernels", "kernels of vLLM against the CPU's numbers", 20, 15, 120),
    Phase("pools", "memory of models: sleep, wake, unload", 20, 15, 120),
    Phase("link", "bandwidth between host and device", 20, 10, 120),
    Phase("tiny", "a server with tiny models, from every residency", 90, 60, 420),
    Phase("large", "a server with models of the 8B class", 180, 150, 900),
    Phase("stock", "vLLM's own sleep mode in turns with ours", 120, 90, 600),
    Phase("sharing", "another process takes the device's memory", 60, 45, 240),
)
NAMES = tuple(phase.name for phase in PHASES)


def chosen(names: Sequence[str]) -> list[Phase]:
    """Return these phases, in the order of importance. Raises ValueError on an unknown name."""
    if unknown := sorted(set(names) - set(NAMES)):
        raise ValueError(f"unknown phase: {', '.join(unknown)}; known: {', '.join(NAMES)}")
    return [phase for phase in PHASES if phase.name in names]


def limit_s(phase: Phase, left_s: float | None) -> float | None:
    """Return how long a phase may take; None if it is not to be started.

    Args:
        phase: which.
        left_s: seconds until the end of the whole check; None if there is no such end.
    """
    if left_s is None:
        return float(phase.limit_s)
    usable_s = left_s - END_S
    return None if usable_s < phase.least_s else min(usable_s, float(phase.limit_s))
