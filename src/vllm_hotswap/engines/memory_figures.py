"""What a model holds: as it is planned before its first load, as measured by its last one."""

from __future__ import annotations

from dataclasses import replace

from vllm_hotswap.host import Device, Loaded, device_of, kv_shares
from vllm_hotswap.launch import ModelLaunch, ModelNeeds
from vllm_hotswap.models import EngineMemory, Footprint, Usage
from vllm_hotswap.states import Residency


class MemoryFigures:
    """The memory of one model.

    The mutable state is `needs` (changed by `plan_with`), `_loaded` (by `measured`) and
    `_has_copy`, whether its weights are in host memory, where they stay once it has slept.
    """

    def __init__(self, launch: ModelLaunch) -> None:
        self._config = launch.vllm_config
        self.device: Device = device_of(launch.vllm_config)
        self.needs: ModelNeeds = launch.needs
        self.has_default_kv = launch.needs.kv_bytes is None
        """Whether the configuration leaves the size of its KV memory to us."""
        self._loaded: Loaded | None = None
        self._has_copy = False

    def __repr__(self) -> str:
        return f"<MemoryFigures kv_bytes={self.kv_bytes} has_copy={self._has_copy}>"

    @property
    def kv_bytes(self) -> int:
        """What it was given; once it has been loaded, what it has: an encoder has none."""
        if self._loaded is None:
            return self.needs.kv_bytes or 0
        return self._loaded.kv_bytes * kv_shares(self._config)

    @property
    def estimate(self) -> EngineMemory:
        """What it needs when it is loaded."""
        return EngineMemory(self.needs.weights_bytes, self.kv_bytes)

    @property
    def footprint(self) -> Footprint:
        """What it holds in each residency."""
        needs = replace(self.needs, kv_bytes=self.kv_bytes)
        return footprint_of(needs, self.device, self._loaded, self._has_copy)

    def plan_with(self, needs: ModelNeeds) -> None:
        """Set what it is planned with, and so the size of its KV memory."""
        self.needs = needs
        config = self._config
        config.cache_config.kv_cache_memory_bytes = (needs.kv_bytes or 0) // kv_shares(config)

    def measured(self, loaded: Loaded) -> None:
        """Take over what a load has measured."""
        self._loaded = loaded

    def slept(self) -> None:
        """Note that it has slept: on some devices, its weights stay in host memory then."""
        self._has_copy = self.device.keeps_copy

    def lost_copy(self) -> None:
        """Note that its weights are not in host memory."""
        self._has_copy = False


def footprint_of(
    needs: ModelNeeds, device: Device, loaded: Loaded | None, has_copy: bool = False
) -> Footprint:
    """What a model holds in each residency: as its load has measured it, estimated before one.

    `has_copy`: its weights are in host memory, awake as well.
    """
    if device.reports_sleep_bytes:
        return _reported_footprint(needs, loaded, has_copy)
    kv = needs.kv_bytes or 0
    weights = needs.weights_bytes + needs.more_weights_bytes
    held = needs.held_bytes
    if loaded is not None and loaded.held_bytes > 0:
        # Files may be larger than what is made of them, or smaller.
        weights = loaded.weights_bytes or needs.weights_bytes
        held = max(loaded.held_bytes, weights) + needs.copies_bytes
    rest = max(held - weights, 0)
    usage = {Residency.PARKED: Usage(held + kv), Residency.COLD: Usage()}
    if 1 in device.sleep_levels:
        usage[Residency.ASLEEP] = Usage(held) if device.is_host_memory else Usage(rest, weights)
    if loaded.can_discard if loaded else 2 in device.sleep_levels:
        usage[Residency.DISCARDED] = Usage(rest)
    return Footprint(usage, Usage(held + kv + needs.reading_bytes))


def _reported_footprint(needs: ModelNeeds, loaded: Loaded | None, has_copy: bool) -> Footprint:
    """Of a model whose worker tells what its sleep gives back, and what it takes."""
    kv = needs.kv_bytes or 0
    held, residue = needs.held_bytes + kv, needs.residue_bytes
    copy = needs.held_bytes - residue
    if loaded is not None and loaded.sleep_bytes > 0:
        # Another process that has given memory back during the load makes it look small.
        held = max(loaded.held_bytes + kv, loaded.sleep_bytes)
        residue, copy = held - loaded.sleep_bytes, loaded.copy_bytes
    parked = Usage(held, copy if has_copy else 0)
    usage = {
        Residency.PARKED: parked,
        Residency.ASLEEP: Usage(residue, copy),
        Residency.COLD: Usage(),
    }
    return Footprint(usage, parked + Usage(needs.reading_bytes))
