"""Makes the zoo's checkpoints: from `config.json` on, with random weights, in seconds, offline.

`python -m tests.zoo.make FOLDER [NAME ...]`. The classes of transformers give names and shapes; the
tokenizer is that of the shipped model `llama`. Weights are wide enough that greedy texts vary: at a
usual initialisation a random model repeats one token, and any two would give the same answers.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from vllm_hotswap.demo.quickstart import MODELS

WEIGHTS = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

COMMON: Mapping[str, Any] = {
    "vocab_size": 1088,  # of the tokenizer: every token has a text
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES: Mapping[str, Any] = {
    **COMMON,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest of vLLM's CPU attention
    "max_position_embeddings": 512,
}
EXPERTS: Mapping[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
WINDOW = 16
"""Tokens of a sliding window, fewer than a prompt has."""

LEFT_AS_MADE = ("A_log", "dt_bias", ".D", "conv1d", "norm", "layernorm", "ln_", "sinks")
"""Parts of names of weights whose scale differs from a matrix's."""


def config(kind: str, sizes: Mapping[str, Any] = SIZES, **more: Any) -> Any:
    """Return a configuration of transformers' class `kind`."""
    return getattr(transformers, kind)(**{**sizes, **more})


def causal(
    kind: str, sizes: Mapping[str, Any] = SIZES, dtype: str = "bfloat16", **more: Any
) -> Any:
    """Return a text model with random weights."""
    made = config(kind, sizes, **more)
    return transformers.AutoModelForCausalLM.from_config(made, dtype=getattr(torch, dtype))


def llama() -> Any:
    return causal("LlamaConfig")


def draft() -> Any:
    """Return the draft model for `llama`."""
    return causal("LlamaConfig", num_hidden_layers=1)


def qwen3() -> Any:
    return causal("Qwen3Config", dtype="float32")


def gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention"] * 2
    more = {"sliding_window": WINDOW, "layer_types": kinds, "query_pre_attn_scalar": 32}
    return causal("Gemma3TextConfig", **more)


def phi3() -> Any:
    return causal("Phi3Config", dtype="float16", sliding_window=WINDOW)


def gpt2() -> Any:
    sizes = {"n_embd": 128, "n_head": 4, "n_layer": 4, "n_positions": 512}
    return causal("GPT2Config", {**COMMON, **sizes}, dtype="float32")


def opt() -> Any:
    return causal("OPTConfig", {**SIZES, "ffn_dim": 256}, word_embed_proj_dim=128)


def mixtral() -> Any:
    return causal("MixtralConfig", num_local_experts=4, num_experts_per_tok=2)


def qwen3_moe() -> Any:
    return causal("Qwen3MoeConfig", **EXPERTS, num_experts=4)


def mamba() -> Any:
    return causal("MambaConfig", COMMON, dtype="float32", state_size=16)


def mamba2() -> Any:
    more = {"num_heads": 8, "head_dim": 32, "n_groups": 1, "state_size": 32, "chunk_size": 64}
    return causal("Mamba2Config", COMMON, **more)


def granite_hybrid() -> Any:
    heads = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 32, "mamba_chunk_size": 64}
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64}
    kinds = ["mamba", "attention"] * 2
    return causal(
        "GraniteMoeHybridConfig", layer_types=kinds, attention_multiplier=0.2, **heads, **more
    )


def jamba() -> Any:
    more = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4}
    return causal("JambaConfig", mamba_d_state=16, **more)


def qwen3_next() -> Any:
    heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    sizes = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "decoder_sparse_step": 1}
    kinds = ["linear_attention", "full_attention"] * 2
    more = {"shared_expert_intermediate_size": 64, "num_experts": 4, "layer_types": kinds}
    return causal("Qwen3NextConfig", **EXPERTS, **heads, **sizes, **more)


def lfm2() -> Any:
    kinds = ["conv", "full_attention"] * 2
    more = {"conv_dim": 128, "block_dim": 128, "block_ff_dim": 256, "block_multiple_of": 32}
    more.update(block_auto_adjust_ff_dim=False, block_ffn_dim_multiplier=1.0)
    return causal("Lfm2Config", layer_types=kinds, **more)


