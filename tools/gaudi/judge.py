"""What is wrong with what was seen. Each function returns sentences; none, if all is well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Any, Literal

Way = Literal["parked", "asleep", "cold"]
MIB = 1 << 20

SLACK_BYTES = 8 * MIB
"""What an allocator may round or keep of memory that comes back: an eighth of a model's KV memory
here."""

MOST = 0.9
"""Of its KV memory, what a model that sleeps or is unloaded has to give back. The rest may be
rounding. Weights of the tiny models are too small to be seen in that; see `HALF`."""

HALF = 0.5
"""The part of its weights that may be missing from what torch reports as freed. Torch does not
round, unlike the device: a model that keeps its weights frees nothing of them."""

LEAST_KV_BYTES = 64 * MIB
"""Of each model's KV memory: `BLOCKS` blocks of 128 tokens, which take 128 KiB each with either of
the tiny models. The server's own figure is judged by that."""

SETTLED = 2
"""Cycles of each model after which nothing may grow: the first ones fill caches."""

HOST_SLACK_BYTES = 64 * MIB
"""What all processes' own memory may grow by. An allocator of the C library does not return at once
what is freed."""

SLACKS = {"device_bytes": SLACK_BYTES, "memory_bytes": HOST_SLACK_BYTES}
"""What may grow by so much. The others may not grow at all."""

FIGURES = {
    "device_bytes": "memory of the device in use",
    "processes": "processes",
    "threads": "threads",
    "descriptors": "open file descriptors",
    "memory_bytes": "memory of the processes",
}
"""Figures whose growth is judged, in words."""

EXPECTED_TOLERANCE = 0.5
"""Between logarithmic probabilities on the device, in bfloat16, and by transformers in float32."""

OWN_TOLERANCE = 0.25
"""The same between two answers of one server: parts of a prompt may be computed together, or found
in the prefix cache."""


@dataclass(frozen=True, slots=True)
class Device:
    """The device as the engine host sees it. Bytes; None where torch has no such function."""

    free: int
    total: int
    memory_allocated: int | None
    memory_reserved: int | None

    @property
    def used(self) -> int:
        return self.total - self.free


@dataclass(frozen=True, slots=True)
class Processes:
    """The server's processes, together."""

    processes: int
    threads: int
    descriptors: int
    memory_bytes: int
    """Host memory that they share with no other process (USS)."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen at one moment. `told` is what the server reports that the model holds."""

    device: Device
    told_device_bytes: int
    told_host_bytes: int
    processes: Processes


@dataclass(frozen=True, slots=True)
class Cycle:
    """A model goes away and comes back."""

    way: Way
    model: str
    kv_bytes: int
    weights_bytes: int
    before: Seen
    away: Seen
    after: Seen
    back_s: float

    def written(self) -> dict[str, Any]:
        """Return it for the file."""
        return asdict(self)


def cycle_faults(cycle: Cycle, *, judges_weights: bool = True) -> list[str]:
    """Return faults: memory not freed, not taken again, or more than before.

    `judges_weights`: whether `memory_allocated` follows what comes and goes, so that it shows
    whether weights do.
    """
    faults = _told_too_little(cycle)
    faults += _parked(cycle) if cycle.way == "parked" else _gone(cycle)
    if judges_weights and cycle.way != "parked":
        faults += _weights_kept(cycle)
    more = _more(cycle)
    if more > SLACK_BYTES:
        faults.append(f"{_mib(more)} more of the device is in use than before")
    told = cycle.after.told_device_bytes - cycle.before.told_device_bytes
    if abs(told) > SLACK_BYTES or cycle.after.told_host_bytes != cycle.before.told_host_bytes:
        faults.append(
            "the server says that the model holds a different amount of memory than before"
        )
    return faults


def notes(cycle: Cycle) -> list[str]:
    """Return what is worth reading, and is not wrong: software may keep less than it did before."""
    less = -_more(cycle)
    return [f"{_mib(less)} less of the device is in use than before"] * (less > SLACK_BYTES)


