"""What was found: one line of JSON for each result, written at once.

A process that dies afterwards loses nothing. Several processes, one after the other, add to the
same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.stats import median

STAND_IN = "not checked: kernels do nothing on a stand-in"


@dataclass(frozen=True, slots=True)
class Row:
    """One result of a phase."""

    phase: str
    key: str
    """The name by which goals and tests find it."""
    what: str
    """The same for people."""
    value: Any
    """A number, a text, or a list of samples."""
    unit: str = ""
    right: bool | None = None
    """None: a figure, or a fact, that is neither right nor wrong."""
    note: str = ""

    @property
    def text(self) -> str:
        """Return the value for people; of samples the median, the largest, and the number."""
        if isinstance(self.value, list) and self.value:
            samples = self.value
            return f"{_short(median(samples))} (max {_short(max(samples))}, n {len(samples)})"
        if isinstance(self.value, bool):
            return "yes" if self.value else "no"
        return _short(self.value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Results:
    """A file of results."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, row: Row) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def rows(self) -> list[Row]:
        """Return all of them. An incomplete last line is left out."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").split("\n")
        return [Row(**json.loads(line)) for line in lines[:-1]]


class Say:
    """Report what one phase finds, to the file and to the terminal."""

    def __init__(self, phase: str, results: Results, is_rehearsal: bool = False) -> None:
        self._phase = phase
        self._results = results
        self._is_rehearsal = is_rehearsal

    def fact(self, key: str, what: str, value: Any, unit: str = "", note: str = "") -> None:
        """Report something that is neither right nor wrong."""
        self._add(Row(self._phase, key, what, value, unit, None, note))

    def check(
        self,
        key: str,
        what: str,
        is_right: bool,
        value: Any = None,
        unit: str = "",
        note: str = "",
        *,
        by_kernels: bool = False,
    ) -> None:
        """Report what has to be right. `by_kernels`: a stand-in cannot tell."""
        shown = is_right if value is None else value
        if by_kernels and self._is_rehearsal:
            self._add(Row(self._phase, key, what, shown, unit, None, STAND_IN))
        else:
            self._add(Row(self._phase, key, what, shown, unit, is_right, note))

    def step(self, what: str) -> None:
        """Announce that a long step starts. It is not a result."""
        print(f"  {self._phase:8} ... {what}", flush=True)

    def _add(self, row: Row) -> None:
        self._results.add(row)
        print(line(row), flush=True)


def line(row: Row) -> str:
    """Return a row on the terminal."""
    mark = {None: " ", True: "+", False: "!"}[row.right]
    unit = f" {row.unit}" if row.unit else ""
    note = f"  [{row.note}]" if row.note else ""
    return f"{mark} {row.phase:8} {row.what}: {row.text}{unit}{note}"


def wrong(rows: Iterable[Row]) -> list[Row]:
    """Return those that are not as they should be."""
    return [row for row in rows if row.right is False]


def find(rows: Sequence[Row], phase: str, key: str) -> Any:
    """Return the value of the last such row; None if there is none."""
    return next((r.value for r in reversed(rows) if (r.phase, r.key) == (phase, key)), None)


def figure(rows: Sequence[Row], phase: str, key: str) -> float | None:
    """Return the number, or the median of the samples, of the last such row."""
    value = find(rows, phase, key)
    if isinstance(value, list):
        return median(value) if value else None
    return float(value) if isinstance(value, int | float) else None
