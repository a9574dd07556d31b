"""What the rehearsals have in common: parts are run, counted and told."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tools.rehearsal import (
    Counts,
    Part,
    RehearsalError,
    chosen,
    commit,
    facts_of,
    rehearse_all,
)

PYTHON = Path(sys.executable)

pytestmark = pytest.mark.slow

FLAGS = ("-c", os.devnull)
"""For pytest: these tests are of no project."""


def part(folder: Path, name: str, code: str, limit_s: int = 60) -> Part:
    file = folder / f"test_{name}.py"
    file.write_text(code, encoding="utf-8")
    return Part(name, str(file), limit_s)


def run(folder: Path, *parts: Part) -> tuple[int, list[dict[str, Any]]]:
    """The status, and the lines of results."""
    results = folder / "rehearsal.jsonl"
    status = rehearse_all(PYTHON, parts, os.environ, results, {"commit": "abc"}, FLAGS)
    return status, [json.loads(line) for line in results.read_text().splitlines()]


WELL = "def test_it():\n    pass\n"
WRONG = "def test_it():\n    assert False\n"
SKIPPED = "import pytest\n@pytest.mark.skipif(True, reason='no device')\ndef test_it():\n    pass\n"
SKIPPED_WHOLE = "import pytest\npytest.skip('no device', allow_module_level=True)\n"
STOPS = """
import pytest
def test_one():
    pass
def test_two():
    pytest.exit("enough", returncode=%d)
def test_three():
    assert False
"""
ALL_WELL = {"passed": 1, "failed": 0, "skipped": 0, "status": 0}
ENDLESS = "import time\ndef test_it():\n    time.sleep(600)\n"


def test_parts_that_pass_are_counted_in_the_results(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """After what is run, in the order in which they were run."""
    status, lines = run(tmp_path, part(tmp_path, "one", WELL), part(tmp_path, "two", WELL))

    assert 0 == status
    assert lines == [
        {"what": "facts", "commit": "abc"},
        {"what": "part", "name": "one", **ALL_WELL},
        {"what": "part", "name": "two", **ALL_WELL},
    ]
    assert "rehearsal: all went well; " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("code", "counts"),
    [
        (WRONG, Counts(failed=1, status=1)),
        (SKIPPED, Counts(skipped=1)),
        (SKIPPED_WHOLE, Counts(skipped=1, status=5)),
        ("", Counts(status=5)),
        ("no_such_name\n", Counts(failed=1, status=2)),
        (STOPS % 3, Counts(passed=1, status=3)),
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
    """And one that was not run does not pass. The parts after it are run all the same."""
    status, lines = run(tmp_path, part(tmp_path, "one", code), part(tmp_path, "two", WELL))

    assert 1 == status
    assert {"what": "part", "name": "one", **asdict(counts)} == lines[1]
    assert 1 == lines[2]["passed"]
    assert capfd.readouterr().err.endswith("rehearsal: failed: one\n")


def test_a_part_without_an_end_is_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, lines = run(tmp_path, part(tmp_path, "one", ENDLESS, limit_s=3))

    assert (1, 0, -9) == (status, lines[1]["passed"], lines[1]["status"])
    assert "rehearsal: one: no end within 3 s" in capfd.readouterr().err


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
    """Torch's with its build, and the commit with whether files differ from it."""
    import torch

    found = facts_of(PYTHON, ["pytest"], os.environ)

    assert (torch.__version__, pytest.__version__) == (found["torch"], found["pytest"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert commit() == found["commit"]
    assert re.fullmatch(r"([0-9a-f]{40}|not known)(, with changes)?", found["commit"])


def test_the_commit_of_a_clone_of_another_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is root."""
    own = commit()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert own == commit()


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(RehearsalError, match=r"cannot say its versions: .*no-such-package"):
        facts_of(PYTHON, ["no-such-package"], os.environ)
