"""Leave the machine code for one kind of GPU in a shared library, and no other.

A CUDA library holds each kernel once for every kind of GPU. Here every container of kernels that
has code for the wanted kind keeps that alone. One that has none keeps the smallest entry, so that
it stays a valid container: its kernels could not run before either, except those that come as PTX
only. The file keeps its length and all addresses; removed code becomes zeros, and compresses to
nothing.

Format: ELF's section table (System V ABI); the container and its entries (`fatbin`) are not
documented by NVIDIA, and were read from the libraries of CUDA 13.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

CONTAINER, ELF = 0xBA55ED50, 2
SECTION = ".nv_fatbin"


class NoFatbin(Exception):
    """A file is not built as expected; the message says how."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Code for one kind of GPU: its kind of code, compute capability (90 is 9.0), and bytes."""

    kind: int
    sm: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Container:
    """Where it lies in the file, how long its head is, and what it holds."""

    place: int
    head: int
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        return sum(len(entry.content) for entry in self.entries)


def section(data: bytes | bytearray, name: str) -> tuple[int, int]:
    """Return offset and size of a section of a 64-bit ELF file; twice 0 if it lacks that name.

    Raises:
        NoFatbin: it is not such a file.
    """
    if data[:5] != b"\x7fELF\x02":
        raise NoFatbin("it is not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry, count, names = struct.unpack_from("<HHH", data, 0x3A)
    found = [struct.unpack_from("<IIQQQQ", data, table + i * entry) for i in range(count)]
    for item in found:
        start = found[names][4] + item[0]
        if data[start : data.index(b"\0", start)] == name.encode():
            return item[4], item[5]
    return 0, 0


def containers(data: bytes | bytearray) -> list[Container]:
    """Return all of a library. Raises `NoFatbin` if one does not end where it says."""
    place, size = section(data, SECTION)
    end, found = place + size, []
    while place < end:
        if struct.unpack_from("<I", data, place)[0] != CONTAINER:
            place += 8
            continue
        head, length = struct.unpack_from("<HQ", data, place + 6)
        stop = place + head + length
        found.append(Container(place, head, _entries(data, place + head, stop)))
        place = stop
    return found


def _entries(data: bytes | bytearray, at: int, stop: int) -> tuple[Entry, ...]:
    found = []
    while at < stop:
        kind, _, head, body = struct.unpack_from("<HHII", data, at)
        (sm,) = struct.unpack_from("<I", data, at + 28)
        if head + body <= 0:
            break
        found.append(Entry(kind, sm, bytes(data[at : at + head + body])))
        at += head + body
    if at != stop:
        raise NoFatbin(f"a container ends at {at}, not at {stop}")
    return tuple(found)


def thin(path: Path, sm: int) -> tuple[int, int]:
    """Change a library. Returns the bytes of code that were kept, and removed."""
    data = bytearray(path.read_bytes())
    found = containers(data)
    foreign = [e for c in found for e in c.entries if e.kind == ELF and e.sm != sm]
    kept = gone = 0
    for container in found:
        body = b"".join(_kept(container, sm, foreign))
        if len(body) > container.nbytes:
            body = b"".join(entry.content for entry in container.entries)
        first = container.place + container.head
        struct.pack_into("<Q", data, container.place + 8, len(body))
        data[first : first + container.nbytes] = body + bytes(container.nbytes - len(body))
        kept, gone = kept + len(body), gone + container.nbytes - len(body)
    path.write_bytes(data)
    return kept, gone


def _kept(container: Container, sm: int, foreign: list[Entry]) -> list[bytes]:
    wanted = [e.content for e in container.entries if (e.kind, e.sm) == (ELF, sm)]
    if wanted:
        return wanted
    smallest = sorted([*container.entries, *foreign], key=lambda entry: len(entry.content))
    return [entry.content for entry in smallest[:1]]
