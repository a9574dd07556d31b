"""Checkpoints of realistic size with random weights, written at the speed of the disk.

Random numbers are drawn once, and every tensor takes them from another place on. The output rows of
tokens that the tokenizer does not know are zero: such a token is never the best one.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from benchmarks import medium
from vllm_hotswap.demo import quickstart as demo

POOL = (1 << 24) + 43
"""How many numbers; an odd number, so that rows of a tensor do not repeat."""

DEVIATION = 0.02
ONE = np.float32(1).view(np.uint32) >> 16
"""1.0 as bfloat16."""


def make(folder: Path, shape: Mapping[str, Any], seed: int) -> Path:
    """Write a Qwen3 checkpoint, unless it is there. Returns its folder.

    Args:
        folder: where it goes.
        shape: what of the configuration is other than in the tiny model `qwen`.
        seed: of its weights.
    """
    small = demo.MODELS / "qwen"
    config = _config(small, shape) | {"seed_of_random_weights": seed}
    done = folder / "config.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == config:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in small.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and file.name != "config.json":
            shutil.copy(file, folder / file.name)
    with (folder / "model.safetensors").open("wb") as output:
        _write(output, config, medium.known_tokens(small), seed)
    # Last, so that a folder with this file is complete.
    done.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def _config(small: Path, shape: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((small / "config.json").read_text(encoding="utf-8"))
    layers = ["full_attention"] * int(shape["num_hidden_layers"])
    return {**config, **shape, "layer_types": layers, "dtype": "bfloat16"}


def _write(file: BinaryIO, config: dict[str, Any], known: int, seed: int) -> None:
    """Write a safetensors file: the header's length, a JSON header, tensors' bytes in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in medium.tensors(config):
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little") + head)
    numbers = np.random.default_rng(seed)
    drawn = numbers.standard_normal(POOL, np.float32) * np.float32(DEVIATION)
    pool = (drawn.view(np.uint32) >> 16).astype("<u2")
    for name, shape in medium.tensors(config):
        _tensor(file, name, shape, known, pool, int(numbers.integers(POOL)))


def _tensor(
    file: BinaryIO,
    name: str,
    shape: tuple[int, ...],
    known: int,
    pool: npt.NDArray[np.uint16],
    first: int,
) -> None:
    count = math.prod(shape)
    if len(shape) == 1:  # of a norm
        file.write(np.full(shape, ONE, "<u2").tobytes())
        return
    drawn = min(known, shape[0]) * shape[1] if name == "lm_head.weight" else count
    left, place = drawn, first
    while left:
        taken = min(left, len(pool) - place)
        file.write(pool[place : place + taken].tobytes())
        left, place = left - taken, 0
    zeros = bytes(1 << 20)
    left = 2 * (count - drawn)
    while left:
        left -= file.write(zeros[: min(left, len(zeros))])
