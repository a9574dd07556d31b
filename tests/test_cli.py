"""The command line: where the file may stand, and how errors are told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_hotswap.cli import file_first
from vllm_hotswap.errors import ConfigError


@pytest.mark.parametrize(
    "words",
    [
        "m.yaml --host 127.0.0.1",
        "models --host 127.0.0.1 other.yaml",
        "",
        "--help",
        "--port 1 -h",
    ],
)
def test_what_is_clear_is_left_as_it_is(words: str) -> None:
    """The first word is the file, unless it is a flag."""
    argv = ["serve", *words.split()]

    assert argv == file_first(argv)


@pytest.mark.parametrize("argv", [[], ["demo", "--write", "a.yaml"], ["--version"]])
def test_other_commands_are_left_as_they_are(argv: list[str]) -> None:
    """Only `serve` takes flags that are not its own."""
    assert argv == file_first(argv)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--host 127.0.0.1 m.yaml", "m.yaml --host 127.0.0.1"),
        ("--enforce-eager m.yml --port 1", "m.yml --enforce-eager --port 1"),
        ("--admin-key k m.yaml", "m.yaml --admin-key k"),
        ("--api-key-file keys m.yaml", "m.yaml --api-key-file keys"),
        ("--config vllm.yaml m.yaml", "m.yaml --config vllm.yaml"),
        ("--config=vllm.yaml m.yaml", "m.yaml --config=vllm.yaml"),
    ],
)
def test_a_file_behind_flags_is_found(words: str, expected: str) -> None:
    """By its name, since only vLLM knows which flags take a value."""
    assert ["serve", *expected.split()] == file_first(["serve", *words.split()])


@pytest.mark.parametrize("words", ["--host 127.0.0.1", "--host a models", "--x a.yaml b.yaml"])
def test_a_file_that_cannot_be_told_from_a_flags_value_is_asked_for(words: str) -> None:
    """Rather than taking the value of a flag for the file."""
    with pytest.raises(ConfigError, match="vllm-hotswap serve FILE"):
        file_first(["serve", *words.split()])


def test_an_error_is_one_line(tmp_path: Path) -> None:
    """Whatever is in its message."""
    path = tmp_path / "models.yaml"
    path.write_text('models: {"two\\nlines": 3}')

    ended = run("serve", "--port", "1", str(path))

    assert 1 == ended.returncode
    assert ended.stderr.startswith("vllm-hotswap: error: ")
    assert 1 == len(ended.stderr.splitlines())


@pytest.mark.parametrize("role", ["api", "admin"])
def test_a_key_file_that_cannot_be_used_ends_the_start(role: str, tmp_path: Path) -> None:
    """Before anything slow is done, with one line that names it and shows nothing of it."""
    (tmp_path / "models.yaml").write_text("models: {llama: {model: org/llama}}")
    keys = tmp_path / "keys"
    keys.write_text("sk-canary")
    keys.chmod(0o644)

    ended = run("serve", str(tmp_path / "models.yaml"), f"--{role}-key-file", str(keys))

    assert 1 == ended.returncode
    assert f"key file '{keys}' is open to every user of the machine; run: chmod" in ended.stderr
    assert 1 == len(ended.stderr.splitlines())
    assert "sk-canary" not in ended.stderr


def test_no_file_is_told_with_the_usage() -> None:
    """As every mistake on the command line."""
    ended = run("serve", "--port", "1")

    assert 2 == ended.returncode
    assert "name the YAML file before the flags" in ended.stderr


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_hotswap", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
