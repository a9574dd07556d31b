"""The makers of the tiny models still make those that ship."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from vllm_hotswap.demo.quickstart import MODELS

pytestmark = [pytest.mark.vllm, pytest.mark.wide]


def makers() -> dict[str, Callable[[], Any]]:
    """Return what makes each model's tokenizer; this imports transformers."""
    from tools.tiny_models.chat_tokenizers import make_llama_tokenizer, make_qwen_tokenizer
    from tools.tiny_models.classify import make_classify_tokenizer
    from tools.tiny_models.embed import make_embed_tokenizer

    return {
        "llama": lambda: make_llama_tokenizer(vocab_size=1088),
        "qwen": lambda: make_qwen_tokenizer(vocab_size=1218),
        "embed": lambda: make_embed_tokenizer(vocab_size=640),
        "classify": lambda: make_classify_tokenizer(vocab_size=576),
    }


@pytest.mark.parametrize("name", ["llama", "qwen", "embed", "classify"])
def test_a_tokenizer_that_is_made_anew_is_the_one_that_ships(name: str, tmp_path: Path) -> None:
    """A tokenizer made again equals the shipped one, so its training texts are unchanged."""
    from tools.tiny_models.saving import save_tokenizer

    save_tokenizer(makers()[name](), tmp_path)

    for file, key in (("tokenizer.json", "model"), ("tokenizer_config.json", "chat_template")):
        made, shipped = (json.loads((f / file).read_text()) for f in (tmp_path, MODELS / name))
        assert shipped.get(key) == made.get(key)


@pytest.mark.parametrize(
    ("name", "digest"), [("llama", "865b33b56e112f31"), ("qwen", "3b5e9817a397e399")]
)
def test_the_chat_models_would_be_trained_on_the_same_examples(name: str, digest: str) -> None:
    """The chat models' examples are unchanged; on purpose, train anew and write the digest here."""
    from tools.tiny_models.curriculum import examples
    from tools.tiny_models.personas import make_persona

    shown = hashlib.sha256()
    for example in islice(examples(1, make_persona(name), render), 12_000):
        shown.update(repr((example.prompt, example.answer, example.free, example.raw)).encode())

    assert digest == shown.hexdigest()[:16]


def render(messages: list[Any], tools: object = None, thinking: bool = False) -> str:
    """Join messages in place of a chat template."""
    return json.dumps([messages, tools, thinking])