def _more(cycle: Cycle) -> int:
    return cycle.after.device.used - cycle.before.device.used


def _needed(cycle: Cycle) -> int:
    """Return KV memory, in bytes: what the server reports, or more if that is too little."""
    return max(cycle.kv_bytes, LEAST_KV_BYTES)


def _told_too_little(cycle: Cycle) -> list[str]:
    if cycle.kv_bytes >= LEAST_KV_BYTES:
        return []
    told = f"the server says that the model's KV memory is {_mib(cycle.kv_bytes)}"
    return [f"{told}; its blocks are {_mib(LEAST_KV_BYTES)}"]


def _parked(cycle: Cycle) -> list[str]:
    moved = cycle.before.device.used - cycle.away.device.used
    if abs(moved) > SLACK_BYTES:
        return [f"{_mib(moved)} were given back by a model that was only parked"]
    return []


def _gone(cycle: Cycle) -> list[str]:
    faults = []
    given = cycle.before.device.used - cycle.away.device.used
    told = cycle.before.told_device_bytes - cycle.away.told_device_bytes
    if given < MOST * _needed(cycle):
        faults.append(
            f"{_mib(given)} of the device were given back, but the model's KV memory alone is "
            f"{_mib(_needed(cycle))}"
        )
    if abs(told - given) > SLACK_BYTES:
        faults.append(f"the server says that {_mib(told)} were given back; it was {_mib(given)}")
    if cycle.way == "asleep" and cycle.away.told_host_bytes < MOST * cycle.weights_bytes:
        faults.append(
            f"the server says that {_mib(cycle.away.told_host_bytes)} are in host memory, but the "
            f"model's weights are {_mib(cycle.weights_bytes)}"
        )
    if cycle.way == "cold" and (cycle.away.told_device_bytes or cycle.away.told_host_bytes):
        faults.append("the server says that an unloaded model holds memory")
    return faults


def _weights_kept(cycle: Cycle) -> list[str]:
    """Return weights that were kept, by `memory_allocated`; none where torch lacks it."""
    before, away = cycle.before.device.memory_allocated, cycle.away.device.memory_allocated
    if before is None or away is None:
        return []
    given, whole = before - away, _needed(cycle) + cycle.weights_bytes
    if given >= whole - HALF * cycle.weights_bytes:
        return []
    return [
        (
            f"tensors of {_mib(given)} have left the device, but the model's KV memory and "
            f"weights are {_mib(whole)}"
        )
    ]


@dataclass(frozen=True, slots=True)
class Growth:
    """Growth of each figure, from the first cycles to the last, when the same model was active."""

    grown: Mapping[str, int]
    lately: Mapping[str, int]
    """Growth since the middle third. Pools of threads grow with use, and stop."""

    def written(self) -> dict[str, Any]:
        """Return it for the file."""
        return asdict(self)

    def faults(self) -> list[str]:
        """Return what has grown by more than it may, and has not stopped."""
        return [
            f"{FIGURES[name]}: {_mib(more) if name in SLACKS else more} more than in the first "
            "cycles"
            for name, more in self.grown.items()
            if more > SLACKS.get(name, 0) and self.lately[name] > 0
        ]


def growth(cycles: Sequence[Cycle]) -> Growth:
    """Return the growth for the last cycle's model.

    What compilers take for a moment must not hide a leak. So the last cycle is compared with the
    median of the middle ones, and with the largest of the first ones only if that is less.
    """
    figures = [_figures(cycle.after) for cycle in cycles if cycle.model == cycles[-1].model]
    third, last = len(figures) // 3, figures[-1]
    middle = {
        name: median_low(each[name] for each in figures[third : len(figures) - third])
        for name in last
    }
    first = {name: max(each[name] for each in figures[:SETTLED]) for name in last}
    return Growth(
        {name: last[name] - min(first[name], middle[name]) for name in last},
        {name: last[name] - middle[name] for name in last},
    )


def _figures(seen: Seen) -> dict[str, int]:
    return {"device_bytes": seen.device.used, **asdict(seen.processes)}


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
