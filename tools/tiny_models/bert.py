"""What the two models of BERT's kind share: tokenizer and configuration."""

from __future__ import annotations

from typing import Any

from tokenizers import normalizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

from tools.tiny_models.bpe import train_bpe


def make_bert_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer that puts BERT's tokens around a text and ignores case."""
    tokenizer = train_bpe(texts, vocab_size, ["[PAD]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def bert_config(
    tokenizer: PreTrainedTokenizerFast, labels: dict[int, str] | None = None
) -> BertConfig:
    """Return the configuration of a tiny BERT, with labels if it classifies."""
    named: dict[str, Any] = {}
    if labels:
        named = {"id2label": labels, "label2id": {name: n for n, name in labels.items()}}
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        **named,
    )
