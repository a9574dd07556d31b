"""Part `gap`: how long no request is served when one busy model takes over from another.

The gap is from the last token of model A to the first one of model B, while requests are queued for
both: more streams of A than it runs at a time, and as many requests for B, sent when the switch
starts. The alternative is to restart plain vLLM under the same load. The end of A's streams is
checked, too: each is compared with what A answers to the same prompt alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.client import BadAnswer
from benchmarks.load import completion, prompts
from benchmarks.report import SUMMARY_COLUMNS, Part, Table, summary_row
from benchmarks.servers import Launcher, Model, Server
from benchmarks.stats import ratio, summarize
from benchmarks.transcript import Transcript, read, token_times
from benchmarks.wire import PATIENT, End, Reply, ask

log = logging.getLogger("benchmarks")

RUNNING = 8
"""Requests that a model runs at a time (`max_num_seqs`)."""
CLIENTS = 12
"""How many streams of A, and how many requests for B."""
TOKENS_OF_A, TOKENS_OF_B = 128, 16
RETRY_S = 0.002
POLL_S = 0.001
ACCEPTED_S = 300.0
DISCARDED = 1
COMPLETIONS = "/v1/completions"

WAYS: Mapping[str, Mapping[str, Any]] = {
    "park": {"drain_timeout": 0, "on_drain_timeout": "park"},
    "abort": {"drain_timeout": 0, "on_drain_timeout": "abort"},
    "drain": {"drain_timeout": 300, "on_drain_timeout": "abort"},
}
"""Fields of the switch call besides its target; `drain` waits until A's streams are complete."""

BEFORE = ("validate", "drain")
"""Phases in which A may still give tokens."""


@dataclass(frozen=True, slots=True)
class Fates:
    """How A's streams ended."""

    identical: int = 0
    """Complete, and equal to A's answer alone."""
    resumed: int = 0
    """Those among them that had been parked."""
    failed: int = 0
    """Ended with an explicit error."""
    lost: int = 0
    """Ended without one."""
    wrong: int = 0


@dataclass(slots=True)
class Gaps:
    """Samples of one way to get from A to B, in milliseconds, and the ends of all its streams."""

    gap_ms: list[float] = field(default_factory=list)
    parts_ms: dict[str, list[float]] = field(default_factory=dict)
    """The gap, split into parts; a restart has none."""
    before_ms: dict[str, list[float]] = field(default_factory=dict)
    """Phases that end before the gap begins, or at about that time."""
    fates: list[Fates] = field(default_factory=list)
    answers_of_b: int = 0


async def gap(launcher: Launcher, models: tuple[Model, Model], rounds: int, restarts: int) -> Part:
    """Measure each way in each round; then the restarts."""
    first, second = (
        replace(model, settings={**model.settings, "max_num_seqs": RUNNING}) for model in models
    )
    found = {way: Gaps() for way in (*WAYS, "restart")}
    async with launcher.hotswap(first, second) as server:
        references = await _reference_answers(server, first.alias)
        for number, way in itertools.product(range(DISCARDED + rounds), WAYS):
            log.info("gap: round %d of %d, %s", number + 1, DISCARDED + rounds, way)
            gaps = found[way] if number >= DISCARDED else Gaps()
            await _switch_round(server, (first.alias, second.alias), way, references, gaps)
    for number in range(restarts):
        log.info("gap: restart %d of %d of plain vLLM", number + 1, restarts)
        await _restart_round(launcher, (first, second), references, found["restart"])
    return _part(found)


async def _reference_answers(server: Server, alias: str) -> dict[str, str]:
    """Return A's answer to each prompt when it has no other work."""
    chosen = itertools.islice(prompts("gap", words=8), CLIENTS)
    replies = {
        text: await ask(server.port, COMPLETIONS, completion(alias, text, TOKENS_OF_A))
        for text in chosen
    }
    return {text: _checked(reply).text for text, reply in replies.items()}


def _checked(reply: Reply) -> Transcript:
    transcript = read(reply)
    if reply.end is not End.COMPLETE or transcript.error or not transcript.is_done:
        raise BadAnswer(f"a request failed: {reply.detail or bytes(reply.body[-300:])!r}")
    return transcript


