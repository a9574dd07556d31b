"""What the rehearsals share: parts are run, counted and reported."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.faults import wait_until
from tools import rehearsal
from tools.rehearsal import (
    STOPS,
    Counts,
    Part,
    RehearsalError,
    chosen,
    commit,
    facts_of,
    rehearse_all,
)
from tools.setup import ROOT

PYTHON = Path(sys.executable)

pytestmark = pytest.mark.slow

FLAGS = ("-c", os.devnull)
"""For pytest: these tests belong to no project."""


def part(folder: Path, name: str, code: str, limit_s: int = 60) -> Part:
    file = folder / f"test_{name}.py"
    file.write_text(code, encoding="utf-8")
    return Part(name, str(file), limit_s)


def run(folder: Path, *parts: Part) -> tuple[int, list[dict[str, Any]]]:
    """Return the status, and the lines of results."""
    results = folder / "rehearsal.jsonl"
    status = rehearse_all(PYTHON, parts, os.environ, results, {"commit": "abc"}, FLAGS)
    return status, [json.loads(line) for line in results.read_text().splitlines()]


WELL = "def test_it():\n    pass\n"
WRONG = "def test_it():\n    assert False\n"
SKIPPED = "import pytest\n@pytest.mark.skipif(True, reason='no device')\ndef test_it():\n    pass\n"
SKIPPED_WHOLE = "import pytest\npytest.skip('no device', allow_module_level=True)\n"
STOPS_HALF_WAY = """
import pytest
def test_one():
    pass
def test_two():
    pytest.exit("enough", returncode=%d)
def test_three():
    assert False
"""
ALL_WELL = {"passed": 1, "failed": 0, "skipped": 0, "status": 0}
SERVES = """
import os, subprocess, time
from pathlib import Path
HERE = Path(__file__).parent
def test_it():
    options = ({}, {"process_group": 0}, {"start_new_session": True})
    servers = [subprocess.Popen(["sleep", "60"], **option) for option in options]
    new = HERE / "serves.new"
    new.write_text(" ".join(str(server.pid) for server in servers))
    new.rename(HERE / "serves")
    try:
        time.sleep(600)
    finally:
        (HERE / "cleaned").touch()
"""
"""Tests with servers of their own groups and sessions; one gets no signal except its parent's."""

DEAF = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"


def test_parts_that_pass_are_counted_in_the_results(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Passed parts are counted in the results, after the tests, in the order in which they ran."""
    status, lines = run(tmp_path, part(tmp_path, "one", WELL), part(tmp_path, "two", WELL))

    assert 0 == status
    assert lines == [
        {"what": "facts", "commit": "abc"},
        {"what": "part", "name": "one", **ALL_WELL},
        {"what": "part", "name": "two", **ALL_WELL},
    ]
    assert "rehearsal: all parts passed; " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("code", "counts"),
    [
        (WRONG, Counts(failed=1, status=1)),
        (SKIPPED, Counts(skipped=1)),
        (SKIPPED_WHOLE, Counts(skipped=1, status=5)),
        ("", Counts(status=5)),
        ("no_such_name\n", Counts(failed=1, status=2)),
        (STOPS_HALF_WAY % 3, Counts(passed=1, status=3)),
    ],
    ids=[
        "fails",
        "is skipped",
        "is skipped as a whole",
        "has no tests",
        "cannot be imported",
        "stops half-way",
    ],
)
def test_a_part_that_does_not_pass_fails_the_rehearsal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], code: str, counts: Counts
) -> None:
    """A failed or skipped part fails the rehearsal; the parts after it still run."""
    status, lines = run(tmp_path, part(tmp_path, "one", code), part(tmp_path, "two", WELL))

    assert 1 == status
    assert {"what": "part", "name": "one", **asdict(counts)} == lines[1]
    assert 1 == lines[2]["passed"]
    assert capfd.readouterr().err.endswith("rehearsal: failed: one\n")


def test_a_part_without_an_end_is_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A part without an end is stopped with its servers, in any group; its tests can clean up."""
    one = part(tmp_path, "one", SERVES, limit_s=5)

    status, lines = run(tmp_path, one)

    assert (1, 0, 2) == (status, lines[1]["passed"], lines[1]["status"])
    assert "rehearsal: one: not finished within 5 s" in capfd.readouterr().err
    assert (tmp_path / "cleaned").exists()
    assert not started(tmp_path)


def test_a_part_that_does_not_obey_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "GRACE_S", 1)
    one = part(tmp_path, "one", DEAF + SERVES, limit_s=5)

    status, lines = run(tmp_path, one)

    assert (1, 0, -9) == (status, lines[1]["passed"], lines[1]["status"])
    assert not started(tmp_path)


