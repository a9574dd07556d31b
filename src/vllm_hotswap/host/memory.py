"""How much KV memory each model gets. Pure: numbers in, numbers out.

vLLM gives one server nearly all memory that is there, so a second model in the same process
would find none. Here the memory is shared before anything is loaded, among *all* configured
models, so that the order of loading changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host.messages import ModelFootprint

OVERHEAD_BYTES = 64 << 20
"""Set aside per model for activations and bookkeeping (27 MB were measured for a tiny model)."""

_GIB = 1 << 30


def share_kv_memory(models: Sequence[ModelFootprint], budget_bytes: int) -> Mapping[str, int]:
    """KV bytes for every model, explicit sizes kept.

    What the budget leaves after all weights, overheads and explicit KV sizes is shared equally
    among the models without one; none gets more than all its sequences can use, and what one
    leaves goes to the others (max-min fairness).

    Raises:
        ConfigError: a model would get less than one sequence of its maximum length needs;
            the message has the arithmetic.
    """
    explicit = {m.alias: m.kv_bytes for m in models if m.kv_bytes is not None}
    automatic = [m for m in models if m.kv_bytes is None]
    weights = sum(m.weights_bytes + OVERHEAD_BYTES for m in models)
    left = budget_bytes - weights - sum(explicit.values())
    shares = _fill_evenly({m.alias: m.max_kv_bytes for m in automatic}, left)
    for model in automatic:
        if shares[model.alias] < model.min_kv_bytes:
            raise ConfigError(_too_little(model, shares[model.alias], budget_bytes, weights, left))
    return {**explicit, **shares}


def _fill_evenly(wanted: Mapping[str, int], available: int) -> dict[str, int]:
    """Divide `available` so that no share can grow without shrinking a smaller one."""
    shares: dict[str, int] = {}
    for position, (alias, want) in enumerate(_smallest_first(wanted.items())):
        even = max(0, available) // (len(wanted) - position)
        shares[alias] = min(want, even)
        available -= shares[alias]
    return shares


def _smallest_first(items: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    return sorted(items, key=lambda item: (item[1], item[0]))


def _too_little(model: ModelFootprint, share: int, budget: int, weights: int, left: int) -> str:
    return (
        f"model {model.alias!r} would get {share / _GIB:.2f} GiB of KV memory, but one sequence "
        f"of its maximum length needs {model.min_kv_bytes / _GIB:.2f} GiB: of {budget / _GIB:.2f} "
        f"GiB, the weights of all models take {weights / _GIB:.2f} GiB and explicit KV sizes leave "
        f"{max(0, left) / _GIB:.2f} GiB to share; lower max_model_len, set kv_cache_memory_bytes, "
        "or configure fewer models"
    )