# --- by a switch ------------------------------------------------------------------------


async def _switch_round(
    server: Server, aliases: tuple[str, str], way: str, references: Mapping[str, str], gaps: Gaps
) -> None:
    source, target = aliases
    await _switch(server, source, WAYS["drain"])
    async with _streams(server, source, references) as streams:
        asked = [_insist(server, target, text) for text in references]
        (sent_s, told), *of_b = await asyncio.gather(_switch(server, target, WAYS[way]), *asked)
        await _switch(server, source, WAYS["drain"])  # parked streams continue
    if not told["switched"] or told["current_model"] != target:
        raise BadAnswer(f"the switch to {target!r} did not happen: {told}")
    _enter(gaps, streams, of_b, references)
    split(gaps, streams, of_b, sent_s, told)


async def _switch(
    server: Server, alias: str, options: Mapping[str, Any]
) -> tuple[float, dict[str, Any]]:
    """Switch. Returns the time before the call, and its answer."""
    reply = await ask(server.port, "/v1/models/switch", {"model": alias, **options})
    if reply.status != 200:
        raise BadAnswer(f"the switch to {alias!r} failed: {bytes(reply.body[:300])!r}")
    told: dict[str, Any] = json.loads(reply.body)
    return reply.sent_s, told


@asynccontextmanager
async def _streams(
    server: Server, alias: str, references: Mapping[str, str]
) -> AsyncIterator[list[Reply]]:
    """Keep streams of A; when the body starts, as many run as can, and after it all have ended."""
    replies = [Reply() for _ in references]
    bodies = [{**completion(alias, text, TOKENS_OF_A), "stream": True} for text in references]
    tasks = [
        asyncio.create_task(ask(server.port, COMPLETIONS, body, PATIENT, reply))
        for reply, body in zip(replies, bodies, strict=True)
    ]
    try:
        while sum(1 for reply in replies if reply.arrivals) < RUNNING:
            if any(task.done() for task in tasks):
                raise BadAnswer("a stream ended before all of them were running")
            await asyncio.sleep(POLL_S)
        yield replies
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _insist(server: Server, alias: str, text: str) -> Reply:
    """Request a stream of B until it is accepted, and return its reply."""
    body = {**completion(alias, text, TOKENS_OF_B), "stream": True}
    async with asyncio.timeout(ACCEPTED_S):
        reply = await ask(server.port, COMPLETIONS, body)
        while reply.status in {404, 503}:
            await asyncio.sleep(RETRY_S)
            reply = await ask(server.port, COMPLETIONS, body)
    _checked(reply)
    return reply


def split(
    gaps: Gaps,
    streams: Sequence[Reply],
    of_b: Sequence[Reply],
    sent_s: float,
    told: Mapping[str, Any],
) -> None:
    """Split the time between A's last token and B's first one, and add it to the samples."""
    last_s, first_s = ends(streams, of_b)
    phases: Mapping[str, float] = told["phases"]
    before_ms = sum(phases[phase] for phase in BEFORE)
    after = {name: value for name, value in phases.items() if name not in BEFORE}
    parts = {
        "last token to the end of the drain": (sent_s - last_s) * 1000 + before_ms,
        **{f"phase {name}": value for name, value in after.items()},
        "between phases": told["duration_ms"] - sum(phases.values()),
        "admission to first token": (first_s - sent_s) * 1000 - told["duration_ms"],
    }
    for name, value in parts.items():
        gaps.parts_ms.setdefault(name, []).append(value)
    for phase in BEFORE:
        gaps.before_ms.setdefault(phase, []).append(phases[phase])


# --- by a restart -----------------------------------------------------------------------


async def _restart_round(
    launcher: Launcher, models: tuple[Model, Model], references: Mapping[str, str], gaps: Gaps
) -> None:
    source, target = models
    async with launcher.plain(source) as server:
        await ask(server.port, COMPLETIONS, completion(source.alias, "Hello", 1))
        async with _streams(server, source.alias, references) as streams:
            await server.terminate()
    async with launcher.plain(target) as server:
        of_b = await asyncio.gather(*(_insist(server, target.alias, text) for text in references))
    _enter(gaps, streams, of_b, references)


