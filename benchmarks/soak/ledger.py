"""The outcome of each request. Pure: compares what was received with what was expected."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from benchmarks.soak.cases import SIMILAR, Case, Reference, cosine
from benchmarks.transcript import Transcript, error_code, is_error, read
from benchmarks.wire import PATIENT, End, Manner, Reply

MAX_FAULTS = 50
"""How many faults are kept with details; all are counted."""

REFUSED = frozenset(
    {
        "drain_refused",
        "model_in_use",
        "model_not_active",
        "model_switching",
        "no_room",
        "not_ready",
        "queue_full",
        "switch_in_progress",
        "switch_rate_limited",
    }
)
"""Codes of errors before a request is accepted."""

FAILED = frozenset(
    {
        "drain_timeout",
        "engine_unavailable",
        "load_failed",
        "parked_request_ended",
        "switch_failed",
        "wait_timeout",
    }
)
"""Codes of errors with which an accepted request may end."""


class Outcome(Enum):
    """How a request ended: exactly one of these."""

    ANSWERED = "answered"
    FAILED = "failed explicitly"
    LEFT = "left by its client"
    EVICTED = "slow client, connection closed"
    REFUSED = "refused"
    LOST = "lost"
    HUNG = "hung"
    WRONG = "wrong"
    UNEXPECTED = "unexpected error"

    @property
    def is_fault(self) -> bool:
        return self in FAULTS


FAULTS = (Outcome.LOST, Outcome.HUNG, Outcome.WRONG, Outcome.UNEXPECTED)


@dataclass(frozen=True, slots=True)
class Verdict:
    """An outcome, with the error's code, or with what is wrong."""

    outcome: Outcome
    detail: str = ""
    was_parked: bool = False
    """Whether the stream said that it was parked."""


def judge(case: Case, reference: Reference, reply: Reply, manner: Manner = PATIENT) -> Verdict:
    """Judge how a request for a case ended."""
    try:
        transcript = read(reply)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return Verdict(Outcome.UNEXPECTED, f"unreadable ({error!r}): {bytes(reply.body[:200])!r}")
    if fault := find_wrong(case, reference, transcript):
        return Verdict(Outcome.WRONG, fault, transcript.was_parked)
    return judge_end(reply, transcript, manner)


def judge_call(reply: Reply, manner: Manner = PATIENT) -> Verdict:
    """Judge how a call ended whose answer is a JSON object of its own."""
    try:
        error = error_code(json.loads(reply.body)) if is_error(reply) else None
    except (ValueError, KeyError, TypeError) as wrong:
        return Verdict(Outcome.UNEXPECTED, f"unreadable ({wrong!r}): {bytes(reply.body[:200])!r}")
    return judge_end(reply, Transcript(error=error, is_done=error is None), manner)


def judge_end(reply: Reply, transcript: Transcript, manner: Manner) -> Verdict:
    """Judge how a request ended whose answer contains nothing wrong."""
    if reply.end is End.COMPLETE:
        outcome, detail = _judge_complete(reply, transcript)
    elif reply.end is End.LEFT:
        outcome, detail = Outcome.LEFT, ""
    elif reply.end is End.HUNG:
        outcome, detail = Outcome.HUNG, f"no end after {reply.duration_s:.0f} s"
    elif manner.is_slow and reply.status:
        outcome, detail = Outcome.EVICTED, ""
    else:
        outcome, detail = Outcome.LOST, reply.detail
    return Verdict(outcome, detail, transcript.was_parked)


def _judge_complete(reply: Reply, transcript: Transcript) -> tuple[Outcome, str]:
    if transcript.error is not None:
        if transcript.is_done:
            return Outcome.UNEXPECTED, f"{transcript.error}, and then [DONE]"
        if transcript.error in REFUSED:
            return Outcome.REFUSED, transcript.error
        if transcript.error in FAILED:
            return Outcome.FAILED, transcript.error
        return (
            Outcome.UNEXPECTED,
            f"{reply.status} {transcript.error}: {bytes(reply.body[-300:])!r}",
        )
    if not transcript.is_done:
        return Outcome.LOST, "the stream ended without [DONE] and without an error"
    return Outcome.ANSWERED, ""


def find_wrong(case: Case, reference: Reference, transcript: Transcript) -> str | None:
    """Return what differs from the model's answer alone, if anything."""
    if strangers := transcript.models - {case.alias}:
        return f"asked {case.alias!r}, but {', '.join(sorted(strangers))} answered"
    if transcript.error == "wrong_stamp":
        return "an output had the stamp of another model or epoch"
    whole = transcript.is_done and transcript.error is None
    if isinstance(reference, str):
        fits = transcript.text == reference if whole else reference.startswith(transcript.text)
        if not fits:
            return f"{transcript.text!r} instead of {reference!r}"
        if whole and transcript.finish not in {"length", "stop"}:
            return f"ended as if complete with finish_reason {transcript.finish!r}"
    elif whole and (similar := cosine(transcript.vector, reference)) < SIMILAR:
        return f"an embedding with a cosine of {similar:.5f} to the right one"
    return None


# --- accounts ---------------------------------------------------------------------------


@dataclass(slots=True)
class Ledger:
    """All requests. The mutable state is which are open, and counts of outcomes, by kind."""

    counts: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    """Errors of refused and failed requests, by code."""
    begun: int = 0
    parked: Counter[Outcome] = field(default_factory=Counter)
    """Outcomes of streams that had said that they were parked."""
    longest_s: float = 0.0
    faults: list[dict[str, Any]] = field(default_factory=list)
    open: dict[int, str] = field(default_factory=dict)

    def begin(self, kind: str) -> int:
        """Record the start of a request. Returns its number."""
        self.begun += 1
        self.open[self.begun] = kind
        return self.begun

    def end(self, number: int, verdict: Verdict, reply: Reply, what: str) -> None:
        """Record the end of a request. Raises KeyError if it has ended before."""
        kind = self.open.pop(number)
        self.counts[kind, verdict.outcome] += 1
        self.longest_s = max(self.longest_s, reply.duration_s)
        if verdict.was_parked:
            self.parked[verdict.outcome] += 1
        if verdict.outcome in {Outcome.REFUSED, Outcome.FAILED}:
            self.codes[verdict.detail] += 1
        if verdict.outcome.is_fault and len(self.faults) < MAX_FAULTS:
            self.faults.append(
                {
                    "number": number,
                    "kind": kind,
                    "what": what,
                    "outcome": verdict.outcome.value,
                    "detail": verdict.detail,
                    "status": reply.status,
                    "sent_s": reply.sent_s,
                    "duration_s": reply.duration_s,
                    "was_parked": verdict.was_parked,
                    "body_end": reply.body[-400:].decode(errors="replace"),
                }
            )

    def total(self, *outcomes: Outcome) -> int:
        """Return the number of requests of all kinds with one of these outcomes."""
        return sum(count for (_, one), count in self.counts.items() if one in outcomes)

    def count(self, kind: str, outcome: Outcome) -> int:
        return self.counts[kind, outcome]

    @property
    def kinds(self) -> list[str]:
        return sorted({kind for kind, _ in self.counts})

    @property
    def unaccounted(self) -> int:
        """The number of requests that have started and have no outcome."""
        return self.begun - sum(self.counts.values())
