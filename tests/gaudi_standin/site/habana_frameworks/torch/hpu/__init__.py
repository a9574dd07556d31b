"""`torch.hpu`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from habana_frameworks.torch import _device
from habana_frameworks.torch.hpu import graphs, metrics, random

__all__ = ["graphs", "metrics", "random"]


class Properties(NamedTuple):
    name: str
    total_memory: int
    multi_processor_count: int


class Event:
    """An event: all work before it has been done."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None: ...

    def record(self, stream: Stream | None = None) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 0.0


class Stream:
    """A stream: work is done at once, on whichever stream."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


_stream = Stream()


def current_stream(device: Any = None) -> Stream:
    return _stream


default_stream = current_stream


@contextlib.contextmanager
def stream(of: Stream | None) -> Iterator[None]:
    yield


def is_available() -> bool:
    return device_count() > 0


def is_initialized() -> bool:
    return True


def init() -> None: ...


def _lazy_init() -> None: ...


def device_count() -> int:
    return 0 if _device.is_absent() else 1


def current_device() -> int:
    return 0


def set_device(device: Any) -> None: ...


def synchronize(device: Any = None) -> None:
    _device.acquire()


def get_device_name(device: Any = None) -> str:
    _device.acquire()
    return "STANDIN"


def get_device_properties(device: Any = None) -> Properties:
    return Properties(get_device_name(), _device.books().limit, 0)


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Return bytes free, and in all. Raises `RuntimeError` where there is no device for us."""
    _device.acquire()
    books = _device.books()
    return books.limit - books.held, books.limit


def memory_allocated(device: Any = None) -> int:
    _device.acquire()
    return _device.books().held


def memory_reserved(device: Any = None) -> int:
    """Return all of the device, so that code that reads tensors' memory from this is found."""
    _device.acquire()
    return _device.books().limit


def max_memory_allocated(device: Any = None) -> int:
    _device.acquire()
    return _device.books().peak


def reset_peak_memory_stats(device: Any = None) -> None:
    _device.reset_peak()


def empty_cache() -> None: ...


def wrap_in_hpu_graph(module: Any, *_: Any, **__: Any) -> Any:
    """Run each time what a device would record."""
    return module


def manual_seed(seed: int) -> None:
    random.manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    random.manual_seed_all(seed)


def get_rng_state(device: Any = "hpu") -> torch.Tensor:
    return random.get_rng_state(device)


def set_rng_state(state: torch.Tensor, device: Any = "hpu") -> None:
    random.set_rng_state(state, device)


def _is_in_bad_fork() -> bool:
    return False


torch._register_device_module("hpu", __import__("sys").modules[__name__])
