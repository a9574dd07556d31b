"""Device memory of one model that can be given back and taken again at the same addresses.

CUDA graphs, views and compiled code know addresses, so addresses stay: what comes and goes is the
physical memory behind them. Each model has a `ModelMemory` of its own, unlike vLLM's allocator,
of which there is one for a process. It knows the driver and nothing of torch, which
`host.cuda_pools` brings together with it.

Everything happens on the thread that loads and steps.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from vllm_hotswap.errors import NoRoom, one_line
from vllm_hotswap.host.cuda_driver import Driver, DriverError

Range = tuple[int, int]
"""An address on the device, and bytes from there on."""

WEIGHTS = "weights"

MIB = 1 << 20

log = logging.getLogger("vllm_hotswap.host")


class HostCopy:
    """Host memory that the device copies from and to at the speed of its link, of exact size.

    Torch's own pinned memory is rounded up to powers of two, and kept when it is freed. Pinning
    takes about as long as writing does, so it is done once. Where it is refused (a limit of locked
    memory), copies take longer, and that is all.
    """

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self._driver = driver
        self._mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self._view: ctypes.Array[ctypes.c_ubyte] | None
        self._view = (ctypes.c_ubyte * nbytes).from_buffer(self._mapping)
        self.address, self.nbytes = ctypes.addressof(self._view), nbytes
        self.refusal: str | None = None
        """Why it is not pinned."""
        try:
            driver.pin(self.address, nbytes)
        except DriverError as error:
            self.refusal = one_line(error)

    def close(self) -> None:
        """Give it back. Raises `DriverError` if it cannot be unpinned: it is still there then."""
        if self.refusal is None:
            self._driver.unpin(self.address)
            self.refusal = "it is closed"
        self._view = None
        self._mapping.close()


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a segment whose content outlasts a sleep. The rest is zero afterwards."""

    offset: int
    nbytes: int
    is_constant: bool
    """Whether the model never writes to it: it is copied once."""


