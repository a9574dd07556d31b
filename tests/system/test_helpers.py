"""Helpers are killed on request, at their limits and with their parent; the next one works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.faults import wait_until
from tests.helpers.scripted_helper import SCRIPTED
from vllm_hotswap.system.helpers import (
    Bounds,
    Errand,
    HelperFailed,
    Helpers,
    HelperStopped,
    NoHelper,
    OutOfBounds,
    RefusedByHelper,
)

ENDLESS = "while True: pass"
TOO_MUCH = "kept = [b'x' * (1 << 20) for _ in range(4096)]"
BOUNDS = Bounds(memory_bytes=64 << 20, cpu_s=30.0)


@pytest.fixture
def helpers() -> Iterator[Helpers]:
    helpers = Helpers(SCRIPTED)
    yield helpers
    helpers.close()


def run_aside(errand: Errand, what: str) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            errand.do(what)
        except BaseException as error:  # noqa: BLE001  # checked by the test
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_helper_is_kept_for_the_next_errand(helpers: Helpers) -> None:
    """A helper stays for the next errand, even after refused work; the refusal is reported."""
    Errand(helpers, BOUNDS).do("pass")
    [pid] = helpers.pids
    with pytest.raises(RefusedByHelper, match="no good") as caught:
        Errand(helpers, BOUNDS).do("raise KeyError('no good')")
    Errand(helpers, BOUNDS).do("pass")

    assert "KeyError" == caught.value.kind
    assert [pid] == helpers.pids


def test_no_helper_is_started_before_there_is_work(helpers: Helpers) -> None:
    """No helper is started before there is work, because helpers cost memory."""
    Errand(helpers, BOUNDS).stop()
    assert [] == helpers.pids


def test_a_stopped_errand_kills_its_helper_in_the_middle_of_its_work(helpers: Helpers) -> None:
    """A stopped errand kills its helper and starts nothing more; the next one has another."""
    errand = Errand(helpers, BOUNDS)
    thread, raised = run_aside(errand, ENDLESS)
    wait_until(lambda: bool(helpers.pids))
    [pid] = helpers.pids
    errand.stop()
    thread.join(30)

    assert [HelperStopped] == [type(error) for error in raised]
    assert not is_there(pid)
    with pytest.raises(HelperStopped):
        errand.do("pass")
    Errand(helpers, BOUNDS).do("pass")
    assert pid not in helpers.pids


@pytest.mark.parametrize(
    ("what", "of", "bounds"),
    [
        (TOO_MUCH, "memory", BOUNDS),
        ("bytearray(1 << 30)", "memory", BOUNDS),
        (ENDLESS, "time", Bounds(64 << 20, 0.2)),
    ],
)
def test_what_takes_too_much_is_ended(helpers: Helpers, what: str, of: str, bounds: Bounds) -> None:
    """A helper beyond its memory or its time is killed, and the next errand is done."""
    Errand(helpers, BOUNDS).do("pass")
    [pid] = helpers.pids
    with pytest.raises(OutOfBounds) as caught:
        Errand(helpers, bounds).do(what)

    assert of == caught.value.of
    assert not is_there(pid)
    Errand(helpers, BOUNDS).do("pass")


def test_a_helper_that_dies_of_its_work_is_replaced(helpers: Helpers) -> None:
    """A helper that dies of its work is replaced, and the cause is reported."""
    with pytest.raises(HelperFailed, match="signal 11"):
        Errand(helpers, BOUNDS).do("import os; os.kill(os.getpid(), 11)")
    Errand(helpers, BOUNDS).do("pass")
    assert 1 == len(helpers.pids)


def test_long_work_has_the_lowest_priority(helpers: Helpers) -> None:
    """Only the working thread has the lowest priority, not the one that listens for errands."""
    errand = Errand(helpers, BOUNDS)
    thread, _ = run_aside(errand, ENDLESS)
    wait_until(lambda: bool(helpers.pids))
    [pid] = helpers.pids

    def priorities() -> dict[bool, int]:
        tasks = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
        return {task == pid: os.getpriority(os.PRIO_PROCESS, task) for task in tasks}

    usual = os.getpriority(os.PRIO_PROCESS, 0)
    wait_until(lambda: {True: usual, False: 19} == priorities())
    errand.stop()
    thread.join(30)


def test_a_helper_knows_no_secret_and_listens_nowhere(
    helpers: Helpers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A helper has no secrets; its only descriptors are /dev/null and the parent's socket pair."""
    monkeypatch.setenv("VLLM_API_KEY", "a secret")
    monkeypatch.setenv("HF_TOKEN", "another")
    Errand(helpers, BOUNDS).do("pass")
    [pid] = helpers.pids
    shown = Path(f"/proc/{pid}/environ").read_bytes()
    links = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]

    assert b"secret" not in shown
    assert b"another" not in shown
    assert {"/dev/null", "socket"} == {link.partition(":")[0] for link in links}
    assert 1 == sum(link.startswith("socket") for link in links)
    assert "1000" == Path(f"/proc/{pid}/oom_score_adj").read_text(encoding="ascii").strip()


