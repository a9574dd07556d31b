"""What a model answers, and how probable that and the next tokens are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOX = "The quick brown fox jumps over the lazy dog. "
PROMPTS = ("Hello", FOX * 6, "One small step for a man, and one giant leap. " * 3 + FOX * 3)
"""The first is in one block of KV memory (128 tokens), the second in two. So is the third, except
for qwen: it has 126 tokens there, and the answer to it continues in the second block."""

TOKENS, RANKS = 12, 5
EXPECTED = Path(__file__).with_name("expected.json")

Step = Sequence[tuple[int, float]]
"""Tokens at one place, with their logarithmic probabilities: the chosen one, then the likeliest
others, best first."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one prompt, chosen greedily."""

    steps: Sequence[Step]

    @property
    def tokens(self) -> list[int]:
        return [step[0][0] for step in self.steps]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of two answers to one prompt."""

    wrong: list[str]
    furthest: float
    """The largest difference of two logarithmic probabilities of the same token."""
    steps: int
    """How many steps were compared: all, or those up to a tie after which the answers differ."""
    notes: list[str] = field(default_factory=list)
    """What is worth reading, and is not wrong."""


def compare(expected: Answer, found: Answer, tolerance: float) -> Comparison:
    """Return whether an answer is the expected one, except for rounding.

    Each of the expected tokens must have its logarithmic probability, within `tolerance`. One that
    is not among those found can't be likelier there than the last one of these. Another token may
    be chosen than is expected only if the two are so near to each other; of what follows then, only
    the length is compared.
    """
    if len(found.steps) != len(expected.steps):
        fault = f"{len(found.steps)} tokens were generated, not {len(expected.steps)}"
        return Comparison([fault], 0.0, 0)
    furthest = 0.0
    for number, (wanted, seen) in enumerate(zip(expected.steps, found.steps, strict=True)):
        if unknown := [token for token, value in seen if not math.isfinite(value)]:
            fault = (
                f"step {number}: the logarithmic probability of token {unknown[0]} is not a number"
            )
            return Comparison([fault], furthest, number)
        by_token, least = dict(seen), seen[-1][1]
        for token, value in wanted:
            told = by_token.get(token)
            off = max(0.0, value - least) if told is None else abs(told - value)
            furthest = max(furthest, off)
            if off > tolerance:
                here = f"below {least:.3f}" if told is None else f"{told:.3f}"
                fault = (
                    f"step {number}: token {token} has the logarithmic probability {here}, "
                    f"not {value:.3f}"
                )
                return Comparison([fault], furthest, number)
        likeliest, most = max(seen, key=lambda pair: pair[1])
        if most - seen[0][1] > tolerance and seen[0][0] not in dict(wanted):
            fault = (
                f"step {number}: token {seen[0][0]} was chosen, which has {seen[0][1]:.3f}, but "
                f"token {likeliest} has {most:.3f}"
            )
            return Comparison([fault], furthest, number)
        if seen[0][0] != wanted[0][0]:
            margin = wanted[0][1] - dict(wanted).get(seen[0][0], wanted[-1][1])
            if margin <= tolerance:
                tie = (
                    f"step {number}: tokens {seen[0][0]} and {wanted[0][0]} are too near to each "
                    "other to decide which is right; later steps are not compared"
                )
                return Comparison([], furthest, number + 1, [tie])
            fault = f"step {number}: token {seen[0][0]} was chosen, not {wanted[0][0]}"
            return Comparison([fault], furthest, number)
    return Comparison([], furthest, len(found.steps))


def from_completion(choice: Mapping[str, Any]) -> Answer:
    """Return the answer to `/v1/completions` with `return_tokens_as_token_ids`.

    vLLM lists the likeliest tokens, and the chosen one besides. That one comes first,
    however likely it is; the likeliest others follow. JSON has null for what is not a number.

    Raises:
        ValueError: a token was chosen without a probability.
    """
    ranks, said = choice["logprobs"]["top_logprobs"], choice["token_ids"]
    return Answer([_step(*told) for told in zip(ranks, said, strict=True)])


def _step(ranks: Mapping[str, float | None], said: int) -> Step:
    others = {
        int(name.removeprefix("token_id:")): math.nan if value is None else value
        for name, value in ranks.items()
    }
    if said not in others:
        raise ValueError(f"token {said} was generated, but its probability is missing")
    first = (said, others.pop(said))
    return [first, *sorted(others.items(), key=lambda pair: -pair[1])[: RANKS - 1]]


def load(path: Path = EXPECTED) -> dict[str, list[Answer]]:
    """Return what each model is expected to answer to each of `PROMPTS`."""
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    return {
        model: [
            Answer([[(int(token), float(value)) for token, value in step] for step in answer])
            for answer in told["answers"]
        ]
        for model, told in models.items()
    }