def deepseek() -> Any:
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}  # the only sizes of vLLM's CPU kernel
    heads = {"qk_nope_head_dim": 32, "v_head_dim": 32, "q_lora_rank": 64, "head_dim": 64}
    groups = {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "first_k_dense_replace": 1}
    more = {**latent, **heads, **groups, **EXPERTS, "num_mtp_layers": 0}
    more.update(num_key_value_heads=4, topk_method="noaux_tc")
    return causal("DeepseekV3Config", **more)


def gpt_oss() -> Any:
    kinds = ["sliding_attention", "full_attention"] * 2
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": kinds}
    return causal("GptOssConfig", sliding_window=WINDOW, **more)


def bert() -> Any:
    return transformers.BertModel(config("BertConfig")).to(torch.bfloat16)


def cross_encoder() -> Any:
    made = config("BertConfig", num_labels=1)
    return transformers.BertForSequenceClassification(made).float()


def classifier() -> Any:
    made = config("Qwen3Config", num_labels=3)
    return transformers.AutoModelForSequenceClassification.from_config(made, dtype=torch.bfloat16)


def reward() -> Any:
    """Return Qwen2's layers without a head."""
    made = config("Qwen2Config", num_labels=1)
    return transformers.AutoModel.from_config(made, dtype=torch.float32)


def llava() -> Any:
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    more = {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 64}
    made = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, **more),
        text_config=config("LlamaConfig"),
        image_token_index=6,  # the tokenizer's <|tool|>
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(made).to(torch.bfloat16)


def paligemma() -> Any:
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    more = {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 128}
    made = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**vision, **more, vision_use_head=False),
        text_config=config("GemmaConfig", tie_word_embeddings=True, num_image_tokens=4),
        image_token_index=6,  # the tokenizer's <|tool|>
        projection_dim=128,
    )
    return transformers.PaliGemmaForConditionalGeneration(made).to(torch.bfloat16)


def whisper() -> Any:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 128, "num_mel_bins": 80}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    inner = {"encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "decoder_start_token_id": 1}
    made = config("WhisperConfig", COMMON, **layers, **heads, **inner)
    return transformers.WhisperForConditionalGeneration(made).to(torch.bfloat16)


# --- changes to the written files -----------------------------------------------------------


def add_reward_head(folder: Path) -> None:
    """Add the two top layers, which transformers does not know."""
    weights = {f"model.{name}": weight for name, weight in load_file(folder / WEIGHTS).items()}
    size = SIZES["hidden_size"]
    for name, rows in (("score.0", size), ("score.2", 1)):
        weights[f"{name}.weight"] = torch.randn(rows, size) * size**-0.5
        weights[f"{name}.bias"] = torch.randn(rows)
    write(folder, weights, architectures=["Qwen2ForRewardModel"])


def add_siglip_processor(folder: Path) -> None:
    """Add the image processor of PaliGemma: four patches, a token for each."""
    name_image_token(folder)
    kinds = {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
    }
    picture = {"size": {"height": 28, "width": 28}, "image_seq_length": 4}
    write_json(folder / "preprocessor_config.json", {**kinds, **picture})


def name_image_token(folder: Path) -> None:
    for file in TOKENIZER_FILES:
        text = (folder / file).read_text(encoding="utf-8")
        (folder / file).write_text(text.replace("<|tool|>", "<image>"), encoding="utf-8")


def add_clip_processor(folder: Path) -> None:
    """Add the image processor of LLaVA, and the token that stands for an image."""
    name_image_token(folder)
    picture = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    kinds = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    write_json(folder / "preprocessor_config.json", {**kinds, **picture})
    patches = {"patch_size": 14, "num_additional_image_tokens": 1}
    more = {"vision_feature_select_strategy": "default", "image_token": "<image>"}
    write_json(folder / "processor_config.json", {**kinds, **patches, **more})


def add_sound_processor(folder: Path) -> None:
    """Add the feature extractor that turns a sound into a spectrum."""
    kinds = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80}
    more = {"processor_class": "WhisperProcessor", "sampling_rate": 16000}
    write_json(folder / "preprocessor_config.json", {**kinds, **more})


