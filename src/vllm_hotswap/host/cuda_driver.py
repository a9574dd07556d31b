"""The NVIDIA driver's calls for device memory that comes and goes at fixed addresses.

Addresses are reserved once; physical memory is made, mapped to them, unmapped and given back as
often as wanted (CUDA's virtual memory management). Every call goes through ctypes to libcuda: no
compiled extension, and no state between calls, so that a call that has failed spoils none of the
later ones.

Protocol: the CUDA Driver API reference, "Virtual Memory Management", "Memory Management" and
"Stream Management". The names with `_v2` are those that its header gives to the plain ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from vllm_hotswap.errors import ConfigError

LIBRARY = "libcuda.so.1"

SUCCESS, OUT_OF_MEMORY, NO_DEVICE = 0, 2, 100
"""CUresult."""

PINNED, ON_DEVICE, READ_WRITE = 1, 1, 3
"""CU_MEM_ALLOCATION_TYPE_, CU_MEM_LOCATION_TYPE_DEVICE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE."""

MAPS_MEMORY = 102
"""CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED."""

NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: it waits for no other stream, and none for it."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

_size, _address, _handle = ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint64
_pointer = ctypes.c_void_p


class DriverError(RuntimeError):
    """A call of the driver has failed. `call` is its name, `code` its CUresult."""

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(f"{call}: {text} (CUDA error {code})")
        self.call = call
        self.code = code

    @property
    def is_out_of_memory(self) -> bool:
        return self.code == OUT_OF_MEMORY


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class Driver:
    """What is needed of libcuda for one device.

    Sizes are bytes, addresses are those of the device but where `host` is said. Every method
    raises `DriverError` if its call fails, and has changed nothing then.
    """

    def __init__(self, device: int, library: Any = None) -> None:
        """`device` is numbered as torch does; `library` has libcuda's functions."""
        self._cuda = ctypes.CDLL(LIBRARY) if library is None else library
        self._device = device
        at_device = _Location(ON_DEVICE, device)
        self._properties = _Properties(PINNED, 0, at_device, None)
        self._access = _Access(at_device, READ_WRITE)
        step = _size()
        self._call(
            "cuMemGetAllocationGranularity",
            ctypes.byref(step),
            ctypes.byref(self._properties),
            ctypes.c_int(0),
        )
        self.step = step.value
        """Sizes and addresses are multiples of it."""

    def ensure_context(self) -> None:
        """Have the calling thread work with torch's context of the device."""
        current = _pointer()
        self._call("cuCtxGetCurrent", ctypes.byref(current))
        if not current.value:
            context = _pointer()
            self._call(
                "cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(self._device)
            )
            self._call("cuCtxSetCurrent", context)

    def memory_info(self) -> tuple[int, int]:
        """Bytes that are free, and that there are."""
        free, total = _size(), _size()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    # --- addresses and memory -----------------------------------------------------------------

    def reserve(self, nbytes: int) -> int:
        """Addresses for so many bytes, without memory; returns the first of them."""
        address = _address()
        self._call(
            "cuMemAddressReserve",
            ctypes.byref(address),
            _size(nbytes),
            _size(0),
            _address(0),
            ctypes.c_uint64(0),
        )
        return address.value

    def forget(self, address: int, nbytes: int) -> None:
        """Undo `reserve`; no memory may be mapped there."""
        self._call("cuMemAddressFree", _address(address), _size(nbytes))

    def create(self, nbytes: int) -> int:
        """Physical memory; returns its handle."""
        handle = _handle()
        self._call(
            "cuMemCreate",
            ctypes.byref(handle),
            _size(nbytes),
            ctypes.byref(self._properties),
            ctypes.c_uint64(0),
        )
        return handle.value

    def release(self, handle: int) -> None:
        """Undo `create`; the memory goes once it is mapped nowhere."""
        self._call("cuMemRelease", _handle(handle))

    def map(self, address: int, nbytes: int, handle: int) -> None:
        """Put physical memory behind reserved addresses; nobody may use it before `allow`."""
        self._call(
            "cuMemMap",
            _address(address),
            _size(nbytes),
            _size(0),
            _handle(handle),
            ctypes.c_uint64(0),
        )

    def allow(self, address: int, nbytes: int) -> None:
        """Let the device read and write what is mapped there."""
        self._call(
            "cuMemSetAccess", _address(address), _size(nbytes), ctypes.byref(self._access), _size(1)
        )

    def unmap(self, address: int, nbytes: int) -> None:
        """Undo `map`."""
        self._call("cuMemUnmap", _address(address), _size(nbytes))

    # --- contents -----------------------------------------------------------------------------

    def new_stream(self) -> int:
        """A stream of its own, for copies beside whatever else the device does."""
        stream = _pointer()
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(NON_BLOCKING))
        return stream.value or 0

    def end_stream(self, stream: int) -> None:
        """Give a stream back; what it has been told to do is done first."""
        self._call("cuStreamDestroy_v2", _pointer(stream))

    def wait(self, stream: int) -> None:
        """Wait for what the stream has been told to do."""
        self._call("cuStreamSynchronize", _pointer(stream))

    def synchronize(self) -> None:
        """Wait for everything that the device has been told to do in this context."""
        self._call("cuCtxSynchronize")

    def to_host(self, host: int, address: int, nbytes: int, stream: int) -> None:
        """Begin to copy from the device."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            _pointer(host),
            _address(address),
            _size(nbytes),
            _pointer(stream),
        )

    def to_device(self, address: int, host: int, nbytes: int, stream: int) -> None:
        """Begin to copy to the device."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            _address(address),
            _pointer(host),
            _size(nbytes),
            _pointer(stream),
        )

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        """Begin to write zeros."""
        self._call(
            "cuMemsetD8Async",
            _address(address),
            ctypes.c_ubyte(0),
            _size(nbytes),
            _pointer(stream),
        )

    def pin(self, host: int, nbytes: int) -> None:
        """Keep host memory where it is, so that the device copies at the speed of its link."""
        self._call("cuMemHostRegister_v2", _pointer(host), _size(nbytes), ctypes.c_uint(0))

    def unpin(self, host: int) -> None:
        """Undo `pin`."""
        self._call("cuMemHostUnregister", _pointer(host))

    def _call(self, name: str, *args: Any) -> None:
        _called(self._cuda, name, *args)


