"""One soak: what its actors share, and how they send requests."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.client import BadAnswer
from benchmarks.servers import Server
from benchmarks.soak.cases import Case, Reference, refuse_alike
from benchmarks.soak.growth import Sample
from benchmarks.soak.ledger import Ledger, Outcome, Verdict, judge, judge_call
from benchmarks.transcript import read
from benchmarks.wire import PATIENT, End, Manner, Reply, ask

POLICIES = ("abort", "park", "refuse")
RECOVERY_S = 120.0
"""After its engine host has ended, the server must be ready and answer within this time."""
QUIET_CALL = Manner(deadline_s=10)
GOLDEN_CALL = Manner(deadline_s=60)

log = logging.getLogger("benchmarks")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do to the server, and for how long."""

    duration_s: float
    seed: int
    kill_every_s: float
    """0 for no kills."""
    clients: int
    policies: tuple[str, ...]
    """The actions to request at a drain's deadline."""


@dataclass(frozen=True, slots=True)
class Switched:
    """A switch that took place, as the server reported it."""

    at_s: float
    target: str
    policy: str
    drain_timeout_s: float
    epoch: int
    duration_ms: float
    phases_ms: Mapping[str, float]
    requests_cut: int
    requests_parked: int


@dataclass(slots=True)
class Kill:
    """A kill of the engine host, and what followed. Seconds from the signal; None: not yet."""

    signal: str
    phase: str
    """The phase of the switch that was under way."""
    at_s: float
    noticed_s: float | None = None
    """Until a status reported it."""
    ready_s: float | None = None
    answered_s: float | None = None
    """Until the end of the first answer to a request that was sent after it."""


@dataclass(slots=True)
class Run:
    """What the actors share; all of it is changed on one event loop."""

    server: Server
    plan: Plan
    references: Mapping[Case, Reference]
    temp: Path
    started_s: float = field(default_factory=time.perf_counter)
    active: str = ""
    """The model last known to be active; most requests go there."""
    clients_left: int = 0
    """Clients that are still at work; switches continue until there are none."""
    ledger: Ledger = field(default_factory=Ledger)
    switched: dict[str, Switched] = field(default_factory=dict)
    """Switches by operation: calls that joined one are one switch."""
    kills: list[Kill] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Faults that are not about a request."""

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started_s

    @property
    def is_over(self) -> bool:
        """Whether the time is over and no recovery is under way, or the server has ended."""
        if self.server.exit_status is not None:
            return True
        return self.elapsed_s >= self.plan.duration_s and not self._is_recovering

    @property
    def _is_recovering(self) -> bool:
        kill = self.kills[-1] if self.kills else None
        if kill is None or (kill.ready_s is not None and kill.answered_s is not None):
            return False
        return time.perf_counter() - kill.at_s < RECOVERY_S

    async def request(
        self, case: Case, *, stream: bool = False, manner: Manner = PATIENT
    ) -> Outcome:
        """Send a request for a case, and record its outcome."""
        kind = "stream" if stream else ("whole answer" if case.can_stream else "embedding")
        number = self.ledger.begin(kind)
        reply = await ask(self.server.port, case.path, case.body(stream=stream), manner)
        verdict = judge(case, self.references[case], reply, manner)
        what = f"{case.alias} {case.path} {case.prompt!r} {case.max_tokens} tokens, {manner}"
        self._enter(number, verdict, reply, what)
        if verdict.outcome is Outcome.ANSWERED:
            self._note_answer(reply)
        return verdict.outcome

    async def call(
        self, kind: str, path: str, body: Mapping[str, Any], manner: Manner = PATIENT
    ) -> dict[str, Any] | None:
        """Send a call, and record its outcome. Returns the answer if it succeeded."""
        number = self.ledger.begin(kind)
        reply = await ask(self.server.port, path, body, manner)
        verdict = judge_call(reply, manner)
        self._enter(number, verdict, reply, f"{path} {json.dumps(body)}, {manner}")
        if verdict.outcome is not Outcome.ANSWERED:
            return None
        told: dict[str, Any] = json.loads(reply.body)
        return told

    async def get(self, path: str) -> tuple[int, Any]:
        """Get a small route that must always answer: status and answer, or (0, None)."""
        reply = await ask(self.server.port, path, manner=QUIET_CALL)
        if reply.end is not End.COMPLETE:
            self.problem(f"GET {path}: {reply.end.value} {reply.detail}")
            return 0, None
        return reply.status, json.loads(reply.body) if reply.body else None

    def problem(self, text: str) -> None:
        log.warning("problem: %s", text)
        self.problems.append(f"after {self.elapsed_s:.1f} s: {text}")

    def _enter(self, number: int, verdict: Verdict, reply: Reply, what: str) -> None:
        self.ledger.end(number, verdict, reply, what)
        if verdict.outcome.is_fault:
            log.warning("%s: %s (%s)", verdict.outcome.value, verdict.detail[:300], what)

    def _note_answer(self, reply: Reply) -> None:
        kill = self.kills[-1] if self.kills else None
        if kill is not None and kill.answered_s is None and reply.sent_s > kill.at_s:
            kill.answered_s = reply.ended_s - kill.at_s


async def take_references(server: Server, cases: Sequence[Case]) -> dict[Case, Reference]:
    """Return the answer to every case, from its model without any other work.

    Raises:
        BadAnswer: a case was not answered, or the answers do not tell the models apart.
    """
    references: dict[Case, Reference] = {}
    for case in sorted(cases, key=lambda one: one.alias):
        switch = await ask(server.port, "/v1/models/switch", {"model": case.alias}, GOLDEN_CALL)
        reply = await ask(server.port, case.path, case.body(), GOLDEN_CALL)
        if switch.status != 200 or reply.status != 200:
            text = (reply.body or switch.body)[:300].decode(errors="replace")
            raise BadAnswer(f"{case.alias!r} did not answer {case.prompt!r}: {text}")
        transcript = read(reply)
        references[case] = transcript.text or transcript.vector
    refuse_alike(references)
    return references
