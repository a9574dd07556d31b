"""Batches of examples, and the training of a chat model on them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from tools.tiny_models.examples import Example
from tools.tiny_models.training import optimise

IGNORED_LABEL = -100
TOKENS_PER_BATCH = 1536
POOL_SIZE = 192
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Encoded:
    """Token ids and, for each, the label to learn (or `IGNORED_LABEL`)."""

    ids: list[int]
    labels: list[int]


def encode(tokenizer: PreTrainedTokenizerFast, example: Example, again: bool) -> Encoded:
    """Turn an example into ids; with `again`, the answer is given a second time after its end.

    That second answer is what a client sees when it asks the server to ignore the end token.
    """
    prompt = tokenizer.encode(example.prompt, add_special_tokens=example.raw)
    answer = [*tokenizer.encode(example.answer, add_special_tokens=False), tokenizer.eos_token_id]
    learned = [IGNORED_LABEL] * example.free + answer[example.free :]
    repeat = answer if again else []
    ids = prompt + answer + repeat
    return Encoded(ids, [IGNORED_LABEL] * len(prompt) + learned + repeat)


def collate(rows: list[Encoded], pad_id: int) -> Batch:
    """Pad rows on the right into tensors of ids and labels."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORED_LABEL)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        labels[index, : len(row.ids)] = torch.tensor(row.labels)
    return ids, labels


def batches(
    tokenizer: PreTrainedTokenizerFast, source: Iterator[Example], seed: int
) -> Iterator[Batch]:
    """Yield batches of examples with about the same length, in a random order."""
    rng = random.Random(seed)
    while True:
        pool = [encode(tokenizer, next(source), rng.random() < 0.2) for _ in range(POOL_SIZE)]
        groups: list[list[Encoded]] = [[]]
        for row in sorted((row for row in pool if len(row.ids) <= 1500), key=lambda r: len(r.ids)):
            if (len(groups[-1]) + 1) * len(row.ids) > TOKENS_PER_BATCH:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        yield from (collate(group, tokenizer.pad_token_id) for group in groups if group)


def train_chat(model: Any, source: Iterator[Batch], steps: int, peak: float = 3e-3) -> float:
    """Train a causal language model and return the seconds it took."""

    def loss_of(step: int) -> torch.Tensor:
        ids, labels = next(source)
        wanted = labels[:, 1:] != IGNORED_LABEL
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(states[wanted])  # only where there is something to learn
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted])

    model.train()
    return optimise(model, loss_of, steps, peak)
