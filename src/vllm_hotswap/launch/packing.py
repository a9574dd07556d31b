"""Second copies of weights that vLLM keeps on CPUs. Checked on vLLM 0.32.0.

Where a CPU can multiply by a packed weight, vLLM packs every layer that is not quantised. A linear
layer then drops its own weight. An embedding and an output layer keep it, because tokens are looked
up in it (`UnquantizedEmbeddingMethod.process_weights_after_loading`, `remove_weight=False`): both
are in memory twice. Which CPU packs which type depends on its instructions, on how torch and
oneDNN were built, and on environment variables such as `ONEDNN_MAX_CPU_ISA`. bfloat16 is packed
only with AVX-512 or AMX, float32 also with AVX2. So vLLM packs a small layer as a test.

Relies on: `dispatch_cpu_unquantized_gemm`, which leaves what it multiplies by in the closure of the
layer's `cpu_linear`; `pad_vocab_size`; `UnquantizedEmbeddingMethod.tie_weights`, which makes
two layers share a weight, and leaves them two.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from vllm_hotswap.host import device_of

ONE_LAYER = frozenset(
    [
        "CohereForCausalLM",
        "Cohere2ForCausalLM",
        "Cohere2MoeForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3nForCausalLM",
        "Gemma3nForConditionalGeneration",
    ]
)
"""Models that multiply by the embedding itself. A model that is missing here is overestimated by
one copy, until its first load.
"""

PROBE_BYTES = 4 << 20
"""A layer of that size is packed like any larger one; below 1 MiB, vLLM packs in other ways."""

ROW_STEP = 16
"""Some ways of packing need a multiple of so many rows, which any padded vocabulary has."""


def packed_copies_bytes(config: Any) -> int:
    """Return the bytes of second copies beside a model's embedding and output layer; else 0.

    Tied embeddings are one weight of two layers, each of which is packed: still two copies.
    Only the models of `ONE_LAYER` have no output layer. The first load measures what there is.
    """
    if not _is_cpu(config):
        return 0
    models = [config.model_config]
    if (draft := _draft_model(config)) is not None:
        models.append(draft)
    return sum(_copies(model) * _embedding_bytes(model) for model in models)


def packing_bytes(config: Any) -> int:
    """Return the bytes that packing a model's largest linear layer takes for a while."""
    if not _is_cpu(config) or config.quant_config is not None:
        return 0
    model = config.model_config
    hidden = model.get_hidden_size()
    inner = getattr(model.hf_text_config, "intermediate_size", None) or 4 * hidden
    shards = config.parallel_config.tensor_parallel_size
    # Gate and up projection are one layer. While it is packed, both forms are in memory.
    rows = max(2 * inner // shards, ROW_STEP)
    return rows * hidden * _itemsize(model) if _is_packed(rows, hidden, model.dtype) else 0


def _is_cpu(config: Any) -> bool:
    from vllm.platforms import current_platform

    return device_of(config).is_host_memory and bool(current_platform.is_cpu())


def _draft_model(config: Any) -> Any | None:
    speculative = config.speculative_config
    draft = None if speculative is None else speculative.draft_model_config
    return None if draft is config.model_config else draft


def _embedding_bytes(model: Any) -> int:
    return _rows(model) * int(model.get_hidden_size()) * _itemsize(model)


def _copies(model: Any) -> int:
    if not _is_packed(_rows(model), int(model.get_hidden_size()), model.dtype):
        return 0
    generates = str(model.runner_type) == "generate"
    return 2 if generates and model.architecture not in ONE_LAYER else 1


def _rows(model: Any) -> int:
    from vllm.model_executor.layers.vocab_parallel_embedding import pad_vocab_size

    return int(pad_vocab_size(model.get_vocab_size()))


def _itemsize(model: Any) -> int:
    return int(model.dtype.itemsize)


def _is_packed(rows: int, columns: int, dtype: Any) -> bool:
    steps = PROBE_BYTES // (columns * dtype.itemsize * ROW_STEP) + 1
    return keeps_packed_copy(min(rows, steps * ROW_STEP), columns, dtype)


@cache
def keeps_packed_copy(rows: int, columns: int, dtype: Any) -> bool:
    """Whether vLLM, on this CPU, keeps a packed copy beside a weight that it does not remove."""
    import torch
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer = torch.nn.Module()
    weight = torch.zeros(rows, columns, dtype=dtype)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    with _one_thread(), _quietly("vllm.model_executor.layers.utils"):
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    cells = getattr(layer.cpu_linear, "__closure__", None) or ()
    return any(_is_copy(cell.cell_contents, weight) for cell in cells)


def _is_copy(value: Any, weight: Any) -> bool:
    import torch
    from vllm._custom_ops import CPUDNNLGEMMHandler

    if isinstance(value, torch.Tensor):
        return bool(value.numel() > 0 and value.data_ptr() != weight.data_ptr())
    return isinstance(value, CPUDNNLGEMMHandler)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep OpenMP from starting threads, which would stay in a process that does not use them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quietly(name: str) -> Iterator[None]:
    """Suppress the warning that the CPU cannot pack: the test is there to find that out."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
