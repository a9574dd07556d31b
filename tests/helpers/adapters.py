"""Small LoRA adapters in PEFT's format, with random but reproducible weights."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_hotswap.demo.quickstart import MODELS
from vllm_hotswap.launch.adapter_files import CONFIG, shapes_of

TARGETS = ("q_proj", "v_proj")


def write_adapter(
    folder: Path,
    base: str = "llama",
    *,
    rank: int = 4,
    seed: int = 1,
    strength: float = 1.0,
    **config: Any,
) -> Path:
    """Write an adapter for one of the tiny models; `strength` is how far it changes answers."""
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes_of(MODELS / base).items()
        if name.endswith(tuple(f"{target}.weight" for target in TARGETS))
    }
    return write_adapter_for(folder, shapes, rank=rank, seed=seed, strength=strength, **config)


def write_adapter_for(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    *,
    rank: int = 4,
    seed: int = 1,
    strength: float = 1.0,
    **config: Any,
) -> Path:
    """Write an adapter for layers of these shapes, (outputs, inputs)."""
    draw = random.Random(seed)  # noqa: S311  # not a secret
    weights: dict[str, tuple[list[int], list[float]]] = {}
    for layer, (outputs, inputs) in shapes.items():
        for letter, shape in (("A", [rank, inputs]), ("B", [outputs, rank])):
            values = [draw.gauss(0, strength) for _ in range(shape[0] * shape[1])]
            weights[f"base_model.model.{layer}.lora_{letter}.weight"] = (shape, values)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(_safetensors(weights))
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(TARGETS),
        **config,
    }
    (folder / CONFIG).write_text(json.dumps(settings))
    return folder


def _safetensors(weights: Mapping[str, tuple[list[int], list[float]]]) -> bytes:
    header, content = {}, b""
    for name, (shape, values) in weights.items():
        data = struct.pack(f"<{len(values)}f", *values)
        offsets = [len(content), len(content) + len(data)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        content += data
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content
