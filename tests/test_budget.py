"""Sharing KV memory: within the budget, fair, and the same in whatever order models come."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, strategies as st

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host.memory import OVERHEAD_BYTES, share_kv_memory
from vllm_hotswap.host.messages import ModelFootprint

GIB = 1 << 30


def footprint(
    alias: str,
    weights: int = 0,
    kv: int | None = None,
    least: int = 0,
    most: int = 100 * GIB,
) -> ModelFootprint:
    return ModelFootprint(alias, weights, kv, least, most)


sizes = st.integers(0, 64 * GIB)
footprints = st.lists(
    st.builds(
        footprint, alias=st.uuids().map(str), weights=sizes, kv=st.none() | sizes, most=sizes
    ),
    min_size=1,
    max_size=6,
)


def left_to_share(models: list[ModelFootprint], budget: int) -> int:
    """What is left of the budget for models without an explicit size."""
    taken = sum(model.weights_bytes + OVERHEAD_BYTES + (model.kv_bytes or 0) for model in models)
    return max(0, budget - taken)


@given(footprints, sizes)
def test_shares_stay_within_the_budget(models: list[ModelFootprint], budget: int) -> None:
    """What is shared out is never more than there is."""
    shares = share_kv_memory(models, budget)

    shared = sum(shares[model.alias] for model in models if model.kv_bytes is None)
    assert shared <= left_to_share(models, budget)


@given(footprints, sizes)
def test_no_share_can_grow_unless_a_smaller_one_shrinks(
    models: list[ModelFootprint], budget: int
) -> None:
    """Max-min fairness: whoever is short has a largest share (but for rounding)."""
    shares = share_kv_memory(models, budget)

    automatic = [model for model in models if model.kv_bytes is None]
    largest = max((shares[model.alias] for model in automatic), default=0)
    short = [shares[model.alias] for model in automatic if shares[model.alias] < model.max_kv_bytes]
    assert all(largest - share <= len(automatic) for share in short)


@given(footprints, sizes)
def test_nothing_is_left_over_while_somebody_is_short(
    models: list[ModelFootprint], budget: int
) -> None:
    """What one model cannot use goes to the others."""
    shares = share_kv_memory(models, budget)

    automatic = [model for model in models if model.kv_bytes is None]
    unused = left_to_share(models, budget) - sum(shares[model.alias] for model in automatic)
    assert unused == 0 or all(shares[model.alias] == model.max_kv_bytes for model in automatic)


@given(footprints, sizes, st.randoms())
def test_order_of_models_changes_nothing(
    models: list[ModelFootprint], budget: int, chance: random.Random
) -> None:
    """Whichever model is configured or loaded first, everyone gets the same."""
    shuffled = chance.sample(models, len(models))

    assert share_kv_memory(models, budget) == share_kv_memory(shuffled, budget)


@given(footprints, sizes)
def test_explicit_sizes_are_kept(models: list[ModelFootprint], budget: int) -> None:
    """A configured size is what the model gets."""
    explicit = {model.alias: model.kv_bytes for model in models if model.kv_bytes is not None}

    assert explicit == {
        alias: share
        for alias, share in share_kv_memory(models, budget).items()
        if alias in explicit
    }


def test_rest_is_shared_equally() -> None:
    """Weights, overheads and explicit sizes first; then everyone gets the same."""
    models = [footprint("a", 2 * GIB), footprint("b", 1 * GIB), footprint("c", 0, 3 * GIB)]

    shares = share_kv_memory(models, 10 * GIB + 3 * OVERHEAD_BYTES)

    assert {"a": 2 * GIB, "b": 2 * GIB, "c": 3 * GIB} == shares


def test_small_model_leaves_the_rest_to_the_others() -> None:
    """Nobody gets more than all its sequences can use."""
    models = [footprint("small", most=GIB), footprint("a"), footprint("b")]

    shares = share_kv_memory(models, 9 * GIB + 3 * OVERHEAD_BYTES)

    assert {"small": GIB, "a": 4 * GIB, "b": 4 * GIB} == shares


def test_no_models_need_nothing() -> None:
    """There is nothing to share among nobody."""
    assert {} == share_kv_memory([], GIB)


def test_too_little_is_refused_with_the_arithmetic() -> None:
    """The message names the model, every number of the sum, and the ways out."""
    models = [
        footprint("llama", 4 * GIB - OVERHEAD_BYTES, least=2 * GIB),
        footprint("qwen", 2 * GIB - OVERHEAD_BYTES),
    ]

    with pytest.raises(ConfigError) as caught:
        share_kv_memory(models, 8 * GIB)

    assert (
        "model 'llama' would get 1.00 GiB of KV memory, but one sequence of its maximum length "
        "needs 2.00 GiB: of 8.00 GiB, the weights of all models take 6.00 GiB and explicit KV "
        "sizes leave 2.00 GiB to share; lower max_model_len, set kv_cache_memory_bytes, "
        "or configure fewer models"
    ) == caught.value.message


def test_weights_beyond_the_budget_leave_nothing() -> None:
    """The arithmetic does not go below zero."""
    with pytest.raises(ConfigError, match=r"would get 0\.00 GiB.*leave 0\.00 GiB to share"):
        share_kv_memory([footprint("llama", 9 * GIB, least=1)], 8 * GIB)
