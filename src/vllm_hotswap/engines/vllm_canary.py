"""Requests a canary through vLLM's own client of the engine. Checked on vLLM 0.32.0.

Relies on: `AsyncLLM.generate` and `encode` with token ids, `SamplingParams`, `PoolingParams.task`.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import Any

from vllm_hotswap.engines.canary import Canary
from vllm_hotswap.host import CANARY_ID

LENGTH = 4
"""Tokens of the prompt."""

POOLING_TASKS = ("embed", "classify", "token_embed", "token_classify")
"""For models that do not generate, in order of preference."""

POOLED_VALUES = 32


def can_be_asked(tasks: Collection[str]) -> bool:
    """Whether a model can answer token ids alone; a speech model, for example, cannot."""
    return "generate" in tasks or any(task in tasks for task in POOLING_TASKS)


def is_overflow(error: Exception) -> bool:
    """Whether vLLM's own queue limits refused the request, which says nothing of the model."""
    return type(error).__name__ in ("QueueOverflowError", "MaxQueuedTokensError")


async def ask_for_canary(client: Any, config: Any, tasks: Collection[str]) -> Canary:
    """Return the canary that the engine generates now."""
    model_config = config.model_config
    prompt = {"type": "token", "prompt_token_ids": prompt_ids(model_config)}
    number = f"{CANARY_ID}{uuid.uuid4().hex[:12]}"
    if "generate" in tasks:
        return await _generate(client, prompt, number, _logprobs(config))
    return await _pool(client, prompt, number, next(t for t in POOLING_TASKS if t in tasks))


def _logprobs(config: Any) -> int | None:
    """Return how many log-probabilities to ask for."""
    allowed: int = config.model_config.max_logprobs
    return 2 if allowed < 0 else min(2, allowed) or None


def prompt_ids(model_config: Any) -> list[int]:
    """Return ids from the middle of the vocabulary: special tokens are at its ends."""
    size = model_config.get_vocab_size()
    length = max(1, min(LENGTH, model_config.max_model_len - 1))
    return [size * number // (2 * LENGTH) for number in range(1, length + 1)]


async def _generate(client: Any, prompt: Any, number: str, logprobs: int | None) -> Canary:
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=logprobs)
    *_, last = [output async for output in client.generate(prompt, params, number)]
    completion = last.outputs[0]
    likeliest = completion.logprobs[0] if completion.logprobs else {}
    found = {token: entry.logprob for token, entry in likeliest.items()}
    return Canary(completion.token_ids[0], found)


async def _pool(client: Any, prompt: Any, number: str, task: str) -> Canary:
    from vllm.pooling_params import PoolingParams

    *_, last = [output async for output in client.encode(prompt, PoolingParams(task=task), number)]
    values = last.outputs.data.flatten()[:POOLED_VALUES].float().tolist()
    return Canary(pooled=tuple(values))
