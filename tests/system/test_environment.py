"""The environment of processes, and what the system shows of it."""

from __future__ import annotations

import fcntl
import os
import resource
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.system.caches import GIVEN
from vllm_hotswap.system.environment import (
    shut_out_others,
    shut_out_others_without_cache,
    shut_out_writers,
)
from vllm_hotswap.system.forgotten import set_aside, value_of
from vllm_hotswap.testing.fake_process import FakeProcessHost

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
SOURCE = Path(__file__).parents[2] / "src"
KEY = "sk-of-an-admin"

FORGET = """
import os
from pathlib import Path
from vllm_hotswap.system.forgotten import forget
forget(["VLLM_API_KEY", "EMPTY", "NOT_SET"])
print(os.environ.get("VLLM_API_KEY"), os.environ["LIKE_VLLM_API_KEY"])
print(Path("/proc/self/environ").read_bytes())
"""


def run(program: list[str], folder: Path | None = None, **variables: str) -> str:
    """Return the output of a Python program that imports this package, errors included."""
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *program],
        env={**os.environ, "PYTHONPATH": path, **variables},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0, 0o002, 0o022, 0o077, 0o137], indirect=True)
def test_nobody_else_writes_to_what_is_made(umask: int, tmp_path: Path) -> None:
    """New files are not writable by others, and what an earlier umask forbade stays forbidden."""
    assert umask == shut_out_writers()
    (tmp_path / "made").mkdir()

    assert 0o777 & ~umask & ~0o022 == stat.S_IMODE((tmp_path / "made").stat().st_mode)


@on_linux
@pytest.mark.parametrize("umask", [0, 0o077], indirect=True)
async def test_the_engine_hosts_umask_keeps_others_from_writing(umask: int) -> None:
    """The engine host's umask keeps others from writing to vLLM's folders, whoever starts it."""
    host = FakeProcessHost(("llama",))
    await host.start()
    try:
        found = umask_of(host.pid)
    finally:
        await host.stop()

    assert umask | 0o022 == found


@on_linux
def test_a_variable_that_is_forgotten_is_shown_to_nobody() -> None:
    """A forgotten variable is shown nowhere; others stay, even one whose name has the same end."""
    out = run(["-c", FORGET], VLLM_API_KEY=KEY, EMPTY="", LIKE_VLLM_API_KEY="stays", ZZZ="last")
    found, shown = out.splitlines()

    assert "None stays" == found
    assert KEY not in shown
    assert "LIKE_VLLM_API_KEY=stays" in shown
    assert "ZZZ=last" in shown


SHADOWED = ("argparse", "asyncio", "logging", "socket")
MARK = "raise SystemExit('taken from the start folder: ' + __file__)"


@pytest.fixture
def start_folder(tmp_path: Path) -> Path:
    """A folder with modules whose names are imported everywhere."""
    for name in SHADOWED:
        (tmp_path / f"{name}.py").write_text(MARK)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["vllm_hotswap", "--version"],
        ["vllm_hotswap", "serve", "none.yaml"],
        ["vllm_hotswap.entrypoints.openai.multi_model_api_server"],
    ],
)
def test_the_command_line_imports_nothing_from_the_start_folder(
    start_folder: Path, arguments: list[str]
) -> None:
    """Nothing is imported from the start folder, however the command line is started."""
    out = run(["-m", *arguments], start_folder, VLLM_HOTSWAP_CONFIG="none.yaml")

    assert "taken from" not in out
    assert "vllm-hotswap" in out


def test_a_start_folder_that_has_been_deleted_is_none(tmp_path: Path) -> None:
    """A deleted start folder is ignored: a shell can stay in one that another removes."""
    folder = tmp_path / "gone"
    folder.mkdir()
    program = f"import os; os.rmdir({str(folder)!r}); from vllm_hotswap import start_folder as s"

    assert "[]" in run(
        ["-c", f"{program}; import sys; sys.path[:] = ['']; s.leave(); print(sys.path)"], folder
    )


def test_a_look_tells_a_folder_that_a_start_would_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A look reports a folder that a start would refuse, continues, and makes no folder."""
    for name in (*GIVEN, "PYTHONSAFEPATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    tmp_path.chmod(0o755)
    shut_out_others_without_cache()
    assert "event=cache_refused" not in caplog.text

    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError):
        shut_out_others()
    shut_out_others_without_cache()

    assert "event=cache_refused" in caplog.text
    assert "1" == os.environ["PYTHONSAFEPATH"]
    assert [] == list(tmp_path.iterdir())


def test_what_is_set_aside_is_told_and_no_longer_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is set aside is still known; one that is set again has precedence."""
    monkeypatch.setenv("ASKED_LATER", "0")
    set_aside(["ASKED_LATER", "NOT_SET"])
    assert "ASKED_LATER" not in os.environ
    assert ("0", None) == (value_of("ASKED_LATER"), value_of("NOT_SET"))

    set_aside(["ASKED_LATER"])
    assert "0" == value_of("ASKED_LATER")

    monkeypatch.setenv("ASKED_LATER", "1")
    assert "1" == value_of("ASKED_LATER")


def variables_of(pid: int) -> dict[str, str]:
    """Return them as the system shows them."""
    shown = Path(f"/proc/{pid}/environ").read_text()
    return dict(line.partition("=")[::2] for line in shown.split("\0"))


def umask_of(pid: int) -> int:
    """Return it as the system shows it: proc_pid_status(5)."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("Umask:")[2].split()[0], 8)


def mode(folder: str) -> int:
    return Path(folder).stat().st_mode & 0o777


@pytest.fixture
async def host_environment(
    start_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[dict[str, str]]:
    """Return the variables of a host that was started there, by a user with many keys."""
    monkeypatch.chdir(start_folder)
    for name in ("VLLM_API_KEY", "VLLM_HOTSWAP_ADMIN_KEY", "OPENAI_API_KEY", "PGPASSWORD"):
        monkeypatch.setenv(name, KEY)
    host = FakeProcessHost(("llama",))
    try:
        await host.start()
        yield variables_of(host.pid)
    finally:
        await host.stop()


@on_linux
async def test_a_host_is_started_in_private(host_environment: dict[str, str]) -> None:
    """A host gets no key, imports nothing from the start folder, where it would have failed, and
    keeps temporary files to itself.
    """
    assert KEY not in host_environment.values()
    assert "1" == host_environment["PYTHONSAFEPATH"]
    assert 0o700 == mode(host_environment["TMPDIR"])


@on_linux
async def test_the_temporary_folder_is_held_as_long_as_the_host_runs() -> None:
    """The host locks its temporary folder, which systemd-tmpfiles then skips."""
    host = FakeProcessHost(("llama",))
    try:
        await host.start()
        descriptor = os.open(variables_of(host.pid)["TMPDIR"], os.O_RDONLY | os.O_DIRECTORY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        await host.stop()

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


@on_linux
async def test_a_host_may_open_many_files() -> None:
    """A host may open many files, even one that starts before the server raises its limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few := min(soft, 500), hard))
    host = FakeProcessHost(("llama",))
    try:
        await host.start()
        its, _ = psutil.Process(host.pid).rlimit(psutil.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await host.stop()

    assert few < its <= hard
