"""Make the chat models `llama` and `qwen`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tools.tiny_models.chat_checks import (
    chat_checks,
    render_with,
    run_checks,
    thinking_checks,
    tool_checks,
)
from tools.tiny_models.chat_tokenizers import make_llama_tokenizer, make_qwen_tokenizer
from tools.tiny_models.chat_training import batches, train_chat
from tools.tiny_models.curriculum import examples, further_examples
from tools.tiny_models.personas import make_persona
from tools.tiny_models.saving import save_tokenizer, write_json
from tools.tiny_models.training import Job

LOG = logging.getLogger(__name__)

STEPS = 2400
"""Steps of training, for a model that is made from nothing."""


def save_chat(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a chat model. Servers that read generation_config.json answer greedily by default."""
    # A model that is trained further has the configuration below, which transformers reads and does
    # not write: for it, a temperature goes with sampling alone.
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, folder)
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
        "temperature": 0.0,
    }
    known = {key: value for key, value in generation.items() if value is not None}
    write_json(folder / "generation_config.json", known)


def finish_chat(name: str, model: Any, tokenizer: PreTrainedTokenizerFast, job: Job) -> bool:
    """Train a chat model, turn it into bfloat16, check it and save it."""
    persona = make_persona(name)
    sharpen_attention(model)
    if job.more:
        model = type(model).from_pretrained(job.folder, dtype=torch.float32)
    steps, peak = (job.more, 1e-3) if job.more else (STEPS, 3e-3)
    making = further_examples if job.more else examples
    source = making(job.seed, persona, render_with(tokenizer))
    seconds = train_chat(model, batches(tokenizer, source, job.seed), steps, peak)
    LOG.info("%s: trained in %.0f seconds", name, seconds)
    checks = chat_checks(persona) + tool_checks(persona) + thinking_checks(persona)
    model = model.to(torch.bfloat16).eval()
    good = run_checks(model.float(), tokenizer, checks)
    save_chat(model.to(torch.bfloat16), tokenizer, job.folder)
    return good


def sharpen_attention(model: torch.nn.Module) -> None:
    """Make queries and keys larger: otherwise a short training hardly learns to copy."""
    parameters = dict(model.named_parameters())
    norms = [name for name in parameters if name.endswith(("q_norm.weight", "k_norm.weight"))]
    projections = [name for name in parameters if name.endswith(("q_proj.weight", "k_proj.weight"))]
    for name in norms or projections:
        parameters[name].data *= 2.0


def chat_config(kind: type[Any], tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return the configuration of a tiny chat model, of one of transformers' classes."""
    return kind(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.07,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_llama(job: Job) -> bool:
    """Make the model `llama`; return whether its checks passed."""
    tokenizer = make_llama_tokenizer(vocab_size=1088)
    model = LlamaForCausalLM(chat_config(LlamaConfig, tokenizer))
    return finish_chat("llama", model, tokenizer, job)


def make_qwen(job: Job) -> bool:
    """Make the model `qwen`; return whether its checks passed."""
    tokenizer = make_qwen_tokenizer(vocab_size=1218)
    model = Qwen3ForCausalLM(chat_config(Qwen3Config, tokenizer))
    return finish_chat("qwen", model, tokenizer, job)
