"""The requests of a soak, and their right answers.

Every request is one of a few cases, all greedy. Its answer is taken once, at the start, from the
model without other work. An answer in the soak must be this text, or a beginning of it if the
answer was cut. Any other answer is wrong, whichever model gave it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.client import BadAnswer
from benchmarks.transcript import Vector

CHAT_MODELS = ("llama", "qwen")
ALIASES = (*CHAT_MODELS, "embed")
QUESTIONS = (
    "Explain Intel Gaudi in one sentence.",
    "What is the weather in Paris?",
    "Who are you?",
    "Hello",
)
SHORT_TOKENS, LONG_TOKENS = 12, 160
SIMILAR = 0.9999
"""The least cosine of two embeddings of one text: batches change the last digits."""

Reference = str | Vector


@dataclass(frozen=True, slots=True)
class Case:
    """A request without its manner: whole or streamed, patient or not."""

    alias: str
    path: str
    prompt: str
    max_tokens: int = 0

    @property
    def can_stream(self) -> bool:
        return self.max_tokens > 0

    def body(self, *, stream: bool = False) -> dict[str, Any]:
        if not self.can_stream:
            return {"model": self.alias, "input": self.prompt}
        body = {
            "model": self.alias,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        if self.path.endswith("/chat/completions"):
            return {**body, "messages": [{"role": "user", "content": self.prompt}]}
        return {**body, "prompt": self.prompt}


def all_cases() -> list[Case]:
    """Return chats and completions, short and long, of both chat models; and texts to embed."""
    generated = [
        Case(alias, path, question, tokens)
        for alias in CHAT_MODELS
        for path in ("/v1/completions", "/v1/chat/completions")
        for question in QUESTIONS
        for tokens in (SHORT_TOKENS, LONG_TOKENS)
    ]
    return generated + [Case("embed", "/v1/embeddings", question) for question in QUESTIONS]


def refuse_alike(references: Mapping[Case, Reference]) -> None:
    """Check that the answers distinguish the models; otherwise, nothing can be concluded.

    Raises:
        BadAnswer: an answer is empty, or two models give the same answer.
    """
    for case, reference in references.items():
        if not reference:
            raise BadAnswer(f"{case.alias!r} gives an empty answer to {case.prompt!r}")
        others = (other for other in references if other.alias != case.alias)
        if any(references[other] == reference for other in others):
            raise BadAnswer(f"{case.alias!r} answers {case.prompt!r} as another model does")


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the cosine; 0 for vectors of different lengths, which are of different models."""
    if len(a) != len(b):
        return 0.0
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
