"""A model of realistic size with random weights, to measure throughput where compute counts.

It takes the configuration and the tokenizer of a small Qwen3 checkpoint and makes it larger. The
output rows of tokens that the tokenizer does not know are zero: such a token has the score 0 and
is never the best one, so every generated token has a text.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ARCHITECTURE = "Qwen3ForCausalLM"
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32768,
    "tie_word_embeddings": False,
}
SEED = 20
DEVIATION = 0.02

Shape = tuple[int, ...]


def make(small: Path, folder: Path, sizes: Mapping[str, Any] = SIZES) -> Path:
    """Write the model to `folder`, unless it is there. Returns the folder.

    Args:
        small: a Qwen3 checkpoint whose tokenizer has at most `vocab_size` tokens.
        folder: where to write the model.
        sizes: what differs from the configuration of `small`; by default 0.22 B weights.
    """
    config = _config(small, sizes)
    if (folder / "config.json").is_file() and _read(folder / "config.json") == config:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in small.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model"):
            shutil.copy(file, folder / file.name)
    _write_weights(folder / "model.safetensors", config, known_tokens(small))
    # Last, so that a folder with this file is complete.
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def is_source(folder: Path) -> bool:
    """Whether the model can be made from that checkpoint."""
    config = _read(folder / "config.json")
    tokenizer = folder / "tokenizer.json"
    return (
        config.get("architectures") == [ARCHITECTURE]
        and tokenizer.is_file()
        and known_tokens(folder) <= int(SIZES["vocab_size"])
    )


def parameters(sizes: Mapping[str, Any] = SIZES) -> int:
    """Return how many weights the model has."""
    return sum(int(np.prod(shape)) for _, shape in tensors({**sizes}))


def known_tokens(folder: Path) -> int:
    """Return one more than the highest token id of a `tokenizer.json`."""
    tokenizer = _read(folder / "tokenizer.json")
    added = [token["id"] for token in tokenizer.get("added_tokens", ())]
    ids: list[int] = [*tokenizer["model"]["vocab"].values(), *added]
    return max(ids) + 1


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of every tensor of a Qwen3 checkpoint."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for number in range(config["num_hidden_layers"]):
        for name, shape in _layer(config):
            yield f"model.layers.{number}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def _layer(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "input_layernorm", (hidden,)
    yield "self_attn.q_proj", (queries, hidden)
    yield "self_attn.k_proj", (keys, hidden)
    yield "self_attn.v_proj", (keys, hidden)
    yield "self_attn.o_proj", (hidden, queries)
    yield "self_attn.q_norm", (head,)
    yield "self_attn.k_norm", (head,)
    yield "post_attention_layernorm", (hidden,)
    yield "mlp.gate_proj", (inner, hidden)
    yield "mlp.up_proj", (inner, hidden)
    yield "mlp.down_proj", (hidden, inner)


def _config(small: Path, sizes: Mapping[str, Any]) -> dict[str, Any]:
    config = _read(small / "config.json")
    layers = ["full_attention"] * int(sizes["num_hidden_layers"])
    return {**config, **sizes, "layer_types": layers, "dtype": "bfloat16"}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write_weights(path: Path, config: dict[str, Any], known: int) -> None:
    """Write a safetensors file: the header's length, a JSON header, tensor bytes in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors(config):
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    random = np.random.default_rng(SEED)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, shape in tensors(config):
            file.write(_bfloat16(_values(name, shape, random, known)))


def _values(
    name: str, shape: Shape, random: np.random.Generator, known: int
) -> npt.NDArray[np.float32]:
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    values = random.standard_normal(shape, np.float32) * np.float32(DEVIATION)
    if name == "lm_head.weight":
        values[known:] = 0
    return values


def _bfloat16(values: npt.NDArray[np.float32]) -> bytes:
    """Return the upper half of each value's bits: bfloat16, rounded towards zero."""
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
