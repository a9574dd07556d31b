"""How long an engine takes for requests that run together.

While `n` requests decode, each of them gets one token in every step, which takes
`step_s + per_request_s * n`. A prompt holds all of them up for `prefill_s_per_token` per token.
That is processor sharing: each engine needs one clock of tokens, and the tokens on it at which
requests end. Nothing changes for running requests when another one begins or ends. When their
engine is not stepped, the clock simply stands still.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Generic, TypeVar

from vllm_hotswap.scheduling import NEVER

Job = TypeVar("Job")


@dataclass(frozen=True, slots=True)
class Service:
    """What the work of one model takes, in seconds."""

    step_s: float = 0.008
    per_request_s: float = 0.0005
    prefill_s_per_token: float = 0.0001

    def step(self, running: int) -> float:
        """Return the seconds of a step, in which each of that many requests gets one token."""
        return self.step_s + self.per_request_s * running

    def alone_s(self, prompt_tokens: int, output_tokens: int) -> float:
        """Return the seconds of one request that runs alone."""
        return prompt_tokens * self.prefill_s_per_token + output_tokens * self.step(1)


class Engine(Generic[Job]):
    """The requests of one model, and when they end while the model is active.

    The mutable state is the clock of tokens, the seconds of prompts to process before it continues,
    the time up to which both are known, and a heap of when, on that clock, each request ends.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tokens = 0.0
        self._prefill_s = 0.0
        self._at_s = NEVER
        self._ends: list[tuple[float, int, Job]] = []
        self._begun = 0

    def __repr__(self) -> str:
        return f"<Engine running={self.running} tokens={self._tokens:.1f}>"

    @property
    def running(self) -> int:
        return len(self._ends)

    @property
    def jobs(self) -> list[Job]:
        """Requests that run, or are frozen with it."""
        return [job for _, _, job in self._ends]

    def begin(self, job: Job, prompt_tokens: int, output_tokens: int, now_s: float) -> None:
        self._run(now_s)
        self._prefill_s += prompt_tokens * self._service.prefill_s_per_token
        self._begun += 1
        heapq.heappush(self._ends, (self._tokens + output_tokens, self._begun, job))

    def start(self, now_s: float) -> None:
        """Step it from now on."""
        self._at_s = now_s

    def stop(self, now_s: float) -> None:
        """Stop stepping it; running requests are frozen."""
        self._run(now_s)
        self._at_s = NEVER

    def next_end_s(self) -> float:
        """Return when the next request ends if none begins before; `NEVER` if none runs."""
        if not self._ends or self._at_s == NEVER:
            return NEVER
        left = max(0.0, self._ends[0][0] - self._tokens)
        return self._at_s + self._prefill_s + left * self._service.step(len(self._ends))

    def end_next(self, now_s: float) -> Job:
        """End the next request; `now_s` is what `next_end_s` returned."""
        end, _, job = self._ends[0]
        self._tokens, self._prefill_s, self._at_s = max(end, self._tokens), 0.0, now_s
        heapq.heappop(self._ends)
        return job

    def _run(self, now_s: float) -> None:
        if self._at_s >= now_s:  # not stepped, or up to date
            return
        passed_s = now_s - self._at_s
        prefill_s = min(passed_s, self._prefill_s)
        self._prefill_s -= prefill_s
        if self._ends and not self._prefill_s:
            self._tokens += self._steps(passed_s - prefill_s)
        self._at_s = now_s

    def _steps(self, passed_s: float) -> float:
        """Return the steps in that time; if steps take no time, as many as any request needs."""
        step_s = self._service.step(len(self._ends))
        if step_s:
            return passed_s / step_s
        return max(end for end, _, _ in self._ends) - self._tokens
