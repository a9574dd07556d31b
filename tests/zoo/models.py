"""The models of the zoo: their checkpoints, settings and questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_hotswap.demo.quickstart import MODELS

MIB = 1 << 20
FLAGS: Mapping[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 4,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 * MIB,
}
"""Settings of every model, in the server and in plain vLLM."""

PROMPTS = (
    "Hello",
    "The weather in Paris is nice today, and the weather in Berlin is cold. Who are you?",
)
"""One prompt is longer than the sliding windows."""

TOKENS = 12
"""Number of tokens that are generated for a prompt."""


@dataclass(frozen=True, eq=False)
class Model:
    """One entry of the server's configuration, and of the table in `docs/reference/models.md`.

    Attributes:
        alias: its alias.
        architecture: vLLM's name for it.
        has: the features of vLLM that only it has.
        asks: the name of its question in `questions`.
        checkpoint: the name that `make` knows, or one of the shipped models; by default the alias.
        flags: its own settings.
        cannot: part of plain vLLM's error when it cannot run the model on a CPU.
        unless: what might make it run nevertheless: instructions of the CPU, as Linux calls them,
            or a Python package.
        unasked: why it is served and moved like the others, but gets no question.
    """

    alias: str
    architecture: str
    has: str
    asks: str = "text"
    checkpoint: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)
    adapter: str = ""
    cannot: str = ""
    unless: str = ""
    unasked: str = ""

    @property
    def speaks_as(self) -> str:
        """Models of one checkpoint give the same answers, whatever their decoding."""
        return self.checkpoint or self.alias

    def folder(self, zoo: Path) -> Path:
        """Return the folder of its checkpoint."""
        name = self.checkpoint or self.alias
        return MODELS / name.removeprefix("shipped-") if name.startswith("shipped-") else zoo / name

    def settings(self, zoo: Path) -> dict[str, Any]:
        """Return vLLM's settings for it; names of checkpoints in them are folders."""
        settings = {**FLAGS, **self.flags}
        if speculative := settings.get("speculative_config"):
            named = {key: str(zoo / value) for key, value in speculative.items() if key == "model"}
            settings["speculative_config"] = {**speculative, **named}
        return settings


NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
DRAFT = {"method": "draft_model", "model": "draft", "num_speculative_tokens": 3}

NO_SCAN = "'_OpNamespace' '_C' object has no attribute 'selective_scan_fwd'"

ZOO: Sequence[Model] = (
    Model("llama", "LlamaForCausalLM", "rotary positions, grouped heads, bfloat16"),
    Model("qwen3", "Qwen3ForCausalLM", "norms of queries and keys, float32"),
    Model("gemma3", "Gemma3ForCausalLM", "sliding window on every other layer"),
    Model("phi3", "Phi3ForCausalLM", "sliding window on all layers, merged matrices, float16"),
    Model("gpt2", "GPT2LMHeadModel", "learned positions, float32"),
    Model("opt", "OPTForCausalLM", "learned positions with an offset"),
    Model("mixtral", "MixtralForCausalLM", "mixture of experts"),
    Model("qwen3-moe", "Qwen3MoeForCausalLM", "mixture of experts, its own class"),
    Model("mamba", "MambaForCausalLM", "state space", cannot=NO_SCAN),
    Model("mamba2", "Mamba2ForCausalLM", "state space, second form"),
    Model("granite-hybrid", "GraniteMoeHybridForCausalLM", "Mamba 2, attention and experts"),
    Model("jamba", "JambaForCausalLM", "Mamba, attention and experts", cannot=NO_SCAN),
    Model("qwen3-next", "Qwen3NextForCausalLM", "gated delta rule, attention and experts"),
    Model("lfm2", "Lfm2ForCausalLM", "short convolutions and attention"),
    Model("deepseek", "DeepseekV3ForCausalLM", "latent attention (MLA), experts, shared experts"),
    Model("gpt-oss", "GptOssForCausalLM", "attention sinks, sliding window, experts with biases"),
    Model("llama-int8", "LlamaForCausalLM", "compressed-tensors, 8-bit weights and activations"),
    Model(
        "llama-int4",
        "LlamaForCausalLM",
        "GPTQ, 4-bit weights",
        cannot="'_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'",
        unless="avx512f",
    ),
    Model(
        "llama-ngram",
        "LlamaForCausalLM",
        "speculative decoding from the prompt",
        checkpoint="llama",
        flags={"speculative_config": NGRAM},
    ),
    Model(
        "llama-draft",
        "LlamaForCausalLM",
        "speculative decoding with a draft model",
        checkpoint="llama",
        flags={"speculative_config": DRAFT},
    ),
    Model(
        "llama-lora",
        "LlamaForCausalLM",
        "LoRA adapter",
        checkpoint="shipped-llama",
        flags={"enable_lora": True, "max_lora_rank": 8},
        adapter="llama-pirate",
    ),
    Model("bert", "BertModel", "embeddings, bidirectional", asks="embedding"),
    Model("cross-encoder", "BertForSequenceClassification", "scores of pairs", asks="score"),
    Model("classifier", "Qwen3ForSequenceClassification", "classes, by conversion", asks="classes"),
    Model("reward", "Qwen2ForRewardModel", "a reward for each token", asks="reward"),
    Model(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        "pictures",
        asks="picture",
        cannot="No module named 'torchvision'",
        unless="torchvision",
    ),
    Model(
        "llava",
        "LlavaForConditionalGeneration",
        "pictures",
        asks="picture",
        cannot="['LlavaForConditionalGeneration'] failed to be inspected",
        unless="torchvision",
    ),
    Model(
        "whisper",
        "WhisperForConditionalGeneration",
        "encoder and decoder",
        asks="sound",
        flags={"max_num_batched_tokens": 2048},
        unasked="no audio decoder is installed",
    ),
)


def table() -> str:
    """Return the rows of the table in `docs/reference/models.md`."""
    return "".join(
        f"| `{model.alias}` | {model.architecture} | {model.has} | {_result(model)} |\n"
        for model in ZOO
    )


def _result(model: Model) -> str:
    if model.unasked:
        return f"loaded and moved, not asked: {model.unasked}"
    if not model.cannot:
        return "the same"
    where = f" without {model.unless}" if model.unless else ""
    return f"plain vLLM cannot{where}: `{model.cannot}`"
