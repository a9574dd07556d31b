"""Weight files: which exist, whether they are complete, and reading them ahead."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_hotswap.demo.quickstart import MODELS
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.launch.checkpoint import (
    CHUNK_BYTES,
    INDEX,
    check_description,
    check_generation,
    check_weights,
    converted_bytes,
    read_ahead,
    weight_files,
    weight_files_bytes,
)


def write_safetensors(file: Path, *sizes: int, cut: int = 0) -> None:
    """Write a file with one tensor per size, `cut` bytes too short."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for number, size in enumerate(sizes):
        header[f"w{number}"] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(end)
    file.write_bytes(content[: len(content) - cut])


def write_index(folder: Path, *names: str) -> None:
    weights = {f"w{number}": name for number, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_weights(folder)
    return caught.value.message


# --- existing files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "total"),
    [
        ({"model.safetensors": 5, "pytorch_model.bin": 7}, 5),
        ({"a.safetensors": 5, "b.safetensors": 6, "config.json": 9}, 11),
        ({"pytorch_model.bin": 7, "x.pt": 9}, 7),
        ({"pytorch_model.bin": 7, "training_args.bin": 1, "optimizer.bin": 14}, 7),
        ({"model.pt": 9, "optimizer.pt": 18}, 9),
        ({"model-1.safetensors": 5, "consolidated.safetensors": 5}, 5),
        ({"consolidated.safetensors": 5}, 5),
        ({"onnx/model.safetensors": 8, "pytorch_model.bin": 7}, 7),
        ({"config.json": 9}, 0),
        ({}, 0),
    ],
)
def test_size_is_that_of_the_files_that_vllm_reads(sizes: dict[str, int], total: int) -> None:
    """The size counts one kind of file, in vLLM's order of preference, and no weight twice."""
    assert total == weight_files_bytes(sizes)


def test_files_are_listed_in_order(tmp_path: Path) -> None:
    """Only files of weights are listed, in order."""
    for name in ("b.safetensors", "a.safetensors", "config.json"):
        (tmp_path / name).touch()
    (tmp_path / "folder.safetensors").mkdir()

    assert ["a.safetensors", "b.safetensors"] == [file.name for file in weight_files(tmp_path)]


def test_files_that_the_index_does_not_name_are_left_out(tmp_path: Path) -> None:
    """Files that the index does not name are left out, as by vLLM."""
    for name in ("model-1.safetensors", "other.safetensors"):
        write_safetensors(tmp_path / name, 4)
    write_index(tmp_path, "model-1.safetensors")

    assert ["model-1.safetensors"] == [file.name for file in weight_files(tmp_path)]


# --- whether they are complete --------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen", "embed"])
def test_shipped_models_are_whole(name: str) -> None:
    """Real checkpoints are accepted as complete."""
    check_weights(MODELS / name)


@pytest.mark.parametrize("sizes", [(), (0,), (4,), (4, 8)])
def test_whole_files_are_accepted(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Complete files are accepted with any content, and with an index that names them all."""
    write_safetensors(tmp_path / "model.safetensors", *sizes)
    write_index(tmp_path, "model.safetensors")

    check_weights(tmp_path)


def test_folder_without_weights_is_left_to_vllm(tmp_path: Path) -> None:
    """A folder without weights, which may have an unknown format, is left to vLLM."""
    (tmp_path / "config.json").touch()

    check_weights(tmp_path)


def test_other_formats_are_left_to_vllm(tmp_path: Path) -> None:
    """Other formats, whose required length is unknown, are left to vLLM."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")

    check_weights(tmp_path)


@pytest.mark.parametrize("cut", [1, 12])
def test_truncated_file_is_named_with_its_sizes(tmp_path: Path, cut: int) -> None:
    """A truncated file is named with its sizes, without reading the weights."""
    file = tmp_path / "model.safetensors"
    write_safetensors(file, 4, 8)
    whole = file.stat().st_size
    write_safetensors(file, 4, 8, cut=cut)

    assert (
        f"the weight file {str(file)!r} is truncated: it has {whole - cut} of {whole} bytes"
    ) == refusal(tmp_path)