# --- what came of it --------------------------------------------------------------------


def _enter(
    gaps: Gaps, streams: Sequence[Reply], of_b: Sequence[Reply], references: Mapping[str, str]
) -> None:
    last_s, first_s = ends(streams, of_b)
    gaps.gap_ms.append((first_s - last_s) * 1000)
    gaps.fates.append(fates(streams, list(references.values())))
    gaps.answers_of_b += len(of_b)


def ends(streams: Sequence[Reply], of_b: Sequence[Reply]) -> tuple[float, float]:
    """Return the times of A's last token before B's first one, and of B's first one."""
    first_s = min(token_times(reply)[0] for reply in of_b)
    times = (at_s for reply in streams for at_s in token_times(reply))
    return max(at_s for at_s in times if at_s < first_s), first_s


def fates(streams: Sequence[Reply], references: Sequence[str]) -> Fates:
    """Count how the streams ended, by comparison with what each should have said."""
    counts = {"identical": 0, "resumed": 0, "failed": 0, "lost": 0, "wrong": 0}
    for reply, reference in zip(streams, references, strict=True):
        transcript = read(reply)
        is_whole = transcript.is_done and transcript.error is None
        if not reference.startswith(transcript.text) or (is_whole and transcript.text != reference):
            counts["wrong"] += 1
        elif is_whole:
            counts["identical"] += 1
            counts["resumed"] += transcript.was_parked
        else:
            counts["failed" if transcript.error else "lost"] += 1
    return Fates(**counts)


# --- report -----------------------------------------------------------------------------


def _part(found: Mapping[str, Gaps]) -> Part:
    measured = {way: gaps for way, gaps in found.items() if gaps.gap_ms}
    rows = [summary_row(NAMES[way], summarize(g.gap_ms)) for way, g in measured.items()]
    columns = ("", *SUMMARY_COLUMNS)
    tables = [Table("Last token of A to first token of B, ms", columns, tuple(rows))]
    tables += [
        Table(f"The gap, split: {NAMES[way]}, ms", columns, _split_rows(gaps))
        for way, gaps in measured.items()
        if gaps.parts_ms
    ]
    tables.append(Table("How A's streams ended", FATE_COLUMNS, _fate_rows(measured)))
    if "restart" in measured:
        tables.append(Table("Ratio of medians", ("", "ratio"), _ratio_rows(measured)))
    samples = {way: asdict(gaps) for way, gaps in measured.items()}
    return Part("gap", tuple(tables), (), samples)


NAMES = {
    "park": "A's streams parked",
    "abort": "A's streams aborted",
    "drain": "A's streams completed",
    "restart": "restart of plain vLLM",
}
FATE_COLUMNS = (
    "",
    "streams",
    "identical to the end",
    "of them parked and resumed",
    "failed explicitly",
    "lost",
    "wrong",
    "answers of B",
)


def _split_rows(gaps: Gaps) -> tuple[tuple[str, ...], ...]:
    within = [summary_row(name, summarize(values)) for name, values in gaps.parts_ms.items()]
    before = [
        summary_row(f"(before: phase {name})", summarize(values))
        for name, values in gaps.before_ms.items()
    ]
    return (*within, *before)


def _fate_rows(measured: Mapping[str, Gaps]) -> tuple[tuple[str, ...], ...]:
    rows = []
    for way, gaps in measured.items():
        names = ("identical", "resumed", "failed", "lost", "wrong")
        counts = [sum(getattr(one, name) for one in gaps.fates) for name in names]
        streams = str(CLIENTS * len(gaps.fates))
        rows.append((NAMES[way], streams, *map(str, counts), str(gaps.answers_of_b)))
    return tuple(rows)


def _ratio_rows(measured: Mapping[str, Gaps]) -> tuple[tuple[str, ...], ...]:
    restart_ms = measured["restart"].gap_ms
    return tuple(
        (f"restart / {NAMES[way]}", f"{ratio(restart_ms, measured[way].gap_ms):.0f}")
        for way in WAYS
        if way in measured
    )
