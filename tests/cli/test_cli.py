"""The command line: the position of the file, and the form of errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_hotswap.cli.main import COMMANDS, file_first, main
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host.vllm_versions import RUN_ON
from vllm_hotswap.launch.misspelt import explained, refuse_misspelt


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
    """A first word that is not a flag is the file, and the arguments stay as they are."""
    argv = ["serve", *words.split()]

    assert argv == file_first(argv)


@pytest.mark.parametrize("argv", [[], ["demo", "--write", "a.yaml"], ["--version"]])
def test_other_commands_are_left_as_they_are(argv: list[str]) -> None:
    """Other commands' arguments stay: only `serve` accepts flags that are not its own."""
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
    """A file behind flags is found by its name: only vLLM knows which flags take a value."""
    assert ["serve", *expected.split()] == file_first(["serve", *words.split()])


@pytest.mark.parametrize("words", ["--host 127.0.0.1", "--host a models", "--x a.yaml b.yaml"])
def test_a_file_that_cannot_be_told_from_a_flags_value_is_asked_for(words: str) -> None:
    """If a word may be a flag's value, the error asks for `serve FILE` instead of guessing."""
    with pytest.raises(ConfigError, match="vllm-hotswap serve FILE"):
        file_first(["serve", *words.split()])


def test_an_error_is_one_line(tmp_path: Path) -> None:
    """An error is one line, whatever its message contains."""
    path = tmp_path / "models.yaml"
    path.write_text('models: {"two\\nlines": 3}')

    ended = run("serve", "--port", "1", str(path))

    assert 1 == ended.returncode
    assert ended.stderr.startswith("vllm-hotswap: error: ")
    assert 1 == len(ended.stderr.splitlines())


@pytest.mark.parametrize("role", ["api", "admin"])
def test_a_key_file_that_cannot_be_used_ends_the_start(role: str, tmp_path: Path) -> None:
    """A bad key file ends the start in one line, before any slow work, and shows no contents."""
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
    """A missing file gets an error with the usage, like every mistake on the command line."""
    ended = run("serve", "--port", "1")

    assert 2 == ended.returncode
    assert "name the YAML file before the flags" in ended.stderr


# --- the nearest right word ------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line of an error of the command line."""
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    return str(line)


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("swich qwen", "switch"),
        ("stauts", "status"),
        ("ps", "status"),
        ("models", "status"),
        ("start m.yaml", "serve"),
        ("use qwen", "switch"),
        ("status --jsn", "--json"),
        ("switch qwen --drain-timeot 3", "--drain-timeout"),
        ("demo --sreve", "--serve"),
    ],
)
def test_unknown_word_is_answered_with_the_nearest(
    line: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown word gets the nearest command, or ours for another program's word."""
    assert f"did you mean {nearest!r}?" in refused(capsys, *line.split())


def test_word_that_is_near_to_nothing_is_answered_with_all_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A word that is near to no command gets the list of the few commands."""
    error = refused(capsys, "zzz")

    assert [] == [name for name in COMMANDS if name not in error]


def test_without_a_command_all_of_them_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a command all are shown with their purposes; the status is that of a mistake."""
    assert 2 == main([])

    shown = capsys.readouterr().out
    assert [] == [name for name, (about, _) in COMMANDS.items() if about not in shown]


def test_help_of_serve_names_the_flags_that_everybody_needs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The help of `serve` names the most needed flags, although they are vLLM's."""
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])

    shown = capsys.readouterr().out
    assert [] == [flag for flag in ("--host", "--port", "--api-key") if flag not in shown]


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an installed vLLM of the newest known version, whose import fails."""
    folder = tmp_path / "vllm"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('this takes seconds')")
    (folder / "_version.py").write_text(f"__version__ = version = '{RUN_ON[-1]}+cpu'")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


@pytest.mark.parametrize("command", ["serve", "check"])
@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--prot", "--port"),
        ("--prot=1", "--port"),
        ("--max-model-length", "--max-model-len"),
        ("--no-enable-prefix-cachng", "--enable-prefix-caching"),
        ("--switching-mdoe", "--switching-mode"),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_misspelt_flag_is_answered_without_importing_vllm(
    command: str, flag: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt flag is found without the slow import of vLLM, and without reading the file."""
    assert 1 == main([command, "nowhere.yaml", flag, "auto"])

    assert f"{flag.partition('=')[0]}; did you mean {nearest!r}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag",
    ["--port", "--max-model", "--max_model_len=3", "--no-enable-prefix-caching", "--zzz", "-tp"],
)
@pytest.mark.usefixtures("vllm")
def test_flag_that_vllm_may_know_is_left_to_vllm(flag: str) -> None:
    """Flags that vLLM may know are left to it: abbreviations, and words near to no flag."""
    refuse_misspelt([flag, "1", "--compilation-config.level", "3"])


@pytest.mark.parametrize("version", ["0.1.0", "99.0.0", "dev"])
def test_flags_of_other_releases_are_left_to_vllm(version: str, vllm: Path) -> None:
    """A newer release may have a flag of that name."""
    (vllm / "_version.py").write_text(f"__version__ = version = '{version}'")

    refuse_misspelt(["--prot", "1"])


def test_message_of_vllms_parser_gets_the_nearest_flag() -> None:
    """An error of vLLM's parser is completed with the nearest flag."""
    assert explained("unrecognized arguments: --prot 1").endswith("; did you mean '--port'?")
    assert "argument --port: invalid" == explained("argument --port: invalid")


def test_commands_for_a_server_load_no_more_than_they_need() -> None:
    """Commands for a server load neither pydantic nor Starlette, which take a second."""
    code = "import sys, vllm_hotswap.cli.main; print(*sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )

    assert set() == {"pydantic", "starlette", "httpx", "tqdm", "vllm"} & set(ended.stdout.split())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_hotswap", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