@dataclass(eq=False, slots=True)
class Segment:
    """A range of addresses that torch has asked for, and what lies behind it."""

    address: int
    nbytes: int
    tag: str
    handle: int | None = None
    """Of its physical memory; None where there is none."""
    is_mapped: bool = False
    is_asleep: bool = False
    """Its content is what `copy` has, and zeros, whatever memory it may have."""
    parts: tuple[Part, ...] = ()
    copy: HostCopy | None = None
    has_constants: bool = False
    """Whether `copy` has the constant parts as they are."""

    @property
    def kept_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class ModelMemory:
    """The device memory of one model, and its copy in host memory.

    The mutable state is `_segments`, by address; `_stuck`, segments that torch has given back and
    the driver has not taken yet; `_stream`, for copies; and the tag of what is being allocated.
    A segment says at any time what the driver has really done, whichever call has failed.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._segments: dict[int, Segment] = {}
        self._stuck: list[Segment] = []
        self._stream: int | None = None
        self._has_told_refusal = False
        self.tag = WEIGHTS
        """Of what is allocated from now on."""

    def __repr__(self) -> str:
        state = "asleep" if self.is_asleep else "awake"
        return (
            f"<ModelMemory {state} segments={len(self._segments)} device={self.device_bytes} "
            f"host={self.host_bytes}>"
        )

    # --- books --------------------------------------------------------------------------------

    @property
    def is_asleep(self) -> bool:
        return any(segment.is_asleep for segment in self._segments.values())

    @property
    def is_in_use(self) -> bool:
        """Whether torch has not given all of it back: somebody has a tensor there."""
        return bool(self._segments)

    @property
    def device_bytes(self) -> int:
        """Physical memory that it holds: what a sleep gives back, while it is awake."""
        return sum(s.nbytes for s in self._all() if s.handle is not None)

    @property
    def address_bytes(self) -> int:
        """Addresses that are reserved, with memory or without."""
        return sum(s.nbytes for s in self._all())

    @property
    def host_bytes(self) -> int:
        """Host memory of its copies; they stay while it is awake."""
        return sum(s.copy.nbytes for s in self._all() if s.copy is not None)

    def has(self, address: int) -> bool:
        """Whether an address is one of its."""
        return any(s.address <= address < s.address + s.nbytes for s in self._all())

    def copy_bytes(self, dropped: Iterable[Range]) -> int:
        """Host memory that its copies take once it has slept, if so much is not kept."""
        holes = merged(dropped)
        return sum(
            _in_pages(sum(nbytes for _, nbytes in outside((s.address, s.nbytes), holes)))
            for s in self._live()
        )

    def _all(self) -> Iterator[Segment]:
        yield from self._segments.values()
        yield from self._stuck

    def _live(self) -> list[Segment]:
        """Those with content, weights first: their copies take longest, and run meanwhile."""
        live = [s for s in self._segments.values() if s.handle is not None and not s.is_asleep]
        return sorted(live, key=lambda segment: segment.tag != WEIGHTS)

    # --- what torch asks for ------------------------------------------------------------------

    def allocate(self, nbytes: int) -> int:
        """Memory; returns its address.

        Raises:
            DriverError: there is none, or not enough; nothing is left of the attempt.
        """
        self._driver.ensure_context()
        nbytes = -(-nbytes // self._driver.step) * self._driver.step
        segment = Segment(self._driver.reserve(nbytes), nbytes, self.tag)
        try:
            self._take(segment)
        except DriverError:
            self._discard(segment)
            raise
        self._segments[segment.address] = segment
        return segment.address

    def free(self, address: int) -> None:
        """Give back memory and addresses. An address that is not its own is nobody's any more."""
        segment = self._segments.pop(address, None)
        if segment is None:
            return
        with suppress(DriverError):  # what cannot be done then either stays in the books
            self._driver.ensure_context()
            if segment.handle is not None:
                self._driver.synchronize()  # steps that have been begun may read it
        self._retry_stuck()
        self._discard(segment)

    def empty(self, address: int) -> None:
        """Give back the memory behind addresses in which nothing is, nor will be."""
        segment = self._segments.get(address)
        if segment is not None:
            self._give_back(segment)

    # --- residency ----------------------------------------------------------------------------

    def weights_changed(self) -> None:
        """Something may have been written to constant parts: the next sleep copies them again."""
        for segment in self._segments.values():
            segment.has_constants = False

    def sleep(self, dropped: Iterable[Range] = (), constant: Iterable[Range] = ()) -> None:
        """Give all device memory back.

        Args:
            dropped: whose content is not needed; it is zero after a wake.
            constant: whose content never changes, unless `weights_changed` says so.

        Raises:
            NoRoom: there is too little host memory.
            DriverError: a copy has failed. In both cases nothing has changed.
        """
        self._driver.ensure_context()
        self._retry_stuck()
        self._driver.synchronize()
        live = self._live()
        self._make_copies(live, merged(dropped), merged(constant))
        stream = self._copying()
        try:
            for segment in live:
                self._save(segment, stream)
        except DriverError:
            with suppress(DriverError):
                self._driver.wait(stream)
            raise
        self._driver.wait(stream)
        for segment in live:
            segment.has_constants = segment.is_asleep = True
        for segment in live:
            self._give_back(segment)

    def wake(self) -> None:
        """Take the memory again, at the same addresses, with what was kept; the rest is zero.

        Copies run while the next segment is being mapped.

        Raises:
            NoRoom: there is too little device memory.
            DriverError: a call has failed. In both cases nothing has changed: it is asleep.
        """
        self._driver.ensure_context()
        asleep = [segment for segment in self._segments.values() if segment.is_asleep]
        asleep.sort(key=lambda segment: segment.tag != WEIGHTS)
        stream = self._copying()
        try:
            for segment in asleep:
                self._take(segment)
                self._restore(segment, stream)
            self._driver.wait(stream)
        except DriverError as error:
            self._fall_back(asleep, stream)
            if error.is_out_of_memory:
                raise NoRoom(self._lack(asleep)) from error
            raise
        for segment in asleep:
            segment.is_asleep = False

    def close(self) -> None:
        """Give everything back, whether it is asleep or not. Nobody may use it any more."""
        with suppress(DriverError):
            self._driver.ensure_context()
            self._driver.synchronize()
        self._retry_stuck()
        while self._segments:
            self._discard(self._segments.popitem()[1])
        if self._stream is not None:
            try:
                self._driver.end_stream(self._stream)
            except DriverError as error:
                log.error("event=stream_kept cause=%r", one_line(error))
            else:
                self._stream = None

    def drop_copies(self) -> None:
        """Give host memory back, though addresses are still in use: the content is lost."""
        for segment in self._segments.values():
            self._drop_copy(segment)

    # --- one segment --------------------------------------------------------------------------

    def _take(self, segment: Segment) -> None:
        """Have memory behind its addresses. If that fails, there is none."""
        try:
            if segment.handle is None:
                segment.handle = self._driver.create(segment.nbytes)
            if not segment.is_mapped:
                self._driver.map(segment.address, segment.nbytes, segment.handle)
                segment.is_mapped = True
            self._driver.allow(segment.address, segment.nbytes)
        except DriverError:
            self._give_back(segment)
            raise

    def _give_back(self, segment: Segment) -> None:
        """Have no memory behind its addresses; what the driver does not take back is kept."""
        try:
            if segment.is_mapped:
                self._driver.unmap(segment.address, segment.nbytes)
                segment.is_mapped = False
            if segment.handle is not None:
                self._driver.release(segment.handle)
                segment.handle = None
        except DriverError as error:
            log.error("event=memory_kept bytes=%d cause=%r", segment.nbytes, one_line(error))

    def _discard(self, segment: Segment) -> None:
        """Give back all that a segment has, or keep it in mind for the next time."""
        self._give_back(segment)
        try:
            if segment.copy is not None:
                segment.copy.close()
                segment.copy = None
            if segment.handle is None:
                self._driver.forget(segment.address, segment.nbytes)
                return
        except DriverError as error:
            log.error("event=addresses_kept bytes=%d cause=%r", segment.nbytes, one_line(error))
        self._stuck.append(segment)

    def _retry_stuck(self) -> None:
        stuck, self._stuck = self._stuck, []
        for segment in stuck:
            self._discard(segment)

    def _drop_copy(self, segment: Segment) -> None:
        if segment.copy is None:
            return
        try:
            segment.copy.close()
        except DriverError as error:
            log.error("event=copy_kept bytes=%d cause=%r", segment.copy.nbytes, one_line(error))
        else:
            segment.copy, segment.has_constants = None, False

    # --- contents -----------------------------------------------------------------------------

    def _copying(self) -> int:
        if self._stream is None:
            self._stream = self._driver.new_stream()
        return self._stream

    def _make_copies(self, live: list[Segment], holes: list[Range], fixed: list[Range]) -> None:
        """Host memory for what is kept of each, where it has none of that size yet."""
        made: list[Segment] = []
        try:
            for segment in live:
                parts = tuple(parts_of(segment, holes, fixed))
                if parts != segment.parts:
                    segment.parts, segment.has_constants = parts, False
                if segment.copy is not None and segment.copy.nbytes != _room(segment):
                    segment.copy.close()
                    segment.copy = None
                if segment.copy is None and segment.kept_bytes:
                    segment.copy = HostCopy(self._driver, _room(segment))
                    made.append(segment)
                    self._tell_refusal(segment.copy)
        except (OSError, MemoryError) as error:
            for segment in made:
                self._drop_copy(segment)
            wanted = sum(_in_pages(segment.kept_bytes) for segment in live) / MIB
            raise NoRoom(
                f"no host memory for {wanted:.1f} MiB of weights asleep: {one_line(error)}; "
                "lower memory.host, or unload a model instead"
            ) from error

    def _tell_refusal(self, copy: HostCopy) -> None:
        if copy.refusal is not None and not self._has_told_refusal:
            self._has_told_refusal = True
            log.warning(
                "event=host_memory_not_pinned cause=%r then='copies take longer' "
                "remedy='raise the limit of locked memory: ulimit -l unlimited'",
                copy.refusal,
            )

    def _save(self, segment: Segment, stream: int) -> None:
        for place, part in _placed(segment):
            if not (part.is_constant and segment.has_constants):
                at = segment.address + part.offset
                self._driver.to_host(place, at, part.nbytes, stream)

    def _restore(self, segment: Segment, stream: int) -> None:
        whole = segment.address, segment.nbytes
        kept = merged((segment.address + part.offset, part.nbytes) for part in segment.parts)
        place = 0 if segment.copy is None else segment.copy.address
        for address, nbytes in kept:  # parts side by side lie side by side in the copy, too
            self._driver.to_device(address, place, nbytes, stream)
            place += nbytes
        for address, nbytes in outside(whole, kept):
            self._driver.zero(address, nbytes, stream)

    def _fall_back(self, asleep: list[Segment], stream: int) -> None:
        with suppress(DriverError):  # copies that have been begun
            self._driver.wait(stream)
        for segment in asleep:
            self._give_back(segment)

    def _lack(self, asleep: list[Segment]) -> str:
        needed = sum(segment.nbytes for segment in asleep) / MIB
        told = ""
        with suppress(DriverError):
            free, total = self._driver.memory_info()
            told = f", {free / MIB:.1f} MiB of the device's {total / MIB:.1f} MiB are free"
        return f"no room: waking takes {needed:.1f} MiB of device memory{told}; it is still asleep"