def _called(library: Any, name: str, *args: Any) -> None:
    """Call a function of libcuda. Raises `DriverError` if it fails."""
    code = getattr(library, name)(*args)
    if code != SUCCESS:
        raise DriverError(name, code, _text(library, code))


def _text(library: Any, code: int) -> str:
    """What the driver calls a CUresult."""
    if code == OUT_OF_MEMORY:
        return "out of memory"
    text = ctypes.c_char_p()
    with suppress(AttributeError):
        library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
    return (text.value or b"unknown error").decode(errors="replace")


def check_driver(
    environment: Mapping[str, str], library: Any = None, device: int = 0, maps: bool = True
) -> Any:
    """libcuda, with a device that can do what is needed: map memory, if `maps`.

    Raises:
        ConfigError: there is no driver or no GPU, it cannot map memory, or a variable is in the
            way; the message says which, and what to do.
    """
    visible = environment.get(VISIBLE)
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        raise ConfigError(
            f"{VISIBLE} is {visible!r}, which hides every GPU; unset it, or name one, such as 0"
        )
    for name in ALLOCATOR_SETTINGS if maps else ():
        if "expandable_segments:true" in environment.get(name, "").lower():
            raise ConfigError(
                f"{name} is {environment[name]!r}, and torch's memory pools, by which models "
                "sleep, do not work with expandable segments; remove expandable_segments from it, "
                "or switch sleep off with VLLM_HOTSWAP_CUDA_SLEEP=0"
            )
    cuda = _loaded(library)
    code = cuda.cuInit(ctypes.c_uint(0))
    count = ctypes.c_int()
    if code == SUCCESS:
        code = cuda.cuDeviceGetCount(ctypes.byref(count))
    if code not in (SUCCESS, NO_DEVICE):
        raise ConfigError(
            f"the NVIDIA driver cannot be used: {_text(cuda, code)} (CUDA error {code}); "
            "run nvidia-smi for details"
        )
    if code == NO_DEVICE or count.value <= device:
        named = f" that {VISIBLE}={visible} names" if visible is not None else ""
        raise ConfigError(
            f"there is no GPU{named}: the NVIDIA driver sees {count.value}; run nvidia-smi, "
            "which also shows whether MIG is on without an instance, and run a container with "
            "--gpus all"
        )
    can_map = ctypes.c_int()
    _called(
        cuda,
        "cuDeviceGetAttribute",
        ctypes.byref(can_map),
        ctypes.c_int(MAPS_MEMORY),
        ctypes.c_int(device),
    )
    if maps and not can_map.value:
        raise ConfigError(
            f"GPU {device} or its driver cannot map memory (CUDA virtual memory management), "
            "which sleep needs; on a virtual GPU, its administrator must enable it; other GPUs "
            "need a driver of 2021 or newer; VLLM_HOTSWAP_CUDA_SLEEP=0 switches sleep off"
        )
    return cuda


def has_driver() -> bool:
    """Whether there is an NVIDIA driver; not, whether it works."""
    try:
        _loaded(None)
    except ConfigError:
        return False
    return True


def _loaded(library: Any) -> Any:
    if library is not None:
        return library
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise ConfigError(
            f"there is no NVIDIA driver: {LIBRARY} cannot be loaded ({error}); install it, or run "
            "the container with --gpus all"
        ) from error
