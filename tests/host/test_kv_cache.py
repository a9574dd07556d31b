"""What a model's configuration says about its layers' caches, before vLLM is asked for sizes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_hotswap.host import kv_cache
from vllm_hotswap.host.kv_cache import BOTH, CHUNKED, FULL, NONE, SLIDING, STATE

HALF = SimpleNamespace(itemsize=2)


def config(layers: int = 4, *, window: int | None = None, **more: Any) -> Any:
    """Return a stand-in for vLLM's configuration of a model, with what is looked at."""
    text = SimpleNamespace(**more.pop("text", {}))
    draft = more.pop("draft", None)
    first, end = more.pop("rank", (0, layers))
    model = SimpleNamespace(
        model="model",
        hf_text_config=text,
        dtype=HALF,
        max_model_len=100,
        attn_type="decoder",
        is_hybrid=False,
        is_attention_free=False,
        has_inner_state=False,
        is_encoder_decoder=False,
        has_noops=False,
        use_mla=False,
        get_total_num_hidden_layers=lambda: layers,
        get_layers_start_end_indices=lambda _: (first, end),
        get_num_kv_heads=lambda _: 2,
        get_head_size=lambda: 8,
    )
    vars(model).update(more)
    return SimpleNamespace(
        model_config=model,
        parallel_config=None,
        speculative_config=draft,
        cache_config=SimpleNamespace(sliding_window=window, block_size=16),
        scheduler_config=SimpleNamespace(max_num_seqs=3),
    )


TOKENS = (100 + 2 * 128) * (3 + 1)
"""Bytes for all sequences: two blocks for each, and the block that vLLM keeps."""


def drafted(layers: int = 1, **more: Any) -> Any:
    """Return a model with a draft model that is described by `more`."""
    draft = config(layers, **more).model_config
    speculative = SimpleNamespace(draft_model_config=draft, draft_parallel_config=None)
    return config(draft=speculative)


MIXED = ["sliding_attention", "full_attention"] * 2


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        (config(), [FULL] * 4),
        (config(window=128), [SLIDING] * 4),
        (config(text={"layer_types": MIXED}), [SLIDING, FULL] * 2),
        (config(text={"layer_types": ["chunked_attention"] * 4}), [CHUNKED] * 4),
        (config(text={"attention_chunk_size": 64}), [CHUNKED] * 4),
        (config(is_attention_free=True, has_inner_state=True), [STATE] * 4),
        (
            config(
                is_hybrid=True, text={"layers_block_type": ["mamba", "attention", "mlp", "moe"]}
            ),
            [STATE, FULL, NONE, NONE],
        ),
        (config(rank=(2, 4), text={"layer_types": MIXED}), [SLIDING, FULL]),
        (config(text={"layer_types": MIXED, "num_kv_shared_layers": 1}), [SLIDING, FULL, SLIDING]),
    ],
)
def test_every_kind_of_layer_is_known_by_its_name(given: Any, kinds: list[str]) -> None:
    """Every kind of layer is recognised by name; only the first rank's with a cache count."""
    assert kinds == kv_cache._kinds(given)
    assert kv_cache._is_known(given, kinds)


@pytest.mark.parametrize(
    "given",
    [
        config(text={"layer_types": ["new_attention"] * 4}),
        config(is_encoder_decoder=True),
        config(has_noops=True),
        config(original_max_model_len=-1),
        config(text={"global_head_dim": 512}),
        config(draft=SimpleNamespace(draft_model_config=None)),
    ],
)
def test_what_the_configuration_leaves_open_is_no_lower_bound(given: Any) -> None:
    """What the configuration leaves open is not a lower bound: only the load tells."""
    assert not kv_cache._is_known(given, kv_cache._kinds(given))


def test_layers_of_a_hybrid_that_are_all_called_the_same_are_both() -> None:
    """Falcon-H1 attends and keeps a state in every layer, and calls them all attention."""
    given = config(is_hybrid=True, text={"layers_block_type": ["attention"] * 4})

    assert [BOTH] * 4 == kv_cache._kinds(given)
    assert not kv_cache._is_known(given, [BOTH] * 4)