def test_truncated_file_that_is_not_read_is_no_mistake(tmp_path: Path) -> None:
    """A truncated file beside complete ones that the index names is not a mistake."""
    write_safetensors(tmp_path / "model.safetensors", 4)
    write_safetensors(tmp_path / "consolidated.safetensors", 4, cut=1)

    check_weights(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A missing file, which the index lists, is named in the error."""
    write_safetensors(tmp_path / "model-1.safetensors", 4)
    write_index(tmp_path, "model-1.safetensors", "model-2.safetensors")

    missing = str(tmp_path / "model-2.safetensors")
    assert f"the weight file {missing!r} does not exist" == refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 7}',
        '{"weight_map": null}',
        '{"weight_map": {"w": 7}}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_index_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    """An index that cannot be read is named, whatever is wrong in it."""
    (tmp_path / INDEX).write_text(text)

    assert f"the index {str(tmp_path / INDEX)!r} cannot be read: " in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"\x00" * 8,
        b"\xff" * 64,
        (1).to_bytes(8, "little") + b"{",
        b"version https://git",
    ],
)
def test_file_that_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    """A file that is empty, too short, or a pointer of Git LFS is named in the error."""
    (tmp_path / "model.safetensors").write_bytes(content)

    message = refusal(tmp_path)
    assert "model.safetensors' is not a safetensors file: " in message
    assert f"{len(content)} bytes" in message


@pytest.mark.parametrize(
    "header", [b"{]", b"[]", b"\xff\xfe", b'{"w": 7}', b'{"w": {}}', b'{"w": {"data_offsets": []}}']
)
def test_header_that_cannot_be_read_is_named(tmp_path: Path, header: bytes) -> None:
    """A header that is not JSON, or not one of tensors, is named in the error."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)

    assert f"the header of the weight file {str(file)!r} cannot be read: " in refusal(tmp_path)


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ('"dtype": ["x"], "shape": [1]', "dtype"),
        ('"dtype": 7, "shape": [1]', "dtype"),
        ('"shape": [1]', "dtype"),
        ('"dtype": "F32", "shape": 1', "shape"),
        ('"dtype": "F32", "shape": ["1"]', "shape"),
        ('"dtype": "F32", "shape": [-1]', "shape"),
        ('"dtype": "F32"', "shape"),
    ],
)
def test_tensor_that_is_not_described_is_named(tmp_path: Path, entry: str, what: str) -> None:
    """A tensor without a valid description is reported with its file and what is wrong."""
    header = f'{{"w": {{{entry}, "data_offsets": [0, 0]}}}}'.encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)

    message = refusal(tmp_path)
    assert f"the header of the weight file {str(file)!r} cannot be read: " in message
    assert f"tensor 'w' has no valid {what}" in message
    assert 0 == converted_bytes(tmp_path, 4)


def test_name_in_the_index_that_no_file_can_have_is_named(tmp_path: Path) -> None:
    """An invalid file name in the index is reported with the system's reason."""
    write_index(tmp_path, "x" * 300)

    assert refusal(tmp_path).endswith("xxx' cannot be read: File name too long")


def test_file_that_cannot_be_read_at_all_is_named(tmp_path: Path) -> None:
    """A file on a broken disk is reported with the disk's error."""
    (tmp_path / "model.safetensors").symlink_to("/proc/self/mem")

    assert refusal(tmp_path).endswith("model.safetensors' cannot be read: Input/output error")


# --- its description ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "it is not a JSON object"),
        ("7", "it is not a JSON object"),
        ("", "Expecting value"),
        ('{"a": ', "Expecting value"),
        ("[" * 100_000, "it is nested too deep"),
    ],
    ids=str.__len__,
)
@pytest.mark.parametrize(
    ("name", "look"),
    [("config.json", check_description), ("generation_config.json", check_generation)],
)
def test_description_that_is_no_object_is_named(
    tmp_path: Path, name: str, look: Callable[[Path], None], text: str, problem: str
) -> None:
    """A description that is not an object gets an error of ours, not a library's."""
    (tmp_path / name).write_text(text)

    with pytest.raises(ConfigError) as caught:
        look(tmp_path)

    start = f"the file {str(tmp_path / name)!r} cannot be read: {problem}"
    assert caught.value.message.startswith(start)


