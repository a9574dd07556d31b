"""Phase `link`: how fast memory is pinned, copied, mapped and unmapped."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable

import psutil

from tools.gpu.device import GIB, MIB
from tools.gpu.facts import refusal
from tools.gpu.results import Say
from tools.gpu.task import Task
from vllm_hotswap.host.cuda_driver import Driver, check_driver
from vllm_hotswap.host.cuda_memory import HostCopy

ROUNDS = 5
MOST = 4 * GIB
SMALL = 128 * MIB
"""In a rehearsal, and of pageable memory."""

PIECES = (2 * MIB, 20 * MIB, 256 * MIB)
MARK = 0xA5


def run(task: Task, say: Say) -> None:
    driver = Driver(0, check_driver(os.environ))
    driver.ensure_context()
    size = SMALL if task.is_rehearsal else block(driver.memory_info()[0], available())
    _copies(say, driver, size)
    for piece in PIECES:
        _mapping(say, driver, piece, max(1, size // piece))


def available() -> int:
    return int(psutil.virtual_memory().available)


def block(device_free: int, host_free: int) -> int:
    """Return the bytes to copy: enough to time, and a quarter of what there is at most."""
    return max(SMALL, min(MOST, device_free // 4, host_free // 4) // SMALL * SMALL)


class Block:
    """Memory on the device, mapped as a model's is."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self._driver, self.nbytes = driver, nbytes
        self.address = driver.reserve(nbytes)
        self._handle = driver.create(nbytes)
        driver.map(self.address, nbytes, self._handle)
        driver.allow(self.address, nbytes)

    def close(self) -> None:
        self._driver.unmap(self.address, self.nbytes)
        self._driver.release(self._handle)
        self._driver.forget(self.address, self.nbytes)


def _copies(say: Say, driver: Driver, size: int) -> None:
    stream, there = driver.new_stream(), Block(driver, size)
    before_s = time.perf_counter()
    pinned = HostCopy(driver, size)
    took_s = time.perf_counter() - before_s
    told = "" if pinned.refusal is None else refusal(pinned.refusal)
    say.check("pinned", "host memory is pinned", pinned.refusal is None, note=told)
    say.fact("pin", "mapping and pinning host memory", size / 1e9 / took_s, "GB/s")
    say.fact("bytes", "copied at a time", size // MIB, "MiB")

    def rates(nbytes: int, begin: Callable[[], None]) -> list[float]:
        found = []
        for _ in range(ROUNDS + 1):
            before_s = time.perf_counter()
            begin()
            driver.wait(stream)
            found.append(nbytes / 1e9 / (time.perf_counter() - before_s))
        return found[1:]

    at, host = there.address, pinned.address
    ctypes.memset(host, MARK, size)
    to_device = rates(size, lambda: driver.to_device(at, host, size, stream))
    ctypes.memset(host, 0, size)
    to_host = rates(size, lambda: driver.to_host(host, at, size, stream))
    say.fact("to_device", "host to device, pinned", to_device, "GB/s")
    say.fact("to_host", "device to host, pinned", to_host, "GB/s")
    back = ctypes.string_at(host, SMALL)
    say.check("same", "data copied there and back is the same", back == bytes([MARK]) * SMALL)
    zero = rates(size, lambda: driver.zero(at, size, stream))
    say.fact("zero", "writing zeros", zero, "GB/s")
    pageable = mmap.mmap(-1, SMALL, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = (ctypes.c_ubyte * SMALL).from_buffer(pageable)
    place = ctypes.addressof(view)
    ctypes.memset(place, MARK, SMALL)
    up = rates(SMALL, lambda: driver.to_device(at, place, SMALL, stream))
    down = rates(SMALL, lambda: driver.to_host(place, at, SMALL, stream))
    say.fact("to_device_pageable", "host to device, pageable", up, "GB/s")
    say.fact("to_host_pageable", "device to host, pageable", down, "GB/s")
    pinned.close()
    there.close()
    driver.end_stream(stream)


def _mapping(say: Say, driver: Driver, piece: int, count: int) -> None:
    """Do as `ModelMemory` does: create, map, allow; unmap, release."""
    places = [driver.reserve(piece) for _ in range(count)]
    before_s = time.perf_counter()
    handles = []
    for place in places:
        handles.append(driver.create(piece))
        driver.map(place, piece, handles[-1])
        driver.allow(place, piece)
    between_s = time.perf_counter()
    for place, handle in zip(places, handles, strict=True):
        driver.unmap(place, piece)
        driver.release(handle)
    after_s = time.perf_counter()
    for place in places:
        driver.forget(place, piece)
    gib = piece * count / GIB
    name = f"pieces of {piece // MIB} MiB"
    up, down = 1e3 * (between_s - before_s) / gib, 1e3 * (after_s - between_s) / gib
    say.fact(f"map.{piece // MIB}", f"mapping, {name}", up, "ms/GiB")
    say.fact(f"unmap.{piece // MIB}", f"unmapping, {name}", down, "ms/GiB")
