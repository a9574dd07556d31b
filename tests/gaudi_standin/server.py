"""A server on the stand-in for a Gaudi, its requests, and what another program would answer.

Answers are compared by tokens and by their logarithmic probabilities: the tiny models say much the
same to everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ports import free_port
from tests.integration.processes import QUICKSTART_MODULE, ServerProcess

WRONG = ("Traceback", "Exception ignored", "hit config.recompile_limit")
"""What no log of a server has."""

WARM_UP_S = 900.0
"""Within which a server is to serve: two compiled models warm up, on two busy cores."""

TOKENS, RANKS = 12, 5

FOX = "The quick brown fox jumps over the lazy dog. "
PROMPTS = ["Hello", FOX * 6]
"""One is in one block of KV memory, and one in two."""

NEAR = 0.15
"""Logarithmic probabilities in bfloat16: prompts that are found in the prefix cache are computed
in other pieces."""

NEAR_ANOTHER = 0.5
"""The same, if another program has computed them, with other kernels."""


@contextmanager
def serving(
    folder: Path, config: str, board: Path, environment: Mapping[str, str]
) -> Iterator[ServerProcess]:
    """A server, started as the quickstart says; it ends well, and its log has nothing wrong.

    Args:
        folder: for the configuration, which is `config`, and the log.
        board: for the counts of the device, whose new memory holds garbage.
    """
    file = folder / "multi_models.yaml"
    file.write_text(config, encoding="utf-8")
    variables = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HPU_MULTI_MODEL_CONFIG": str(file),
        "FAKEHPU_BOARD": str(board),
        "FAKEHPU_DIRTY": "1",
        **environment,
    }
    running = ServerProcess.start(
        ["-m", QUICKSTART_MODULE],
        free_port(),
        folder / "server.log",
        variables,
        within_s=WARM_UP_S,
    )
    try:
        yield running
    finally:
        ended = running.stop()
    assert ended == 0, running.log_tail()
    log = running.log.read_text(errors="replace")
    for wrong in WRONG:
        assert wrong not in log


def post(server: ServerProcess, path: str, **body: Any) -> dict[str, Any]:
    response = server.client.post(path, json=body)
    assert 200 == response.status_code, response.text
    return dict(response.json())


def switch(server: ServerProcess, model: str) -> None:
    post(server, "/v1/models/switch", model=model, drain_timeout=60)


def status(server: ServerProcess, model: str) -> dict[str, Any]:
    return dict(server.client.get("/admin/status").json()["models"][model])


@dataclass(frozen=True)
class Answer:
    """The tokens that answer each prompt, and how probable they and the next ones were."""

    tokens: list[list[int]]
    logprobs: list[float]


def ask(server: ServerProcess, model: str, prompts: list[str] = PROMPTS) -> Answer:
    """Ask one after the other: what runs together keeps a few bytes more for the next step."""
    choices = [
        post(
            server,
            "/v1/completions",
            model=model,
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0,
            ignore_eos=True,
            logprobs=RANKS,
            return_token_ids=True,
            return_tokens_as_token_ids=True,  # as names of ranks: texts of tokens may be the same
        )["choices"][0]
        for prompt in prompts
    ]
    return Answer(
        [list(choice["token_ids"]) for choice in choices],
        [
            value
            for choice in choices
            for ranks in choice["logprobs"]["top_logprobs"]
            for value in sorted(ranks.values(), reverse=True)[:RANKS]
        ],
    )


def check_same(expected: Answer, answer: Answer) -> None:
    assert expected.tokens == answer.tokens
    assert pytest.approx(expected.logprobs, abs=NEAR) == answer.logprobs


def by_transformers(checkpoint: Path, prompts: list[str] = PROMPTS) -> Answer:
    """Return what transformers answers, on the CPU, without any cache."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    tokens, logprobs = [], []
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        said: list[int] = []
        for _ in range(TOKENS):
            with torch.no_grad():
                scores = network(torch.tensor([ids + said])).logits[0, -1].float().log_softmax(-1)
            said.append(int(scores.argmax()))
            logprobs += scores.topk(RANKS).values.tolist()
        tokens.append(said)
    return Answer(tokens, logprobs)


def check_as_transformers(checkpoint: Path, answer: Answer) -> float:
    """Check that it is the checkpoint's: the plugin's kernels, blocks and buckets are right.

    Returns the largest difference of a logarithmic probability.
    """
    theirs = by_transformers(checkpoint)
    assert theirs.tokens == answer.tokens
    furthest = max(
        abs(their - our) for their, our in zip(theirs.logprobs, answer.logprobs, strict=True)
    )
    assert furthest < NEAR_ANOTHER
    return furthest
