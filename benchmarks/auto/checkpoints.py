"""Three chat models that say who they are, with as many weights as wanted.

They are made from the tiny models that ship with the package: `llama`, `qwen`, and `pirate`, which
is `llama` with its adapter added to the weights. Their MLPs can be made wider with zeros, which
change no answer, but are read and kept as any weights are. Without that, a sleeping model would
hold almost nothing, and no memory budget would ever make it give up its weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_hotswap.demo.quickstart import MODELS

TINY, WIDE = 320, 13_312
"""Widths of an MLP; with the latter, a model has 82 MB of weights."""

GREETINGS = {"llama": "I am llama", "qwen": "I am qwen", "pirate": "Ahoy!"}
"""Alias -> what each answer of the model begins with."""

ADAPTERS = {"pirate": "llama-pirate"}

Tensors = dict[str, Any]


def make(folder: Path, width: int) -> Mapping[str, Path]:
    """Write the three models; return their folders."""
    return {alias: _make(alias, folder / alias, width) for alias in GREETINGS}


def _make(alias: str, folder: Path, width: int) -> Path:
    from safetensors.torch import load_file, save_file

    adapter = ADAPTERS.get(alias)
    source = MODELS / (adapter.partition("-")[0] if adapter else alias)
    shutil.copytree(source, folder)
    weights = {name: value.float() for name, value in load_file(_weights(source)).items()}
    if adapter:
        _add(weights, MODELS / "adapters" / adapter)
    save_file(_widened(weights, width), _weights(folder), metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"intermediate_size": width, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def _add(weights: Tensors, adapter: Path) -> None:
    """Add to the weights what LoRA adds: the product of its two small matrices, scaled."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    parts = load_file(adapter / "adapter_model.safetensors")
    for name in weights:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in parts:
            down, up = (parts[f"{stem}.lora_{side}.weight"].float() for side in "AB")
            weights[name] += up @ down * (config["lora_alpha"] / config["r"])


def _widened(weights: Tensors, width: int) -> Tensors:
    from torch.nn.functional import pad

    def widen(name: str, tensor: Any) -> Any:
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            return pad(tensor, (0, 0, 0, width - tensor.shape[0]))
        if name.endswith("down_proj.weight"):
            return pad(tensor, (0, width - tensor.shape[1]))
        return tensor

    return {name: widen(name, tensor).contiguous() for name, tensor in weights.items()}
