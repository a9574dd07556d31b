"""What vLLM's configuration of one model tells of its memory. Checked on vLLM 0.32.0."""

from __future__ import annotations

from typing import Any

from vllm_hotswap.host import device_of, expected_limits, given_bytes, kv_key, kv_shares, ranks
from vllm_hotswap.launch.budget import OVERHEAD_BYTES, ModelNeeds
from vllm_hotswap.launch.packing import packed_copies_bytes, packing_bytes


def model_needs(
    alias: str, config: Any, weights_bytes: int, pinned: bool = False, converted_bytes: int = 0
) -> ModelNeeds:
    """What can be known of a model's memory before it is loaded, on one device.

    Args:
        weights_bytes: of its files.
        converted_bytes: what its weights take beyond that in their type in memory.
    """
    device = device_of(config)
    kv = expected_limits(config)
    # The workers of a tensor-parallel model share one CPU's memory, but have a GPU each.
    workers = kv_shares(config)
    graphs = 0 if config.model_config.enforce_eager else device.graphs_bytes
    explicit = given_bytes(config, kv)
    return ModelNeeds(
        alias=alias,
        weights_bytes=weights_bytes if device.is_host_memory else weights_bytes // ranks(config),
        kv_bytes=None if explicit is None else explicit * workers,
        min_kv_bytes=kv.least * workers,
        max_kv_bytes=kv.most * workers,
        pinned=pinned,
        kv_key=kv_key(config, kv),
        keeps_weights=device.is_host_memory,
        overhead_bytes=OVERHEAD_BYTES + slots_bytes(config) + graphs,
        processes=workers if workers > 1 else 0,
        copies_bytes=adapter_copies_bytes(config),
        more_weights_bytes=packed_copies_bytes(config) + converted_bytes,
        packing_bytes=packing_bytes(config),
        residue_bytes=OVERHEAD_BYTES + graphs if device.reports_sleep_bytes else 0,
    )


def slots_bytes(config: Any) -> int:
    """What a model holds for the adapters that it can run at once, roughly."""
    lora = config.lora_config
    return 0 if lora is None else int(lora.max_loras * kv_shares(config) * _adapter_bytes(config))


def adapter_copies_bytes(config: Any) -> int:
    """What adapters hold besides, once they are loaded, if that is the device's memory."""
    lora = config.lora_config
    if lora is None or not device_of(config).is_host_memory:
        return 0
    return int(lora.max_cpu_loras * kv_shares(config) * _adapter_bytes(config))


def _adapter_bytes(config: Any) -> int:
    """An adapter of the highest rank, for all layers that may have one."""
    model, parallel, lora = config.model_config, config.parallel_config, config.lora_config
    hidden, vocabulary = model.get_hidden_size(), model.get_vocab_size()
    heads = model.get_num_attention_heads(parallel) * model.get_head_size()
    kv_heads = model.get_num_kv_heads(parallel) * model.get_head_size()
    inner = getattr(model.hf_text_config, "intermediate_size", None) or 4 * hidden
    # Inputs and outputs of q and o, of k and v, of three matrices of each expert.
    attention = 2 * (hidden + heads) + 2 * (hidden + kv_heads)
    experts = max(1, model.get_num_experts())
    layers = model.get_num_layers(parallel) * (attention + 3 * experts * (hidden + inner))
    parameters = lora.max_lora_rank * (layers + 2 * (hidden + vocabulary))
    return int(parameters * getattr(lora.lora_dtype, "itemsize", 2))
