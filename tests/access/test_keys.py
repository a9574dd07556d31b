"""Where keys come from, and that no key is ever shown."""

from __future__ import annotations

import hmac
import os
import subprocess
from pathlib import Path

import pytest

from vllm_hotswap.access import keys
from vllm_hotswap.access.keys import Keys, KeySource, parse_key_file, read_key_file, split_keys
from vllm_hotswap.errors import ConfigError

SECRET = "sk-canary-4711"


def key_file(folder: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def test_keys_are_known_and_nothing_else_is() -> None:
    """Only the whole key is accepted: not a part of it, not more, not an empty one."""
    known = Keys.of(["one", "two"], "--api-key")

    assert [True, True] == [known.know(key) for key in (b"one", b"two")]
    assert not any(known.know(key) for key in (b"", b"on", b"one ", b"onetwo", b"ONE", b"\xff"))


def test_every_key_is_compared_even_when_one_has_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys are compared even after a match, so timing reveals nothing about the match."""
    compared: list[bytes] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(keys.secrets, "compare_digest", compare)

    assert Keys.of(["one", "two", "three"], "--api-key").know(b"one")
    assert 3 == len(compared)


def test_keys_are_not_kept() -> None:
    """Keys are not stored, so no repr, traceback or debugger dump can show them."""
    source = KeySource(Keys.of([SECRET], "--api-key"))

    assert SECRET not in f"{source!r} {source.given!r} {source.given._keys!r}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [""]),
        ("one", ["one"]),
        ("one,two", ["one", "two"]),
        (" one ,\ttwo\nthree, ", ["one", "two", "three"]),
    ],
)
def test_variable_holds_several_keys(text: str, expected: list[str]) -> None:
    """A variable can hold several keys, separated by commas or white space."""
    assert expected == split_keys(text)


def test_file_holds_one_key_a_line() -> None:
    """A key file has one key per line, and comments; a comment sign inside a key stays in it."""
    text = "# of the team\none  # until May\r\n\n\t two\t\nthree#3\n#four"

    assert ["one", "two", "three#3"] == [key for key, _ in parse_key_file(text) if key]


def test_comment_behind_a_key_is_its_name(tmp_path: Path) -> None:
    """A comment after a key is its name, without unprintable characters; its line is its place."""
    path = key_file(tmp_path, "# keys\none # ann's \x1b[1mlaptop \ntwo#2\t#" + "x" * 200)

    keys = read_key_file(path)

    one, two = keys.find(b"one"), keys.find(b"two#2")
    assert one is not None
    assert two is not None
    assert ("ann's [1mlaptop", f"key file '{path}', line 2") == (one.name, one.place)
    assert "x" * 100 == two.name
    assert one.fingerprint != two.fingerprint
    assert 12 == len(one.fingerprint)


def test_keys_of_files_add_up_to_those_that_were_given(tmp_path: Path) -> None:
    """Keys of files add to the given ones, and follow the current content of the files."""
    path = key_file(tmp_path, "two\nthree\n")
    source = KeySource(Keys.of(["one"], "--api-key"), [path])
    before = source.read()

    path.write_text("four\n")
    after = source.read()

    candidates = [b"one", b"two", b"three", b"four"]
    assert [True, True, True, False] == [before.know(key) for key in candidates]
    assert [True, False, False, True] == [after.know(key) for key in candidates]


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o666])
def test_file_that_others_may_use_is_refused_with_the_command_to_run(
    tmp_path: Path, mode: int
) -> None:
    """A key file that others can read or write is refused, with a command that works as printed."""
    folder = tmp_path / "Ann's files"
    folder.mkdir()
    path = key_file(folder, SECRET, mode)

    with pytest.raises(ConfigError, match="key file") as refused:
        read_key_file(path)
    subprocess.run(["/bin/sh", "-c", refused.value.message.partition("run: ")[2]], check=True)

    assert 1 == len(read_key_file(path))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o660])
def test_file_of_the_owner_and_its_group_is_read(tmp_path: Path, mode: int) -> None:
    """A key file readable by its owner's group is accepted: the group is the operator's choice."""
    assert 1 == len(read_key_file(key_file(tmp_path, SECRET, mode)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "contains no key; write one per line"),
        ("# nothing\n\n", "contains no key; write one per line"),
        (f"{SECRET} {SECRET}", "may only have printable ASCII characters, and no spaces"),
        (f"{SECRET}é", "may only have printable ASCII characters, and no spaces"),
        (f"{SECRET}\x07", "may only have printable ASCII characters, and no spaces"),
        (f"{SECRET}\xff".encode("latin-1"), "is not UTF-8 text"),
    ],
)
def test_file_that_cannot_be_used_is_named_and_not_quoted(
    tmp_path: Path, content: str | bytes, expected: str
) -> None:
    """An unusable key file is named but not quoted; an empty one would require no key at all."""
    path = key_file(tmp_path, content)

    with pytest.raises(ConfigError, match=expected) as caught:
        read_key_file(path)

    assert str(path) in caught.value.message
    assert SECRET not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A missing key file is named, with the reason."""
    with pytest.raises(ConfigError, match=r"missing' cannot be read: No such file or directory"):
        read_key_file(tmp_path / "missing")


def test_folder_or_pipe_is_no_key_file(tmp_path: Path) -> None:
    """A folder or pipe is refused as a key file: a pipe would block, and cannot be read again."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    tmp_path.chmod(0o700)

    with pytest.raises(ConfigError, match="is not a regular file"):
        read_key_file(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is not a regular file"):
        read_key_file(tmp_path)


def test_key_that_no_header_can_carry_is_refused_without_showing_it() -> None:
    """A key that no header can carry is refused without showing it, wherever it was given."""
    with pytest.raises(ConfigError, match=r"^--admin-key: a key may only") as caught:
        Keys.of([f"{SECRET} x"], "--admin-key")

    assert SECRET not in caught.value.message
