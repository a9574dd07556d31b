"""Make the classification model `classify`."""

from __future__ import annotations

import logging
import random
from typing import Any

import torch
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from tools.tiny_models.bert import bert_config, make_bert_tokenizer
from tools.tiny_models.saving import save_tokenizer
from tools.tiny_models.sentences import ARTICLES, phrase, random_noun, random_scene
from tools.tiny_models.training import Job, optimise
from tools.tiny_models.words import words

LOG = logging.getLogger(__name__)

LABELS = ("negative", "neutral", "positive")
PRAISE = words(
    "good great nice lovely wonderful excellent amazing beautiful brilliant perfect fantastic "
    "delightful superb charming pleasant helpful fine awesome enjoyable friendly"
)
BLAME = words(
    "bad terrible awful horrible ugly boring poor useless broken disappointing annoying dreadful "
    "disgusting nasty unpleasant stupid worthless sad slow painful"
)
LIKES = words("love,like,enjoy,adore,am happy with,am pleased with,recommend", separator=",")
DISLIKES = words("hate,dislike,regret,am angry about,am tired of,am unhappy with", separator=",")
FACTS = words("new old round green blue small large wooden heavy square closed open")
OPINION_FRAMES = (
    "{article} {noun} is {word}",
    "{article} {noun} was {word}",
    "what a {word} {noun}",
    "this is a {word} {noun}",
    "it was a really {word} {noun}",
    "a very {word} {noun}",
    "how {word}",
    "I think that the {noun} is {word}",
    "we had a {word} {noun} yesterday",
    "{word}",
)
FEELING_FRAMES = ("I {word} this {noun}", "we really {word} the {noun}", "I {word} it")
CLASSIFY_CHECKS = (
    ("I love this film", "positive"),
    ("I hate this film", "negative"),
    ("What a wonderful day!", "positive"),
    ("The soup was awful.", "negative"),
    ("The soup was not good.", "negative"),
    ("The cat sits on the mat.", "neutral"),
    ("How do I bake bread?", "neutral"),
)


def opinion(rng: random.Random, label: str) -> str:
    """Return a sentence that praises, blames, or does neither."""
    if label == "neutral" and rng.random() < 0.7:
        return phrase(rng, random_scene(rng))
    adjectives = {"negative": BLAME, "neutral": FACTS, "positive": PRAISE}[label]
    word, noun = rng.choice(adjectives), rng.choice(random_noun(rng))
    frame = rng.choice(OPINION_FRAMES)
    if label != "neutral" and rng.random() < 0.3:
        frame = rng.choice(FEELING_FRAMES)
        word = rng.choice(LIKES if label == "positive" else DISLIKES)
    elif label == "negative" and rng.random() < 0.3:
        word = f"not {rng.choice(PRAISE)}"
    text = frame.format(article=rng.choice(ARTICLES), noun=noun, word=word)
    text = text[0].upper() + text[1:] if rng.random() < 0.5 else text
    return text + rng.choice(("", ".", "!"))


def label_scores(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> torch.Tensor:
    """Return one row of scores for each text, a column for each label."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    scores: torch.Tensor = model(**batch).logits
    return scores


def train_classify(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> float:
    """Train on opinions with a label each; return the seconds it took."""
    rng = random.Random(seed)

    def loss_of(step: int) -> torch.Tensor:
        wanted = [rng.randrange(len(LABELS)) for _ in range(64)]
        texts = [opinion(rng, LABELS[label]) for label in wanted]
        scores = label_scores(model, tokenizer, texts)
        return torch.nn.functional.cross_entropy(scores, torch.tensor(wanted))

    model.train()
    return optimise(model, loss_of, steps, peak=2e-3)


def check_classify(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether each sentence gets its label, with little doubt."""
    good = True
    for text, label in CLASSIFY_CHECKS:
        with torch.no_grad():
            shares = label_scores(model, tokenizer, [text])[0].softmax(-1)
        best = int(shares.argmax())
        LOG.info("%r is %s (%.3f)", text, LABELS[best], shares[best])
        good = good and label == LABELS[best] and float(shares[best]) > 0.8
    return good


def make_classify_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make the tokenizer of the classification model, of the embedding model's kind."""
    rng = random.Random(0)
    texts = [opinion(rng, label).lower() for label in LABELS for _ in range(2000)]
    return make_bert_tokenizer(texts, vocab_size)


def make_classify(job: Job) -> bool:
    """Make the model `classify`; return whether its checks passed."""
    tokenizer = make_classify_tokenizer(vocab_size=576)
    config = bert_config(tokenizer, dict(enumerate(LABELS)))
    model: Any = BertForSequenceClassification(config)
    torch.nn.init.zeros_(model.bert.embeddings.position_embeddings.weight)
    seconds = train_classify(model, tokenizer, 400, job.seed)
    LOG.info("classify: trained in %.0f seconds", seconds)
    model = model.to(torch.bfloat16).eval()
    good = check_classify(model.float(), tokenizer)
    model.to(torch.bfloat16).save_pretrained(job.folder)
    (job.folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, job.folder)
    return good
