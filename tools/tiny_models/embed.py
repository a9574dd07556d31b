"""Make the sentence embedding model `embed`."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import torch
from transformers import BertModel, PreTrainedTokenizerFast

from tools.tiny_models.bert import bert_config, make_bert_tokenizer
from tools.tiny_models.examples import Message
from tools.tiny_models.questions import QUESTIONS
from tools.tiny_models.saving import save_tokenizer, write_json
from tools.tiny_models.sentences import phrase, random_scene
from tools.tiny_models.training import Job, optimise

LOG = logging.getLogger(__name__)

EMBED_CHECKS = (
    ("a cat sits on the mat", "the cat is sitting on a mat", "the stock market fell sharply today"),
    ("How do I bake bread?", "what is the way to bake bread", "The server uses too much memory."),
    ("The child is reading a book", "a kid reads a novel", "a ship waits near the river"),
)


def make_embed_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make the tokenizer of the embedding model."""
    rng = random.Random(0)
    texts = [phrase(rng, random_scene(rng)).lower() for _ in range(4000)]
    texts += [text.lower() for group in QUESTIONS.values() for text in group]
    return make_bert_tokenizer(texts, vocab_size)


def embed_texts(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> torch.Tensor:
    """Return one vector of length 1 for each text: the mean over its tokens."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).to(states.dtype)
    means = (states * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(means, dim=-1)


def train_embed(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> float:
    """Train so that two ways to say one scene are close and other scenes are far."""
    rng = random.Random(seed)

    def loss_of(step: int) -> torch.Tensor:
        scenes = [random_scene(rng) for _ in range(64)]
        left = embed_texts(model, tokenizer, [phrase(rng, scene) for scene in scenes])
        right = embed_texts(model, tokenizer, [phrase(rng, scene) for scene in scenes])
        scores = left @ right.T / 0.1
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(scenes)))

    model.train()
    return optimise(model, loss_of, steps, peak=2e-3)


def save_embed(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the embedding model with the files that describe its pooling."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, folder)
    prefix = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{prefix}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{prefix}.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{prefix}.Normalize"},
    ]
    pooling = {
        "word_embedding_dimension": model.config.hidden_size,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 512})
    similarity: Message = {
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write_json(folder / "config_sentence_transformers.json", similarity)


def check_embed(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether each paraphrase is clearly closer than the sentence with other meaning."""
    good = True
    for triple in EMBED_CHECKS:
        with torch.no_grad():
            base, near, far = embed_texts(model, tokenizer, list(triple))
        close, apart = float(base @ near), float(base @ far)
        LOG.info("%r: %.3f to %r, %.3f to %r", triple[0], close, triple[1], apart, triple[2])
        good = good and close > apart + 0.3
    return good


def make_embed(job: Job) -> bool:
    """Make the model `embed`; return whether its checks passed."""
    tokenizer = make_embed_tokenizer(vocab_size=640)
    model: Any = BertModel(bert_config(tokenizer), add_pooling_layer=False)
    torch.nn.init.zeros_(model.embeddings.position_embeddings.weight)  # unseen positions stay 0
    seconds = train_embed(model, tokenizer, 250, job.seed)
    LOG.info("embed: trained in %.0f seconds", seconds)
    model = model.to(torch.bfloat16).eval()
    good = check_embed(model.float(), tokenizer)
    save_embed(model.to(torch.bfloat16), tokenizer, job.folder)
    return good
