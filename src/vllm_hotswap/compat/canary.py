"""How a canary is asked for, through vLLM's own client of the engine. Checked on vLLM 0.32.0.

Relies on: `AsyncLLM.generate` and `encode` with token ids, `SamplingParams`, `PoolingParams.task`.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import Any

from vllm_hotswap.canary import CANARY_ID, Canary

LENGTH = 4
"""Tokens of the prompt."""

POOLING_TASKS = ("embed", "classify", "token_embed", "token_classify")
"""In the order in which they are preferred, for models that do not generate."""

POOLED_VALUES = 32


async def ask_for_canary(client: Any, model_config: Any, tasks: Collection[str]) -> Canary | None:
    """What the engine generates now; None for a model that cannot be asked with token ids alone."""
    prompt = {"type": "token", "prompt_token_ids": prompt_ids(model_config)}
    number = f"{CANARY_ID}{uuid.uuid4().hex[:12]}"
    if "generate" in tasks:
        return await _generate(client, prompt, number, model_config.max_logprobs)
    task = next((task for task in POOLING_TASKS if task in tasks), None)
    return None if task is None else await _pool(client, prompt, number, task)


def prompt_ids(model_config: Any) -> list[int]:
    """Ids from the middle of the vocabulary: at its ends are the special tokens."""
    size = model_config.get_vocab_size()
    length = max(1, min(LENGTH, model_config.max_model_len - 1))
    return [size * number // (2 * LENGTH) for number in range(1, length + 1)]


async def _generate(client: Any, prompt: Any, number: str, max_logprobs: int) -> Canary:
    from vllm.sampling_params import SamplingParams

    wanted = 2 if max_logprobs < 0 else min(2, max_logprobs)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=wanted or None)
    *_, last = [output async for output in client.generate(prompt, params, number)]
    completion = last.outputs[0]
    likeliest = completion.logprobs[0] if completion.logprobs else {}
    logprobs = {token: entry.logprob for token, entry in likeliest.items()}
    return Canary(completion.token_ids[0], logprobs)


async def _pool(client: Any, prompt: Any, number: str, task: str) -> Canary:
    from vllm.pooling_params import PoolingParams

    *_, last = [output async for output in client.encode(prompt, PoolingParams(task=task), number)]
    values = last.outputs.data.flatten()[:POOLED_VALUES].float().tolist()
    return Canary(pooled=tuple(values))
