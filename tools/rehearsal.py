"""What the rehearsals of devices have in common: parts that are run one after the other.

Each part is some tests, on a stand-in for a device. What they find goes to one file of JSON lines,
as it is found: first what is run, and after each part how many of its tests had which result. A
test that is skipped has not been run, so its part has failed.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree as ET

from tools.setup import ROOT, output_of

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
"""Variables with which nothing is fetched or sent."""

KEPT = ("VLLM_CACHE_ROOT", "VLLM_LOGGING_LEVEL", "VLLM_CONFIGURE_LOGGING")
"""Variables of vLLM's that change where it keeps things and what it says, and no more."""

STEERING = ("PYTEST_", "FAKEGPU_", "FAKEHPU_", "VLLM_", "PT_HPU_", "HABANA_", "QUANT_CONFIG")
"""Prefixes of variables that change which tests are run, and on what."""

VERSIONS = """
import json, platform, sys
from importlib import metadata
import torch
found = {name: metadata.version(name) for name in sys.argv[1:]}
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, **found}))
"""
"""Torch's own version, which names its build: `2.11.0+cu130`."""

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""These stop a rehearsal: Ctrl-C, another program, a terminal that goes away."""

GRACE_S = 20
"""For a part that is stopped: its tests stop their servers, and remove what they have made."""

LOOK_S = 0.2

Running = tuple[int, str]
"""A process: its number, and when it started, since numbers are used again."""


class RehearsalError(Exception):
    """It can't start; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some tests."""

    name: str
    tests: str
    limit_s: int
    variables: Mapping[str, str] = field(default_factory=dict)
    """Variables of this part, besides those of all."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The results of a part's tests. All 0 if it was stopped before it could report."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    status: int = 0
    """Pytest's. A run that stops half-way counts nothing of what it left out; this shows it."""

    @property
    def is_well(self) -> bool:
        return self.passed > 0 and not (self.failed or self.skipped or self.status)


def rehearse_all(
    python: Path,
    parts: Sequence[Part],
    environment: Mapping[str, str],
    results: Path,
    facts: Mapping[str, str],
    flags: Sequence[str] = (),
    before_each: Callable[[], None] = lambda: None,
) -> int:
    """Run the parts, and report what failed. Returns the exit status.

    A signal that ends it ends all that it has started first; the status is then 128 and its number,
    as a shell has it.

    Args:
        results: where the tests write; what was there is removed.
        facts: of what is run (`facts_of`), for the first line.
        flags: for pytest.
    """
    results.write_text(json.dumps({"what": "facts", **facts}) + "\n", encoding="utf-8")
    failed = []
    with stops() as asked:
        for number, part in enumerate(parts, 1):
            print(f"rehearsal: {number} of {len(parts)}: {part.name} ...", flush=True)
            start = time.monotonic()
            before_each()
            report = results.with_suffix(".xml")
            counts = rehearse(python, part, environment, report, flags, asked)
            if not counts.is_well:
                failed.append(part.name)
            line = {"what": "part", "name": part.name, **asdict(counts)}
            with results.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
            print(
                f"rehearsal: {part.name}: {counts.passed} passed, {counts.failed} failed, "
                f"{counts.skipped} skipped, status {counts.status}; "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )
            if asked:
                print(f"rehearsal: stopped by {asked[0].name}", file=sys.stderr)
                return 128 + asked[0]
    if failed:
        print(f"rehearsal: failed: {'; '.join(failed)}", file=sys.stderr)
        return 1
    print(f"rehearsal: all parts passed; {results} has the counts")
    return 0


def check_paths(*paths: Path) -> None:
    """Raise `RehearsalError` if Python's search path, or a linker's, cannot have one of them."""
    for path in paths:
        if ":" in str(path):
            raise RehearsalError(
                f"'{path}' has a ':' in its name, which separates folders in search paths; move it"
            )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make the folder, and lock it until the end: a second rehearsal would count the first's tests.

    Raises:
        RehearsalError: another one has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RehearsalError(
                f"another rehearsal runs in {folder}; wait until it ends, or stop it"
            ) from None
        yield
    finally:
        os.close(opened)


