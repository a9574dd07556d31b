"""Failpoints: valid specifications, and the effect at a named place."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_hotswap import failpoints
from vllm_hotswap.config.reader import load_config
from vllm_hotswap.demo.quickstart import write
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.failpoints import InjectedFault, async_failpoint, failpoint
from vllm_hotswap.server.run import run as run_server
from vllm_hotswap.states import SwitchPhase

PROGRAM = """
import sys
from vllm_hotswap.failpoints import enable, failpoint
enable(sys.argv[1])
failpoint("host.load", "qwen")
failpoint("host.load", "llama")
print("lived on", flush=True)
"""


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    """Disarm failpoints after each test."""
    yield
    failpoints.disable()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file with an empty specification, and arm failpoints with it."""
    path = tmp_path / "failpoints"
    path.write_text("")
    failpoints.enable(f"@{path}")
    return path


def replace(path: Path, text: str) -> None:
    """Replace it atomically, as a test does while a server reads."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def run(specification: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, specification],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_nothing_happens_unless_they_are_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without being enabled, nothing happens: only a process's main reads the variable."""
    monkeypatch.setenv(failpoints.VARIABLE, "host.load=raise")

    failpoint("host.load", "llama")

    assert failpoints.enabled() is None


def test_a_place_fails_for_the_model_that_is_named() -> None:
    """A place fails for the named model only; a rule without a model applies to all."""
    failpoints.enable("host.load@llama=raise(no luck); host.wake=raise")

    failpoint("host.load", "qwen")
    with pytest.raises(InjectedFault, match="no luck"):
        failpoint("host.load", "llama")
    with pytest.raises(InjectedFault, match=r"failpoint host\.wake"):
        failpoint("host.wake", "qwen")


def test_a_rule_with_a_limit_ends() -> None:
    """After a rule's limit, the next rule for the same place applies."""
    failpoints.enable("host.step=2*sleep(0);host.step=1*raise")

    failpoint("host.step")
    failpoint("host.step")
    with pytest.raises(InjectedFault):
        failpoint("host.step")
    failpoint("host.step")


def test_a_blocking_sleep_takes_as_long_as_it_says() -> None:
    """A blocking sleep makes the thread itself wait, for the given time."""
    failpoints.enable("host.step=sleep(0.05)")
    before = time.monotonic()

    failpoint("host.step")

    assert time.monotonic() - before >= 0.05


async def test_a_coroutine_that_hangs_lets_others_run() -> None:
    """A hanging coroutine lets others run, and can be cancelled."""
    failpoints.enable("switch.drain=1*sleep(0);switch.drain=hang")

    await async_failpoint("switch.drain")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await async_failpoint("switch.drain")


async def test_a_coroutine_fails_as_plain_code_does() -> None:
    """A coroutine fails with the text of the rule, as plain code does."""
    failpoints.enable("switch.drain@qwen=raise(boom)")

    await async_failpoint("switch.drain", "llama")
    with pytest.raises(InjectedFault, match="boom"):
        await async_failpoint("switch.drain", "qwen")


@pytest.mark.parametrize(
    ("action", "status"),
    [
        ("kill", -signal.SIGKILL),
        ("segv", -signal.SIGSEGV),
        ("exit(7)", 7),
        ("exit", 1),
    ],
)
def test_a_process_ends_as_it_was_told(action: str, status: int) -> None:
    """A process exits at the named place, and not earlier."""
    ended = run(f"host.load@llama={action}")

    assert (status, "") == (ended.returncode, ended.stdout)


def test_a_process_can_be_stopped() -> None:
    """A stopped process is alive and silent, as after SIGSTOP, until SIGCONT."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "host.load@llama=stop"], stdout=subprocess.PIPE, text=True
    )
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    process.send_signal(signal.SIGCONT)

    assert os.WIFSTOPPED(status)
    assert "lived on\n" == process.communicate(timeout=60)[0]


def test_a_file_is_read_again_when_it_is_replaced(file: Path) -> None:
    """A replaced file is read again, so that one running server can go through many faults."""
    failpoint("host.load")
    replace(file, "host.load=raise(first)\nhost.wake=raise")
    with pytest.raises(InjectedFault, match="first"):
        failpoint("host.load")
    replace(file, "")

    failpoint("host.load")


def test_a_limit_in_a_file_holds_for_all_processes(file: Path) -> None:
    """A restarted host does not reset the count; a replaced file does."""
    replace(file, "host.load@llama=1*exit(7)")

    assert [7, 0] == [run(f"@{file}").returncode for _ in range(2)]
    replace(file, "host.load@llama=1*exit(7)")
    assert 7 == run(f"@{file}").returncode


def test_a_hit_is_noted_beside_the_file(file: Path) -> None:
    """A hit is noted beside the file, so that a test can wait for it."""
    replace(file, "host.load=sleep(0)")

    failpoint("host.load", "llama")
    failpoint("host.wake", "llama")

    (line,) = (file.parent / "failpoints.hits").read_text().splitlines()
    assert line.endswith(" host.load=sleep(0)")


def test_a_file_that_becomes_wrong_disarms(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that becomes invalid disarms: the server continues, and logs why nothing fails."""
    replace(file, "host.load=raise")
    file.unlink()
    failpoint("host.load")
    replace(file, "host.lode=raise")
    failpoint("host.load")

    assert 2 == caplog.text.count("event=failpoints_unreadable")


@pytest.mark.parametrize(
    ("specification", "says"),
    [
        ("host.load", "it must be NAME"),
        ("host.load=1*raise(a", "it must be NAME"),
        ("host.load=raise;host.lode=kill", "unknown failpoint 'host.lode'"),
        ("host.load=burn", "unknown action 'burn'"),
        ("host.load=sleep(soon)", "sleep takes a number of seconds"),
        ("host.load=exit(now)", "exit takes a status of one or two digits"),
        ("host.load=kill(9)", "kill takes no argument"),
        ("@/nowhere/at/all", "the file '/nowhere/at/all' cannot be read"),
    ],
)
def test_a_wrong_specification_is_refused(specification: str, says: str) -> None:
    """A wrong specification is refused with the variable, the wrong part and valid values."""
    with pytest.raises(ConfigError, match=r"VLLM_HOTSWAP_FAILPOINTS: ") as refused:
        failpoints.enable(specification)

    assert says in refused.value.message
    assert failpoints.enabled() is None


def test_a_server_does_not_start_with_a_wrong_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with a wrong specification stops before it starts anything."""
    monkeypatch.setenv(failpoints.VARIABLE, "host.lode=kill")

    with pytest.raises(ConfigError, match=r"unknown failpoint 'host\.lode'"):
        run_server(load_config(write(tmp_path)), [])


def test_every_phase_of_a_switch_has_one() -> None:
    """Every phase of a switch has a failpoint with its name."""
    assert {f"switch.{phase}" for phase in SwitchPhase} <= set(failpoints.PLACES)
