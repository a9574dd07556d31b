"""Adapters as files: what is checked in a folder before vLLM loads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.adapters import write_adapter, write_adapter_for
from vllm_hotswap.config.reader import parse_config
from vllm_hotswap.demo.quickstart import MODELS
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.launch.adapter_files import read_adapter, shapes_of, smallest_rank
from vllm_hotswap.launch.adapters import check_names
from vllm_hotswap.models.engine import AdapterFiles

Q_PROJ = "model.layers.0.self_attn.q_proj"
BASE = {f"{Q_PROJ}.weight": (128, 64)}


def test_whole_adapter_is_found_with_its_rank(tmp_path: Path) -> None:
    """An adapter with the shapes of the model's layers is accepted, and its rank is known."""
    folder = write_adapter(tmp_path / "pirate", "llama", rank=4)

    files = read_adapter("pirate", folder, shapes_of(MODELS / "llama"))

    assert AdapterFiles("pirate", folder, 4) == files


def test_rank_is_the_highest_of_all_layers(tmp_path: Path) -> None:
    """The rank is the highest of all layers: PEFT allows a separate rank for each."""
    folder = write_adapter(tmp_path, rank=4, rank_pattern={"q_proj": 24, "v_proj": 2})

    assert 24 == read_adapter("a", folder, {}).rank


@pytest.mark.parametrize("kind", ["bin", "pt"])
def test_weights_that_only_vllm_opens_are_taken_as_they_are(tmp_path: Path, kind: str) -> None:
    """Pickled weights are accepted without being opened."""
    folder = write_adapter(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / f"adapter_model.{kind}")

    assert 4 == read_adapter("a", folder, BASE).rank


def test_shapes_are_unknown_without_a_folder_and_for_packed_weights(tmp_path: Path) -> None:
    """Shapes of quantised weights are unknown: a weight may have another shape than its layer."""
    write_packed(tmp_path / "model.safetensors")

    assert {} == shapes_of(None) == shapes_of(tmp_path / "none") == shapes_of(tmp_path)


def no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def other_method(folder: Path) -> None:
    write_adapter_for(folder, {Q_PROJ: (128, 64)}, peft_type="IA3")


def no_rank(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 0}')


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def truncated(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


def lower_rank_in_config(folder: Path) -> None:
    write_adapter_for(folder, {Q_PROJ: (128, 64)}, rank=8, r=4)


def more_inputs(folder: Path) -> None:
    write_adapter_for(folder, {Q_PROJ: (128, 65)})


def fewer_outputs(folder: Path) -> None:
    write_adapter_for(folder, {Q_PROJ: (127, 64)})


def more_layers(folder: Path) -> None:
    write_adapter_for(folder, {"model.layers.1.self_attn.q_proj": (128, 64)})


def no_matrix(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"shape": [4, 64]', b'"shape": [4,1,6]'))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_config, "has no adapter_config.json"),
        (broken_config, "adapter_config.json is not valid JSON"),
        (other_method, "does not describe a LoRA adapter"),
        (no_rank, "has no rank `r` above 0"),
        (no_weights, "has none of adapter_model.safetensors"),
        (truncated, "is truncated"),
        (lower_rank_in_config, "has rank 8, adapter_config.json says 4"),
        (more_inputs, r"has the shape \(4, 65\), but its layer in the base model has \(128, 64\)"),
        (
            fewer_outputs,
            r"has the shape \(127, 4\), but its layer in the base model has \(128, 64\)",
        ),
        (more_layers, "weights for layer 1, but the last layer of its base model is 0"),
        (no_matrix, "so it is not a matrix"),
    ],
)
def test_what_cannot_be_served_is_refused_without_its_path(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    """What vLLM would refuse, or serve wrongly, is refused without showing its path."""
    folder = write_adapter_for(tmp_path / "secret", {Q_PROJ: (128, 64)})
    spoil(folder)

    with pytest.raises(ConfigError, match=f"adapter 'sql' cannot be used: .*{message}") as caught:
        read_adapter("sql", folder, BASE)

    assert "secret" not in caught.value.message


def test_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A missing folder is refused, and so is a file in its place."""
    with pytest.raises(ConfigError, match="it is not a folder"):
        read_adapter("sql", tmp_path / "none", {})


def test_layers_that_keep_their_weights_transposed_are_not_compared(tmp_path: Path) -> None:
    """Transposed weights, which PEFT marks with `fan_in_fan_out`, are not compared."""
    folder = write_adapter_for(tmp_path, {Q_PROJ: (64, 128)}, fan_in_fan_out=True)

    assert 4 == read_adapter("a", folder, BASE).rank


@pytest.mark.parametrize(
    ("needed", "rank"), [([], 16), ([4], 16), ([17], 32), ([8, 64], 64), ([600], 16)]
)
def test_rank_of_the_engine_follows_from_its_adapters(needed: list[int], rank: int) -> None:
    """The rank is vLLM's smallest that fits; one that it never allows is refused elsewhere."""
    assert rank == smallest_rank(needed, (1, 8, 16, 32, 64, 512), 16)


@pytest.mark.parametrize(
    ("llama", "qwen", "places"),
    [
        (["sql"], ["sql"], "models.llama.lora_modules and in models.qwen.lora_modules"),
        (["sql", "sql"], [], "models.llama.lora_modules and in models.llama.lora_modules"),
        (["qwen"], [], "models.qwen and in models.llama.lora_modules"),
        ([], ["meta"], "models.llama and in models.qwen.lora_modules"),
    ],
)
def test_every_name_means_one_thing(
    tmp_path: Path, llama: list[str], qwen: list[str], places: str
) -> None:
    """Names of models and adapters are unique; the error for a duplicate names both places."""
    models = {"llama": {"model": "a/llama", "aliases": ["meta"]}, "qwen": {"model": "a/qwen"}}
    config = parse_config({"models": models}, tmp_path / "models.yaml")
    adapters = {
        "llama": [AdapterFiles(name, tmp_path, 4) for name in llama],
        "qwen": [AdapterFiles(name, tmp_path, 4) for name in qwen],
    }

    with pytest.raises(ConfigError, match=f"is used twice, in {places}"):
        check_names(config, adapters)


def write_packed(file: Path) -> None:
    entry = {"dtype": "U8", "shape": [4096, 1], "data_offsets": [0, 4096]}
    header = json.dumps({f"{Q_PROJ}.weight": entry}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4096))


def test_a_configuration_too_deep_for_json_is_refused(tmp_path: Path) -> None:
    """Too deep nesting is refused as invalid JSON, not with an error of another kind."""
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)

    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_adapter("pirate", tmp_path, {})
