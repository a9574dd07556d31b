"""Moves tensors that vLLM keeps for the whole process out of one model's memory.

Tensors allocated together with a model's weights lie in memory that sleeps and goes with that
model. Some are not part of the model: scratch memory and constants in globals of modules, made by
the first model that needs them. Other models would use them while that model sleeps, which ends the
process. So they are replaced by copies that lie elsewhere. The model's own references stay as they
are.

The search covers globals of vLLM's and FlashInfer's modules, their dictionaries and lists, and
attributes of their functions, classes and objects; not what is hidden deeper, such as in
`functools.cache`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from contextlib import suppress
from types import FunctionType
from typing import Any

import torch

PACKAGES = ("vllm", "flashinfer")

Place = tuple[str, torch.Tensor, Callable[[torch.Tensor], object]]
"""A name, the tensor there, and a function that puts another one there."""


def move_out(is_inside: Callable[[int], bool]) -> list[str]:
    """Replace tensors whose memory begins at an address that `is_inside`; returns their names.

    The caller makes sure that new tensors lie elsewhere.
    """
    moved: dict[int, torch.Tensor] = {}
    names = []
    for name, tensor, put in _places():
        if is_inside(_address(tensor)):
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.detach().clone()
            put(moved[id(tensor)])
            names.append(name)
    return names


def _address(tensor: torch.Tensor) -> int:
    with suppress(RuntimeError, NotImplementedError):  # it has no memory of its own
        address: int = tensor.untyped_storage().data_ptr()
        return address
    return 0


def _places() -> list[Place]:
    found: list[Place] = []
    seen: set[int] = set()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in PACKAGES and module is not None:
            for key, value in list(vars(module).items()):
                if isinstance(value, torch.Tensor):
                    found.append((f"{name}:{key}", value, _setter(module, key)))
                elif id(value) not in seen:
                    seen.add(id(value))
                    found += _places_in(f"{name}:{key}", value)
    return found


def _places_in(name: str, value: Any) -> Iterator[Place]:
    if isinstance(value, MutableMapping):
        for key, each in _copy_of(value.items()):
            if isinstance(each, torch.Tensor):
                yield f"{name}[{key!r}]", each, _item_setter(value, key)
    elif isinstance(value, MutableSequence):
        for index, each in enumerate(_copy_of(value)):
            if isinstance(each, torch.Tensor):
                yield f"{name}[{index}]", each, _item_setter(value, index)
    elif _is_theirs(value):
        for key, each in _copy_of(vars(value).items()):
            if isinstance(each, torch.Tensor):
                yield f"{name}.{key}", each, _setter(value, key)


def _copy_of(values: Any) -> list[Any]:
    with suppress(Exception):  # an object of theirs that only looks like a container
        return list(values)
    return []


def _is_theirs(value: Any) -> bool:
    """Whether it is a function, a class or an object of these packages, with attributes."""
    owner = value if isinstance(value, type | FunctionType) else type(value)
    package = str(getattr(owner, "__module__", "")).partition(".")[0]
    return package in PACKAGES and hasattr(value, "__dict__")


def _setter(owner: Any, name: str) -> Callable[[torch.Tensor], object]:
    return lambda tensor: setattr(owner, name, tensor)


def _item_setter(owner: Any, key: Any) -> Callable[[torch.Tensor], object]:
    return lambda tensor: owner.__setitem__(key, tensor)
