"""The results of the floods, as tables and rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.floods.run import FIRST, PHASES, Found, Memory, Phase
from benchmarks.report import Table
from benchmarks.stats import summarize

BAR = 1.5
"""The most that the p95 of the time to the first token may be, as a ratio to that before."""

MACHINE = "busy process"
"""The control that shows what the machine alone makes slower."""

MIB = 1 << 20
WAITS = ("stream", "health", "admin")


def row(found: Found) -> dict[str, Any]:
    """Return all figures of one flood, for the JSON file."""
    sent = found.sent
    return {
        "flood": found.kind.name,
        "is_control": found.kind.is_control,
        "what": found.kind.what,
        "connections": found.kind.connections,
        "reached": reached(found),
        "outcomes": dict(sorted(sent.outcomes.items())),
        "sent_mib": round(sent.sent_bytes / MIB, 1),
        "attacker_cpu": round(sent.cpu_s / sent.seconds, 2),
        "phases": {name: _phase(found.phases[name]) for name in PHASES},
        "p95_during_by_before": ratio(found, "during"),
        "p95_after_by_before": ratio(found, "after"),
        "memory_mib": {name: _memory(memory) for name, memory in found.memory.items()},
        "kept_mib": round(kept_mib(found, FIRST), 1),
        "kept_again_mib": round(kept_mib(found, "before"), 1),
        "errors": [sample.error for sample in _errors(found)][:10],
    }


def reached(found: Found) -> bool:
    """Whether a flood reached its aim."""
    return not found.kind.shows.isdisjoint(found.sent.outcomes)


def p95_ms(phase: Phase, name: str = "stream") -> float | None:
    """Return the p95 of the waits for a first token, or another answer; None without samples."""
    waits = [sample.waited_s * 1000 for sample in phase.samples[name]]
    return summarize(waits).p95 if waits else None


def ratio(found: Found, name: str) -> float | None:
    """Return the p95 of the time to the first token, divided by that before the flood."""
    value, before = p95_ms(found.phases[name]), p95_ms(found.phases["before"])
    return round(value / before, 2) if value is not None and before else None


def kept_mib(found: Found, since: str) -> float:
    """Return by how much the memory of the server's processes alone has grown in the flood."""
    after, before = found.memory["after"], found.memory[since]
    return (after.api_uss + after.host_uss - before.api_uss - before.host_uss) / MIB


def missed(found: Found) -> list[str]:
    """Return what is not as it should be, in short."""
    if found.kind.is_control:
        return []
    said = [] if reached(found) else ["did not get there"]
    if _errors(found):
        said.append("errors")
    slow = [name for name in ("during", "after") if (ratio(found, name) or 0) > BAR]
    return said + [f"{name} > {BAR}" for name in slow]


def waits_table(all_found: Sequence[Found]) -> Table:
    """Return a table of another user's first tokens, and of what the flood was."""
    machine = next((p95_ms(f.phases["during"]) for f in all_found if f.kind.name == MACHINE), None)
    lines = []
    for found in all_found:
        during = p95_ms(found.phases["during"])
        by_machine = during / machine if during is not None and machine else None
        lines.append(
            (
                _name(found),
                *(_shown(p95_ms(found.phases[name]), 1) for name in PHASES),
                _shown(ratio(found, "during"), 2),
                _shown(ratio(found, "after"), 2),
                _shown(by_machine, 2),
                str(len(_errors(found))),
                ", ".join(missed(found)),
            )
        )
    columns = ("p95, ms", *PHASES, "during/before", "after/before", f"during/{MACHINE}", "errors")
    return Table("First token of another user", (*columns, "missed"), tuple(lines))


def others_table(all_found: Sequence[Found]) -> Table:
    """Return a table of health checks, admin calls, and the machine's load during each flood."""
    lines = []
    for found in all_found:
        during = found.phases["during"]
        lines.append(
            (
                _name(found),
                *(_shown(p95_ms(during, name), 1) for name in ("health", "admin")),
                f"{sum(found.sent.outcomes.values()) / found.sent.seconds:.0f}",
                _outcomes(found.sent.outcomes),
                f"{during.api_cpu_s / during.seconds:.2f}",
                f"{during.host_cpu_s / during.seconds:.2f}",
                f"{found.sent.cpu_s / found.sent.seconds:.2f}",
            )
        )
    columns = ("during", "/health p95, ms", "admin p95, ms", "a second", "outcomes")
    cores = ("cores: API", "cores: host", "cores: attacker")
    return Table("During the floods", (*columns, *cores), tuple(lines))


def memory_table(all_found: Sequence[Found]) -> Table:
    """Return a table of the RSS of both processes before, at most, and after.

    Kept is how much their own memory (USS) has grown since before the first flood of this kind.
    Kept again is the growth since before the flood that counts, without what is allocated once.
    """
    lines = []
    for found in all_found:
        of = found.memory
        api = " / ".join(f"{of[name].api_rss / MIB:.0f}" for name in PHASES)
        host = " / ".join(f"{of[name].host_rss / MIB:.0f}" for name in PHASES)
        kept = [f"{kept_mib(found, since):.1f}" for since in (FIRST, "before")]
        lines.append((_name(found), api, host, *kept))
    columns = ("MiB: before / most / after", "API process", "engine host", "kept", "kept again")
    return Table("Memory", columns, tuple(lines))


def tables(all_found: Sequence[Found]) -> tuple[Table, ...]:
    return waits_table(all_found), others_table(all_found), memory_table(all_found)


def _name(found: Found) -> str:
    kind = found.kind
    return f"({kind.name})" if kind.is_control else kind.name


def _errors(found: Found) -> list[Any]:
    """Return the failures of all clients except the attacker, in all three phases."""
    return [
        sample
        for phase in found.phases.values()
        for samples in phase.samples.values()
        for sample in samples
        if sample.error
    ]


def _phase(phase: Phase) -> dict[str, Any]:
    waits = {name: _waits(phase, name) for name in WAITS}
    cpu = {"api_cpu_s": phase.api_cpu_s, "host_cpu_s": phase.host_cpu_s}
    return {"s": phase.seconds, **waits, **cpu}


def _waits(phase: Phase, name: str) -> dict[str, Any]:
    samples = phase.samples[name]
    result: dict[str, Any] = {"n": len(samples), "errors": sum(bool(s.error) for s in samples)}
    if samples:
        summary = summarize([sample.waited_s * 1000 for sample in samples])
        result |= {"p50_ms": summary.p50, "p95_ms": summary.p95, "max_ms": summary.maximum}
    return {key: round(value, 2) for key, value in result.items()}


def _memory(memory: Memory) -> dict[str, float]:
    names = ("api_rss", "host_rss", "api_uss", "host_uss")
    return {name: round(getattr(memory, name) / MIB, 1) for name in names}


def _outcomes(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
