"""Moves vLLM's process-wide state in and out, for the engine that is worked with.

`host.vllm_state` lists that state, with reasons. While the same engine is worked with, nothing is
moved: steps cost nothing. When another engine follows, the state of the last one is kept for it,
and the other's is put back, as if each had a process of its own. So an engine that cannot be loaded
leaves nothing behind.

Only the compute thread works with engines. `host.vllm_state` says what IO threads read of this
state at other times.

Worker processes of a tensor-parallel model serve that model alone: nothing is moved in them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

from vllm_hotswap.host.randomness import Randomness
from vllm_hotswap.host.vllm_state import PLUGINS, STATE, Owner, State, of_owner
from vllm_hotswap.host.vllm_versions import vllm_version

P = ParamSpec("P")
R = TypeVar("R")

MISSING = object()
"""The value of a cell that is not set."""

CONTAINERS = (
    dict,
    list,
    set,
    deque,
    weakref.WeakSet,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
)
"""Types of values that are changed in place. Each has a method `copy`."""


class Cell(Protocol):
    """One place of a process that holds a value."""

    def get(self) -> Any:
        """Return the value, or MISSING."""

    def set(self, value: Any) -> None:
        """Change the value."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute of a module, a class or an object."""

    owner: Any
    name: str

    def get(self) -> Any:
        return getattr(self.owner, self.name, MISSING)

    def set(self, value: Any) -> None:
        """Change the value, but never add or remove the attribute: an IO thread may read it."""
        if value is not MISSING and hasattr(self.owner, self.name):
            setattr(self.owner, self.name, value)


@dataclass(frozen=True, slots=True)
class Item:
    """A variable of the environment."""

    owner: MutableMapping[str, str]
    name: str

    def get(self) -> Any:
        return self.owner.get(self.name, MISSING)

    def set(self, value: Any) -> None:
        """Write only a value that differs: no other thread may read the environment then."""
        if value is self.get() or value == self.get():
            return
        if value is MISSING:
            del self.owner[self.name]
        else:
            self.owner[self.name] = value


def cells(place: str) -> Iterator[Cell]:
    """Yield the cells at a place of `host.vllm_state`.

    None if this vLLM has no such place, or if it belongs to a plugin that is not in use.
    """
    module, _, path = place.partition(":")
    if not _is_in_use(module.partition(".")[0]):
        return
    if module == "os":
        yield Item(os.environ, path.removeprefix("environ[").removesuffix("]"))
        return
    *way, name = path.split(".")
    with contextlib.suppress(ImportError, AttributeError):
        owners: list[Any] = [importlib.import_module(module)]
        for part in way:
            owners = [step for owner in owners for step in _steps(owner, part)]
        yield from (Attribute(owner, name) for owner in owners)


def absent(states: Iterable[State] = STATE) -> list[str]:
    """Return the places of attributes that are moved, but that the installed vLLM does not have.

    Call it after a load: some names exist only then.
    """
    version = vllm_version()
    return [
        state.place
        for state in states
        if state.is_moved_attribute and _is_in_use(state.package)
        if state.is_in(version) and not _is_there(state.place)
    ]


def _is_in_use(package: str) -> bool:
    return package not in PLUGINS or package in sys.modules


def _is_there(place: str) -> bool:
    found = [cell.get() for cell in cells(place)]
    return bool(found) and all(value is not MISSING for value in found)


def _steps(owner: Any, part: str) -> Iterable[Any]:
    return list(owner.values()) if part == "*" else [getattr(owner, part)]


class EngineState:
    """One engine's values of cells, its random numbers, and whether it may compile."""

    def __init__(self, values: list[Any], kind: Any, stance: str) -> None:
        self.values = values
        self.kind = kind
        self.stance = stance
        self.randomness: Randomness | None = None


