"""libcuda without a GPU: the calls that `host.cuda_driver` uses, over memory files.

Device memory is real, and can run out. Physical memory is a memory file. Reserved addresses are an
inaccessible mapping, which a mapping of the file replaces. So touching memory that does not exist
kills the process. Copies run when they are waited for, and not earlier.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

STEP = 64 << 10
BROKEN = 999
OUT_OF_MEMORY = 2
CONTEXT = 0xC0DE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
NOTHING = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE


@dataclass
class Physical:
    """Memory of the device."""

    file: int
    nbytes: int
    is_released: bool = False
    is_mapped: bool = False


@dataclass
class Copy:
    """A copy that a stream has to do."""

    address: int
    nbytes: int
    do: Callable[[], object]


@dataclass
class FakeCuda:
    """One device with `total` bytes. Witnesses: `calls`, `copied`, `most`, and `left`."""

    total: int = 1 << 40
    devices: int = 1
    can_map: bool = True
    init_code: int = 0
    calls: list[str] = field(default_factory=list)
    copied: int = 0
    """Bytes that have been copied to the host."""
    most: int = 0
    """The most bytes that were ever in use."""
    fails_at: int | None = None
    """Number of calls that succeed before one fails; None: all succeed."""
    fails_at_name: tuple[str, int] | None = None
    """The same for calls of one name."""
    refuses: set[str] = field(default_factory=set)
    """Names of calls that always fail."""
    others: int = 0
    """Bytes that other processes hold."""

    def __post_init__(self) -> None:
        self.reserved: dict[int, int] = {}
        self.physical: dict[int, Physical] = {}
        self.mapped: dict[int, tuple[int, int]] = {}
        self.allowed: set[int] = set()
        self.pinned: set[int] = set()
        self.streams: dict[int, list[Copy]] = {}
        self.failed: str | None = None
        """The call that `fails_at` made fail."""
        self._next = 1000

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)
        function = getattr(type(self), f"_{name}")

        def call(*args: Any) -> int:
            self.calls.append(name)
            if name in self.refuses:
                return BROKEN
            if self.fails_at_name is not None and name == self.fails_at_name[0]:
                left = self.fails_at_name[1]
                self.fails_at_name = (name, left - 1) if left else None
                if left == 0:
                    self.failed = name
                    return BROKEN
            if self.fails_at is not None and name != "cuGetErrorString":
                if self.fails_at == 0:
                    self.fails_at, self.failed = None, name
                    return OUT_OF_MEMORY if name == "cuMemCreate" else BROKEN
                self.fails_at -= 1
            return function(self, *args) or 0

        return call

    @property
    def used(self) -> int:
        return self.others + sum(memory.nbytes for memory in self.physical.values())

    @property
    def left(self) -> dict[str, int]:
        """Everything that was not released, except streams."""
        kinds = {
            "addresses": len(self.reserved),
            "memory": len(self.physical),
            "mappings": len(self.mapped),
            "pinned": len(self.pinned),
        }
        return {kind: count for kind, count in kinds.items() if count}

    def _number(self) -> int:
        self._next += 1
        return self._next

    # --- the device ---------------------------------------------------------------------------

    def _cuInit(self, _flags: Any) -> int:
        return self.init_code

    def _cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = self.devices

    def _cuDeviceGetAttribute(self, value: Any, _attribute: Any, _device: Any) -> None:
        value._obj.value = int(self.can_map)

    def _cuGetErrorString(self, code: Any, text: Any) -> None:
        text._obj.value = f"fake error {code.value}".encode()

    def _cuCtxGetCurrent(self, context: Any) -> None:
        context._obj.value = CONTEXT

    def _cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        free._obj.value, total._obj.value = self.total - self.used, self.total

    def _cuMemGetAllocationGranularity(self, step: Any, _properties: Any, _flags: Any) -> None:
        step._obj.value = STEP

    # --- memory -------------------------------------------------------------------------------

    def _cuMemAddressReserve(self, address: Any, size: Any, *_: Any) -> None:
        assert size.value % STEP == 0
        place = _libc.mmap(None, size.value, 0, NOTHING, -1, 0)  # PROT_NONE
        self.reserved[place] = size.value
        address._obj.value = place

    def _cuMemAddressFree(self, address: Any, size: Any) -> int:
        end = address.value + size.value
        is_in_use = any(address.value <= low < end for low in self.mapped)
        if self.reserved.get(address.value) != size.value or is_in_use:
            return BROKEN
        del self.reserved[address.value]
        _libc.munmap(address.value, size.value)
        return 0

    def _cuMemCreate(self, handle: Any, size: Any, properties: Any, _flags: Any) -> int:
        if self.used + size.value > self.total:
            return OUT_OF_MEMORY
        file = os.memfd_create("device")
        os.ftruncate(file, size.value)
        os.pwrite(file, b"\xaa" * size.value, 0)  # new memory is not zero
        number = self._number()
        self.physical[number] = Physical(file, size.value)
        self.most = max(self.most, self.used)
        handle._obj.value = number
        return 0

    def _cuMemRelease(self, handle: Any) -> int:
        memory = self.physical.get(handle.value)
        if memory is None or memory.is_released:
            return BROKEN
        memory.is_released = True
        self._collect(handle.value)
        return 0

    def _cuMemMap(self, address: Any, size: Any, _offset: Any, handle: Any, _flags: Any) -> int:
        start, end = address.value, address.value + size.value
        is_free = all(end <= low or low + held <= start for low, (held, _) in self.mapped.items())
        is_ours = any(low <= start and end <= low + n for low, n in self.reserved.items())
        if not (is_free and is_ours) or self.physical[handle.value].nbytes != size.value:
            return BROKEN
        self.physical[handle.value].is_mapped = True
        self.mapped[address.value] = size.value, handle.value
        return 0

    def _cuMemSetAccess(self, address: Any, size: Any, access: Any, _count: Any) -> int:
        if address.value not in self.mapped:
            return BROKEN
        if address.value not in self.allowed:
            file = self.physical[self.mapped[address.value][1]].file
            both = mmap.PROT_READ | mmap.PROT_WRITE
            _libc.mmap(address.value, size.value, both, mmap.MAP_SHARED | MAP_FIXED, file, 0)
            self.allowed.add(address.value)
        return 0

    def _cuMemUnmap(self, address: Any, size: Any) -> int:
        if self.mapped.get(address.value, (0,))[0] != size.value:
            return BROKEN
        end = address.value + size.value
        for copies in self.streams.values():
            assert not any(c.address < end and address.value < c.address + c.nbytes for c in copies)
        _, handle = self.mapped.pop(address.value)
        self.allowed.discard(address.value)
        _libc.mmap(address.value, size.value, 0, NOTHING | MAP_FIXED, -1, 0)
        self.physical[handle].is_mapped = False
        self._collect(handle)
        return 0

    def _collect(self, handle: int) -> None:
        memory = self.physical[handle]
        if memory.is_released and not memory.is_mapped:
            os.close(memory.file)
            del self.physical[handle]

    # --- contents -----------------------------------------------------------------------------

    def _cuStreamCreate(self, stream: Any, _flags: Any) -> None:
        number = self._number()
        self.streams[number] = []
        stream._obj.value = number

    def _cuStreamDestroy_v2(self, stream: Any) -> None:
        self._run(stream.value)
        del self.streams[stream.value]

    def _cuStreamSynchronize(self, stream: Any) -> None:
        self._run(stream.value)

    def _cuCtxSynchronize(self) -> None:
        for stream in self.streams:
            self._run(stream)

    def _run(self, stream: int) -> None:
        copies, self.streams[stream] = self.streams[stream], []
        for copy in copies:
            copy.do()

    def _cuMemcpyDtoHAsync_v2(self, host: Any, address: Any, size: Any, stream: Any) -> None:
        place, at, nbytes = host.value, address.value, size.value
        self.copied += nbytes
        self._tell(stream, at, nbytes, lambda: ctypes.memmove(place, at, nbytes))

    def _cuMemcpyHtoDAsync_v2(self, address: Any, host: Any, size: Any, stream: Any) -> None:
        place, at, nbytes = host.value, address.value, size.value
        self._tell(stream, at, nbytes, lambda: ctypes.memmove(at, place, nbytes))

    def _cuMemsetD8Async(self, address: Any, value: Any, size: Any, stream: Any) -> None:
        at, byte, nbytes = address.value, value.value, size.value
        self._tell(stream, at, nbytes, lambda: ctypes.memset(at, byte, nbytes))

    def _tell(self, stream: Any, at: int, nbytes: int, do: Callable[[], object]) -> None:
        assert any(
            low <= at and at + nbytes <= low + size
            for low, (size, _) in self.mapped.items()
            if low in self.allowed
        ), "a copy from or to memory that is not there"
        self.streams[stream.value].append(Copy(at, nbytes, do))

    def _cuMemHostRegister_v2(self, host: Any, size: Any, _flags: Any) -> int:
        if host.value in self.pinned or host.value % mmap.PAGESIZE or size.value % mmap.PAGESIZE:
            return BROKEN
        self.pinned.add(host.value)
        return 0

    def _cuMemHostUnregister(self, host: Any) -> int:
        if host.value not in self.pinned:
            return BROKEN
        self.pinned.remove(host.value)
        return 0


def read(address: int, nbytes: int) -> bytes:
    """Return the contents of device memory."""
    return ctypes.string_at(address, nbytes)


def write(address: int, content: bytes) -> None:
    """Write to device memory, as a kernel would."""
    ctypes.memmove(address, content, len(content))
