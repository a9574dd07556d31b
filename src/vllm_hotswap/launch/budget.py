"""The memory budget: what it is, how KV memory is shared within it. Pure: numbers in, numbers out.

vLLM gives one server nearly all memory that is there, so a second model in the same process
would find none. Here KV memory is shared before anything is loaded, among *all* configured
models, so that the order of loading changes nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vllm_hotswap.config import _GIB, MemoryBudget, resolve_size
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host import DeviceMemory
from vllm_hotswap.models import Usage

OVERHEAD_BYTES = 64 << 20
"""Set aside per model for activations and bookkeeping (27 MB were measured for a tiny model)."""

WORKER_GROWTH = 1.4
"""How much more a worker process holds than the engine host, which has not run a model when it is
measured. An estimate from one machine (600 MiB beside 430 MiB) for the first load of a model; the
load then measures its worker processes with it. A worker that is started only to be measured would
take as long as that load. If it is too low, the first load goes beyond the budget by the
difference."""

READING_BYTES = 64 << 20
"""What a load takes for a while besides what it leaves: the tensor that is being read."""


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """What is known of a model's memory before it is loaded, in bytes."""

    alias: str
    weights_bytes: int
    """Size of its weight files; 0 where that is not known (a hub name not yet downloaded)."""
    kv_bytes: int | None
    """Its configured KV size, None to be given one."""
    min_kv_bytes: int
    """Enough for one sequence of its maximum length; less would be refused by vLLM."""
    max_kv_bytes: int
    """Enough for all sequences it may run at once, each of its maximum length."""
    pinned: bool = False
    kv_key: str = ""
    """The key by which its KV size is configured."""
    keeps_weights: bool = False
    """Whether its weights still count when it is asleep."""
    overhead_bytes: int = OVERHEAD_BYTES
    copies_bytes: int = 0
    """Adapters that it will load after itself, so that a measured load does not show them."""
    more_weights_bytes: int = 0
    """What its weights take beyond their files: second copies, a larger type."""
    processes: int = 0
    """Worker processes of its own whose memory is the device's."""
    host_bytes: int = 0
    """What the engine host itself holds, and so any process that imports the same."""
    packing_bytes: int = 0
    """What packing its largest layer takes for a while, once all weights have been read."""
    residue_bytes: int = 0
    """What of its overhead stays on an accelerator while it is asleep: graphs and buffers."""

    @property
    def held_bytes(self) -> int:
        """What it holds without KV memory."""
        weights_bytes = self.weights_bytes + self.more_weights_bytes
        processes_bytes = int(self.processes * self.host_bytes * WORKER_GROWTH)
        return weights_bytes + self.overhead_bytes + self.copies_bytes + processes_bytes

    @property
    def asleep_bytes(self) -> int:
        """What it holds of the device while it is asleep."""
        return self.held_bytes if self.keeps_weights else self.residue_bytes

    @property
    def reading_bytes(self) -> int:
        """What its load takes for a while besides what it leaves."""
        return max(min(READING_BYTES, self.weights_bytes), self.packing_bytes)

    @property
    def least_kv_bytes(self) -> int:
        """The KV memory without which it is not loaded."""
        return self.min_kv_bytes if self.kv_bytes is None else self.kv_bytes


def resolve_budget(
    memory: MemoryBudget, device: DeviceMemory, host_free_bytes: int, fraction: float
) -> Usage:
    """What all models together may hold.

    Args:
        memory: as configured.
        device: what there is, and what the engine host holds already.
        host_free_bytes: host memory that nobody uses.
        fraction: of the device's memory, for a default; the same as vLLM's
            `gpu_memory_utilization`.

    Raises:
        ConfigError: there is less than is asked for, or nothing is left for models.
    """
    if memory.device is None:
        for_models = int(device.free - (1 - fraction) * device.total)
    else:
        size = resolve_size(memory.device, device.total)
        for_models = size - device.held
        if for_models > device.free:
            raise ConfigError(
                f"memory.device is {_gib(size)}, but only {_gib(device.free + device.held)} of "
                f"{_gib(device.total)} can be used; lower it, or stop the other processes that "
                "use the device"
            )
    if for_models <= 0:
        raise ConfigError(_nothing_left(memory, device))
    host = (
        host_free_bytes // 2 if memory.host is None else resolve_size(memory.host, host_free_bytes)
    )
    return Usage(for_models, host)


def _nothing_left(memory: MemoryBudget, device: DeviceMemory) -> str:
    others = device.total - device.free - device.held - device.reserve
    if device.reserve and memory.device is None:
        return (
            f"no memory is left for models: of the device's {_gib(device.total)}, other processes "
            f"hold {_gib(max(0, others))}, the engine host itself holds {_gib(device.held)}, and "
            f"{_gib(device.reserve)} are kept free for activations; stop the other processes, or "
            "use another device"
        )
    return (
        f"no memory is left for models: the engine host itself holds {_gib(device.held)}, and "
        f"{_gib(device.free)} are free; raise memory.device"
    )


