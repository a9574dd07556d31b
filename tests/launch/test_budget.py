"""The memory budget: sizes as users write them, and the shares of KV memory within it."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from vllm_hotswap.config.sizes import MemoryBudget, parse_size, resolve_size
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host.devices import DeviceMemory
from vllm_hotswap.launch.budget import (
    OVERHEAD_BYTES,
    READING_BYTES,
    ModelNeeds,
    resolve_budget,
    share_kv_memory,
)
from vllm_hotswap.models.footprint import Usage

MIB = 1 << 20
GIB = 1 << 30


def needs(
    alias: str,
    weights: int = 0,
    kv: int | None = None,
    least: int = 0,
    most: int = 100 * GIB,
    pinned: bool = False,
    keeps_weights: bool = False,
) -> ModelNeeds:
    key = "" if kv is None else "kv_cache_memory_bytes"
    return ModelNeeds(alias, weights, kv, least, most, pinned, key, keeps_weights)


def bounded(least: int, more: int, **others: object) -> ModelNeeds:
    return needs(least=least, most=least + more, **others)  # type: ignore[arg-type]


sizes = st.integers(0, 16 * GIB)
models_strategy = st.lists(
    st.builds(
        bounded,
        alias=st.uuids().map(str),
        weights=sizes,
        kv=st.none() | sizes,
        least=st.integers(0, 4 * GIB),
        more=sizes,
        pinned=st.booleans(),
        keeps_weights=st.booleans(),
    ),
    min_size=1,
    max_size=5,
)
spare = st.integers(0, 32 * GIB)
"""What a budget has beyond the necessary minimum."""


def together(model: ModelNeeds, models: list[ModelNeeds]) -> list[ModelNeeds]:
    """Return a model and the pinned ones: whatever else is loaded, these are loaded together."""
    return [other for other in models if other.pinned or other is model]


def taken(models: list[ModelNeeds], kv: dict[str, int]) -> int:
    """Return what models take while the last of them is loaded."""
    reading = max(min(READING_BYTES, model.weights_bytes) for model in models)
    return reading + sum(m.weights_bytes + OVERHEAD_BYTES + kv[m.alias] for m in models)


def least(models: list[ModelNeeds]) -> dict[str, int]:
    return {m.alias: m.min_kv_bytes if m.kv_bytes is None else m.kv_bytes for m in models}


def least_for_all(models: list[ModelNeeds]) -> int:
    """Return the smallest budget with which all can be loaded together."""
    return taken(models, least(models))


def least_in_turn(models: list[ModelNeeds]) -> int:
    """Return the smallest budget with which each can be loaded beside the pinned ones."""
    return max(least_for_all(together(model, models)) for model in models)


def kept_asleep(model: ModelNeeds, models: list[ModelNeeds]) -> int:
    """Return what sleeping weights take beside a loaded model."""
    others = [m for m in models if m.keeps_weights and m not in together(model, models)]
    return sum(m.weights_bytes + OVERHEAD_BYTES for m in others)


# --- sharing --------------------------------------------------------------------------------


@given(models_strategy, spare)
def test_each_model_can_be_loaded_beside_the_pinned_ones(
    models: list[ModelNeeds], spare: int
) -> None:
    """Weights, overhead, share and the reading of weights fit beside the pinned models."""
    budget = least_in_turn(models) + spare

    shares = dict(share_kv_memory(models, budget))

    assert all(taken(together(model, models), shares) <= budget for model in models)


@given(models_strategy, spare)
def test_all_are_loaded_together_where_their_minima_allow_it(
    models: list[ModelNeeds], spare: int
) -> None:
    """Where the minima of all fit together, the sum of all shares is within the budget, too."""
    budget = least_for_all(models) + spare

    assert taken(models, dict(share_kv_memory(models, budget))) <= budget


@given(models_strategy, spare)
def test_one_has_kv_memory_at_a_time_where_the_weights_of_all_allow_it(
    models: list[ModelNeeds], spare: int
) -> None:
    """Weights that sleeping models keep count; other weights come and go with their models."""
    budget = spare + max(
        kept_asleep(model, models) + least_for_all(together(model, models)) for model in models
    )

    shares = dict(share_kv_memory(models, budget))

    assert all(
        kept_asleep(model, models) + taken(together(model, models), shares) <= budget
        for model in models
    )


@given(models_strategy, spare)
def test_nobody_gets_less_than_its_minimum_or_more_than_its_maximum(
    models: list[ModelNeeds], spare: int
) -> None:
    """A share lies between one sequence of maximum length and all sequences of the model."""
    shares = share_kv_memory(models, least_in_turn(models) + spare)

    automatic = [model for model in models if model.kv_bytes is None]
    assert all(m.min_kv_bytes <= shares[m.alias] <= m.max_kv_bytes for m in automatic)


@given(models_strategy, spare)
def test_explicit_sizes_are_kept(models: list[ModelNeeds], spare: int) -> None:
    """A model with a configured size gets that size."""
    shares = share_kv_memory(models, least_in_turn(models) + spare)

    explicit = {model.alias: model.kv_bytes for model in models if model.kv_bytes is not None}
    assert explicit == {alias: share for alias, share in shares.items() if alias in explicit}


@given(models_strategy, spare)
def test_no_share_can_grow_unless_a_smaller_one_shrinks(
    models: list[ModelNeeds], spare: int
) -> None:
    """Max-min fairness: a short model has at least as much as any model above its minimum."""
    shares = share_kv_memory(models, least_for_all(models) + spare)

    automatic = [model for model in models if model.kv_bytes is None]
    short = [shares[m.alias] for m in automatic if shares[m.alias] < m.max_kv_bytes]
    generous = [shares[m.alias] for m in automatic if shares[m.alias] > m.min_kv_bytes]
    assert not short or min(short) >= max(generous, default=0)


@given(models_strategy, spare)
def test_nothing_is_left_over_while_somebody_is_short(models: list[ModelNeeds], spare: int) -> None:
    """What one model cannot use goes to the others, except less than a byte per model."""
    budget = least_for_all(models) + spare
    shares = dict(share_kv_memory(models, budget))

    automatic = [model for model in models if model.kv_bytes is None]
    unused = budget - taken(models, shares)
    assert unused < len(models) or all(shares[m.alias] == m.max_kv_bytes for m in automatic)


@given(models_strategy, spare, st.randoms())
def test_order_of_models_changes_nothing(
    models: list[ModelNeeds], spare: int, chance: random.Random
) -> None:
    """Shares are the same, whatever the order of configuration or loading."""
    budget = least_in_turn(models) + spare
    shuffled = chance.sample(models, len(models))

    assert share_kv_memory(models, budget) == share_kv_memory(shuffled, budget)


@given(models_strategy)
def test_refused_is_only_what_could_never_be_loaded(models: list[ModelNeeds]) -> None:
    """Only a model whose minimum does not fit beside the minima of pinned ones is refused."""
    share_kv_memory(models, least_in_turn(models))

    with pytest.raises(ConfigError, match="can never be loaded"):
        share_kv_memory(models, least_in_turn(models) - 1)


def test_rest_is_shared_equally() -> None:
    """After weights, overheads, reading and explicit sizes, all models get the same."""
    models = [needs("a", 2 * GIB), needs("b", 1 * GIB), needs("c", 0, 3 * GIB)]

    shares = share_kv_memory(models, 10 * GIB + 3 * OVERHEAD_BYTES + READING_BYTES)

    assert {"a": 2 * GIB, "b": 2 * GIB, "c": 3 * GIB} == shares


def test_small_model_leaves_the_rest_to_the_others() -> None:
    """No model gets more than all its sequences can use."""
    models = [needs("small", most=GIB), needs("a"), needs("b")]

    shares = share_kv_memory(models, 9 * GIB + 3 * OVERHEAD_BYTES)

    assert {"small": GIB, "a": 4 * GIB, "b": 4 * GIB} == shares


def test_large_minimum_comes_before_equal_shares() -> None:
    """A model gets its minimum even if one sequence needs more than an equal share."""
    models = [needs("long", least=6 * GIB), needs("a"), needs("b")]

    shares = share_kv_memory(models, 10 * GIB + 3 * OVERHEAD_BYTES)

    assert {"long": 6 * GIB, "a": 2 * GIB, "b": 2 * GIB} == shares


def test_model_of_unknown_appetite_takes_what_there_is() -> None:
    """A model whose KV memory per token is unknown has no maximum."""
    shares = share_kv_memory([needs("hybrid", most=sys.maxsize)], 5 * GIB + OVERHEAD_BYTES)

    assert {"hybrid": 5 * GIB} == shares


def test_models_that_do_not_fit_together_take_turns_with_their_weights_kept() -> None:
    """Where all weights fit, they stay, and each model in turn has all remaining KV memory."""
    models = [
        needs("a", 2 * GIB - OVERHEAD_BYTES, least=4 * GIB, keeps_weights=True),
        needs("b", 1 * GIB - OVERHEAD_BYTES, least=3 * GIB, keeps_weights=True),
    ]

    shares = share_kv_memory(models, 9 * GIB + READING_BYTES)

    assert {"a": 6 * GIB, "b": 6 * GIB} == shares


def test_models_whose_weights_do_not_fit_together_take_turns_alone() -> None:
    """Otherwise each model in turn has all that its own weights leave; others are unloaded."""
    models = [
        needs("a", 6 * GIB - OVERHEAD_BYTES, keeps_weights=True),
        needs("b", 4 * GIB - OVERHEAD_BYTES, keeps_weights=True),
    ]

    shares = share_kv_memory(models, 9 * GIB + READING_BYTES)

    assert {"a": 3 * GIB, "b": 5 * GIB} == shares


def test_pinned_model_shares_with_everyone_in_turn() -> None:
    """A pinned model keeps the smallest share that any of the turns gives it."""
    models = [
        needs("pinned", GIB - OVERHEAD_BYTES, pinned=True),
        needs("a", 6 * GIB - OVERHEAD_BYTES),
        needs("b", 4 * GIB - OVERHEAD_BYTES),
    ]

    shares = share_kv_memory(models, 9 * GIB + READING_BYTES)

    assert {"pinned": GIB, "a": GIB, "b": 2 * GIB} == shares


def test_no_models_need_nothing() -> None:
    """Without models nothing is shared, and nothing is needed."""
    assert {} == share_kv_memory([], GIB)


def test_too_little_is_refused_with_the_arithmetic() -> None:
    """The message has the model, every number of the sum, and the possible remedies."""
    models = [
        needs("qwen", 2 * GIB - OVERHEAD_BYTES),
        needs("llama", 7 * GIB - OVERHEAD_BYTES - READING_BYTES, least=2 * GIB),
    ]

    with pytest.raises(ConfigError) as caught:
        share_kv_memory(models, 8 * GIB)

    assert (
        "model 'llama' can never be loaded: one sequence of its maximum length needs 2.00 GiB of "
        "KV memory, its weights and overhead take 7.00 GiB, and the budget for models is "
        "8.00 GiB, which leaves 1.00 GiB; raise memory.device or lower max_model_len"
    ) == caught.value.message


def test_too_little_beside_pinned_models_names_what_they_take() -> None:
    """The message has pinned models' weights, overheads and KV memory; unpinning is a remedy."""
    models = [
        needs("pinned", 2 * GIB - OVERHEAD_BYTES, 1 * GIB, pinned=True),
        needs("llama", 4 * GIB - OVERHEAD_BYTES - READING_BYTES, 3 * GIB),
    ]

    with pytest.raises(ConfigError) as caught:
        share_kv_memory(models, 8 * GIB)

    assert (
        "model 'llama' can never be loaded: kv_cache_memory_bytes gives it 3.00 GiB of KV memory, "
        "its weights and overhead take 4.00 GiB, pinned models take 3.00 GiB, and the budget for "
        "models is 8.00 GiB, which leaves 1.00 GiB; raise memory.device, lower "
        "kv_cache_memory_bytes or unpin a model"
    ) == caught.value.message