def test_what_a_part_leaves_running_is_ended(tmp_path: Path) -> None:
    code = SERVES.replace("time.sleep(600)", "pass").replace("start_new_session", "restore_signals")

    status, _ = run(tmp_path, part(tmp_path, "one", code))

    assert 0 == status
    assert not started(tmp_path)


@pytest.mark.parametrize("number", STOPS)
def test_a_rehearsal_that_is_ended_leaves_nothing_running(
    tmp_path: Path, number: signal.Signals
) -> None:
    """An interrupted rehearsal, even if twice, leaves nothing running and starts no more parts."""
    one, two = part(tmp_path, "one", SERVES), part(tmp_path, "two", WELL)
    code = (
        "import os, sys; from pathlib import Path; from tools.rehearsal import Part, rehearse_all;"
        f"parts = [Part('one', {one.tests!r}, 60), Part('two', {two.tests!r}, 60)];"
        f"results = Path({str(tmp_path / 'rehearsal.jsonl')!r});"
        f"sys.exit(rehearse_all(Path(sys.executable), parts, os.environ, results, {{}}, {FLAGS}))"
    )
    with subprocess.Popen(
        [PYTHON, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until((tmp_path / "serves").exists)
        process.send_signal(number)
        process.send_signal(number)
        assert process.stderr is not None
        said = process.stderr.read()

    assert 128 + number == process.returncode
    assert said.endswith(f"rehearsal: stopped by {number.name}\n")
    lines = [json.loads(line) for line in (tmp_path / "rehearsal.jsonl").read_text().splitlines()]
    assert ["one"] == [line["name"] for line in lines[1:]]
    assert not started(tmp_path)


def started(folder: Path) -> list[int]:
    """Return which processes started by `SERVES` still run."""
    numbers = [int(number) for number in (folder / "serves").read_text().split()]
    assert 3 == len(numbers)
    return [number for number in numbers if is_running(number)]


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("content", ["", '<testsuites><testsuite tests="3"'])
def test_a_part_whose_report_is_cut_off_fails_alone(tmp_path: Path, content: str) -> None:
    """A part whose report is cut off, as by a full disk, fails alone; the parts after it run."""
    code = (
        "import atexit, pathlib\n"
        "report = pathlib.Path(__file__).with_name('rehearsal.xml')\n"
        f"atexit.register(report.write_text, {content!r})\n"
    )

    status, lines = run(tmp_path, part(tmp_path, "one", code + WELL), part(tmp_path, "two", WELL))

    assert 1 == status
    assert {"what": "part", "name": "one", **asdict(Counts())} == lines[1]
    assert 1 == lines[2]["passed"]


def test_results_of_before_are_not_kept(tmp_path: Path) -> None:
    run(tmp_path, part(tmp_path, "one", WELL))
    _, lines = run(tmp_path, part(tmp_path, "two", WELL))
    assert ["two"] == [line["name"] for line in lines[1:]]


def test_a_file_that_is_of_no_part_is_refused() -> None:
    parts = [Part("one", "tests/test_one.py", 1), Part("two", "tests/test_two.py", 1)]
    assert parts == chosen(parts, [])
    assert parts[1:] == chosen(parts, ["tests/test_two.py"])
    with pytest.raises(RehearsalError) as refused:
        chosen(parts, ["tests/test_two.py", "tests/test_tow.py"])
    assert str(refused.value) == (
        "no part has tests/test_tow.py; TESTS may be: tests/test_one.py, tests/test_two.py"
    )


def test_what_is_run_is_told_with_its_versions() -> None:
    """The report gives versions, torch's build, the commit, and whether files differ from it."""
    import torch

    found = facts_of(PYTHON, ["pytest"], os.environ)

    assert (torch.__version__, pytest.__version__) == (found["torch"], found["pytest"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert commit() == found["commit"]
    assert re.fullmatch(r"([0-9a-f]{40}|not known)(, with changes)?", found["commit"])


def test_the_commit_of_a_clone_of_another_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is reported in another user's clone, too, as in a container run by root."""
    own = commit()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert own == commit()


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(RehearsalError, match=r"does not report its versions: .*no-such-package"):
        facts_of(PYTHON, ["no-such-package"], os.environ)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("exit 3", "it ended with status 3"),
        ("echo '{}'; echo bye", "bye"),
        ("echo '[]'", "[]"),
        ("echo oops >&2; exit 1", "oops"),
    ],
)
def test_a_python_that_cannot_say_its_versions_is_told(tmp_path: Path, code: str, why: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{code}\n", encoding="utf-8")
    python.chmod(0o755)
    with pytest.raises(RehearsalError) as refused:
        facts_of(python, [], os.environ)
    assert str(refused.value) == (
        f"{python} does not report its versions: {why}; remove its environment, and the next "
        "run makes a new one"
    )
