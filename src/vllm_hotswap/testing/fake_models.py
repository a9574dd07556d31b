"""What a fake engine takes from a model's entry in the YAML file.

Its tasks, the sizes of its weights and KV memory, whether it calls tools, its adapters. Files are
looked at where they are there, and none is needed: what is not known is made up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_hotswap.config import MemoryBudget, ModelConfig, ServerConfig, resolve_size, unknown_key
from vllm_hotswap.errors import ConfigMistakes, Mistake, mistakes_of
from vllm_hotswap.launch import known_flags, weight_files
from vllm_hotswap.models import Usage
from vllm_hotswap.testing.fake_answers import Manners
from vllm_hotswap.testing.fake_frontend import Task
from vllm_hotswap.testing.fake_settings import MAX_RANK, FakeSettings

_GIB = 1 << 30

DEVICE_BYTES = 80 * _GIB
HOST_BYTES = 128 * _GIB
"""Of the machine that is made up; fractions under `memory` are of these."""

WEIGHTS_BYTES = _GIB
KV_BYTES = _GIB
MAX_MODEL_LEN = 4096
"""Of a model of which it is not known."""

_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_SIZES = {"K": 1 << 10, "M": 1 << 20, "G": _GIB, "T": 1 << 40}

LOAD_WORDS, WAKE_WORDS, SLEEP_WORDS = 10, 5, 2
"""How long a load, a wake and a sleep take, in words of an answer."""


def budget_of(memory: MemoryBudget) -> Usage:
    """What all models together may hold of the machine that is made up."""
    return Usage(
        resolve_size(0.9 if memory.device is None else memory.device, DEVICE_BYTES),
        resolve_size(0.5 if memory.host is None else memory.host, HOST_BYTES),
    )


def check_keys(config: ServerConfig) -> None:
    """See that vLLM has the flags that models have as keys; their values are not looked at.

    Raises:
        ConfigMistakes: names every key that the newest vLLM that is supported does not have.
    """
    known, found = known_flags(), list[Mistake]()
    for model in config.models:
        for key in model.settings:
            if key.replace("-", "_").removeprefix("no_") not in known:
                error = unknown_key(model.at(config.path), key, known)
                found += mistakes_of(error, model.at(config.path, key).line)
    if found:
        raise ConfigMistakes(found)


def settings_of(model: ModelConfig, word_s: float) -> FakeSettings:
    """How the fake engine of a model is; `word_s` are the seconds that a word of it takes."""
    settings = model.settings
    return FakeSettings(
        load_s=LOAD_WORDS * word_s,
        wake_s=WAKE_WORDS * word_s,
        sleep_s=SLEEP_WORDS * word_s,
        token_s=word_s,
        weights_bytes=_weights_bytes(model) or WEIGHTS_BYTES,
        kv_bytes=_bytes(settings.get("kv_cache_memory_bytes")) or KV_BYTES,
        tasks=tasks_of(model),
        offloads=True,
        root=model.model,
        max_model_len=_bytes(settings.get("max_model_len")) or MAX_MODEL_LEN,
        manners=Manners(bool(settings.get("enable_auto_tool_choice")), is_brief=True),
    )


def tasks_of(model: ModelConfig) -> tuple[Task, ...]:
    """By `convert`, by the architecture in its folder, by `runner`; else it generates."""
    convert, runner = model.settings.get("convert"), model.settings.get("runner")
    if convert in ("embed", "classify"):
        return (convert,)
    names = _architectures(Path(model.model)) if model.is_folder else ""
    if "ForSequenceClassification" in names:
        return ("classify",)
    is_pooling = bool(names) and not re.search("ForCausalLM|ForConditionalGeneration", names)
    return ("embed",) if is_pooling or runner == "pooling" else ("generate",)


def adapters_of(model: ModelConfig) -> Iterator[tuple[str, Path, int]]:
    """Name, path and rank of each of its `lora_modules`, in any form that vLLM takes."""
    given = model.settings.get("lora_modules") or ()
    for module in [given] if isinstance(given, str | dict) else given:
        name, path = _named(module)
        if name:
            yield name, Path(path), MAX_RANK


def _named(module: Any) -> tuple[str, str]:
    if isinstance(module, str) and module.lstrip().startswith("{"):
        module = json.loads(module)
    if isinstance(module, dict):
        return str(module.get("name", "")), str(module.get("path", ""))
    name, _, path = str(module).partition("=")
    return name, path


def _architectures(folder: Path) -> str:
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return " ".join(described.get("architectures") or ())
    except (OSError, ValueError, TypeError, AttributeError):
        return ""


def _weights_bytes(model: ModelConfig) -> int:
    """Of the files in its folder; 0 where there are none."""
    try:
        files = weight_files(Path(model.model)) if model.is_folder else []
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0


def _bytes(value: object) -> int:
    """As vLLM reads a number: `64M` is binary and `64m` decimal. 0 where it is none."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)", str(value))
    return int(float(match[1]) * (_SIZES | _BINARY_SIZES)[match[2]]) if match else 0
