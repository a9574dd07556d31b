"""The results of benchmark parts, as tables on the screen and as one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.stats import Bar, Summary

FORMAT_VERSION = 1
SUMMARY_COLUMNS = ("p50", "p95", "p99", "min", "max", "n")


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table of texts; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_text: bool = False
    """Whether all columns are aligned to the left, not only the first."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part's tables and bars, and all its samples."""

    name: str
    tables: tuple[Table, ...]
    bars: tuple[Bar, ...]
    samples: Mapping[str, Any]


def render(part: Part) -> str:
    """Return a part's tables and bars in Markdown."""
    blocks = [render_table(table) for table in part.tables]
    if part.bars:
        blocks.append(render_table(_bar_table(part)))
    return "\n\n".join(blocks)


def render_table(table: Table) -> str:
    """Return a Markdown table whose columns are aligned for reading as text."""
    lines = [table.columns, *table.rows]
    widths = [max(2, *(len(line[i]) for line in lines)) for i in range(len(table.columns))]
    end = "-" if table.is_text else ":"
    rule = ["-" * widths[0], *("-" * (width - 1) + end for width in widths[1:])]
    drawn = [_line(line, widths, table.is_text) for line in lines]
    drawn.insert(1, f"| {' | '.join(rule)} |")
    return f"### {table.title}\n\n" + "\n".join(drawn)


def summary_row(name: str, summary: Summary, digits: int = 2) -> tuple[str, ...]:
    """Return a row for `SUMMARY_COLUMNS`."""
    values = (summary.p50, summary.p95, summary.p99, summary.minimum, summary.maximum)
    return (name, *(f"{value:.{digits}f}" for value in values), str(summary.count))


def document(
    environment: Mapping[str, Any], options: Mapping[str, Any], parts: Sequence[Part]
) -> dict[str, Any]:
    """Return the JSON file's content."""
    return {
        "format": FORMAT_VERSION,
        "environment": dict(environment),
        "options": dict(options),
        "parts": {part.name: _part_document(part) for part in parts},
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file by the content, rounded to the precision of the clock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(content), indent=1) + "\n", encoding="utf-8")


def _part_document(part: Part) -> dict[str, Any]:
    return {
        "bars": [{**asdict(bar), "met": bar.met} for bar in part.bars],
        "tables": [asdict(table) for table in part.tables],
        "samples": dict(part.samples),
    }


def _bar_table(part: Part) -> Table:
    rows = tuple(
        (
            bar.name,
            f"{bar.value:.2f}",
            f"{'>=' if bar.at_least else '<='} {bar.limit:g}",
            "met" if bar.met else "MISSED",
        )
        for bar in part.bars
    )
    return Table(f"{part.name}: targets", ("target", "measured", "wanted", ""), rows)


def _line(cells: Sequence[str], widths: Sequence[int], is_text: bool) -> str:
    padded = [
        cell.ljust(width) if is_text or number == 0 else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