class ProcessState:
    """Moves the state of engines in and out of their process. There is one for each process.

    The mutable state is `_current`, whose values are in place, and `_kinds`, the parallel groups
    by the kind of model that needs them, which last as long as the process.
    """

    def __init__(self, cells: list[Cell], groups: list[Cell]) -> None:
        self._cells, self._groups = cells, groups
        self._outset = _values(cells)
        self._dtype = torch.get_default_dtype()
        self._kinds: dict[Any, list[Any]] = {}
        self._current: EngineState | None = None

    def begin(self, vllm_config: Any) -> EngineState:
        """Return the state for an engine about to be loaded: that of a process without engines."""
        kind = _kind(vllm_config)
        groups = self._kinds.get(kind, [None for _ in self._groups])
        values = [*map(_fresh, self._outset), *groups]
        return EngineState(
            values, kind, "force_eager" if compiles_nothing(vllm_config) else "default"
        )

    def put_in_place(self, state: EngineState) -> None:
        """Make this the state of the process, and keep the values there for their engine."""
        if self._current is state:
            return
        if self._current is not None:
            self._current.values = _values([*self._cells, *self._groups])
            self._current.randomness = Randomness.now()
            self._current = None  # if the rest fails, no engine owns what is in place
        self._put(state.values, state.stance)
        if state.randomness is not None:
            state.randomness.restore()
        self._current = state

    def loaded(self, state: EngineState) -> None:
        """Keep the groups that a loaded engine has made for its kind: the next one uses them."""
        if _has_any(self._groups):
            self._kinds.setdefault(state.kind, _values(self._groups))

    def end(self, state: EngineState) -> Randomness:
        """Remove an engine that is gone, or was not loaded. Returns what it would draw next."""
        self.put_in_place(state)
        randomness = Randomness.now()
        try:
            if state.kind not in self._kinds and _has_any(self._groups):
                _destroy_groups()  # made by a load that failed
        finally:
            self._current = None
            self._put([*map(_fresh, self._outset), *(None for _ in self._groups)], "default")
        return randomness

    def _put(self, values: list[Any], stance: str) -> None:
        for cell, value in zip([*self._cells, *self._groups], values, strict=True):
            cell.set(value)
        torch.compiler.set_stance(stance)
        torch.set_default_dtype(self._dtype)  # a load that fails leaves its own, in vLLM 0.26


@cache
def process_state() -> ProcessState:
    """Return the `ProcessState` of this process; first called before the first load."""
    return ProcessState(_cells_of(Owner.ENGINE), _cells_of(Owner.KIND))


def _cells_of(owner: Owner) -> list[Cell]:
    return [cell for state in of_owner(owner) for cell in cells(state.place)]


class Stateful(Protocol):
    """An engine with a state of its own, once its load has started."""

    state: EngineState | None


E = TypeVar("E", bound=Stateful)


def in_own_state(
    method: Callable[Concatenate[E, P], R],
) -> Callable[Concatenate[E, P], R]:
    """Put the engine's own state in place before each call of a method."""

    @wraps(method)
    def inside(engine: E, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if engine.state is not None:
            process_state().put_in_place(engine.state)
        return method(engine, *args, **kwargs)

    return inside


def compiles_nothing(vllm_config: Any) -> bool:
    """Whether a model runs as it is written, without compilation."""
    return bool(vllm_config.model_config.enforce_eager)


def _kind(vllm_config: Any) -> Any:
    """Return what the groups of a model in one process depend on."""
    is_moe = getattr(vllm_config.model_config, "is_moe", False)
    return bool(is_moe), bool(vllm_config.parallel_config.enable_eplb)


def _values(places: list[Cell]) -> list[Any]:
    return [cell.get() for cell in places]


def _has_any(groups: list[Cell]) -> bool:
    return any(group.get() not in (None, MISSING) for group in groups)


def _fresh(value: Any) -> Any:
    """Return the value for one more engine, which may change it."""
    # `copy.copy` of a weak set is the same set by another name.
    return value.copy() if isinstance(value, CONTAINERS) else value


def _destroy_groups() -> None:
    from vllm.distributed.parallel_state import destroy_model_parallel

    destroy_model_parallel()
