"""What vLLM's configuration of one model tells of its memory. Checked on vLLM 0.32.0."""

from __future__ import annotations

import sys
from typing import Any

from vllm_hotswap.budget import OVERHEAD_BYTES, ModelNeeds
from vllm_hotswap.devices import device_of

WORKER_PROCESS_BYTES = 600 << 20
"""What one worker process of a tensor-parallel model holds besides the model, on a CPU."""


def model_needs(alias: str, config: Any, weights_bytes: int, pinned: bool = False) -> ModelNeeds:
    """What can be known of a model's memory before it is loaded, on one device."""
    model, parallel, device = config.model_config, config.parallel_config, device_of(config)
    per_token = (
        2
        * model.get_num_layers(parallel)
        * model.get_num_kv_heads(parallel)
        * model.get_head_size()
        * _kv_dtype_bytes(config)
    )
    # vLLM allocates whole blocks; one more than needed covers rounding and its null block.
    one = per_token * (model.max_model_len + 2 * (config.cache_config.block_size or 128))
    # Latent attention, state-space and sliding-window layers hold something else per token.
    is_plain = not (
        model.use_mla or model.is_hybrid or model.is_attention_free or model.get_sliding_window()
    )
    # The workers of a tensor-parallel model share one CPU's memory, but have a GPU each.
    workers = kv_shares(config)
    explicit = config.cache_config.kv_cache_memory_bytes
    return ModelNeeds(
        alias=alias,
        weights_bytes=weights_bytes if device.is_host_memory else weights_bytes // _ranks(config),
        kv_bytes=None if explicit is None else explicit * workers,
        min_kv_bytes=one * workers if is_plain else 0,
        max_kv_bytes=one * workers * config.scheduler_config.max_num_seqs
        if is_plain
        else sys.maxsize,
        pinned=pinned,
        keeps_weights=device.is_host_memory,
        overhead_bytes=OVERHEAD_BYTES + (WORKER_PROCESS_BYTES * workers if workers > 1 else 0),
    )


def kv_shares(config: Any) -> int:
    """Into how many parts a model's KV memory on its device is divided, one for each worker."""
    return _ranks(config) if device_of(config).is_host_memory else 1


def _ranks(config: Any) -> int:
    parallel = config.parallel_config
    return int(parallel.tensor_parallel_size * parallel.pipeline_parallel_size)


def _kv_dtype_bytes(config: Any) -> int:
    dtype = str(config.cache_config.cache_dtype)
    return 1 if "fp8" in dtype or "int8" in dtype else int(config.model_config.dtype.itemsize)
