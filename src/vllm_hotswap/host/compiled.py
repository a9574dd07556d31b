"""Keeps a model's compiled code when the model is unloaded, for its next load.

Compiling takes vLLM ten seconds or more, even for a small model with warm caches, and leaves
something in the process each time. The code itself holds neither weights nor layers: it finds both
on the model that it is called with, at every call. So an engine keeps the code when its model is
unloaded, and gives it to the next one. It also reads code that an earlier process has saved.

vLLM tries to read saved code, too, but fails on CPU ("'function' object has no attribute
'finalize_loading'"): it saves code of every kind, and loads only what its own backend has compiled.

Only code that vLLM traces once and hands to torch's Inductor as a whole is kept, as on the CPU
platform. Code of vLLM's own backend holds its CUDA graphs and, with these, device memory. Code made
with `max_autotune` or frozen parameters holds copies of the weights.

Relies on, in vLLM 0.32.0: `TorchCompileWithNoGuardsWrapper` being a base class of what is compiled,
with `aot_compiled_fn`, `do_not_compile`, `_is_encoder` and `vllm_config` on the object, and
`__call__` preferring `aot_compiled_fn`; the folder that its `__call__` derives from
`aot_compile_hash_factors` and `_model_hash_key`; `_verify_source_unchanged`. In torch 2.13:
`_bytecode_hooks`, and code from `aot_compile` taking the module as its first argument.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch._dynamo.convert_frame import _bytecode_hooks
from vllm import envs
from vllm.compilation.caching import aot_compile_hash_factors
from vllm.compilation.decorators import _model_hash_key, _verify_source_unchanged
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import CompilationMode, CUDAGraphMode, set_current_vllm_config

from vllm_hotswap.errors import one_line

log = logging.getLogger("vllm_hotswap.host")


class CompiledCode:
    """The compiled code of one engine, by the name of the module that it computes.

    `_kept` is the code that the last model left; `_places` says where vLLM saves the present
    model's code. A place is named after everything that the code depends on, except its sources.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Path], Any] = {}
        self._places: dict[str, Path] = {}

    def share_with(self, executor: Any) -> None:
        """Let the worker of an executor in this process use this code, and not only saved code."""
        if (worker := _worker(executor)) is not None:
            worker.compiled_code = self

    def apply_to(self, runner: Any) -> None:
        """Give a loaded model the available code, unless it is compiled already.

        Call it between the choice of the KV cache layout, on which the code depends, and vLLM's
        first run of the model, which would compile it.
        """
        before = time.monotonic()
        modules = dict(_compilable(runner))
        if not modules or is_compiled(runner):
            return
        self._places = _places(modules)
        given = sum(self._apply(name, modules[name]) for name in self._places)
        log.info(
            "event=compiled_code_given modules=%d of=%d seconds=%.2f",
            given,
            len(modules),
            time.monotonic() - before,
        )

    def reclaim_from(self, executor: Any) -> None:
        """Keep the code of a model about to be taken apart, and remove its hooks from Dynamo."""
        modules = dict(_compilable(getattr(_worker(executor), "model_runner", None)))
        if self._places:
            self._kept = {
                (name, place): code
                for name, place in self._places.items()
                if name in modules and (code := _code(modules[name])) is not None
            }
        self._places = {}
        _unhook(modules.values())

    def _apply(self, name: str, module: Any) -> bool:
        place = self._places[name]
        code = self._kept.get((name, place)) or _saved_code(module, place)
        if code is not None:
            module.aot_compiled_fn = code
        return code is not None


@contextmanager
def forgetting_failed_load() -> Iterator[None]:
    """If the load inside fails, remove Dynamo's hooks of the model that was being made."""
    before = set(_bytecode_hooks)
    try:
        yield
    except BaseException:
        for key in [key for key in _bytecode_hooks if key not in before]:
            del _bytecode_hooks[key]
        raise


