"""A checkpoint's weight files: which ones exist, whether they are complete, and reading them ahead.

Knows the layout of safetensors files (https://github.com/huggingface/safetensors#format): eight
bytes with the header's length, a JSON header with the byte range of each tensor, the tensors.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_hotswap.errors import ConfigError, one_line

INDEX = "model.safetensors.index.json"
SUFFIXES = (".safetensors", ".bin", ".pt")
TRAINING = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}
"""Files beside the weights that vLLM does not read."""
CHUNK_BYTES = 8 << 20
MAX_HEADER_BYTES = 100_000_000
"""Largest header that the safetensors library itself accepts."""


def weight_files_bytes(sizes: Mapping[str, int]) -> int:
    """Return the bytes of a checkpoint's weight files: of the first kind found, as vLLM does."""
    return sum(sizes[name] for name in _weight_names(sizes))


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files in a folder, of the first kind found: those of the index, if any."""
    names = {file.name for file in folder.iterdir() if file.is_file()}
    indexed = names & _indexed(folder)
    return [folder / name for name in sorted(_weight_names(indexed or names))]


def _weight_names(names: Iterable[str]) -> list[str]:
    names = [name for name in names if "/" not in name and name not in TRAINING]
    for suffix in SUFFIXES:
        if found := [name for name in names if name.endswith(suffix)]:
            # Mistral's own `consolidated` files hold the same weights again.
            return [name for name in found if not name.startswith("consolidated")] or found
    return []


def check_weights(folder: Path) -> None:
    """Find missing and truncated weight files without reading the weights.

    Raises:
        ConfigError: a file is missing or incomplete; the message names it.
    """
    for name in sorted(_indexed(folder)):
        _check_there(folder / name)
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            try:
                tensors(file)
            except OSError as error:
                raise _unreadable(file, error) from error


def _check_there(file: Path) -> None:
    try:
        is_there = file.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise _unreadable(file, error) from error
    if not is_there:
        raise ConfigError(f"the weight file {str(file)!r} does not exist")


def _indexed(folder: Path) -> set[str]:
    """Return the files that the index names; none if there is no index."""
    index = folder / INDEX
    if not index.is_file():
        return set()
    names = json_object(index, "index").get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(
            f"the index {str(index)!r} cannot be read: it has no `weight_map` of tensors to files"
        )
    return set(names.values())


def json_object(file: Path, what: str = "file") -> dict[str, Any]:
    """Read a JSON object from a file. Raises `ConfigError`, which names the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except RecursionError:
        reason = "it is nested too deep"
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except OSError as error:
        reason = error.strerror or one_line(error)
    except ValueError as error:
        reason = one_line(error)
    else:
        return content
    raise ConfigError(f"the {what} {str(file)!r} cannot be read: {reason}")


def check_description(folder: Path) -> None:
    """Check what all readers of `config.json`, if there is one, take for granted.

    Raises:
        ConfigError: it is wrong; the message names it.
    """
    file = folder / "config.json"
    if not file.is_file():
        return
    names = json_object(file).get("architectures")
    if names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return
    raise ConfigError(f"the file {str(file)!r} is invalid: `architectures` must be a list of names")


def check_generation(folder: Path) -> None:
    """Check that `generation_config.json`, if there is one, can be read.

    vLLM ignores an unreadable one, and serves with other defaults.

    Raises:
        ConfigError: it cannot be read; the message names it.
    """
    file = folder / "generation_config.json"
    if file.is_file():
        json_object(file)


def tensors(file: Path) -> Mapping[str, Mapping[str, Any]]:
    """Read each tensor's `dtype`, `shape` and `data_offsets` from a safetensors file's header.

    Raises:
        ConfigError: the file is not a safetensors file, or is incomplete.
        OSError: it cannot be read.
    """
    actual = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, actual - 8):
            raise ConfigError(
                f"the weight file {str(file)!r} is not a safetensors file: {actual} bytes, "
                f"a header of {length}"
            )
        raw = content.read(length)
    try:
        entries = _entries(json.loads(raw))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"the header of the weight file {str(file)!r} cannot be read: {error}"
        ) from error
    ends = [entry["data_offsets"][1] for entry in entries.values()]
    expected = 8 + length + max(ends, default=0)
    if actual < expected:
        raise ConfigError(
            f"the weight file {str(file)!r} is truncated: it has {actual} of {expected} bytes"
        )
    return entries


def _entries(header: Any) -> dict[str, dict[str, Any]]:
    """Return the tensors of a header. Raises `ValueError` if an entry is not valid."""
    if not isinstance(header, dict):
        raise ValueError("it is not a JSON object")
    entries = {name: entry for name, entry in header.items() if name[:2] != "__"}
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise ValueError(f"tensor {name!r} is not a JSON object")
        for key, is_valid in _VALID.items():
            if not is_valid(entry.get(key)):
                raise ValueError(f"tensor {name!r} has no valid {key}")
    return entries


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _is_range(value: Any) -> bool:
    return _are_sizes(value) and len(value) == 2 and bool(value[0] <= value[1])


_VALID: Mapping[str, Callable[[Any], bool]] = {
    "dtype": lambda value: isinstance(value, str),
    "shape": _are_sizes,
    "data_offsets": _is_range,
}
"""Checks of what a header must say about each tensor."""

FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Sizes of the types that a load converts to the model's own type, by safetensors' names."""


def converted_bytes(folder: Path, itemsize: int) -> int:
    """Return what floating-point weights take beyond their files' size, with `itemsize` bytes each.

    Return 0 if files cannot be read, or have no header: then the load shows it.
    """
    try:
        headers = [tensors(file) for file in weight_files(folder) if file.suffix == ".safetensors"]
    except (ConfigError, OSError):
        return 0
    entries = [entry for header in headers for entry in header.values()]
    return max(0, sum(_growth(entry, itemsize) for entry in entries))


def _growth(entry: Mapping[str, Any], itemsize: int) -> int:
    stored = FLOAT_BYTES.get(entry["dtype"], itemsize)
    begin, end = entry["data_offsets"]
    return int((end - begin) // stored * (itemsize - stored))


async def read_ahead(
    files: Iterable[Path], limit_bytes: int, on_progress: Callable[[int], None] = lambda _: None
) -> int:
    """Read files into the page cache, on a thread; cancelling stops it.

    `on_progress` is called on that thread, with the bytes read so far.

    Returns:
        The bytes read, at most `limit_bytes` rounded up to a chunk.

    Raises:
        ConfigError: a file cannot be read; the message names it.
    """
    stop = threading.Event()
    try:
        return await asyncio.to_thread(_read, list(files), limit_bytes, stop, on_progress)
    finally:
        stop.set()


def _read(
    files: Iterable[Path],
    limit_bytes: int,
    stop: threading.Event,
    on_progress: Callable[[int], None],
) -> int:
    buffer = bytearray(CHUNK_BYTES)
    done = 0
    for file in files:
        try:
            with file.open("rb", buffering=0) as content:
                while not stop.is_set() and done < limit_bytes and (n := content.readinto(buffer)):
                    done += n
                    on_progress(done)
        except OSError as error:
            raise _unreadable(file, error) from error
    return done


def _unreadable(file: Path, error: OSError) -> ConfigError:
    return ConfigError(f"the weight file {str(file)!r} cannot be read: {error.strerror}")