def _placed(segment: Segment) -> Iterator[tuple[int, Part]]:
    """The parts, each with the address of its copy."""
    if segment.copy is not None:
        place = segment.copy.address
        for part in segment.parts:
            yield place, part
            place += part.nbytes


def _room(segment: Segment) -> int:
    return _in_pages(segment.kept_bytes)


def _in_pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


# --- ranges -----------------------------------------------------------------------------------


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes in as few ranges as possible, by address."""
    result: list[Range] = []
    for start, nbytes in sorted(ranges):
        end = start + nbytes
        if result and start <= sum(result[-1]):
            first, length = result[-1]
            result[-1] = (first, max(first + length, end) - first)
        elif nbytes > 0:
            result.append((start, nbytes))
    return result


def inside(whole: Range, ranges: Iterable[Range]) -> Iterator[Range]:
    """What of `whole` is in one of the ranges, which are merged."""
    first, end = whole[0], sum(whole)
    for start, nbytes in ranges:
        low, high = max(first, start), min(end, start + nbytes)
        if low < high:
            yield low, high - low


def outside(whole: Range, ranges: Iterable[Range]) -> Iterator[Range]:
    """What of `whole` is in none of the ranges, which are merged."""
    place, end = whole[0], sum(whole)
    for low, nbytes in inside(whole, ranges):
        if low > place:
            yield place, low - place
        place = low + nbytes
    if place < end:
        yield place, end - place


def parts_of(segment: Segment, holes: list[Range], fixed: list[Range]) -> Iterator[Part]:
    """What is kept of a segment, in the order of its addresses."""
    for kept in outside((segment.address, segment.nbytes), holes):
        found = [(low, size, True) for low, size in inside(kept, fixed)]
        found += [(low, size, False) for low, size in outside(kept, fixed)]
        for low, size, is_constant in sorted(found):
            yield Part(low - segment.address, size, is_constant)
