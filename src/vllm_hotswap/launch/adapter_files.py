"""LoRA adapters as files: a folder in PEFT's format, and whether it fits its base model.

Only headers are read. Without these checks, vLLM would silently accept weights that are too small
for a layer, and serve wrong answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.launch.checkpoint import tensors, weight_files
from vllm_hotswap.models import AdapterFiles

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
"""Weight files, in the order in which vLLM looks for them."""

WHOLE_DTYPES = frozenset(["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8"])
"""Types of weights that have the shape of their layer; others are packed."""

_LORA_WEIGHT = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight")

_LAYER = re.compile(r"\blayers\.(\d+)\.")

Shapes = Mapping[str, tuple[int, ...]]


def read_adapter(name: str, path: Path, base: Shapes, is_3d: bool = False) -> AdapterFiles:
    """Check a folder without reading its weights.

    Args:
        name: the adapter's name.
        path: the folder.
        base: shapes of the base model's weights, as far as they are known.
        is_3d: vLLM's `is_3d_lora_weight`.

    Raises:
        ConfigError: it cannot be served; the message contains no path.
    """
    try:
        config = _config(path)
        _check_weights(path, config, base)
    except OSError as error:
        raise ConfigError(f"adapter {name!r} cannot be read: {error.strerror}") from error
    except ConfigError as error:
        message = error.message.replace(f"{path}/", "")
        raise ConfigError(f"adapter {name!r} cannot be used: {message}") from error
    return AdapterFiles(name, path, _rank(config), is_3d)


def shapes_of(folder: Path | None) -> Shapes:
    """Return the shapes of the weights in a checkpoint's safetensors files, without packed ones."""
    files = weight_files(folder) if folder is not None and folder.is_dir() else []
    headers = [tensors(file) for file in files if file.suffix == ".safetensors"]
    return {
        name: tuple(entry["shape"])
        for header in headers
        for name, entry in header.items()
        if entry.get("dtype") in WHOLE_DTYPES and "shape" in entry
    }


def smallest_rank(needed: Iterable[int], allowed: Iterable[int], least: int) -> int:
    """Return the smallest allowed rank that holds all needed ranks, and is at least `least`."""
    wanted = max([least, *needed])
    return min((rank for rank in allowed if rank >= wanted), default=least)


def _config(path: Path) -> Mapping[str, Any]:
    if not path.is_dir():
        raise ConfigError("it is not a folder")
    file = path / CONFIG
    if not file.is_file():
        raise ConfigError(f"it has no {CONFIG}, so it is not an adapter in PEFT's format")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{CONFIG} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise ConfigError(f"{CONFIG} does not describe a LoRA adapter")
    if not all(_is_size(rank) for rank in _ranks(config)):
        raise ConfigError(f"{CONFIG} has no rank `r` above 0")
    return config


def _ranks(config: Mapping[str, Any]) -> list[Any]:
    pattern = config.get("rank_pattern")
    return [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _rank(config: Mapping[str, Any]) -> int:
    return int(max(_ranks(config)))


def _check_weights(path: Path, config: Mapping[str, Any], base: Shapes) -> None:
    name = next((name for name in WEIGHTS if (path / name).is_file()), None)
    if name is None:
        raise ConfigError(f"it has none of {', '.join(WEIGHTS)}")
    if not name.endswith(".safetensors"):
        return  # a pickle: only vLLM opens it, and accepts nothing but tensors
    header = tensors(path / name)
    _check_layers(header, base)
    for tensor, entry in header.items():
        if match := _LORA_WEIGHT.fullmatch(tensor):
            layer = None if config.get("fan_in_fan_out") else base.get(f"{match[1]}.weight")
            _check_shape(tensor, entry.get("shape"), match[2], layer, _rank(config))


def _check_layers(names: Iterable[str], base: Shapes) -> None:
    """Refuse weights for layers that the base model does not have; vLLM silently ignores them."""
    its, have = _highest_layer(names), _highest_layer(base)
    if have is not None and its is not None and its > have:
        raise ConfigError(
            f"it has weights for layer {its}, but the last layer of its base model is {have}: "
            "it was made for another model"
        )


def _highest_layer(names: Iterable[str]) -> int | None:
    numbers = (int(match[1]) for name in names if (match := _LAYER.search(name)))
    return max(numbers, default=None)


def _check_shape(
    tensor: str, shape: Any, kind: str, layer: tuple[int, ...] | None, rank: int
) -> None:
    """Check a shape: a layer of (outputs, inputs) has A (rank, inputs) and B (outputs, rank)."""
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_size, shape)):
        raise ConfigError(f"{tensor} has the shape {shape!r}, so it is not a matrix")
    its_rank, size = shape if kind == "A" else reversed(shape)
    if its_rank > rank:
        raise ConfigError(f"{tensor} has rank {its_rank}, {CONFIG} says {rank}")
    if layer is not None and len(layer) == 2 and size != layer[1 if kind == "A" else 0]:
        raise ConfigError(
            f"{tensor} has the shape {tuple(shape)}, but its layer in the base model has {layer}: "
            "it was made for another model"
        )
