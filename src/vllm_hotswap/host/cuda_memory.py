"""Device memory of one model that can be given back and taken again at the same addresses.

CUDA graphs, views and compiled code know addresses, so addresses stay: what comes and goes is the
physical memory behind them. Each model has its own `ModelMemory`; vLLM has one allocator for a
process. It knows the driver and nothing of torch: `host.cuda_pools` connects the two.

Physical memory comes in chunks, so that a wake can be divided: while another model is served,
`wake_some` takes a few of them at a time, and steps of that model wait for no more than these.

Everything happens on the thread that loads and steps.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from vllm_hotswap.errors import NoRoom, one_line
from vllm_hotswap.host.cuda_driver import OUT_OF_MEMORY, Driver, DriverError
from vllm_hotswap.states import WakeProgress

Range = tuple[int, int]
"""An address on the device, and the number of bytes from there on."""

WEIGHTS = "weights"

MIB = 1 << 20

SLICE_BYTES = 64 * MIB
"""The most that a step of another model waits for, while a model wakes beside it. To copy it takes
3 ms over PCI Express 4.0 with 16 lanes (20 GB/s), to map it less than 1 ms: a fraction of a step.
Computed, not yet measured."""

GIVE_UP_BYTES = 16 * SLICE_BYTES
"""How much of a wake is given back at once: unmapping is quicker than mapping, and copies nothing.
About 1 ms for each GiB, by published figures."""

log = logging.getLogger("vllm_hotswap.host")


class HostCopy:
    """Host memory of exact size, which the device copies from and to at the speed of its link.

    Torch's own pinned memory is rounded up to powers of two, and kept when it is freed. Pinning
    takes about as long as writing does, so it is done once. If it is refused (a limit of locked
    memory), copies take longer; nothing else changes.
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
        """Free the memory. Raises `DriverError` if it cannot be unpinned, and is still there."""
        if self.refusal is None:
            self._driver.unpin(self.address)
            self.refusal = "it is closed"
        self._view = None
        self._mapping.close()


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a segment whose content survives a sleep. The rest is zero afterwards."""

    offset: int
    nbytes: int
    is_constant: bool
    """Whether the model never writes to it, so that it is copied only once."""


@dataclass(eq=False, slots=True)
class Chunk:
    """A part of a segment, with physical memory of its own."""

    address: int
    nbytes: int
    handle: int | None = None
    """The handle of its physical memory; None if it has none."""
    is_mapped: bool = False
    is_filled: bool = False
    """Whether a wake has started to copy its content to it."""


@dataclass(eq=False, slots=True)
class Segment:
    """A range of addresses that torch has asked for, and the memory behind it."""

    address: int
    nbytes: int
    tag: str
    chunks: tuple[Chunk, ...]
    is_asleep: bool = False
    """Whether its content is that of `copy`, and zeros, whatever memory it has already."""
    parts: tuple[Part, ...] = ()
    kept: tuple[Range, ...] = ()
    """The addresses of all parts, in as few ranges as possible; `copy` holds them in this order."""
    copy: HostCopy | None = None
    has_constants: bool = False
    """Whether the constant parts in `copy` are up to date."""

    @property
    def device_bytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks if chunk.handle is not None)

    @property
    def is_whole(self) -> bool:
        """Whether there is memory behind all of it."""
        return all(chunk.is_mapped for chunk in self.chunks)

    @property
    def kept_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class ModelMemory:
    """The device memory of one model, and its copy in host memory.

    The mutable state is `_segments`, by address; `_stuck`, segments that torch has given back and
    the driver has not taken yet; `_stream`, for copies; `_new_copies`, segments for which the last
    sleep has taken host memory; and the tag of what is being allocated.
    A segment always records what the driver has really done, whichever call has failed.
    """

    def __init__(self, driver: Driver, chunk_bytes: int = SLICE_BYTES) -> None:
        """Move physical memory in chunks of `chunk_bytes`, rounded to whole steps of the driver."""
        self._driver = driver
        self._chunk_bytes = max(driver.step, chunk_bytes // driver.step * driver.step)
        self._segments: dict[int, Segment] = {}
        self._stuck: list[Segment] = []
        self._stream: int | None = None
        self._new_copies: list[Segment] = []
        self._has_logged_refusal = False
        self.tag = WEIGHTS
        """The tag of what is allocated from now on."""

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
        """Whether torch has not given all of it back, because tensors are still there."""
        return bool(self._segments)

    @property
    def device_bytes(self) -> int:
        """Physical memory that it holds: what a sleep gives back, while it is awake."""
        return sum(segment.device_bytes for segment in self._all())

    @property
    def address_bytes(self) -> int:
        """Bytes of reserved addresses, with or without memory."""
        return sum(s.nbytes for s in self._all())

    @property
    def host_bytes(self) -> int:
        """Host memory of its copies; they stay while it is awake."""
        return sum(s.copy.nbytes for s in self._all() if s.copy is not None)

    @property
    def whole_bytes(self) -> int:
        """Bytes of memory that the whole device has. Raises `DriverError`."""
        self._driver.ensure_context()
        return self._driver.memory_info()[1]

    def has(self, address: int) -> bool:
        """Whether an address lies in this memory."""
        return any(s.address <= address < s.address + s.nbytes for s in self._all())

    def copy_bytes(self, dropped: Iterable[Range]) -> int:
        """Return the host memory that its copies take after a sleep that drops these ranges."""
        holes = merged(dropped)
        return sum(
            _in_pages(sum(nbytes for _, nbytes in outside((s.address, s.nbytes), holes)))
            for s in self._live()
        )

    def _all(self) -> Iterator[Segment]:
        yield from self._segments.values()
        yield from self._stuck

    def _live(self) -> list[Segment]:
        """Return the segments with content, weights first: their copies run beside the rest."""
        live = [s for s in self._segments.values() if s.is_whole and not s.is_asleep]
        return sorted(live, key=lambda segment: segment.tag != WEIGHTS)

    # --- what torch asks for ------------------------------------------------------------------

    def allocate(self, nbytes: int) -> int:
        """Allocate memory; return its address.

        Raises:
            DriverError: there is none, or not enough; nothing of the attempt is left.
        """
        self._driver.ensure_context()
        nbytes = -(-nbytes // self._driver.step) * self._driver.step
        segment = self._new_segment(nbytes)
        try:
            for chunk in segment.chunks:
                self._take(chunk)
        except DriverError:
            self._discard(segment)
            raise
        self._segments[segment.address] = segment
        return segment.address

    def _new_segment(self, nbytes: int) -> Segment:
        address, size = self._driver.reserve(nbytes), self._chunk_bytes
        chunks = tuple(
            Chunk(address + offset, min(size, nbytes - offset)) for offset in range(0, nbytes, size)
        )
        return Segment(address, nbytes, self.tag, chunks)

    def free(self, address: int) -> None:
        """Give back memory and addresses. Ignore an address that is not, or no longer, its own."""
        segment = self._segments.pop(address, None)
        if segment is None:
            return
        with suppress(DriverError):  # a later call that fails, too, stays recorded
            self._driver.ensure_context()
            if segment.device_bytes:
                self._driver.synchronize()  # steps under way may read it
        self._retry_stuck()
        self._discard(segment)

    def empty(self, address: int) -> None:
        """Give back the memory of a segment that holds nothing, and never will."""
        segment = self._segments.get(address)
        if segment is not None:
            self._give_back(segment)

    # --- residency ----------------------------------------------------------------------------

    def weights_changed(self) -> None:
        """Note that constant parts may have changed: the next sleep copies them again."""
        for segment in self._segments.values():
            segment.has_constants = False

    def sleep(self, dropped: Iterable[Range] = (), constant: Iterable[Range] = ()) -> None:
        """Give all device memory back.

        Args:
            dropped: ranges whose content is not needed; it is zero after a wake.
            constant: ranges whose content never changes, unless `weights_changed` says so.

        Raises:
            NoRoom: there is too little host memory.
            DriverError: a copy has failed. In both cases nothing has changed.
        """
        live = self.get_ready_to_sleep(dropped, constant)
        for segment in live:
            segment.is_asleep = True
        for segment in live:
            self._give_back(segment)

    def get_ready_to_sleep(
        self, dropped: Iterable[Range] = (), constant: Iterable[Range] = ()
    ) -> list[Segment]:
        """Do all of `sleep` that may fail, but give nothing back; return the segments to sleep.

        `stay_awake` undoes it. Raises as `sleep` does.
        """
        self._driver.ensure_context()
        self._retry_stuck()
        self._driver.synchronize()
        live = self._live()
        self._new_copies = self._make_copies(live, merged(dropped), merged(constant))
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
            segment.has_constants = True
        return live

    def stay_awake(self) -> None:
        """Give back host memory that was taken for a sleep that does not follow."""
        for segment in self._new_copies:
            if not segment.is_asleep:
                self._drop_copy(segment)

    def wake(self) -> None:
        """Take the memory again, at the same addresses, with what was kept; the rest is zero.

        What `wake_some` has done already is not done again. Copies run while the next chunk is
        being mapped.

        Raises:
            NoRoom: there is too little device memory.
            DriverError: a call has failed. In both cases nothing has changed: it is asleep.
        """
        self._driver.ensure_context()
        with self._falling_back():
            for segment, chunk in self._missing():
                self._fill(segment, chunk)
            self._driver.wait(self._copying())
        for segment in self._asleep():
            segment.is_asleep = False
            for chunk in segment.chunks:
                chunk.is_filled = False

    def wake_some(self, at_most: int, spare_bytes: int = 0) -> WakeProgress:
        """Take a part of the memory again. It is asleep until `wake`, which does what is left.

        The copies that it starts run beside other work of the device. It waits for those of the
        previous call, so that no more than `at_most` bytes are ever under way.

        Args:
            at_most: bytes to take, but a chunk at least.
            spare_bytes: what must stay free on the device, for the model that is served.

        Raises:
            NoRoom: there is too little device memory.
            DriverError: a call has failed. In both cases it has given back what it had taken.
        """
        self._driver.ensure_context()
        taken = 0
        with self._falling_back(spare_bytes):
            self._driver.wait(self._copying())
            room = self._room(spare_bytes)
            for segment, chunk in self._missing():
                if taken and taken + chunk.nbytes > at_most:
                    break
                if taken + chunk.nbytes > room:
                    why = "too little is left for others"
                    raise DriverError("cuMemGetInfo_v2", OUT_OF_MEMORY, why)
                self._fill(segment, chunk)
                taken += chunk.nbytes
        return self.progress

    @property
    def progress(self) -> WakeProgress:
        """The progress of a wake; it is done if nothing is asleep."""
        chunks = [chunk for segment in self._asleep() for chunk in segment.chunks]
        done = sum(chunk.nbytes for chunk in chunks if chunk.is_filled)
        return WakeProgress(done, sum(chunk.nbytes for chunk in chunks))

    def give_up_wake(self, at_most: int | None = None) -> int:
        """Give back what `wake_some` has taken, or `at_most` bytes of it, in whole chunks.

        Returns the bytes that are left to be given back. Idempotent.

        Raises:
            DriverError: copies cannot be waited for; nothing has changed.
        """
        self._driver.ensure_context()
        self._driver.wait(self._copying())
        taken = [c for s in self._asleep() for c in s.chunks if c.handle is not None]
        for chunk in reversed(taken):  # the last first, so that a wake continues from there
            if at_most is not None and at_most <= 0:
                break
            self._give_chunk_back(chunk)
            at_most = None if at_most is None else at_most - chunk.nbytes
        return sum(chunk.nbytes for chunk in taken if chunk.is_filled)

    def close(self) -> None:
        """Give everything back, whether it is asleep or not. It must not be used afterwards."""
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
        """Give host memory back although addresses are still in use: the content is lost."""
        for segment in self._segments.values():
            self._drop_copy(segment)

    # --- one segment --------------------------------------------------------------------------

    def _take(self, chunk: Chunk) -> None:
        """Put memory behind the addresses of a chunk. If that fails, there is none."""
        try:
            if chunk.handle is None:
                chunk.handle = self._driver.create(chunk.nbytes)
            if not chunk.is_mapped:
                self._driver.map(chunk.address, chunk.nbytes, chunk.handle)
                chunk.is_mapped = True
            self._driver.allow(chunk.address, chunk.nbytes)
        except DriverError:
            self._give_chunk_back(chunk)
            raise

    def _give_back(self, segment: Segment) -> None:
        """Remove the memory behind a segment; what the driver does not take back is recorded."""
        for chunk in segment.chunks:
            self._give_chunk_back(chunk)

    def _give_chunk_back(self, chunk: Chunk) -> None:
        chunk.is_filled = False
        try:
            if chunk.is_mapped:
                self._driver.unmap(chunk.address, chunk.nbytes)
                chunk.is_mapped = False
            if chunk.handle is not None:
                self._driver.release(chunk.handle)
                chunk.handle = None
        except DriverError as error:
            log.error("event=memory_kept bytes=%d cause=%r", chunk.nbytes, one_line(error))

    def _discard(self, segment: Segment) -> None:
        """Give back all that a segment has; if that fails, remember it for a later attempt."""
        self._give_back(segment)
        try:
            if segment.copy is not None:
                segment.copy.close()
                segment.copy = None
            if not segment.device_bytes:
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

    def _make_copies(
        self, live: list[Segment], holes: list[Range], fixed: list[Range]
    ) -> list[Segment]:
        """Make host memory for what is kept of each segment, unless it has some of that size.

        Returns the segments for which it was made.
        """
        made: list[Segment] = []
        try:
            for segment in live:
                parts = tuple(parts_of(segment, holes, fixed))
                if parts != segment.parts:
                    segment.parts, segment.has_constants = parts, False
                    ranges = ((segment.address + part.offset, part.nbytes) for part in parts)
                    segment.kept = tuple(merged(ranges))
                if segment.copy is not None and segment.copy.nbytes != _room(segment):
                    segment.copy.close()
                    segment.copy = None
                if segment.copy is None and segment.kept_bytes:
                    segment.copy = HostCopy(self._driver, _room(segment))
                    made.append(segment)
                    self._log_refusal(segment.copy)
        except (OSError, MemoryError) as error:
            for segment in made:
                self._drop_copy(segment)
            wanted = sum(_in_pages(segment.kept_bytes) for segment in live) / MIB
            raise NoRoom(
                f"no host memory for {wanted:.1f} MiB of weights asleep: {one_line(error)}; "
                "lower memory.host, or unload a model instead"
            ) from error
        return made

    def _log_refusal(self, copy: HostCopy) -> None:
        if copy.refusal is not None and not self._has_logged_refusal:
            self._has_logged_refusal = True
            log.warning(
                "event=host_memory_not_pinned cause=%r then='copies are slower' "
                "remedy='raise the limit of locked memory: ulimit -l unlimited'",
                copy.refusal,
            )

    def _save(self, segment: Segment, stream: int) -> None:
        for place, part in _placed(segment):
            if not (part.is_constant and segment.has_constants):
                for offset, nbytes in self._by_chunks(part.offset, part.nbytes):
                    host = place + offset - part.offset
                    self._driver.to_host(host, segment.address + offset, nbytes, stream)

    def _by_chunks(self, offset: int, nbytes: int) -> Iterator[Range]:
        """Split bytes of a segment into ranges, none of which crosses the end of a chunk."""
        end = offset + nbytes
        while offset < end:
            size = min(end - offset, self._chunk_bytes - offset % self._chunk_bytes)
            yield offset, size
            offset += size

    def _asleep(self) -> list[Segment]:
        """Return the segments that are asleep, weights first."""
        asleep = [segment for segment in self._segments.values() if segment.is_asleep]
        return sorted(asleep, key=lambda segment: segment.tag != WEIGHTS)

    def _missing(self) -> Iterator[tuple[Segment, Chunk]]:
        """Yield the chunks that a wake has still to fill."""
        for segment in self._asleep():
            for chunk in segment.chunks:
                if not chunk.is_filled:
                    yield segment, chunk

    def _fill(self, segment: Segment, chunk: Chunk) -> None:
        """Take the memory of a chunk, and start to copy its content to it."""
        self._take(chunk)
        # Set before the copies: if only some of them start, a wake waits for it, or gives it back.
        chunk.is_filled = True
        self._restore(segment, chunk, self._copying())

    def _restore(self, segment: Segment, chunk: Chunk, stream: int) -> None:
        whole = chunk.address, chunk.nbytes
        place = 0 if segment.copy is None else segment.copy.address
        for kept in segment.kept:
            for address, nbytes in inside(whole, [kept]):
                self._driver.to_device(address, place + address - kept[0], nbytes, stream)
            place += kept[1]
        for address, nbytes in outside(whole, segment.kept):
            self._driver.zero(address, nbytes, stream)

    @contextmanager
    def _falling_back(self, spare_bytes: int = 0) -> Iterator[None]:
        """If the wake inside fails, give back all that it has taken, also in earlier calls."""
        try:
            yield
        except DriverError as error:
            with suppress(DriverError):  # what is not given back stays recorded
                self.give_up_wake()
            if error.is_out_of_memory:
                raise NoRoom(self._lack(spare_bytes)) from error
            raise

    def _room(self, spare_bytes: int) -> float:
        """Return the bytes that may be taken so that `spare_bytes` stay free."""
        return self._driver.memory_info()[0] - spare_bytes if spare_bytes else math.inf

    def _lack(self, spare_bytes: int) -> str:
        needed = self.progress.total_bytes / MIB
        details = ""
        with suppress(DriverError):
            free, total = self._driver.memory_info()
            details = f", {free / MIB:.1f} MiB of the device's {total / MIB:.1f} MiB are free"
        if spare_bytes:
            details += f", {spare_bytes / MIB:.1f} MiB of them reserved for the active model"
        return (
            f"no room: waking takes {needed:.1f} MiB of device memory{details}; it is still asleep"
        )


def _placed(segment: Segment) -> Iterator[tuple[int, Part]]:
    """Yield the parts, each with the address of its copy."""
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
    """Return the same bytes in as few ranges as possible, by address."""
    result: list[Range] = []
    for start, nbytes in sorted(ranges):
        end = start + nbytes
        if result and start <= sum(result[-1]):
            first, length = result[-1]
            result[-1] = (first, max(first + length, end) - first)
        elif nbytes > 0:
            result.append((start, nbytes))
    return result


def inside(whole: Range, ranges: Sequence[Range]) -> Iterator[Range]:
    """Yield the parts of `whole` that are in one of the ranges, which are merged."""
    first, end = whole[0], sum(whole)
    for start, nbytes in ranges:
        low, high = max(first, start), min(end, start + nbytes)
        if low < high:
            yield low, high - low


def outside(whole: Range, ranges: Sequence[Range]) -> Iterator[Range]:
    """Yield the parts of `whole` that are in none of the ranges, which are merged."""
    place, end = whole[0], sum(whole)
    for low, nbytes in inside(whole, ranges):
        if low > place:
            yield place, low - place
        place = low + nbytes
    if place < end:
        yield place, end - place


def parts_of(segment: Segment, holes: list[Range], fixed: list[Range]) -> Iterator[Part]:
    """Yield the parts of a segment that are kept, in the order of their addresses."""
    for kept in outside((segment.address, segment.nbytes), holes):
        found = [(low, size, True) for low, size in inside(kept, fixed)]
        found += [(low, size, False) for low, size in outside(kept, fixed)]
        for low, size, is_constant in sorted(found):
            yield Part(low - segment.address, size, is_constant)