@pytest.mark.parametrize("value", ["5", '"LlamaForCausalLM"', "[5]", "{}"])
def test_architectures_that_are_no_names_are_named(tmp_path: Path, value: str) -> None:
    """Architectures that are not names are reported with the file."""
    (tmp_path / "config.json").write_text(f'{{"architectures": {value}}}')

    with pytest.raises(ConfigError) as caught:
        check_description(tmp_path)

    assert caught.value.message == (
        f"the file {str(tmp_path / 'config.json')!r} is invalid: "
        "`architectures` must be a list of names"
    )


@pytest.mark.parametrize(
    "text", ["{}", '{"architectures": null}', '{"architectures": ["LlamaForCausalLM"]}']
)
def test_description_may_leave_things_out(tmp_path: Path, text: str) -> None:
    """A description may leave out what vLLM has defaults for; other formats need neither file."""
    check_description(tmp_path)
    check_generation(tmp_path)

    (tmp_path / "config.json").write_text(text)

    check_description(tmp_path)


# --- reading ahead --------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files, together two chunks and one byte."""
    (tmp_path / "a").write_bytes(bytes(CHUNK_BYTES))
    (tmp_path / "b").write_bytes(bytes(CHUNK_BYTES + 1))
    return [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize(
    ("limit", "read"),
    [
        (1 << 40, 2 * CHUNK_BYTES + 1),
        (CHUNK_BYTES + 1, 2 * CHUNK_BYTES),
        (1, CHUNK_BYTES),
        (0, 0),
    ],
)
async def test_files_are_read_as_far_as_the_limit(files: list[Path], limit: int, read: int) -> None:
    """Files are read up to the limit, rounded up to a chunk; each byte is read once."""
    assert read == await read_ahead(files, limit)


async def test_reading_does_not_hold_up_the_event_loop(tmp_path: Path) -> None:
    """A thread reads, without delaying the event loop, and stops when it is cancelled."""
    endless = Path("/dev/zero")
    before = threading.active_count()

    reading = asyncio.create_task(read_ahead([endless], 1 << 60))
    await asyncio.sleep(0)
    assert not reading.done()

    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert threading.active_count() <= before + 1
    assert 0 == await read_ahead([], 1)


async def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A file that cannot be read gets an error of ours, with the reason."""
    with pytest.raises(ConfigError) as caught:
        await read_ahead([tmp_path / "gone"], 1)

    assert (
        f"the weight file {str(tmp_path / 'gone')!r} cannot be read: No such file or directory"
    ) == caught.value.message


@pytest.mark.parametrize(
    "offsets",
    [
        '[0, "x"]',
        '["0", 4]',
        "[0, 1.5]",
        "[0]",
        "[0, 4, 8]",
        "[4, 0]",
        "[-4, 0]",
        "[false, 4]",
        "{}",
    ],
)
def test_offsets_that_are_no_range_are_refused(tmp_path: Path, offsets: str) -> None:
    """Invalid offsets are refused with the file's name."""
    header = f'{{"a": {{"dtype": "F32", "shape": [1], "data_offsets": {offsets}}}}}'.encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)

    with pytest.raises(ConfigError, match=r"header .*model\.safetensors' cannot be read"):
        check_weights(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "itemsize", "more"),
    [("BF16", 2, 0), ("BF16", 4, 24), ("F32", 2, 0), ("F16", 4, 24), ("I8", 4, 0)],
)
def test_a_larger_type_in_memory_is_counted(
    tmp_path: Path, dtype: str, itemsize: int, more: int
) -> None:
    """Values of a larger type count; integers are not converted, a smaller type gains nothing."""
    size = 12 * {"BF16": 2, "F16": 2, "F32": 4, "I8": 1}[dtype]
    entry = {"w": {"dtype": dtype, "shape": [12], "data_offsets": [0, size]}}
    head = json.dumps(entry).encode()
    content = len(head).to_bytes(8, "little") + head + bytes(size)
    (tmp_path / "model.safetensors").write_bytes(content)

    assert more == converted_bytes(tmp_path, itemsize)


def test_files_that_cannot_be_read_are_counted_as_they_are(tmp_path: Path) -> None:
    """Unreadable files count with their size; the load reports what is wrong with them."""
    (tmp_path / "model.safetensors").write_bytes(b"broken")

    assert 0 == converted_bytes(tmp_path, 4)
