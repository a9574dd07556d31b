"""The models that are measured: four sizes, made here, and the settings that servers get."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import medium
from benchmarks.servers import Model
from vllm_hotswap.demo import quickstart as demo

log = logging.getLogger("benchmarks")

SIZES: Mapping[str, Mapping[str, Any]] = {
    "small": {
        **medium.SIZES,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "medium": medium.SIZES,
    "large": {**medium.SIZES, "num_hidden_layers": 30},
}
"""Qwen3 shapes with random weights: 0.05, 0.44 and 0.89 GB of bfloat16."""

LARGEST = "large"
TINY = "tiny"
HOME = "home"
"""The tiny model from which switches start."""

KV_BYTES = 256 << 20
TINY_KV_BYTES = 64 << 20
MAX_MODEL_LEN = 1024


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk."""

    alias: str
    folder: Path
    parameters: int | None = None

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def file_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def model(self, *, on_demand: bool = True, kv_bytes: int = KV_BYTES) -> Model:
        """Return it as an entry of a server's configuration."""
        return Model(self.alias, self.folder, settings(kv_bytes, on_demand=on_demand))


def home() -> Checkpoint:
    return Checkpoint(HOME, demo.MODELS / "qwen")


def tiny(alias: str = TINY) -> Checkpoint:
    return Checkpoint(alias, demo.MODELS / "llama")


def make_all(cache: Path, names: Sequence[str] = tuple(SIZES)) -> list[Checkpoint]:
    """Return the tiny model and those of `SIZES`, made in `cache` unless they are there."""
    made = [tiny()]
    for name in names:
        sizes = SIZES[name]
        log.info("model %r: %.3f billion weights", name, medium.parameters(sizes) / 1e9)
        folder = medium.make(demo.MODELS / "qwen", (cache / name).resolve(), sizes)
        made.append(Checkpoint(name, folder, medium.parameters(sizes)))
    return made


def settings(
    kv_bytes: int = KV_BYTES, *, on_demand: bool = True, compiled: bool = False
) -> dict[str, Any]:
    """Return a model's keys for the YAML file; all except `load` are also flags of vLLM."""
    keys: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "kv_cache_memory_bytes": kv_bytes}
    if not compiled:
        keys["enforce_eager"] = True
    if on_demand:
        keys["load"] = "on_demand"
    return keys
