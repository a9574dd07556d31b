"""What a model takes of the device and of host memory. Values in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vllm_hotswap.states import Residency


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of device and of host memory. If both are the same memory, all are device bytes."""

    device: int = 0
    host: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.device + other.device, self.host + other.host)

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.device - other.device, self.host - other.host)

    def fits(self, budget: Usage) -> bool:
        return self.device <= budget.device and self.host <= budget.host


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of a model in each residency; measured once it has been loaded, estimated before."""

    usage: Mapping[Residency, Usage]
    """Residencies that the model's device does not have are left out."""
    peak: Usage
    """Memory while it is loaded or woken: at least what it holds when it is parked."""

    def at(self, residency: Residency) -> Usage:
        """Return what it holds there; a model that is being loaded holds its peak."""
        if residency is Residency.LOADING:
            return self.peak
        if residency is Residency.ACTIVE:
            residency = Residency.PARKED
        return self.usage.get(residency, Usage())


def total(usages: Iterable[Usage]) -> Usage:
    result = Usage()
    for usage in usages:
        result = result + usage
    return result
