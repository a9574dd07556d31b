"""The memory budget: sizes as people write them, and KV memory shared within it."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from vllm_hotswap.budget import (
    OVERHEAD_BYTES,
    READING_BYTES,
    MemoryBudget,
    ModelNeeds,
    parse_size,
    resolve_budget,
    resolve_size,
    share_kv_memory,
)
from vllm_hotswap.devices import DeviceMemory
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.planner import Usage

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
"""What a budget has besides what is needed at least."""


def together(model: ModelNeeds, models: list[ModelNeeds]) -> list[ModelNeeds]:
    """A model and the pinned ones: they are loaded at once, whatever else is."""
    return [other for other in models if other.pinned or other is model]


def taken(models: list[ModelNeeds], kv: dict[str, int]) -> int:
    """What models take while the last of them is loaded."""
    reading = max(min(READING_BYTES, model.weights_bytes) for model in models)
    return reading + sum(m.weights_bytes + OVERHEAD_BYTES + kv[m.alias] for m in models)


def least(models: list[ModelNeeds]) -> dict[str, int]:
    return {m.alias: m.min_kv_bytes if m.kv_bytes is None else m.kv_bytes for m in models}


def least_for_all(models: list[ModelNeeds]) -> int:
    """The smallest budget with which all can be loaded together."""
    return taken(models, least(models))


def least_in_turn(models: list[ModelNeeds]) -> int:
    """The smallest budget with which each can be loaded beside the pinned ones."""
    return max(least_for_all(together(model, models)) for model in models)


def kept_asleep(model: ModelNeeds, models: list[ModelNeeds]) -> int:
    """What weights asleep take beside a model that is loaded."""
    others = [m for m in models if m.keeps_weights and m not in together(model, models)]
    return sum(m.weights_bytes + OVERHEAD_BYTES for m in others)


# --- sharing --------------------------------------------------------------------------------


@given(models_strategy, spare)
def test_each_model_can_be_loaded_beside_the_pinned_ones(
    models: list[ModelNeeds], spare: int
) -> None:
    """With its weights, its overhead, its share, and what reading it takes."""
    budget = least_in_turn(models) + spare

    shares = dict(share_kv_memory(models, budget))

    assert all(taken(together(model, models), shares) <= budget for model in models)


@given(models_strategy, spare)
def test_all_are_loaded_together_where_their_minima_allow_it(
    models: list[ModelNeeds], spare: int
) -> None:
    """Then the sum of all shares is within the budget, too."""
    budget = least_for_all(models) + spare

    assert taken(models, dict(share_kv_memory(models, budget))) <= budget


@given(models_strategy, spare)
def test_one_has_kv_memory_at_a_time_where_the_weights_of_all_allow_it(
    models: list[ModelNeeds], spare: int
) -> None:
    """Weights that sleepers keep count; the others come and go with their models."""
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
    """One sequence of its maximum length at least, all of its sequences at most."""
    shares = share_kv_memory(models, least_in_turn(models) + spare)

    automatic = [model for model in models if model.kv_bytes is None]
    assert all(m.min_kv_bytes <= shares[m.alias] <= m.max_kv_bytes for m in automatic)


@given(models_strategy, spare)
def test_explicit_sizes_are_kept(models: list[ModelNeeds], spare: int) -> None:
    """A configured size is what the model gets."""
    shares = share_kv_memory(models, least_in_turn(models) + spare)

    explicit = {model.alias: model.kv_bytes for model in models if model.kv_bytes is not None}
    assert explicit == {alias: share for alias, share in shares.items() if alias in explicit}


@given(models_strategy, spare)
def test_no_share_can_grow_unless_a_smaller_one_shrinks(
    models: list[ModelNeeds], spare: int
) -> None:
    """Max-min fairness: whoever is short has as much as anybody who could do with less."""
    shares = share_kv_memory(models, least_for_all(models) + spare)

    automatic = [model for model in models if model.kv_bytes is None]
    short = [shares[m.alias] for m in automatic if shares[m.alias] < m.max_kv_bytes]
    generous = [shares[m.alias] for m in automatic if shares[m.alias] > m.min_kv_bytes]
    assert not short or min(short) >= max(generous, default=0)


@given(models_strategy, spare)
def test_nothing_is_left_over_while_somebody_is_short(models: list[ModelNeeds], spare: int) -> None:
    """What one model cannot use goes to the others, but for less than a byte each."""
    budget = least_for_all(models) + spare
    shares = dict(share_kv_memory(models, budget))

    automatic = [model for model in models if model.kv_bytes is None]
    unused = budget - taken(models, shares)
    assert unused < len(models) or all(shares[m.alias] == m.max_kv_bytes for m in automatic)


@given(models_strategy, spare, st.randoms())
def test_order_of_models_changes_nothing(
    models: list[ModelNeeds], spare: int, chance: random.Random
) -> None:
    """Whichever model is configured or loaded first, everyone gets the same."""
    budget = least_in_turn(models) + spare
    shuffled = chance.sample(models, len(models))

    assert share_kv_memory(models, budget) == share_kv_memory(shuffled, budget)


@given(models_strategy)
def test_refused_is_only_what_could_never_be_loaded(models: list[ModelNeeds]) -> None:
    """A model that cannot have its minimum beside the pinned ones, each with its minimum."""
    share_kv_memory(models, least_in_turn(models))

    with pytest.raises(ConfigError, match="can never be loaded"):
        share_kv_memory(models, least_in_turn(models) - 1)


def test_rest_is_shared_equally() -> None:
    """Weights, overheads, reading and explicit sizes first; then everyone gets the same."""
    models = [needs("a", 2 * GIB), needs("b", 1 * GIB), needs("c", 0, 3 * GIB)]

    shares = share_kv_memory(models, 10 * GIB + 3 * OVERHEAD_BYTES + READING_BYTES)

    assert {"a": 2 * GIB, "b": 2 * GIB, "c": 3 * GIB} == shares


def test_small_model_leaves_the_rest_to_the_others() -> None:
    """Nobody gets more than all its sequences can use."""
    models = [needs("small", most=GIB), needs("a"), needs("b")]

    shares = share_kv_memory(models, 9 * GIB + 3 * OVERHEAD_BYTES)

    assert {"small": GIB, "a": 4 * GIB, "b": 4 * GIB} == shares


def test_large_minimum_comes_before_equal_shares() -> None:
    """A model whose one sequence takes more than an equal share has that much."""
    models = [needs("long", least=6 * GIB), needs("a"), needs("b")]

    shares = share_kv_memory(models, 10 * GIB + 3 * OVERHEAD_BYTES)

    assert {"long": 6 * GIB, "a": 2 * GIB, "b": 2 * GIB} == shares


def test_model_of_unknown_appetite_takes_what_there_is() -> None:
    """Where KV memory per token is not known, there is no maximum."""
    shares = share_kv_memory([needs("hybrid", most=sys.maxsize)], 5 * GIB + OVERHEAD_BYTES)

    assert {"hybrid": 5 * GIB} == shares


def test_models_that_do_not_fit_together_take_turns_with_their_weights_kept() -> None:
    """All weights stay; each model in turn has all KV memory that they leave."""
    models = [
        needs("a", 2 * GIB - OVERHEAD_BYTES, least=4 * GIB, keeps_weights=True),
        needs("b", 1 * GIB - OVERHEAD_BYTES, least=3 * GIB, keeps_weights=True),
    ]

    shares = share_kv_memory(models, 9 * GIB + READING_BYTES)

    assert {"a": 6 * GIB, "b": 6 * GIB} == shares


def test_models_whose_weights_do_not_fit_together_take_turns_alone() -> None:
    """Each has all that its own weights leave; the others are unloaded then."""
    models = [
        needs("a", 6 * GIB - OVERHEAD_BYTES, keeps_weights=True),
        needs("b", 4 * GIB - OVERHEAD_BYTES, keeps_weights=True),
    ]

    shares = share_kv_memory(models, 9 * GIB + READING_BYTES)

    assert {"a": 3 * GIB, "b": 5 * GIB} == shares


def test_pinned_model_shares_with_everyone_in_turn() -> None:
    """It keeps the least of what any turn leaves it."""
    models = [
        needs("pinned", GIB - OVERHEAD_BYTES, pinned=True),
        needs("a", 6 * GIB - OVERHEAD_BYTES),
        needs("b", 4 * GIB - OVERHEAD_BYTES),
    ]

    shares = share_kv_memory(models, 9 * GIB + READING_BYTES)

    assert {"pinned": GIB, "a": GIB, "b": 2 * GIB} == shares


def test_no_models_need_nothing() -> None:
    """There is nothing to share among nobody."""
    assert {} == share_kv_memory([], GIB)


def test_too_little_is_refused_with_the_arithmetic() -> None:
    """The message names the model, every number of the sum, and the ways out."""
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
    """Their weights, overheads and KV memory; unpinning one is a way out."""
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
    """An encoder: neither its length nor a size of KV memory would help."""
    model = needs("bert", 9 * GIB - OVERHEAD_BYTES - READING_BYTES, 0)

    with pytest.raises(ConfigError) as caught:
        share_kv_memory([model], 8 * GIB)

    assert (
        "model 'bert' can never be loaded: its weights and overhead take 9.00 GiB, and the budget "
        "for models is 8.00 GiB, which leaves 0.00 GiB; raise memory.device"
    ) == caught.value.message


def test_pinned_models_that_do_not_fit_are_named_themselves() -> None:
    """Not the first model that cannot be loaded beside them."""
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
    """Bytes are whole numbers, fractions are not."""
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
    """Whatever it is."""
    with pytest.raises(ValueError, match="give bytes, a size such as 20GiB, or a fraction"):
        parse_size(value)


def test_fraction_is_one_of_what_there_is() -> None:
    """Bytes are bytes."""
    assert (25, 7) == (resolve_size(0.25, 100), resolve_size(7, 100))


# --- the budget -----------------------------------------------------------------------------

MACHINE = DeviceMemory(total=100 * GIB, free=80 * GIB, held=2 * GIB)


def test_default_budget_is_what_vllm_would_take() -> None:
    """All that is free, but for what `gpu_memory_utilization` leaves to others; half of host."""
    assert Usage(70 * GIB, 15 * GIB) == resolve_budget(MemoryBudget(), MACHINE, 30 * GIB, 0.9)


def test_configured_budget_is_for_the_engine_host_as_a_whole() -> None:
    """What the host holds itself is taken off; a fraction is one of what there is."""
    memory = MemoryBudget(device=0.5, host=0.5)

    assert Usage(48 * GIB, 15 * GIB) == resolve_budget(memory, MACHINE, 30 * GIB, 0.9)


def test_budget_beyond_what_is_free_is_refused() -> None:
    """With what can be used; all that is free and held may be."""
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
    """With what the host holds itself and what is free."""
    with pytest.raises(ConfigError, match="no memory is left for models: the engine host itself"):
        resolve_budget(memory, device, 0, 0.9)


def test_worker_processes_count_as_much_as_the_host_and_more() -> None:
    """They import the same, whatever that takes on the machine, and run models besides."""
    alone = needs("a", GIB)
    wide = replace(alone, processes=2, host_bytes=300 * MIB)

    assert alone.held_bytes == replace(alone, host_bytes=300 * MIB).held_bytes
    assert 600 * MIB < wide.held_bytes - alone.held_bytes < 900 * MIB


def test_a_full_device_says_who_holds_it() -> None:
    """Other processes, the engine host itself, and what is kept free."""
    device = DeviceMemory(total=80 * GIB, free=0, held=GIB, reserve=2 * GIB)

    with pytest.raises(
        ConfigError,
        match=r"of the device's 80.00 GiB, other processes hold 77.00 GiB, the engine host itself "
        r"holds 1.00 GiB, and 2.00 GiB are kept free .*; stop the other processes",
    ):
        resolve_budget(MemoryBudget(), device, 0, 1.0)


def test_what_models_leave_on_the_device_asleep_is_no_ones_kv_memory() -> None:
    """Two that do not fit together, each with what the other one keeps while it sleeps."""
    one, two = (
        replace(needs(alias, weights=8 * GIB, least=GIB), residue_bytes=GIB // 2)
        for alias in ("one", "two")
    )
    budget = 14 * GIB

    shares = share_kv_memory([one, two], budget)

    left = budget - 8 * GIB - OVERHEAD_BYTES - GIB // 2 - READING_BYTES
    assert {"one": left, "two": left} == shares
