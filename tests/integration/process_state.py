"""What is process-wide in vLLM: module globals, class attributes, caches of functions, and more.

`Watch` remembers what each module of vLLM held when it was imported, and later reports what has
changed since, in the notation of `vllm_hotswap.host.vllm_state`.
"""

from __future__ import annotations

import enum
import functools
import importlib.abc
import importlib.machinery
import logging
import os
import signal
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

PACKAGE = "vllm"
DEPTH = 4
"""How deep values are compared, such as a registry of objects with tables."""

PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)
SEQUENCES = (list, tuple, set, frozenset, deque, weakref.WeakSet)
MAPPINGS = (dict, types.MappingProxyType, weakref.WeakValueDictionary, weakref.WeakKeyDictionary)
CACHE = type(functools.cache(len))
CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, property)
CONFIGS = ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Watch(importlib.abc.MetaPathFinder):
    """Watch every module of vLLM from the end of its import on."""

    def __init__(self) -> None:
        self._seen: dict[str, Any] = {}
        self._importing = False
        for module in _modules():
            self._remember(dict(_of_module(module)))
        self._remember(dict(_of_process()))
        sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return Python's own spec, with a look at the module once it has been executed."""
        if name.partition(".")[0] != PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Looking(spec.loader, self)
        return spec

    def imported(self, module: types.ModuleType) -> None:
        self._remember(dict(_of_module(module)))

    def changed(self) -> list[str]:
        """Return places whose values differ from those at the last call, or at the import."""
        now = dict(_of_process())
        values: dict[str, Any] = {}
        for module in _modules():
            now |= dict(_of_module(module))
        for place, (fingerprint, value) in now.items():
            if self._seen.get(place) != fingerprint:
                values[place] = value
        self._remember(now)
        return sorted(_without_copies(values))

    def _remember(self, found: dict[str, tuple[Any, Any]]) -> None:
        self._seen |= {place: fingerprint for place, (fingerprint, _) in found.items()}


class _Looking(importlib.abc.Loader):
    """A loader that notifies a watch of the module that it has executed."""

    def __init__(self, loader: Any, watch: Watch) -> None:
        self._loader, self._watch = loader, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        module: types.ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)
        self._watch.imported(module)


def _without_copies(values: dict[str, Any]) -> Iterator[str]:
    """Yield one place for each object: modules import objects from each other."""
    seen: set[int] = set()
    for place in sorted(values, key=lambda place: (place.count("."), place)):
        value = values[place]
        if isinstance(value, PLAIN) or id(value) not in seen:
            yield place
        seen.add(id(value))


def _modules() -> Iterator[types.ModuleType]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == PACKAGE and isinstance(module, types.ModuleType):
            yield module


def _of_module(module: types.ModuleType) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the fingerprint and the value of each place."""
    for name, value in list(vars(module).items()):
        place = f"{module.__name__}:{name}"
        if _is_state(name, value) and not _is_cache_from_elsewhere(module, value):
            yield place, (_fingerprint(value, DEPTH), value)
        if isinstance(value, type) and value.__module__ == module.__name__:
            yield from _of_class(place, value)


def _of_class(prefix: str, cls: type) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name, value in list(vars(cls).items()):
        inner = getattr(value, "__func__", value)
        if _is_state(name, inner):
            yield f"{prefix}.{name}", (_fingerprint(inner, DEPTH), inner)


def _is_state(name: str, value: Any) -> bool:
    if isinstance(value, CACHE):
        return True
    if name.startswith("__") or isinstance(value, types.ModuleType | logging.Logger | type):
        return False
    return not isinstance(value, CODE)


def _is_cache_from_elsewhere(module: types.ModuleType, value: Any) -> bool:
    return isinstance(value, CACHE) and value.__module__ != module.__name__


def _fingerprint(value: Any, depth: int) -> Any:
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, CACHE):
        return ("cache", value.cache_info().misses)
    if isinstance(value, torch.Tensor):
        return ("tensor", id(value), value._version)
    if depth > 0 and isinstance(value, MAPPINGS):
        items = list(value.items())
        return ("map", *((_fingerprint(k, 1), _fingerprint(v, depth - 1)) for k, v in items))
    if depth > 0 and isinstance(value, SEQUENCES):
        return ("sequence", *(_fingerprint(item, depth - 1) for item in list(value)))
    if depth > 0 and _is_of_vllm(value):
        return (id(value), _fingerprint(vars(value), depth - 1))
    return (type(value).__qualname__, id(value))


def _is_of_vllm(value: Any) -> bool:
    module = getattr(type(value), "__module__", None)
    is_ours = isinstance(module, str) and module.startswith(PACKAGE)
    return is_ours and not isinstance(value, type) and hasattr(value, "__dict__")


def _of_process() -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield what vLLM may set elsewhere in the process."""
    for name, value in os.environ.items():
        yield f"os:environ[{name}]", (value, value)
    for place, value in _settings():
        yield place, (value, None)


def _settings() -> Iterator[tuple[str, Any]]:
    yield "torch:default_dtype", str(torch.get_default_dtype())
    yield "torch:default_device", str(torch.get_default_device())
    yield "torch:num_threads", torch.get_num_threads()
    yield "torch:set_num_threads", id(torch.set_num_threads)
    yield "torch:float32_matmul_precision", torch.get_float32_matmul_precision()
    yield "torch:deterministic", torch.are_deterministic_algorithms_enabled()
    yield "torch:grad", torch.is_grad_enabled()
    yield "sys:path", tuple(sys.path)
    yield "logging:root", (logging.root.level, len(logging.root.handlers))
    for number in SIGNALS:
        yield f"signal:{number.name}", repr(signal.getsignal(number))
    for name in CONFIGS:
        if (config := sys.modules.get(name)) is not None:
            for key, value in config.shallow_copy_dict().items():
                yield f"{name}:{key}", repr(value)
