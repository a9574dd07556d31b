"""Second copies of weights: counted where vLLM makes them on this CPU, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor import models
from vllm.model_executor.layers import utils, vocab_parallel_embedding
from vllm.model_executor.models import registry

from vllm_hotswap.host.devices import CPU_WORKER, anonymous_bytes
from vllm_hotswap.launch.packing import ONE_LAYER, keeps_packed_copy, packed_copies_bytes

ROWS, COLUMNS = 16384, 1024
SMALL = 2048, 1024

TYPES = [torch.float32, torch.bfloat16, torch.float16]


GENERATES = "generate"


def grown_by_a_layer(dtype: torch.dtype) -> int:
    """Return what the process grows by when vLLM takes an output layer of `ROWS` by `COLUMNS`."""
    layer = torch.nn.Module()
    weight = torch.ones(ROWS, COLUMNS, dtype=dtype)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    before = anonymous_bytes()
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    return anonymous_bytes() - before


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_small_layer_tells_what_a_large_one_will_hold(dtype: torch.dtype) -> None:
    """A small layer predicts exactly whether this CPU keeps a packed copy of a large one."""
    grown = grown_by_a_layer(dtype)

    assert keeps_packed_copy(*SMALL, dtype) == (grown > ROWS * COLUMNS * dtype.itemsize // 2)


def test_float32_is_packed_wherever_onednn_is() -> None:
    """float32 is packed wherever oneDNN is, so the test above sees both answers, or this one."""
    from vllm import _custom_ops as ops

    assert ops._supports_onednn == keeps_packed_copy(*SMALL, torch.float32)


def model(architecture: str, dtype: torch.dtype = torch.float32, runner: str = GENERATES) -> Any:
    """Return the used parts of a model's configuration; its embedding has 64 MiB in float32."""
    return SimpleNamespace(
        architecture=architecture,
        runner_type=runner,
        dtype=dtype,
        get_vocab_size=lambda: ROWS,
        get_hidden_size=lambda: COLUMNS,
    )


def counted(model: Any) -> int:
    """Return the bytes of second copies."""
    config = SimpleNamespace(
        model_config=model,
        speculative_config=None,
        parallel_config=SimpleNamespace(worker_cls=CPU_WORKER),
    )
    return packed_copies_bytes(config)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_copies_are_counted_for_types_that_this_cpu_packs(dtype: torch.dtype) -> None:
    """Copies count for types that this CPU packs: two for a generating model's two layers."""
    copies = 2 if keeps_packed_copy(*SMALL, dtype) else 0

    assert copies * ROWS * COLUMNS * dtype.itemsize == counted(model("LlamaForCausalLM", dtype))


def test_a_model_without_an_output_layer_has_one_copy_less() -> None:
    """A model without an output layer, that embeds or reuses its embedding, has one copy less."""
    one = counted(model("LlamaForCausalLM", runner="pooling"))

    assert 2 * one == counted(model("LlamaForCausalLM"))
    assert {one} == {counted(model(name)) for name in ONE_LAYER}


def test_tied_layers_stay_two_layers() -> None:
    """Tied layers stay two layers: vLLM packs the embedding's weight for both."""
    output, embedding = torch.nn.Module(), torch.nn.Module()
    embedding.weight = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
    method = vocab_parallel_embedding.UnquantizedEmbeddingMethod()
    tied = method.tie_weights(output, embedding)

    assert tied is output
    assert tied.weight is embedding.weight


def test_the_models_without_an_output_layer_are_those_of_vllm() -> None:
    """Models without an output layer are those whose vLLM sources use the embedding for logits."""
    folder = Path(models.__file__).parent
    sources = [(file.stem, file.read_text(encoding="utf-8")) for file in folder.glob("*.py")]
    found = {stem for stem, source in sources if "logits_processor(self.model.embed" in source}
    known = {registry._VLLM_MODELS[name][0].removesuffix("_mm") for name in ONE_LAYER}

    assert known == found


def test_a_copy_for_other_instructions_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy for AMX's small layers, a tensor and not a handler of oneDNN, counts as one."""
    monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *_: True)
    monkeypatch.setattr(
        torch.ops._C, "convert_weight_packed", lambda weight: weight.clone(), raising=False
    )
    keeps_packed_copy.cache_clear()

    try:
        assert keeps_packed_copy(64, 64, torch.bfloat16)
    finally:
        keeps_packed_copy.cache_clear()


def test_a_cpu_that_packs_nothing_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that packs nothing, as bfloat16 without AVX-512, keeps no copy."""
    from vllm import _custom_ops as ops

    def refuse(*_: object) -> None:
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *_: False)
    monkeypatch.setattr(ops, "create_onednn_mm", refuse)
    keeps_packed_copy.cache_clear()

    try:
        assert not keeps_packed_copy(64, 64, torch.float32)
    finally:
        keeps_packed_copy.cache_clear()