@pytest.mark.parametrize("what", ["pass", ENDLESS])
def test_a_helper_ends_with_its_parent(what: str) -> None:
    """A helper ends with its parent, however that ends, and whether it works or waits."""
    program = f"""
import threading, time
from vllm_hotswap.system.helpers import *
helpers = Helpers({SCRIPTED!r})
threading.Thread(target=Errand(helpers, Bounds()).do, args=[{what!r}], daemon=True).start()
while not helpers.pids or ({what!r} == "pass" and not helpers._idle):
    time.sleep(0.01)
print(helpers.pids[0], flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_there(pid)
        parent.kill()
    wait_until(lambda: not is_there(pid))


def test_closing_ends_all_of_them(helpers: Helpers) -> None:
    """Closing ends all helpers, even working ones."""
    Errand(helpers, BOUNDS).do("pass")
    [idle] = helpers.pids
    thread, raised = run_aside(Errand(helpers, BOUNDS), ENDLESS)
    other = Errand(helpers, BOUNDS)
    other.do("pass")
    pids = helpers.pids
    helpers.close()
    thread.join(30)

    assert idle in pids
    assert [HelperStopped] == [type(error) for error in raised]
    assert [] == [pid for pid in pids if is_there(pid)]


@pytest.mark.parametrize(
    "command", [["/nowhere/python"], [sys.executable, "-c", "import os; os._exit(3)"]]
)
def test_it_is_told_where_no_helper_can_be_started(command: list[str]) -> None:
    """A program that is missing, or has no usable xgrammar, is reported."""
    with pytest.raises(NoHelper):
        Errand(Helpers(command), BOUNDS).do("pass")


@pytest.fixture(scope="module")
def native() -> Iterator[Helpers]:
    """The real program, with the native code of xgrammar and llguidance."""
    if find_spec("xgrammar") is None:
        pytest.skip("xgrammar is not installed")
    helpers = Helpers()
    yield helpers
    helpers.close()


@pytest.mark.parametrize(
    ("maker", "arguments"),
    [
        ("from_ebnf", ['root ::= "yes" | "no"', "root"]),
        ("from_regex", ["[a-z]+", False]),
        (
            "from_json_schema",
            ['{"type": "object"}', True, None, [",", ":"], True, None, False, False],
        ),
    ],
)
def test_good_grammars_pass(native: Helpers, maker: str, arguments: list[Any]) -> None:
    """Good grammars of each kind pass."""
    Errand(native, BOUNDS).do("check", maker, *arguments)


def test_wrong_ones_are_refused_in_the_library_s_words(native: Helpers) -> None:
    """Wrong grammars are refused in the words of either library."""
    with pytest.raises(RefusedByHelper, match="Regex parsing error"):
        Errand(native, BOUNDS).do("check", "from_regex", "(", False)
    with pytest.raises(RefusedByHelper, match="Expected token"):
        Errand(native, BOUNDS).do("guidance", json.dumps({"grammars": [{"lark_grammar": "x"}]}))


def test_it_has_loaded_neither_torch_nor_transformers(native: Helpers) -> None:
    """A helper has loaded neither torch nor transformers, which take 300 MB and seconds."""
    Errand(native, BOUNDS).do("check", "from_regex", "a", False)
    mapped = Path(f"/proc/{native.pids[0]}/maps").read_text(encoding="utf-8")
    assert "xgrammar" in mapped
    assert "libtorch" not in mapped


def test_stopping_kills_every_helper_of_an_errand(helpers: Helpers) -> None:
    """A stop kills all helpers of an errand: vLLM tries a second library after seconds."""
    errand = Errand(helpers, BOUNDS)
    threads = [run_aside(errand, ENDLESS)[0] for _ in range(2)]
    wait_until(lambda: 2 == len(helpers.pids))
    errand.stop()
    for thread in threads:
        thread.join(30)

    assert [] == helpers.pids


def test_the_start_of_a_helper_does_not_count_as_work(helpers: Helpers) -> None:
    """A helper's start does not count as work, or the first errand would look slow."""
    errand = Errand(helpers, BOUNDS)
    errand.do("import time; time.sleep(0.2)")
    errand.do("import time; time.sleep(0.2)")
    last = Errand(helpers, BOUNDS)
    with pytest.raises(RefusedByHelper):
        last.do("1 / 0")

    assert errand.took_s >= 0.4
    assert 0 < last.took_s
