"""What a phase has to know, handed from the check to the phase's own process as JSON."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

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
    """Everything is small, and what only kernels could tell is not checked."""
    ends_at: float
    """By `time.monotonic`, which all processes of a machine share."""

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
