"""What was found, as a table on the terminal, as Markdown for the docs, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.report import Table, render_table
from tools.gpu.goals import Goal, goals
from tools.gpu.phases import PHASES
from tools.gpu.results import Row, find, wrong

FORMAT_VERSION = 1
REHEARSAL = (
    "**A rehearsal on a stand-in for the driver, without a GPU: no figure here says anything about "
    "a GPU.**"
)
ABOUT = {
    "name": "device",
    "driver": "driver",
    "MIG": "MIG",
    "total": "memory, MiB",
    "others": "held by others, MiB",
    "pcie": "PCIe: generation now, at most; lanes",
    "cores": "cores",
    "host": "host memory, MiB",
    "torch": "torch",
    "vllm": "vLLM",
    "hotswap": "vllm-hotswap",
}
"""Keys of `facts` that head the page."""


@dataclass(frozen=True, slots=True)
class Done:
    """How one phase ended: `done`, or why not."""

    phase: str
    state: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """Everything about one run."""

    environment: Mapping[str, Any]
    is_rehearsal: bool
    done: Sequence[Done]
    rows: Sequence[Row]

    @property
    def goals(self) -> list[Goal]:
        """Return the goals. A rehearsal has none: times on a stand-in say nothing."""
        return [] if self.is_rehearsal else goals(self.rows)

    @property
    def is_wrong(self) -> bool:
        """Return whether a check is not right."""
        return bool(wrong(self.rows))

    @property
    def misses(self) -> bool:
        """Return whether a goal is missed."""
        return any(goal.is_met is False for goal in self.goals)


def document(report: Report) -> dict[str, Any]:
    """Return the JSON file's content."""
    return {
        "format": FORMAT_VERSION,
        "rehearsal": report.is_rehearsal,
        "environment": dict(report.environment),
        "phases": [asdict(done) for done in report.done],
        "goals": [{**asdict(goal), "met": goal.is_met} for goal in report.goals],
        "results": [asdict(row) for row in report.rows],
    }


def terminal(report: Report) -> str:
    """Return what is shown at the end: phases, goals, and what is wrong."""
    blocks = [render_table(_phase_table(report))]
    if report.goals:
        blocks.append(render_table(_goal_table(report)))
    elif report.is_rehearsal:
        blocks.append("A rehearsal: times on a stand-in mean nothing, so no goal is judged.")
    bad = wrong(report.rows)
    blocks.append(f"{len(report.rows)} results, {len(bad)} wrong")
    blocks += [f"! {row.phase} {row.what}: {row.text} {row.note}".rstrip() for row in bad]
    return "\n\n".join(blocks[:3]) + "".join(f"\n{text}" for text in blocks[3:])


def markdown(report: Report, title: str) -> str:
    """Return a page for the docs."""
    blocks = [f"# {title}", _made(report), render_table(_facts_table(report))]
    if report.is_rehearsal:
        blocks.insert(1, REHEARSAL)
    if report.goals:
        blocks.append(render_table(_goal_table(report)))
    blocks.append(render_table(_phase_table(report)))
    found = {p.what: [row for row in report.rows if row.phase == p.name] for p in PHASES}
    blocks += [render_table(_result_table(what, rows)) for what, rows in found.items() if rows]
    return "\n\n".join(blocks).replace("\n### ", "\n## ") + "\n"


def _made(report: Report) -> str:
    about = report.environment
    return (
        f"Made on {str(about.get('date', ''))[:10]} at revision {about.get('git_revision')} by "
        f"`make check-gpu` ({' '.join(about.get('arguments', ())) or 'all phases'})."
    )


def _facts_table(report: Report) -> Table:
    found = {key: find(report.rows, "facts", key) for key in ABOUT}
    rows = tuple((ABOUT[key], _cell(value)) for key, value in found.items() if value is not None)
    return Table("Where", ("", ""), rows, is_text=True)


def _phase_table(report: Report) -> Table:
    rows = tuple(
        (done.phase, f"{done.seconds:.0f}", _cell(done.state)[:200]) for done in report.done
    )
    return Table("Phases", ("phase", "s", "end"), rows, is_text=True)


def _goal_table(report: Report) -> Table:
    rows = tuple(
        (goal.name, _number(goal.value), f"<= {_number(goal.limit)}", goal.unit, goal.state)
        for goal in report.goals
    )
    return Table("Goals", ("goal", "measured", "wanted", "", "state"), rows)


def _result_table(title: str, rows: Sequence[Row]) -> Table:
    marks = {None: "", True: "right", False: "WRONG"}
    cells = tuple(
        (
            _cell(row.what),
            f"{_cell(row.text)} {row.unit}".strip(),
            marks[row.right],
            _cell(row.note),
        )
        for row in rows
    )
    return Table(title[0].upper() + title[1:], ("what", "found", "", ""), cells, is_text=True)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "/")
