"""Sizes of memory in the configuration: bytes, `20GiB`, or a fraction such as `80%`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.dataclasses import dataclass as validated_dataclass

_GIB = 1 << 30


_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}


Size = int | float
"""Bytes (an int) or a fraction of what there is (a float above 0, at most 1)."""


def parse_size(value: object) -> Size:
    """Bytes or a fraction from `20GiB`, `0.8`, `80%` or a number of bytes.

    Raises:
        ValueError: it is none of these; the message says what is wanted.
    """
    wanted = "give bytes, a size such as 20GiB, or a fraction such as 0.8 or 80%"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(wanted)
    if isinstance(value, int) and value > 0:
        return value
    if isinstance(value, float) and 0 < value <= 1:
        return value
    match = re.fullmatch(r"([0-9.]+)\s*(%|[A-Za-z]*)", str(value).strip())
    if match is None or not isinstance(value, str):
        raise ValueError(wanted)
    return _size(match[1], match[2], wanted)


def _size(number: str, unit: str, wanted: str) -> Size:
    try:
        amount = float(number)
    except ValueError:
        raise ValueError(wanted) from None
    if unit == "%" and 0 < amount <= 100:
        return amount / 100
    if not unit and 0 < amount <= 1:
        return amount
    size = int(amount * _UNITS.get(unit.upper(), 0))
    if size <= 0:
        raise ValueError(wanted)
    return size


GivenSize = Annotated[
    int | float | None,
    BeforeValidator(lambda value: None if value is None else parse_size(value)),
    WithJsonSchema({"type": ["integer", "number", "string", "null"]}),
]


def _parse_bytes(value: object) -> int:
    size = parse_size(value)
    if isinstance(size, float):
        raise ValueError("give bytes, or a size such as 64MiB")
    return size


ByteSize = Annotated[
    int, BeforeValidator(_parse_bytes), WithJsonSchema({"type": ["integer", "string"]})
]
"""Bytes, or a size such as `64MiB`."""


@validated_dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class MemoryBudget:
    """The `memory` section: what the engine host may hold, None for a default.

    Bytes, a size such as `20GiB`, or a fraction such as `0.8` or `80%`.
    """

    device: Annotated[
        GivenSize,
        Field(
            description="device memory for the models and the engine host itself; on a CPU, for "
            "the whole host process. A fraction is of the device's total. Default: "
            "`gpu_memory_utilization` of the device, minus what others use; on CUDA, what "
            "is free, minus a reserve"
        ),
    ] = None
    host: Annotated[
        GivenSize,
        Field(
            description="host memory for weights asleep (on accelerators) and prefetched files; "
            "default: half of the free host memory"
        ),
    ] = None


def resolve_size(size: Size, total_bytes: int) -> int:
    """Bytes; a fraction is one of `total_bytes`."""
    return int(size * total_bytes) if isinstance(size, float) else size