def is_compiled(runner: Any) -> bool:
    """Whether vLLM compiles some of the runner's model, and has nothing left to compile."""
    codes = [_code(module) for _, module in _compilable(runner)]
    return bool(codes) and None not in codes


def can_outlive(vllm_config: Any) -> bool:
    """Whether the compiled code of a model holds nothing of the model itself."""
    config = vllm_config.compilation_config
    return (
        envs.VLLM_USE_AOT_COMPILE
        and config.mode == CompilationMode.DYNAMO_TRACE_ONCE
        and config.cudagraph_mode in (None, CUDAGraphMode.NONE)
        and not config.inductor_compile_config.get("max_autotune")
        and not config.inductor_compile_config.get("freezing")
        and not torch._inductor.config.freezing
    )


def _worker(executor: Any) -> Any:
    return getattr(getattr(executor, "driver_worker", None), "worker", None)


def _compilable(runner: Any) -> Iterator[tuple[str, Any]]:
    """Yield the modules, with names, that vLLM compiles of a runner's model and draft model."""
    drafter = getattr(runner, "drafter", None)
    for root, model in (("", runner), ("drafter.", drafter)):
        for name, module in _modules(getattr(model, "model", None)):
            if isinstance(module, TorchCompileWithNoGuardsWrapper) and not getattr(
                module, "do_not_compile", True
            ):
                yield root + name, module


def _modules(model: Any) -> Iterator[tuple[str, Any]]:
    yield from model.named_modules() if isinstance(model, torch.nn.Module) else ()


def _unhook(modules: Iterable[Any]) -> None:
    """Remove Dynamo's hooks of these modules, which would keep the modules for ever.

    The module's own `cleanup` knows only the last hook. A class that inherits from another compiled
    class, such as that of Qwen3, registers two.
    """
    ids = {id(module) for module in modules}
    for key, hook in list(_bytecode_hooks.items()):
        if id(getattr(hook, "__self__", None)) in ids:
            del _bytecode_hooks[key]


def _code(module: Any) -> Any:
    return getattr(module, "aot_compiled_fn", None)


def _places(modules: dict[str, Any]) -> dict[str, Path]:
    """Return where vLLM saves the code of each module whose code can outlive it."""
    factors: dict[int, list[str]] = {}
    places = {}
    for name, module in modules.items():
        if can_outlive(config := module.vllm_config):
            if id(config) not in factors:
                factors[id(config)] = aot_compile_hash_factors(config)
            places[name] = _place(module, factors[id(config)])
    return places


def _place(module: Any, factors: list[str]) -> Path:
    key = str([*factors, _model_hash_key(module.forward)])
    folder = Path(envs.VLLM_CACHE_ROOT, "torch_compile_cache", "torch_aot_compile")
    parallel = module.vllm_config.parallel_config
    rank = f"rank_{parallel.rank}_{parallel.data_parallel_index}"
    return folder / hashlib.sha256(key.encode()).hexdigest() / rank / "model"


def _saved_code(module: Any, place: Path) -> Any | None:
    """Return code that vLLM has saved; None if it does not fit, or a source has changed since."""
    # vLLM saves all blocks of an encoder in one place, although their shapes may differ.
    if envs.VLLM_DISABLE_COMPILE_CACHE or module._is_encoder or not place.is_file():
        return None
    # vLLM does the same: Inductor unpacks the contents of the file there.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place.parent.parent / "inductor_cache")
    try:
        return _read(module, place)
    except Exception as error:  # noqa: BLE001  # after any error, vLLM compiles the model anew
        log.warning("event=saved_code_unusable file=%s cause=%r", place, one_line(error))
        return None


def _read(module: Any, place: Path) -> Any:
    config = module.vllm_config
    with set_current_vllm_config(config), place.open("rb") as file:
        code: Any = torch.compiler.load_compiled_function(
            file, f_globals=module.forward.__globals__
        )
    _verify_source_unchanged(code.source_info(), config)
    if not config.compilation_config.dynamic_shapes_config.evaluate_guards:
        code.disable_guard_check()
    return code