def test_a_model_without_kv_memory_that_does_not_fit_is_told_so() -> None:
    """The error for an encoder names neither length nor KV memory, which would not help."""
    model = needs("bert", 9 * GIB - OVERHEAD_BYTES - READING_BYTES, 0)

    with pytest.raises(ConfigError) as caught:
        share_kv_memory([model], 8 * GIB)

    assert (
        "model 'bert' can never be loaded: its weights and overhead take 9.00 GiB, and the budget "
        "for models is 8.00 GiB, which leaves 0.00 GiB; raise memory.device"
    ) == caught.value.message


def test_pinned_models_that_do_not_fit_are_named_themselves() -> None:
    """The error names the pinned models, not the first model that fails beside them."""
    models = [needs("llama"), needs("pinned", 9 * GIB, pinned=True)]

    with pytest.raises(ConfigError, match=r"'pinned' can never be loaded: .* leaves 0\.00 GiB;"):
        share_kv_memory(models, 8 * GIB)


# --- sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1 << 30, 1 << 30),
        ("20GiB", 20 * GIB),
        ("20 gib", 20 * GIB),
        ("1.5GiB", GIB * 3 // 2),
        ("20GB", 20 * 10**9),
        ("512MiB", 512 * MIB),
        ("2TiB", 2048 * GIB),
        ("4096", 4096),
        ("4096B", 4096),
        (0.8, 0.8),
        (1.0, 1.0),
        ("0.8", 0.8),
        ("80%", 0.8),
        ("100 %", 1.0),
    ],
)
def test_size_may_be_written_as_people_do(text: object, size: float) -> None:
    """Numbers of bytes are whole numbers; fractions are not."""
    parsed = parse_size(text)

    assert (type(size), size) == (type(parsed), parsed)


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, None, []),
        *("", ".", "GiB", "1.2.3GiB", "5 apples", "20 G iB", "-1GiB", "0GiB", "0.0001KB"),
        *("0", "0%", "101%", "nan", "inf"),
    ],
)
def test_anything_else_is_refused_with_what_is_wanted(value: object) -> None:
    """Everything that is not a size is refused with a description of sizes."""
    with pytest.raises(ValueError, match="give bytes, a size such as 20GiB, or a fraction"):
        parse_size(value)


