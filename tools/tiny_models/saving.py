"""Files of a model."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "src" / "vllm_hotswap" / "tiny_models"


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, and make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a tokenizer so that both old and new versions of transformers load it."""
    tokenizer.save_pretrained(folder)
    template = folder / "chat_template.jinja"
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template.exists():
        config["chat_template"] = template.read_text(encoding="utf-8")
        template.unlink()
    write_json(path, config)
