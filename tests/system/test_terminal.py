"""Standard streams that cannot write a name, are closed, or have lost their reader."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vllm_hotswap.system import terminal

NAME = "模型"
PREPARED = "from vllm_hotswap.system import terminal; terminal.prepare(); "


def run(code: str, *, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own; `shell` redirects its streams."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, code]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_name_that_an_encoding_lacks_is_escaped(encoding: str) -> None:
    """A name outside a stream's encoding is escaped in everything printed or logged later."""
    code = f"{PREPARED}import sys; print({NAME!a}); print({NAME!a}, file=sys.stderr)"

    ended = run(code, PYTHONIOENCODING=encoding)

    shown = NAME if encoding == "utf-8" else "\\u6a21\\u578b"
    assert (0, f"{shown}\n", f"{shown}\n") == (ended.returncode, ended.stdout, ended.stderr)


def test_bytes_of_a_path_that_are_no_text_are_escaped() -> None:
    """Bytes of a path that are not text, half surrogates in Python, are escaped."""
    ended = run(f"{PREPARED}print('a\\udcff')", PYTHONIOENCODING="utf-8")

    assert (0, "a\\udcff\n") == (ended.returncode, ended.stdout)


@pytest.mark.parametrize("shell", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_the_null_device(shell: str) -> None:
    """Closed streams become the null device, so no later file or child's output replaces them."""
    code = (
        f"{PREPARED}import os, sys; r, w = os.pipe(); assert r > 2, r; "
        "print(sys.stdin.read(), sys.stdout.isatty(), file=sys.stderr); "
        "terminal.write_text('said'); "
        "import subprocess; subprocess.run(['sh', '-c', 'echo out; echo err >&2'], check=True); "
        "sys.exit(7)"
    )

    ended = run(code, shell=shell if "<" in shell else f"{shell} </dev/null")

    assert (7, False) == (ended.returncode, "rror" in ended.stderr)


@pytest.mark.parametrize("shell", [">&-", ">/dev/full"])
def test_what_nobody_takes_is_dropped(shell: str) -> None:
    """Output without a reader is dropped: the caller learns it; nothing raises, even at exit."""
    code = (
        "from vllm_hotswap.system import terminal; import sys; "
        "sys.exit(3 if terminal.write_text('lost') else (print('more'), 5)[1])"
    )

    ended = run(code, shell=shell)

    assert (5, "") == (ended.returncode, ended.stderr)


def test_a_reader_that_has_left_is_noticed_without_an_error() -> None:
    """A reader that has left, as of `vllm-hotswap ... | head`, is noticed without an error."""
    code = (
        "from vllm_hotswap.system import terminal; import sys, os; r, w = os.pipe(); os.close(r); "
        "os.dup2(w, 1); heard = [terminal.write_text('x') for _ in range(2)]; print('more'); "
        "sys.exit(0 if heard == [False, True] else 1)"
    )

    ended = run(code)

    assert (0, "") == (ended.returncode, ended.stderr)


def test_text_is_said_in_the_streams_encoding(capsys: pytest.CaptureFixture[str]) -> None:
    """Text is written in the stream's encoding, with its line end, and at once."""
    assert terminal.write_text(f"active: {NAME}")
    assert f"active: {NAME}\n" == capsys.readouterr().out
