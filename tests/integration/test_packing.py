"""Second copies of weights: counted where vLLM makes them on this CPU, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.layers import utils

from vllm_hotswap.compat.packing import keeps_packed_copy
from vllm_hotswap.devices import anonymous_bytes

ROWS, COLUMNS = 16384, 1024
SMALL = 2048, 1024

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def grown_by_a_layer(dtype: torch.dtype) -> int:
    """What the process grows by when vLLM takes an output layer of `ROWS` by `COLUMNS`."""
    layer = torch.nn.Module()
    weight = torch.ones(ROWS, COLUMNS, dtype=dtype)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    before = anonymous_bytes()
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    return anonymous_bytes() - before


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_small_layer_tells_what_a_large_one_will_hold(dtype: torch.dtype) -> None:
    """Whatever this CPU packs, the process grows by a copy if, and only if, it was foretold."""
    grown = grown_by_a_layer(dtype)

    assert keeps_packed_copy(*SMALL, dtype) == (grown > ROWS * COLUMNS * dtype.itemsize // 2)


def test_float32_is_packed_wherever_onednn_is() -> None:
    """So that the test above sees both answers, or only this one."""
    from vllm import _custom_ops as ops

    assert ops._supports_onednn == keeps_packed_copy(*SMALL, torch.float32)


def test_a_copy_for_other_instructions_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where AMX takes small layers, vLLM keeps a tensor and not a handler of oneDNN."""
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
    """As without AVX-512, where bfloat16 has no packed form."""
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
