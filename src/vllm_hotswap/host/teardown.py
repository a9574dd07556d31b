"""Takes one engine apart, while others in the same process continue.

vLLM's own shutdown ends with process-wide cleanup (distributed groups, workspaces, caches), so it
is only for the last engine of a process. What it leaves would wait for a full collection of a heap
with a million objects (half a second), because vLLM freezes a model's objects once it is loaded.
Here the objects that hold memory are emptied one by one, so that reference counting gives it back
at once. The empty shells are left to a collection at a quieter time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

SHARED = frozenset(["vllm.model_executor.layers.activation", "torch.nn.modules.activation"])
"""Modules whose classes vLLM makes once for all models (0.32.0: `get_act_fn` and its like)."""


def dismantle(parts: Mapping[str, Any]) -> None:
    """Empty an engine's executor, worker, runner, model and scheduler.

    Args:
        parts: the attributes that vLLM's engine got when its model was loaded.
    """
    for holder in list(_holders(parts)):
        vars(holder).clear()


def pools_of(parts: Mapping[str, Any]) -> Any:
    """Take the memory pools of an engine's worker, to be closed once it is dismantled.

    None if it has none, or if the worker is another process.
    """
    take = getattr(_worker(parts), "take_pools", None)
    return None if take is None else take()


def collect_leftovers() -> None:
    """Collect what `dismantle` or a failed load has left, even if vLLM has frozen it."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _worker(parts: Mapping[str, Any]) -> Any:
    wrapper = getattr(parts.get("model_executor"), "driver_worker", None)
    return getattr(wrapper, "worker", None)


def _holders(parts: Mapping[str, Any]) -> Iterator[Any]:
    executor = parts.get("model_executor")
    wrapper = getattr(executor, "driver_worker", None)
    worker = _worker(parts)
    runner = getattr(worker, "model_runner", None)
    for model in (getattr(runner, "model", None), getattr(runner, "drafter", None)):
        if model is not None and hasattr(model, "modules"):
            yield from (module for module in model.modules() if not _is_shared(module))
    config = parts.get("vllm_config")
    if config is not None:
        config.compilation_config.static_forward_context.clear()
    for holder in (runner, worker, wrapper, executor, parts.get("scheduler")):
        if holder is not None and hasattr(holder, "__dict__"):
            yield holder


def _is_shared(module: Any) -> bool:
    """Whether other models may use the same object: vLLM keeps activation functions for all."""
    return type(module).__module__ in SHARED and not any(True for _ in module.parameters())