def test_fraction_is_one_of_what_there_is() -> None:
    """A fraction is a fraction of all memory, and a number of bytes stays as it is."""
    assert (25, 7) == (resolve_size(0.25, 100), resolve_size(7, 100))


# --- the budget -----------------------------------------------------------------------------

MACHINE = DeviceMemory(total=100 * GIB, free=80 * GIB, held=2 * GIB)


def test_default_budget_is_what_vllm_would_take() -> None:
    """All free memory except what `gpu_memory_utilization` leaves to others; half of the host's."""
    assert Usage(70 * GIB, 15 * GIB) == resolve_budget(MemoryBudget(), MACHINE, 30 * GIB, 0.9)


def test_configured_budget_is_for_the_engine_host_as_a_whole() -> None:
    """The host's own memory is subtracted; a fraction is a fraction of all memory."""
    memory = MemoryBudget(device=0.5, host=0.5)

    assert Usage(48 * GIB, 15 * GIB) == resolve_budget(memory, MACHINE, 30 * GIB, 0.9)


def test_budget_beyond_what_is_free_is_refused() -> None:
    """It is refused with what can be used: free memory, and what the host itself holds."""
    assert 80 * GIB == resolve_budget(MemoryBudget(82 * GIB), MACHINE, 0, 0.9).device

    with pytest.raises(
        ConfigError, match=r"memory.device is 83.00 GiB, but only 82.00 GiB of 100.00 GiB"
    ):
        resolve_budget(MemoryBudget(83 * GIB), MACHINE, 0, 0.9)