def share_kv_memory(models: Sequence[ModelNeeds], budget_bytes: int) -> Mapping[str, int]:
    """KV bytes for every model, explicit sizes kept.

    The first of these that gives every model enough for one sequence of its maximum length:

    1. all models loaded together: each gets that much, and what is left is shared equally, none
       gets more than all its sequences can use, and what one leaves goes to the others (max-min
       fairness);
    2. one model with KV memory at a time, the others asleep;
    3. one model at a time, the others unloaded.

    Pinned models always count as loaded. One model at a time is read.

    Raises:
        ConfigError: a model cannot have its minimum even then; the message has the arithmetic.
    """
    for others in (_all_loaded, _asleep, _unloaded):
        if (shares := others(models, budget_bytes)) is not None:
            return shares
    raise ConfigError(_too_little(models, budget_bytes))


def _all_loaded(models: Sequence[ModelNeeds], budget_bytes: int) -> dict[str, int] | None:
    return _share(models, budget_bytes - _weights(models))


def _asleep(models: Sequence[ModelNeeds], budget_bytes: int) -> dict[str, int] | None:
    left = budget_bytes - sum(model.asleep_bytes for model in models)
    return _one_at_a_time(models, left, lambda model: model.held_bytes - model.asleep_bytes)


def _unloaded(models: Sequence[ModelNeeds], budget_bytes: int) -> dict[str, int] | None:
    return _one_at_a_time(models, budget_bytes, lambda model: model.held_bytes)


def _one_at_a_time(
    models: Sequence[ModelNeeds], left: int, coming: Callable[[ModelNeeds], int]
) -> dict[str, int] | None:
    """Every model in turn shares with the pinned ones; what is `coming` with each is taken off."""
    shares: dict[str, int] = {}
    for model in models:
        together = _with_pinned(model, models)
        round_shares = _share(together, left - sum(map(coming, together)))
        if round_shares is None:
            return None
        for alias, share in round_shares.items():
            shares[alias] = min(share, shares.get(alias, share))
    return shares


def _with_pinned(model: ModelNeeds, models: Sequence[ModelNeeds]) -> list[ModelNeeds]:
    """A model and those that are loaded whenever it is."""
    return [other for other in models if other.pinned or other is model]


def _weights(models: Iterable[ModelNeeds]) -> int:
    return sum(model.held_bytes for model in models)


def _reading(models: Iterable[ModelNeeds]) -> int:
    return max((model.reading_bytes for model in models), default=0)


def _least(models: Sequence[ModelNeeds]) -> int:
    """What models must have to be loaded together."""
    kv_bytes = sum(model.least_kv_bytes for model in models)
    return _weights(models) + kv_bytes + _reading(models)


def _share(models: Sequence[ModelNeeds], left: int) -> dict[str, int] | None:
    """What each gets, explicit sizes first; None if that is less than somebody's minimum."""
    left -= _reading(models)
    if sum(model.least_kv_bytes for model in models) > left:
        return None
    explicit = {m.alias: m.kv_bytes for m in models if m.kv_bytes is not None}
    others = [model for model in models if model.kv_bytes is None]
    return {**explicit, **_fill_evenly(others, left - sum(explicit.values()))}


def _fill_evenly(models: Sequence[ModelNeeds], available: int) -> dict[str, int]:
    """Divide `available` so that no share can grow without shrinking a smaller one.

    Shares are filled to one level, as water fills vessels: whoever needs more than that at least
    has its minimum, whoever can use less than that at most has its maximum.
    """

    def filled(level: int) -> dict[str, int]:
        return {m.alias: max(m.min_kv_bytes, min(m.max_kv_bytes, level)) for m in models}

    levels = range(available + 1) if models else range(1)
    too_high = bisect_right(levels, available, key=lambda level: sum(filled(level).values()))
    return filled(too_high - 1)


def _too_little(models: Sequence[ModelNeeds], budget_bytes: int) -> str:
    """The arithmetic of the first model that does not fit; pinned ones are looked at first."""
    model = next(
        m
        for m in sorted(models, key=lambda m: not m.pinned)
        if _least(_with_pinned(m, models)) > budget_bytes
    )
    pinned = [other for other in models if other.pinned and other is not model]
    wants, steps = "", ["raise memory.device"]
    if model.kv_key and model.kv_bytes:
        wants = f"{model.kv_key} gives it {_gib(model.kv_bytes)} of KV memory, "
        steps.append(f"lower {model.kv_key}")
    elif model.min_kv_bytes:
        need = f"needs {_gib(model.min_kv_bytes)} of KV memory, "
        wants = f"one sequence of its maximum length {need}"
        steps.append("lower max_model_len")
    if pinned:
        steps.append("unpin a model")
    taken = model.held_bytes + _reading([model, *pinned])
    beside = _least(pinned) - _reading(pinned)
    left = budget_bytes - taken - beside
    return (
        f"model {model.alias!r} can never be loaded: {wants}its weights and overhead take "
        f"{_gib(taken)}{f', pinned models take {_gib(beside)}' if pinned else ''}, and the budget "
        f"for models is {_gib(budget_bytes)}, which leaves {_gib(max(0, left))}; "
        f"{' or '.join(filter(None, [', '.join(steps[:-1]), steps[-1]]))}"
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
