"""Configurations of small models with every kind of attention; their weights are vLLM's dummies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vllm_hotswap.demo.quickstart import MODELS

COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2048,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

MIXED = ["sliding_attention", "sliding_attention", "full_attention"] * 2

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "full": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "sliding": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 128,
    },
    "phi3": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": 128},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "layer_types": MIXED,
        "sliding_window": 128,
        "query_pre_attn_scalar": 32,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "sliding_window": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 64,
    },
    "chunked": {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "attention_chunk_size": 128,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 256,
        "no_rope_layers": [1, 1, 0] * 2,
        "layer_types": ["chunked_attention", "chunked_attention", "full_attention"] * 2,
    },
    "hybrid": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "layer_types": ["mamba", "mamba", "attention"] * 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 256,
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 32,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "mamba_chunk_size": 64,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "mamba": {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "num_heads": 8,
        "head_dim": 32,
        "state_size": 32,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": 64,
        "conv_kernel": 4,
    },
    "mla": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "head_dim": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
    "encoder": {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    },
}


def make(folder: Path, name: str, called: str = "", **sizes: int) -> Path:
    """Make a folder with the model's configuration and a tokenizer; vLLM makes up its weights."""
    folder = folder / (called or name)
    folder.mkdir()
    for file in (MODELS / "llama").glob("tokenizer*"):
        shutil.copy(file, folder)
    config = {**COMMON, **ARCHITECTURES[name], **sizes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