@contextmanager
def stops() -> Iterator[list[signal.Signals]]:
    """Yield the stop signals so far. Nothing is interrupted: code that waits checks them.

    What a process was started to ignore (`nohup`) stays ignored.
    """
    asked: list[signal.Signals] = []
    before = {
        number: signal.signal(number, lambda its, _: asked.append(signal.Signals(its)))
        for number in STOPS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def own_surroundings() -> dict[str, str]:
    """Return the starting environment, without the variables that would change what is run."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or not name.startswith(STEERING)
    }


def chosen(parts: Sequence[Part], tests: Sequence[str]) -> list[Part]:
    """Return the parts with these files; all, if none is named.

    Raises:
        RehearsalError: no part has one of the files.
    """
    there = [part.tests for part in parts]
    if unknown := [test for test in tests if test not in there]:
        raise RehearsalError(f"no part has {', '.join(unknown)}; TESTS may be: {', '.join(there)}")
    return [part for part in parts if not tests or part.tests in tests]


def facts_of(
    python: Path, packages: Sequence[str], environment: Mapping[str, str]
) -> dict[str, str]:
    """Return what is run: this repository's commit, versions of packages, and the day (UTC).

    Raises:
        RehearsalError: a package is missing, or torch does not start.
    """
    asked = subprocess.run(
        [python, "-c", VERSIONS, *packages],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    versions = None
    if asked.returncode == 0:
        with suppress(ValueError, IndexError):
            versions = json.loads(asked.stdout.splitlines()[-1])
    if not isinstance(versions, dict):
        why = (asked.stderr or asked.stdout).strip().splitlines()
        raise RehearsalError(
            f"{python} does not report its versions: "
            f"{why[-1] if why else f'it ended with status {asked.returncode}'}; "
            "remove its environment, and the next run makes a new one"
        )
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit(),
        **versions,
        "device": "stand-in",
        "models": "the tiny ones that ship with the package",
    }


def commit() -> str:
    """Return this repository's commit, and whether files differ from it."""
    git = ("git", "-c", f"safe.directory={ROOT}", "-C", ROOT)  # in a container it is another user's
    here = output_of(*git, "rev-parse", "HEAD").strip()
    changed = output_of(*git, "status", "--porcelain", "--untracked-files=no").strip()
    return f"{here or 'not known'}{', with changes' if changed else ''}"


def rehearse(
    python: Path,
    part: Part,
    environment: Mapping[str, str],
    report: Path,
    flags: Sequence[str] = (),
    asked: Sequence[signal.Signals] = (),
) -> Counts:
    """Run a part to its end or its limit.

    Args:
        report: a file for pytest's report.
        asked: it is ended as soon as there is something in it.
    """
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", *flags, "-v"]
    command += [f"--junitxml={report}", part.tests]
    variables = {**environment, **part.variables}
    process = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True)
    deadline = time.monotonic() + part.limit_s
    try:
        while not asked and not has_ended(process, LOOK_S):
            if time.monotonic() > deadline:
                print(
                    f"rehearsal: {part.name}: not finished within {part.limit_s} s", file=sys.stderr
                )
                break
    finally:
        end(process)
    return counted(report, process.returncode)


def counted(report: Path, status: int) -> Counts:
    """Return the counts in pytest's report (JUnit's format), with its exit status."""
    try:
        suite = ET.parse(report).getroot().find("testsuite")  # noqa: S314  # pytest's own
    except (OSError, ET.ParseError):  # it was killed before it wrote, or while it did
        return Counts(status=status)
    if suite is None:
        return Counts(status=status)
    tests, failures, errors, skipped = (
        int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    )
    return Counts(tests - failures - errors - skipped, failures + errors, skipped, status)


def has_ended(process: subprocess.Popen[bytes], within_s: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(within_s)
    return process.returncode is not None


def end(process: subprocess.Popen[bytes]) -> None:
    """End it and all that it has started: servers and their engines have their own process groups.

    It is interrupted first, as by Ctrl-C, since only its tests know what they have made. What then
    is left of its session, or was started by it before, is killed.
    """
    known = members(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        has_ended(process, GRACE_S)
    deadline = time.monotonic() + GRACE_S
    while (left := members(process.pid, known)) and time.monotonic() < deadline:
        for pid, _ in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    process.wait()


def members(session: int, known: Collection[Running] = ()) -> set[Running]:
    """Return what runs of a session and of these, with all that they started: proc_pid_stat(5)."""
    parents, found = {}, set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it may end at any time
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            state, parent, its, began = fields[0], int(fields[1]), int(fields[3]), fields[19]
            if state in "ZX":
                continue
            running = (int(stat.parent.name), began)
            parents[running] = parent
            if its == session or running in known:
                found.add(running)
    while more := {it for it, parent in parents.items() if parent in dict(found)} - found:
        found |= more
    return found