def test_a_draft_models_layers_count() -> None:
    """A draft model's layers count: they have a cache beside the model's."""
    model, draft = kv_cache._models(drafted(layers=2, text={"layer_types": MIXED[:2]}))

    assert [FULL] * 4 == kv_cache._kinds(model)
    assert [SLIDING, FULL] == kv_cache._kinds(draft)


def test_a_draft_models_layers_are_as_wide_as_they_are() -> None:
    """The bound is the model's, plus the draft model's by its own heads and type."""
    sizes = {"get_num_kv_heads": lambda _: 4, "get_head_size": lambda: 64}
    wide = {**sizes, "dtype": SimpleNamespace(itemsize=4)}
    given = drafted(layers=1, **wide)
    alone = kv_cache._most_by_sizes(config())

    # One layer, four heads of 64 numbers of four bytes.
    assert alone + 2 * 1 * 4 * 64 * 4 * TOKENS == kv_cache._most_by_sizes(given)


def test_a_draft_model_that_holds_something_else_has_no_bound() -> None:
    """A draft model with another kind of cache has no bound, and nor has one with both kinds."""
    assert sys.maxsize == kv_cache._most_by_sizes(drafted(use_mla=True))


def asking(blocks: int | None, size: int | None) -> Any:
    cache = SimpleNamespace(num_gpu_blocks_override=blocks, kv_cache_memory_bytes=size)
    return SimpleNamespace(cache_config=cache)


def test_a_number_of_blocks_counts_more_than_bytes() -> None:
    """Block counts win over bytes, as in vLLM; without blocks of a known size, bytes are given."""
    limit = kv_cache.KVLimits(least=200, most=1000, block=100)

    assert 300 == kv_cache.given_bytes(asking(3, 500), limit)
    assert 500 == kv_cache.given_bytes(asking(None, 500), limit)
    assert 500 == kv_cache.given_bytes(asking(3, 500), kv_cache.KVLimits(0, 1000))
    assert 0 == kv_cache.given_bytes(asking(3, 500), kv_cache.NO_KV)
    assert kv_cache.given_bytes(asking(None, None), limit) is None


@pytest.mark.parametrize("attn_type", ["encoder_only", "encoder"])
def test_encoders_need_no_kv_memory(attn_type: str) -> None:
    """Encoders need no KV memory, nor do models without attention that keep no state."""
    assert not kv_cache.needs_kv(config(attn_type=attn_type))
    assert not kv_cache.needs_kv(config(is_attention_free=True))
    assert kv_cache.needs_kv(config())


def test_where_vllm_cannot_be_asked_keys_and_values_are_the_bound() -> None:
    """Four layers, two heads of eight numbers of two bytes; two blocks for each sequence."""
    most = kv_cache._most_of_full_attention(config(), [FULL] * 4)

    assert 2 * 4 * 2 * 8 * 2 * TOKENS == most


@pytest.mark.parametrize(
    ("given", "kinds"), [(config(use_mla=True), [FULL] * 4), (config(), [STATE, FULL])]
)
def test_nothing_is_a_bound_for_what_holds_something_else(given: Any, kinds: list[str]) -> None:
    """Models that hold anything else have no lower bound; the load bounds them."""
    assert sys.maxsize == kv_cache._most_of_full_attention(given, kinds)


@dataclass
class SpecOf26:
    block_size: int


@dataclass
class SpecOf29(SpecOf26):
    num_prefill_checkpoint_blocks: int = 0


def test_checkpoint_blocks_are_counted_where_vllm_knows_them() -> None:
    """Checkpoint blocks are counted only where vLLM knows the argument; vLLM 0.26 refuses it."""
    assert {} == kv_cache._checkpoint_blocks(SpecOf26)
    assert {"num_prefill_checkpoint_blocks": 1} == kv_cache._checkpoint_blocks(SpecOf29)