@pytest.mark.parametrize(
    ("memory", "device"),
    [
        (MemoryBudget(2 * GIB), MACHINE),
        (MemoryBudget(), DeviceMemory(total=100 * GIB, free=10 * GIB, held=GIB)),
    ],
)
def test_budget_that_leaves_nothing_for_models_is_refused(
    memory: MemoryBudget, device: DeviceMemory
) -> None:
    """The error has what the host itself holds, and what is free."""
    with pytest.raises(ConfigError, match="no memory is left for models: the engine host itself"):
        resolve_budget(memory, device, 0, 0.9)


def test_worker_processes_count_as_much_as_the_host_and_more() -> None:
    """Each worker process costs what the host's imports cost, and runs models besides."""
    alone = needs("a", GIB)
    wide = replace(alone, processes=2, host_bytes=300 * MIB)

    assert alone.held_bytes == replace(alone, host_bytes=300 * MIB).held_bytes
    assert 600 * MIB < wide.held_bytes - alone.held_bytes < 900 * MIB


def test_a_full_device_says_who_holds_it() -> None:
    """The message for a full device names other processes, the engine host and the reserve."""
    device = DeviceMemory(total=80 * GIB, free=0, held=GIB, reserve=2 * GIB)

    with pytest.raises(
        ConfigError,
        match=r"of the device's 80.00 GiB, other processes hold 77.00 GiB, the engine host itself "
        r"holds 1.00 GiB, and 2.00 GiB are kept free .*; stop the other processes",
    ):
        resolve_budget(MemoryBudget(), device, 0, 1.0)


def test_what_models_leave_on_the_device_asleep_is_no_ones_kv_memory() -> None:
    """Each of two models that do not fit together loses what the other keeps while asleep."""
    one, two = (
        replace(needs(alias, weights=8 * GIB, least=GIB), residue_bytes=GIB // 2)
        for alias in ("one", "two")
    )
    budget = 14 * GIB

    shares = share_kv_memory([one, two], budget)

    left = budget - 8 * GIB - OVERHEAD_BYTES - GIB // 2 - READING_BYTES
    assert {"one": left, "two": left} == shares