def to_int8(folder: Path) -> None:
    """Store matrices as 8-bit integers with a scale for each row; steps scale the activations."""
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / WEIGHTS).items():
        if not is_linear(name):
            weights[name] = weight
            continue
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        weights[name] = (weight.float() / scale).round().to(torch.int8)
        weights[f"{name}_scale"] = scale
    whole = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**whole, "strategy": "channel", "dynamic": False},
        "input_activations": {**whole, "strategy": "token", "dynamic": True},
    }
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme},
    }
    write(folder, weights, quantization_config=quantisation)


def to_int4(folder: Path) -> None:
    """Store matrices as random 4-bit integers, eight per word, a scale for 32 rows: GPTQ's form."""
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / WEIGHTS).items():
        if not is_linear(name):
            weights[name] = weight
            continue
        layer, (rows, columns) = name.removesuffix(".weight"), weight.shape
        words = torch.randint(-(2**31), 2**31, (columns // 8, rows), dtype=torch.int64)
        weights[f"{layer}.qweight"] = words.to(torch.int32)
        weights[f"{layer}.qzeros"] = torch.full((columns // 32, rows // 8), 0x77777777).int()
        scales = torch.rand(columns // 32, rows) * 0.4 * columns**-0.5
        weights[f"{layer}.scales"] = scales.to(weight.dtype)
        weights[f"{layer}.g_idx"] = torch.arange(columns, dtype=torch.int32) // 32
    quantisation = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    more = {"desc_act": False, "lm_head": False}
    write(folder, weights, quantization_config={**quantisation, **more})


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def write(folder: Path, weights: Mapping[str, torch.Tensor], **more: Any) -> None:
    """Replace the weights, and add to the configuration."""
    whole = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
    path = folder / "config.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **more})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


Change = Callable[[Path], None]

MAKERS: Mapping[str, tuple[Callable[[], Any], Change | None]] = {
    "llama": (llama, None),
    "draft": (draft, None),
    "llama-int8": (llama, to_int8),
    "llama-int4": (llama, to_int4),
    "qwen3": (qwen3, None),
    "gemma3": (gemma3, None),
    "phi3": (phi3, None),
    "gpt2": (gpt2, None),
    "opt": (opt, None),
    "mixtral": (mixtral, None),
    "qwen3-moe": (qwen3_moe, None),
    "mamba": (mamba, None),
    "mamba2": (mamba2, None),
    "granite-hybrid": (granite_hybrid, None),
    "jamba": (jamba, None),
    "qwen3-next": (qwen3_next, None),
    "lfm2": (lfm2, None),
    "deepseek": (deepseek, None),
    "gpt-oss": (gpt_oss, None),
    "bert": (bert, None),
    "cross-encoder": (cross_encoder, None),
    "classifier": (classifier, None),
    "reward": (reward, add_reward_head),
    "llava": (llava, add_clip_processor),
    "paligemma": (paligemma, add_siglip_processor),
    "whisper": (whisper, add_sound_processor),
}
"""Checkpoints: the model of transformers, and the changes to its files."""


def make(name: str, folder: Path) -> Path:
    """Write the checkpoint `name` to `folder / name`, unless it exists. Return its folder."""
    target = folder / name
    if not target.is_dir():
        making = folder / f".{name}"
        model, change = MAKERS[name]
        torch.manual_seed(zlib.crc32(name.encode()))
        made = model()
        widen(made)
        made.save_pretrained(making)
        for file in TOKENIZER_FILES:
            shutil.copy(MODELS / "llama" / file, making)
        if change:
            change(making)
        making.rename(target)
    return target


@torch.no_grad()
def widen(model: Any) -> None:
    """Give matrices values that neither vanish nor grow from layer to layer."""
    for name, weight in model.named_parameters():
        if any(part in name for part in LEFT_AS_MADE):
            continue
        if weight.dim() == 1:
            weight.normal_(0, 0.1)
        elif "emb" in name or name.endswith(("wte.weight", "wpe.weight")):
            weight.normal_(0, 1)
        else:
            weight.normal_(0, 2 * weight.shape[-1] ** -0.5)


def main() -> None:
    folder, *names = sys.argv[1:]
    for name in names or MAKERS:
        print(make(name, Path(folder)))


if __name__ == "__main__":
    main()
