"""Where a fake engine is, and the bytes that it holds there."""

from __future__ import annotations

from vllm_hotswap.models import EngineMemory, Footprint, Usage
from vllm_hotswap.states import Residency, WakeProgress
from vllm_hotswap.testing.fake_settings import FakeSettings


class FakeMemory:
    """The memory of one fake engine.

    The mutable state is `level` and `slices_done`. `move_to`, `wake_slice` and `drop_slices` alone
    change them.
    """

    def __init__(self, settings: FakeSettings) -> None:
        self._settings = settings
        self.level: int | None = None
        """0: loaded, 1 or 2: asleep at that level, None: not loaded."""
        self.slices_done = 0
        """Of a wake before it is asked for."""

    def __repr__(self) -> str:
        return f"<FakeMemory level={self.level} slices_done={self.slices_done}>"

    def move_to(self, level: int | None) -> None:
        self.level, self.slices_done = level, 0

    def wake_slice(self) -> None:
        """Take back one more part of what is asleep at level 1."""
        self.slices_done = min(self.slices_done + 1, self._settings.slices)

    def drop_slices(self) -> None:
        """Give back what slices have taken."""
        self.slices_done = 0

    @property
    def planned(self) -> EngineMemory:
        """What it needs when it is loaded."""
        return EngineMemory(self._settings.weights_bytes, self._settings.kv_bytes)

    @property
    def footprint(self) -> Footprint:
        """What it holds in each residency."""
        settings = self._settings
        weights, kv = settings.weights_bytes, settings.kv_bytes
        usage = {Residency.PARKED: Usage(weights + kv), Residency.COLD: Usage()}
        if 1 in settings.levels:
            asleep = Usage(settings.residue_bytes, weights) if settings.offloads else Usage(weights)
            usage[Residency.ASLEEP] = asleep
        if 2 in settings.levels:
            usage[Residency.DISCARDED] = Usage()
        return Footprint(usage, Usage(weights + kv))

    @property
    def held_bytes(self) -> int:
        """What it holds now."""
        weights, kv = self._settings.weights_bytes, self._settings.kv_bytes
        asleep = self._settings.residue_bytes if self._settings.offloads else weights
        held = {0: weights + kv, 1: asleep}.get(-1 if self.level is None else self.level, 0)
        return held + self.wake_progress.done_bytes

    @property
    def wake_progress(self) -> WakeProgress:
        """How far slices have woken it; nothing of nothing unless it sleeps at level 1."""
        if self.level != 1 or not self._settings.slices:
            return WakeProgress(0, 0)
        usage = self.footprint.usage
        total = usage[Residency.PARKED].device - usage[Residency.ASLEEP].device
        return WakeProgress(total * self.slices_done // self._settings.slices, total)

    @property
    def left_to_wake(self) -> float:
        """The share of a wake that slices have not done."""
        return 1 - self.slices_done / self._settings.slices if self._settings.slices else 1
