"""Random checkpoints of a few hundred kilobytes, made in a second: no tokenizer, no training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vllm_hotswap.demo import MODELS

VOCABULARY = 512


def make(kind: str, folder: Path) -> Path:
    """A checkpoint of one kind in `folder`.

    Args:
        kind: "llama" or "embed", which are shipped, or "moe" or "mamba".
    """
    if not folder.exists():
        if kind in ("llama", "embed"):
            shutil.copytree(MODELS / kind, folder)
        else:
            _random_model(kind).save_pretrained(folder)
    return folder


def _random_model(kind: str) -> Any:
    import torch
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    configs = {
        "moe": lambda: transformers.Qwen3MoeConfig(
            **sizes,
            **heads,
            intermediate_size=64,
            moe_intermediate_size=64,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=1024,
        ),
        "mamba": lambda: transformers.Mamba2Config(
            **sizes, state_size=16, num_heads=4, head_dim=32, n_groups=1, expand=2
        ),
    }
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(configs[kind]())
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8)  # so that the likeliest token depends on the prompt
    return model.to(torch.bfloat16)
