"""`python -m tools.gaudi.check`: what it judges, what it writes, and what it omits."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import psutil
import pytest

from tests.helpers.faults import wait_until
from tests.integration import test_gaudi_check
from tools.gaudi import expected, facts, program
from tools.gaudi.answers import (
    EXPECTED,
    PROMPTS,
    RANKS,
    TOKENS,
    Answer,
    compare,
    from_completion,
    load,
)
from tools.gaudi.inside import check_gaudi_memory
from tools.gaudi.judge import (
    EXPECTED_TOLERANCE,
    HOST_SLACK_BYTES,
    LEAST_KV_BYTES,
    MIB,
    SLACK_BYTES,
    Cycle,
    Device,
    Processes,
    Seen,
    Way,
    cycle_faults,
    growth,
    notes,
)
from tools.gaudi.private import ROOT, Blank
from tools.gaudi.program import Kind, check_packages, grown, opened
from tools.gaudi.results import Results, output_of
from tools.gaudi.server import (
    BLOCKS,
    PAIR,
    PLUGIN,
    Server,
    configuration,
    surroundings,
    weights_bytes,
)
from vllm_hotswap.config.reader import load_config
from vllm_hotswap.errors import InvalidRequest
from vllm_hotswap.residency.operations import refuse_unknown_level
from vllm_hotswap.states import Residency
from vllm_hotswap.system.caches import check_caches

# --- what the file omits -------------------------------------------------------------------------

HOST, USER, SECRET, PROXY = "gaudi-lab-17", "mmueller", "hf_AbCdEf123456", "10.11.12.13"


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A user on a machine: everything that identifies them, and must not be in the file."""
    monkeypatch.setattr(socket, "gethostname", lambda: f"{HOST}.example.org")
    home = tmp_path / "homes" / "mm"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", USER)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(sys, "prefix", "/opt/gaudi-python")
    return {
        "clone": str(ROOT),
        "home": str(home),
        "temporary": str(tmp_path / "temporary"),
        "python": sys.prefix,
        "packages": expected.__file__,
        "full host": f"{HOST}.example.org",
        "host": HOST,
        "user": USER,
        "secret": SECRET,
        "other home": "/home/jdoe",
    }


FAILING = """
import os, sys
told = os.environ["TOLD"]
print("INFO starts with " + told)
print("FileNotFoundError: no such file in " + told, flush=True)
sys.exit(3)
"""


def test_a_server_that_fails_tells_no_names_and_no_folders(
    person: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A failing server's last error is in the file, without names of users or folders."""
    folder = Path(person["temporary"])
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    told = ", ".join([*person.values(), str(folder / "models.yaml")])
    file = tmp_path / "out.jsonl"
    results = Results(file)
    server = Server(
        folder,
        eager=True,
        command=(sys.executable, "-c", FAILING),
        environment={**os.environ, "TOLD": told},
    )

    Kind(results, server, "eager").run()
    results.check("eager: end", server.stop)

    written = file.read_text()
    start, end = (json.loads(line) for line in written.splitlines())
    assert not start["ok"]
    assert not end["ok"]
    assert "ended with status 3; its log: FileNotFoundError: no such file in <clone>" in written
    assert [] == [name for name, text in person.items() if text in written]


def test_whatever_a_check_raises_or_returns_is_written_without_names(
    person: dict[str, str], tmp_path: Path
) -> None:
    """No name is written, whatever a check raises or returns, at any depth, keys included."""
    told = " ".join(person.values())
    file = tmp_path / "out.jsonl"
    results = Results(file)

    def fails() -> dict[str, Any]:
        raise RuntimeError(f"/v1/models/switch: 500 {told}")

    results.check("raises", fails)
    results.check("returns", lambda: {"deep": [{told: (told, 1)}], "wrong": [told]})
    results.check("a program", lambda: {"out": output_of([sys.executable, "-c", told], 60)})

    written = file.read_text()
    assert 3 == written.count('"ok": false')
    assert [] == [name for name, text in person.items() if text in written]


def test_addresses_of_this_machine_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses are left out, except loopback, which every machine has, and versions."""
    address = type("Address", (), {"address": PROXY})
    loopback = type("Address", (), {"address": "127.0.0.1"})
    monkeypatch.setattr("psutil.net_if_addrs", lambda: {"eth0": [address], "lo": [loopback]})

    blank = Blank({})

    assert "tcp://<host>:5 tcp://127.0.0.1:5" == blank.text(f"tcp://{PROXY}:5 tcp://127.0.0.1:5")
    assert "1.24.1.480" == blank.text("1.24.1.480")


def test_words_that_only_begin_like_a_name_stay() -> None:
    """Words that only begin like a name stay, and so do names that are common to many machines."""
    blank = Blank({"LOGNAME": "ann", "USER": "root"})
    assert "cannot <user> root's" == blank.text("cannot ann root's")


@pytest.mark.parametrize("name", ["gaudi", "vllm", "habana", "Check"])
def test_words_of_what_is_checked_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of the check stay even if they are a user's name; the user's folder is left out."""
    monkeypatch.setattr(socket, "gethostname", lambda: f"{name}.example.org")
    told = f"vllm_{name}.platform check-{name} {name}"

    blank = Blank({"LOGNAME": name, "HOME": f"/data/{name}"})

    assert f"{told} <home>/x <host>" == blank.text(f"{told} /data/{name}/x {name}.example.org")


def test_no_package_that_is_told_of_is_made_a_name() -> None:
    """A user or machine may be named like any word of a package's name."""
    for package in facts.PACKAGES:
        for word in package.split("-"):
            assert package == Blank({"LOGNAME": word}).text(package)


ESCAPING = {
    "JSON": lambda name: json.dumps({"error": f"bad\n{name}\t{name}"}),
    "repr": lambda name: repr(f"bad\n{name}\r{name}"),
    "repr of bytes": lambda name: repr(b"bad\n" + name.encode()),
    "JSON of a repr": lambda name: json.dumps({"error": repr(f"bad\n{name}")}),
    "colours": lambda name: f"\x1b[31m{name}\x1b[0m",
    "colours in JSON": lambda name: json.dumps(f"\x1b[31m{name}\x1b[0m"),
    "an address": lambda name: f"file%3A%2F{name}%2Fx",
    "capitals": lambda name: name.upper(),
}


@pytest.mark.parametrize("way", ESCAPING)
@pytest.mark.parametrize("name", [USER, SECRET, HOST])
def test_names_are_left_out_however_they_are_written(
    person: dict[str, str], way: str, name: str
) -> None:
    """Names are left out after escapes, which put a letter before them, and between colours."""
    assert name.lower() not in Blank().text(ESCAPING[way](name)).lower()


@pytest.mark.parametrize("value", ["pä'ß\\word", "a\"b\\c'd", "tür mit schloß"])
def test_letters_that_are_escaped_are_part_of_a_secret(value: str) -> None:
    """Escaped letters are part of a secret, and of a folder."""
    blank = Blank({"A_TOKEN": value, "HF_HOME": f"/data/{value}/hf"})
    for written in (
        value,
        json.dumps(value),
        repr(value),
        ascii(value),
        json.dumps(repr(value)),
        quote(value),
        quote(value, safe=""),
    ):
        told = blank.text(f"a {written} of /data/{written}/hf")
        assert "word" not in told
        assert "schlo" not in told
        assert "b\\" not in told


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HF_TOKEN", f"{SECRET}\n"),
        ("HF_TOKEN", f"{SECRET}\r"),
        ("HF_TOKEN", f"  {SECRET}"),
        ("HF_TOKEN", f"Bearer {SECRET}"),
        ("DB_PASS", SECRET),
        ("SITE_PWD", SECRET),
        ("PROXY_AUTH", SECRET),
    ],
)
def test_a_secret_is_known_without_what_is_around_it(variable: str, value: str) -> None:
    """A secret is recognised without line ends from files, or the word before it in headers."""
    blank = Blank({variable: value})
    assert "token <secret> refused, x<secret>x" == blank.text(f"token {SECRET} refused, x{SECRET}x")


def test_the_folder_that_one_is_in_is_no_secret() -> None:
    """The current folder is not a secret, although `PWD` stands for a password elsewhere."""
    assert "/srv/work/x" == Blank({"PWD": "/srv/work"}).text("/srv/work/x")


def test_a_long_answer_is_cut_when_names_have_been_taken_out_of_it(
    person: dict[str, str], tmp_path: Path
) -> None:
    """A long answer is cut after names are taken out: half of a token would not be recognised."""

    class Says(Server):
        def __init__(self, text: str) -> None:
            answer = httpx.Response(500, text=text)
            self._client = httpx.Client(transport=httpx.MockTransport(lambda _: answer))

    results = Results(tmp_path / "out.jsonl")
    for before in (*range(480, 500), *range(980, 1000)):
        server = Says("x" * before + f" {SECRET} " + "y" * 5000)
        results.check("post", partial(server.post, "http://h/"))
        results.check("refused", partial(server.refused, "http://h/"))

    written = (tmp_path / "out.jsonl").read_text()
    assert SECRET[:6] not in written
    assert max(map(len, written.splitlines())) < 1200


@pytest.mark.parametrize(
    "home", ["/home/john doe/x", "/home/o'brien/x", "/Users/Ann Mary Lee/x", "%2Fhome%2Fjdoe%2Fx"]
)
def test_homes_of_others_are_left_out_whatever_their_name(home: str) -> None:
    told = Blank({}).text(f"no file {home} and /opt/y, of /home/ann or bob")
    assert told.startswith("no file <home>")
    assert told.endswith("x and /opt/y, of <home> or bob")
    for name in ("doe", "brien", "Lee"):
        assert name not in told


def test_this_machines_domain_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain is omitted even if the machine knows only its first name. File suffixes stay."""
    monkeypatch.setattr(socket, "gethostname", lambda: "Gaudi-Lab")
    monkeypatch.setattr(socket, "getfqdn", lambda: "gaudi-lab.acme.example")

    told = Blank({}).text("Gaudi-Lab.corp.acme.example gaudi-lab.acme.example GAUDI-LAB.log")

    assert "<host> <host> <host>.log" == told


@pytest.mark.parametrize(
    "who",
    [
        *("ann:pw123456", "ghp_0123456789", "ann:p%40w"),
        *("ann:p@ss123", "ann:pa/ss123", "ann:pa'ss123", 'ann:pa"ss123'),
    ],
)
def test_credentials_in_an_address_are_left_out(who: str) -> None:
    """Credentials in addresses, as of proxies and indexes, are left out, from any variable."""
    told = f"ProxyError('http://{who}@proxy.acme.example:3128', mail@acme.example)"
    assert Blank({}).text(told) == told.replace(who, "<secret>")


def test_the_longest_name_is_taken_first() -> None:
    """A folder of the clone is not identified by the folders above the clone."""
    blank = Blank({"HOME": str(ROOT.parent)})
    assert "<clone>/models <home>/others" == blank.text(f"{ROOT}/models {ROOT.parent}/others")


def test_of_variables_only_numbers_and_switches_are_told() -> None:
    """Only numbers and switches of variables are shown, and none of keys."""
    told = facts.variables(
        {
            "PT_HPU_LAZY_MODE": "0",
            "VLLM_SKIP_WARMUP": "true",
            "VLLM_CACHE_ROOT": "/home/jdoe/cache",
            "VLLM_API_KEY": "123456",
            "HOME": "/home/jdoe",
        }
    )
    assert told == {
        "PT_HPU_LAZY_MODE": "0",
        "VLLM_API_KEY": "(a text)",
        "VLLM_CACHE_ROOT": "(a text)",
        "VLLM_SKIP_WARMUP": "true",
    }


# --- facts about the machine ---------------------------------------------------------------------


def test_the_facts_say_which_code_was_checked() -> None:
    """The facts have the commit, and whether Python finds the package of this clone."""
    told = facts.facts()

    try:
        commit = output_of(["git", "rev-parse", "HEAD"], 60, ROOT).strip()
    except (OSError, RuntimeError):  # the tests may run where there is no git
        commit = None
    assert commit == told["commit"]
    assert told["package_is_the_clones"]
    assert [] == told["wrong"]
    assert set(facts.PACKAGES) == set(told["versions"])


def made_clone(folder: Path) -> str:
    """Make a clone with one commit, and return the commit's name."""
    who = ["-c", "user.name=ann", "-c", "user.email=ann@example.org"]
    for words in (["init", "-q", "-b", "main"], [*who, "commit", "-q", "--allow-empty", "-m", "a"]):
        output_of(["git", *words], 60, folder)
    return output_of(["git", "rev-parse", "HEAD"], 60, folder).strip()


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


@needs_git
def test_the_commit_of_a_clone_of_another_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit of another user's clone is found, as in a container, although git refuses."""
    commit = made_clone(tmp_path)
    monkeypatch.setattr(
        facts, "GIT", [word.replace(str(ROOT), str(tmp_path)) for word in facts.GIT]
    )
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")

    with pytest.raises(RuntimeError, match="dubious ownership"):
        output_of(["git", "rev-parse", "HEAD"], 60, tmp_path)
    assert (commit, False) == (facts.commit(tmp_path), facts.is_changed(tmp_path))


@needs_git
def test_the_commit_is_told_where_there_is_no_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit is found on a branch, a packed one or none; changed files are unknown."""
    commit = made_clone(tmp_path)
    found = []
    for words in (["status", "-s"], ["pack-refs", "--all"], ["checkout", "-q", "--detach"]):
        output_of(["git", *words], 60, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(facts, "GIT", ["no-such-git"])
            found.append((facts.commit(tmp_path), facts.is_changed(tmp_path)))

    assert [(commit, None)] * 3 == found
    shutil.rmtree(tmp_path / ".git")
    monkeypatch.setattr(facts, "GIT", ["no-such-git"])
    assert facts.commit(tmp_path) is None


def test_a_package_that_is_not_the_clones_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package from elsewhere is wrong, as after `pip install .` and a later `git pull`."""
    monkeypatch.setattr(facts, "OWN", "another_hotswap")
    (tmp_path / facts.OWN).mkdir()
    (tmp_path / facts.OWN / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))

    (fault,) = facts.facts()["wrong"]

    assert fault.endswith("which is not the clone's; reinstall the clone: pip install .")


def test_another_package_is_told_from_the_clones(tmp_path: Path) -> None:
    """Another package is recognised by its modules' contents and their names."""
    (tmp_path / "a.py").write_text("1")
    first = facts.digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    second = facts.digest(tmp_path)
    (tmp_path / "b.py").write_text("2")

    assert 3 == len({first, second, facts.digest(tmp_path)})


def of_256_mib(used: tuple[int, int, int], reserved: tuple[int | None, ...]) -> str:
    names = ("before", "with_256_mib", "after")
    seen = {
        name: {
            "free": (1000 - each) * MIB,
            "total": 1000 * MIB,
            "memory_allocated": each * MIB,
            "memory_reserved": None if pool is None else pool * MIB,
        }
        for name, each, pool in zip(names, used, reserved, strict=True)
    }
    return f"print({json.dumps(seen)!r})"


def test_which_number_follows_memory_that_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that keeps freed memory does not follow it, nor does a missing figure."""
    monkeypatch.setattr(facts, "DEVICE", of_256_mib((1, 257, 1), (1, 257, 257)))
    kept = facts.device()
    monkeypatch.setattr(facts, "DEVICE", of_256_mib((1, 1, 1), (None, None, None)))
    absent = facts.device()

    assert kept["follows"] == {
        "mem_get_info": True,
        "memory_allocated": True,
        "memory_reserved": False,
    }
    assert [] == kept["wrong"]
    assert [
        "torch.hpu.mem_get_info does not show that 256 MiB come and go",
        (
            "torch.hpu.memory_allocated does not show that 256 MiB come and go, so whether weights "
            "leave the device is not judged"
        ),
    ] == absent["wrong"]


def test_another_platform_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A separate process finds it out: the check must not hold the device."""
    monkeypatch.setattr(facts, "PLATFORM", "print('noise'); print('cpu vllm.platforms.cpu.Cpu')")
    results = Results(tmp_path / "out.jsonl")

    told = results.check("platform", facts.platform)

    assert not told["ok"]
    assert ["vLLM has chosen vllm.platforms.cpu.Cpu (cpu), not the plugin's platform"] == told[
        "wrong"
    ]


ALONE = """
import sys
import tools.gaudi.program
print({"torch", "vllm", "vllm_gaudi", "habana_frameworks"} & set(sys.modules))
"""


def test_the_check_itself_imports_nothing_that_may_take_the_device() -> None:
    """A Gaudi belongs to one process: to the server, while it runs."""
    ran = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "set()" == ran.stdout.strip()


# --- what cannot be checked ----------------------------------------------------------------------


def test_a_python_without_the_plugin_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Python without the plugin gets one line with the next step, and writes no file."""

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(program.Unusable, match="use the Python that has it: make check-gaudi"):
        check_packages()

    assert 2 == program.main(["/nowhere/out.jsonl"])
    assert 1 == capsys.readouterr().err.count("\n")


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(program.Unusable, match="No such file or directory; name another file"):
        opened(tmp_path / "nowhere" / "out.jsonl")


def test_results_of_an_earlier_run_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that would overwrite them is refused before anything is checked."""
    path = tmp_path / "out.jsonl"
    path.write_text("an hour's results")
    monkeypatch.setattr(program, "check_packages", lambda: None)

    assert 2 == program.main([str(path)])

    assert "an hour's results" == path.read_text()
    told = capsys.readouterr().err
    assert told.startswith(f"check-gaudi: error: {path} already exists, ")
    assert 1 == told.count("\n")


def test_a_disk_that_is_full_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk is reported in one line, and ends the check: no result could be stored."""
    monkeypatch.setattr(program, "check_packages", lambda: None)
    monkeypatch.setattr(program, "opened", lambda _: Results(Path("/dev/full")))
    monkeypatch.setattr(facts, "facts", dict)
    monkeypatch.setattr(facts, "device", lambda: pytest.fail("checked on and on"))

    assert 2 == program.main(["/dev/full"])

    told = capsys.readouterr().err
    assert told.startswith(
        "check-gaudi: error: /dev/full can't be written: No space left on device"
    )
    assert 1 == told.count("\n")


def test_a_file_is_emptied_only_when_it_can_be_written_without_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file with earlier results is emptied only once names can be left out."""

    class Fails(Exception):
        pass

    def fails() -> Blank:
        raise Fails

    path = tmp_path / "out.jsonl"
    path.write_text("earlier")
    monkeypatch.setattr("tools.gaudi.results.Blank", fails)
    with pytest.raises(Fails):
        Results(path)
    assert "earlier" == path.read_text()


def test_a_folder_that_is_a_loop_of_links_is_left_out(tmp_path: Path) -> None:
    """A folder that is a loop of links, as variables may have, is left out."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "no file <folder>/x" == Blank({"HF_HOME": str(loop)}).text(f"no file {loop}/x")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_terminal_that_does_not_have_a_letter_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """A letter that the terminal lacks, or a byte that is not text, does not end the check."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    results = Results(tmp_path / "out.jsonl")

    results.check("x", lambda: {"wrong": ["no \ufffd and no \udcff"]})
    results.check("y", dict)

    terminal.seek(0)
    assert ["BAD  x  no ", "ok   y\n"] == [line[:11] for line in terminal]
    assert 2 == len((tmp_path / "out.jsonl").read_text().splitlines())


def test_a_terminal_that_has_gone_away_ends_nothing(tmp_path: Path) -> None:
    """If the terminal disappears, the check continues, and its results are in the file."""
    code = (
        "from pathlib import Path; from tools.gaudi.results import Results\n"
        f"results = Results(Path({str(tmp_path / 'out.jsonl')!r}))\n"
        "for name in ('x', 'y'): results.check(name, dict)"
    )
    with Path("/dev/full").open("w") as terminal:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=terminal, check=True)
    assert 2 == len((tmp_path / "out.jsonl").read_text().splitlines())


def test_a_driver_that_tells_no_text_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "hl-smi"
    program.write_text("#!/bin/sh\nprintf '1.24\\377\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert "1.24\ufffd" == facts.driver()

    program.unlink()
    monkeypatch.setattr(facts, "ASK_DRIVER", ["no-such-program"])
    monkeypatch.setattr(facts, "DRIVER", tmp_path / "version")
    facts.DRIVER.write_bytes(b"1.24\xff\n")
    assert "1.24\ufffd" == facts.driver()


def test_too_few_cycles_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Too few cycles are refused, because they could not show growth."""
    with pytest.raises(SystemExit):
        program.main(["out.jsonl", "--cycles", "5"])
    assert "--cycles must be at least 6" in capsys.readouterr().err


def test_an_interrupted_check_says_what_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted check has the results so far in its file."""

    def interrupted(_: Results) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "check_packages", lambda: None)
    monkeypatch.setattr(facts, "DEVICE", "raise SystemExit('no device')")
    monkeypatch.setattr(facts, "PLATFORM", "print('hpu vllm_gaudi.platform.HpuPlatform')")
    monkeypatch.setattr(program, "check_refusal", interrupted)

    assert 130 == program.main([str(tmp_path / "out.jsonl")])

    assert "has the results so far" in capsys.readouterr().err
    assert 3 == len((tmp_path / "out.jsonl").read_text().splitlines())


# --- the server ----------------------------------------------------------------------------------


def test_the_servers_variables_let_it_be_asked_and_read(tmp_path: Path) -> None:
    """The server gets none of the user's keys or quantisation; the check's plugin is allowed."""
    told = surroundings(
        {
            "VLLM_API_KEY": "k",
            "VLLM_HOTSWAP_ADMIN_KEY": "k",
            "VLLM_HOTSWAP_CONFIG": "other.yaml",
            "QUANT_CONFIG": "q.json",
            "VLLM_PLUGINS": "hpu",
            "PYTHONPATH": "/some/where",
            "PT_HPU_LAZY_MODE": "0",
        },
        tmp_path / "models.yaml",
        tmp_path / "socket",
    )
    kept = {"VLLM_API_KEY", "VLLM_HOTSWAP_ADMIN_KEY", "VLLM_HOTSWAP_CONFIG", "QUANT_CONFIG"}
    assert not kept & set(told)
    assert f"hpu,{PLUGIN}" == told["VLLM_PLUGINS"]
    check_caches(told)  # raises if the server would refuse the check's folders
    assert told["PYTHONPATH"].endswith(":/some/where")
    assert "0" == told["PT_HPU_LAZY_MODE"]
    ran = subprocess.run(
        [sys.executable, "-c", FIND], capture_output=True, text=True, check=True, env=told
    )
    assert f"{PLUGIN}:register" == ran.stdout.strip()


COMPILES = """
import os, sys
from pathlib import Path
sys.path.insert(0, str(Path.home()))
import own
caches = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
for name in caches:
    Path(os.environ[name]).mkdir(parents=True)
    Path(os.environ[name], "compiled").touch()
Path("caches").write_text(chr(10).join(os.environ[name] for name in caches))
sys.exit(3)
"""


def test_nothing_that_a_server_compiles_is_left_or_found_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code is in the server's own folder, wherever the user keeps such files."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "own.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(home / "vllm"))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    server = partial(Server, command=(sys.executable, "-c", COMPILES))
    monkeypatch.setattr(program, "Server", server)
    found: list[str] = []

    for eager in (True, False):
        program.check_server(Results(tmp_path / "out.jsonl"), eager=eager, cycles=6, ways=())
        found += Path("caches").read_text().splitlines()

    assert 6 == len(set(found))
    assert [] == [path for path in found if Path(path).exists()]
    assert [home / "own.py"] == list(home.rglob("*"))


FIND = """
from importlib.metadata import entry_points
(found,) = entry_points(group="vllm.general_plugins", name="check_gaudi_memory")
assert found.load()
print(found.value)
"""


def test_the_configuration_is_one_that_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(configuration(eager=True))
    assert PAIR == load_config(path).aliases


HEALTH = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        with open(sys.argv[1], "a") as file:
            file.write(self.path + chr(10))
        self.send_error(503)
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def test_a_server_that_is_not_ready_is_asked_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that loads its models is polled at intervals, not all the time."""
    asked = tmp_path / "asked"
    waits: list[float] = []
    monkeypatch.setattr("tools.gaudi.server.LOOK_S", 0.123)
    server = Server(tmp_path, eager=True, command=(sys.executable, "-c", HEALTH, str(asked)))
    sleep = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: (waits.append(seconds), sleep(seconds)))

    def wait() -> None:
        with pytest.raises(RuntimeError, match="it has ended with status -9"):
            server.wait()
        ended.set()

    ended = threading.Event()
    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_until(lambda: asked.exists() and asked.read_text().count("/health") >= 3)
    server._process.kill()
    waiting.join()
    assert ended.is_set()
    server._client.close()
    server._process.wait()

    assert asked.read_text().count("/health") <= waits.count(0.123)


def test_ctrl_c_does_not_reach_the_server(tmp_path: Path) -> None:
    """Ctrl-C does not reach the server: the check stops it, and reports how that went."""
    server = Server(tmp_path, eager=True, command=(sys.executable, "-c", HEALTH, "asked"))
    assert os.getpgid(server._process.pid) != os.getpgid(0)
    server.end()


RUN = """
import sys
from functools import partial
from pathlib import Path
from tools.gaudi import interrupts, program, server
from tools.gaudi.results import Results
server.STOP_LIMIT_S = 2
program.Server = partial(program.Server, command=(sys.executable, "-c", sys.argv[1]))
interrupts.take()
try:
    program.check_server(Results(Path("out.jsonl")), eager=True, cycles=6, ways=())
except KeyboardInterrupt:
    sys.exit(130)
"""
TELLS = """
import os, signal, time
from pathlib import Path
def tell(name, what):
    Path(name + ".new").write_text(str(what))
    Path(name + ".new").rename(name)
tell("folder", Path(os.environ["VLLM_HPU_MULTI_MODEL_CONFIG"]).parent)
"""
OBEYS = f"{TELLS}tell('pid', os.getpid()); time.sleep(600)"
DISOBEYS = f"""{TELLS}
signal.signal(signal.SIGTERM, lambda *_: tell("asked", 1))
tell('pid', os.getpid())
while True:
    time.sleep(600)
"""


def left(folder: Path, signals: Sequence[int], code: str) -> list[str]:
    """Return what remains after a check that gets these signals, each once it has to wait."""
    check = psutil.Popen(
        [sys.executable, "-c", RUN, code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        for number, waits_for in zip(signals, ("pid", "asked"), strict=False):
            wait_until((folder / waits_for).exists)
            check.send_signal(number)
        assert 130 == check.wait(60)
        own = Path((folder / "folder").read_text())
        pid = int((folder / "pid").read_text())
        found = ["the server"] * is_there(pid) + ["its folder"] * own.exists()
    finally:
        for path in folder.glob("pid"):
            kill(int(path.read_text()))
        kill(check.pid)
        check.wait()
    return found


def is_there(pid: int) -> bool:
    """Whether it exists and runs: a process that was not waited for yet has ended."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_check_that_is_ended_ends_its_server(tmp_path: Path, number: int) -> None:
    """Ctrl-C, `kill` and a closed terminal stop the server, too. It has its own process group, and
    would otherwise hold the device for ever."""
    assert [] == left(tmp_path, [number], OBEYS)


def test_a_second_signal_does_not_keep_the_check_from_ending_its_server(tmp_path: Path) -> None:
    """A second signal does not hinder the check, although the server has to be killed."""
    assert [] == left(tmp_path, [signal.SIGINT, signal.SIGINT], DISOBEYS)


def test_a_terminal_that_goes_away_is_nothing_to_nohup() -> None:
    code = (
        "import signal; from tools.gaudi import interrupts\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); interrupts.take()\n"
        "print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    )
    assert "True\n" == output_of([sys.executable, "-c", code], 60, ROOT)


@pytest.mark.parametrize("check", ["check_server", "check_refusal"])
def test_a_check_that_is_interrupted_while_it_starts_a_server_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    """A signal before the check has a reference to the server stops the server, too."""
    started: list[psutil.Popen] = []

    class Slow(Server):
        def __init__(self, folder: Path, **how: Any) -> None:
            super().__init__(folder, command=(sys.executable, "-c", WAIT), **how)
            started.append(self._process)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(program, "Server", Slow)
    more = {"eager": True, "cycles": 6, "ways": ()} if check == "check_server" else {}
    results = Results(tmp_path / "out.jsonl")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            getattr(program, check)(results, **more)
        assert [False] == [process.is_running() for process in started]
    finally:
        signal.signal(signal.SIGINT, before)
        for process in started:
            kill(process.pid)


def test_nothing_is_started_that_cannot_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If creating the client fails, or is interrupted, no server is started."""
    started: list[Any] = []

    def fails(**_: Any) -> None:
        raise OSError("no certificates")

    monkeypatch.setattr("httpx.Client", fails)
    monkeypatch.setattr("psutil.Popen", lambda *words, **_: started.append(words))
    with pytest.raises(OSError, match="no certificates"):
        Server(tmp_path, eager=True)
    assert [] == started


STARTS = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]%s)
Path("child.new").write_text(str(child.pid))
Path("child.new").rename("child")
%s
"""


@pytest.mark.parametrize(
    ("group", "then"),
    [("", "sys.exit(1)"), (", process_group=0", "time.sleep(600)")],
    ids=["a process of its group, and it ends itself", "an engine host, and it is killed"],
)
def test_what_a_server_leaves_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, then: str
) -> None:
    """A process that an exited server has started, and that holds the device, is killed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tools.gaudi.server.LAST_LIMIT_S", 0.1)
    server = Server(tmp_path, eager=True, command=(sys.executable, "-c", STARTS % (group, then)))
    wait_until(Path("child").exists)
    pid = int(Path("child").read_text())
    try:
        if group:
            assert 2 == server.processes().processes
            server._process.kill()
        wait_until(lambda: not server.is_running)
        server.end()
        wait_until(lambda: not is_there(pid))
    finally:
        kill(pid)


LINE = "vllm-hotswap: error: models.yaml:5: models.llama: QUANT_CONFIG is 'gone.json'"
REFUSES = f"""
import os, sys
assert "gone.json" == os.environ["QUANT_CONFIG"]
print({LINE!r} + ", and there is no such file; correct it", file=sys.stderr)
print("ERROR: a library's last words", file=sys.stderr)
sys.exit(1)
"""


def with_log(log: Path, content: bytes) -> Server:
    server = Server.__new__(Server)
    server.log = log
    log.write_bytes(content)
    return server


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"error " + b"x" * 20_000_000, "(a line of more than 64 KiB)"),
        (b"error: gone\n" + b"x\n" * 40_000 + b"error: late\nlast\n", "error: late"),
        (b"z" * 70_000 + b"\nlast\n", "last"),
        (b"", ""),
        (b"error: a\xff byte", "error: a\ufffd byte"),
    ],
)
def test_of_a_long_log_the_end_is_read(tmp_path: Path, content: bytes, told: str) -> None:
    """A line may have any length, and a cut line may begin with half of a name."""
    assert told == with_log(tmp_path / "server.log", content).last_error()


def test_a_line_of_any_length_that_a_program_writes_is_left_out(tmp_path: Path) -> None:
    """A line of any length is left out: searching it for names would take long."""
    code = "raise SystemExit('x' * 1_000_000)"
    path = tmp_path / "out.jsonl"
    Results(path).check("x", lambda: {"out": output_of([sys.executable, "-c", code], 60)})
    assert ["RuntimeError: (a line of more than 64 KiB)"] == json.loads(path.read_text())["wrong"]


def test_a_long_line_of_a_log_is_cut_and_does_nothing_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names are taken out before the cut; the rest can't clear the terminal or look like ours."""
    control = b"vllm-hotswap: error: \x1b]0;title\x07 \x1b[2J \x9b31m\x7f\x08 " + b"y" * 5000
    server = with_log(tmp_path / "server.log", control + b" " + SECRET.encode())

    def fails() -> dict[str, Any]:
        raise RuntimeError(f"its log: {server.last_error()}")

    path = tmp_path / "out.jsonl"
    Results(path, Blank({"HF_TOKEN": SECRET})).check("x", fails)

    told = capsys.readouterr().out
    assert "vllm-hotswap: error: " in told
    assert told.removesuffix("\n").isprintable()
    assert len(told) < 1100
    assert len(path.read_text()) < 1200


CRASHES = """
import sys
print("Error: neural_compressor cannot open QUANT_CONFIG gone.json, and there is no such file")
sys.exit(%d)
"""
ENDS_OTHERWISE = REFUSES.replace("sys.exit(1)", "sys.exit(245)")
OTHER = 'raise SystemExit("vllm-hotswap: error: models.yaml is missing")'


def refusal_of(code: str, folder: Path) -> dict[str, Any]:
    server = Server(
        folder,
        eager=True,
        command=(sys.executable, "-c", code),
        environment={**os.environ, "QUANT_CONFIG": "/the/users"},
        more={"QUANT_CONFIG": "gone.json"},
    )
    try:
        return program.refusal(server)
    finally:
        server.end()


def test_a_start_that_has_to_be_refused_is_judged_by_what_it_says(tmp_path: Path) -> None:
    """A refusal must have our own error. The check's variable is passed on, not the user's."""
    refused = refusal_of(REFUSES, tmp_path)

    assert [] == refused["wrong"]
    assert refused["told"].endswith(f"{LINE}, and there is no such file; correct it")


@pytest.mark.parametrize(
    ("code", "status"),
    [(CRASHES % 1, 1), (CRASHES % 245, 245), (ENDS_OTHERWISE, 245), (OTHER, 1)],
    ids=["a library's error", "a crash that names it", "another status", "another error of ours"],
)
def test_a_start_that_fails_otherwise_is_no_refusal(code: str, status: int, tmp_path: Path) -> None:
    """A start with another error is not a refusal, even if its log has the variable."""
    (fault,) = refusal_of(code, tmp_path)["wrong"]
    assert fault.startswith("it is not refused because of QUANT_CONFIG: the server does not ")
    assert f"ended with status {status}; " in fault


def test_a_start_that_is_not_refused_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that serves, or hangs with the variable in its log, is not taken for a refusal."""
    assert ["a server starts, although QUANT_CONFIG does not name a file"] == program.refusal(
        FakeServer()  # type: ignore[arg-type]  # has all that is asked
    )["wrong"]
    monkeypatch.setattr("tools.gaudi.server.START_LIMIT_S", 1)
    (fault,) = refusal_of(REFUSES.replace("sys.exit(1)", "import time; time.sleep(600)"), tmp_path)[
        "wrong"
    ]
    assert "it is not ready yet; " in fault


class FakeHpu:
    """`torch.hpu` without a `memory_reserved`."""

    @staticmethod
    def synchronize() -> None: ...

    @staticmethod
    def mem_get_info() -> tuple[int, int]:
        return 3, 8

    @staticmethod
    def memory_allocated() -> int:
        return 5


def test_the_engine_host_tells_what_it_has_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine host answers each query, with null for missing figures; this process does not."""
    path = tmp_path / "socket"
    monkeypatch.setenv(check_gaudi_memory.VARIABLE, str(path))
    check_gaudi_memory.register()
    assert not path.exists()

    main = type("Main", (), {"__spec__": type("Spec", (), {"name": check_gaudi_memory.HOST})})
    torch = type("Torch", (), {"get_device_module": staticmethod(lambda _: FakeHpu)})
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(check_gaudi_memory, "_listening", [])
    check_gaudi_memory.register()
    check_gaudi_memory.register()  # vLLM, wrapped by the plugin, may load it more than once
    server = Server.__new__(Server)
    server._socket = path

    assert Device(3, 8, 5, None) == server.device()
    monkeypatch.setattr(FakeHpu, "mem_get_info", staticmethod(lambda: 1 / 0))
    with pytest.raises(RuntimeError, match="can't read the device's memory: ZeroDivisionError"):
        server.device()


def test_a_socket_that_cannot_be_made_does_not_end_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the socket's path is too long, the host starts without the check, and logs it."""
    main = type("Main", (), {"__spec__": type("Spec", (), {"name": check_gaudi_memory.HOST})})
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(check_gaudi_memory, "_listening", [])
    monkeypatch.setenv(check_gaudi_memory.VARIABLE, str(tmp_path / ("a" * 108)))

    check_gaudi_memory.register()

    assert [] == check_gaudi_memory._listening
    assert "can't be listened on: AF_UNIX path too long\n" in capsys.readouterr().err


def test_a_long_temporary_folder_is_not_the_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the check's server nor the refused one has its socket in a long folder."""
    long = tmp_path / ("a" * 108)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    folders: list[Path] = []

    class Nowhere(Exception):
        pass

    def server(folder: Path, **_: Any) -> None:
        folders.append(folder)
        raise Nowhere

    monkeypatch.setattr(program, "Server", server)
    results = Results(tmp_path / "out.jsonl")
    for check in (
        lambda: program.check_server(results, eager=True, cycles=6, ways=()),
        lambda: program.check_refusal(results),
    ):
        with pytest.raises(Nowhere):
            check()

    assert 2 == len(folders)
    assert all(len(str(folder / "memory.socket")) < 107 for folder in folders)
    assert not any(folder.exists() for folder in folders)


def test_a_host_without_the_plugin_is_told(tmp_path: Path) -> None:
    server = Server.__new__(Server)
    server._socket = tmp_path / "nobody"
    with pytest.raises(RuntimeError, match="the check's plugin in the engine host does not answer"):
        server.device()


READY = """
import http.server, json, sys
model = {"residency": "parked", "weights_bytes": 1, "kv_bytes": 1, "held": {}}
status = {"models": {"llama": model, "qwen": model}, "memory": {}}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(status).encode())
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def test_without_what_the_host_tells_no_cycle_is_begun(tmp_path: Path) -> None:
    """Without the host's answers no cycle starts; the start is reported as wrong."""
    results = Results(tmp_path / "out.jsonl")
    server = Server(tmp_path, eager=True, command=(sys.executable, "-c", READY))

    Kind(results, server, "eager").run()
    server.end()

    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    (fault,) = json.loads(line)["wrong"]
    assert fault.startswith("the check's plugin in the engine host does not answer: ")


# --- what is judged: answers ---------------------------------------------------------------------


def test_the_expected_answers_are_those_of_the_models_that_are_here() -> None:
    """The expected answers are up to date; `python -m tools.gaudi.expected` writes them."""
    told = json.loads(EXPECTED.read_text())["models"]
    assert {model: expected.digest(model) for model in PAIR} == {
        model: told[model]["weights_sha256"] for model in PAIR
    }
    shapes = {(len(told[model]["answers"]), TOKENS, RANKS) for model in PAIR}
    assert {(len(PROMPTS), TOKENS, RANKS)} == shapes
    assert EXPECTED.read_text() == expected.text(json.loads(EXPECTED.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("model", PAIR)
def test_the_expected_answers_are_those_that_transformers_gives(model: str) -> None:
    """The expected answers equal those of transformers, on every CPU."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    try:
        found = [Answer(steps) for steps in expected.answers(expected.MODELS / model)]
    finally:
        torch.set_num_threads(threads)
    pairs = zip(load()[model], found, strict=True)
    assert [[]] * len(PROMPTS) == [compare(*pair, 0.01).wrong for pair in pairs]


BLOCK = 128
"""Tokens of a block of KV memory on a Gaudi."""


def answer_without_first_block(model: str, prompt: str) -> Answer:
    """Answer with transformers, without reading the keys and values of the first block."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(expected.MODELS / model)(prompt).input_ids
    assert BLOCK < len(ids) < 2 * BLOCK
    folder = expected.MODELS / model
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    steps = []
    with torch.no_grad():
        cache = network(torch.tensor([ids[:-1]])).past_key_values
        for _ in range(TOKENS):
            seen = torch.tensor([[0] * BLOCK + [1] * (len(ids) - BLOCK)])
            scores = network(
                torch.tensor([ids[-1:]]),
                past_key_values=cache,
                attention_mask=seen,
                position_ids=torch.tensor([[len(ids) - 1]]),
            ).logits[0, -1]
            best = scores.log_softmax(-1).topk(RANKS)
            steps.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
            ids = [*ids, steps[-1][0][0]]
    return Answer(steps)


@pytest.mark.slow
@pytest.mark.parametrize("model", PAIR)
def test_a_block_of_kv_memory_that_is_lost_would_be_seen(model: str) -> None:
    """The prompt that takes two blocks, repeated after each cycle, shows a lost block."""
    prompt = 1
    assert PROMPTS[prompt] in PROMPTS[program.AGAIN]
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lost = answer_without_first_block(model, PROMPTS[prompt])
    finally:
        torch.set_num_threads(threads)
    assert compare(load()[model][prompt], lost, EXPECTED_TOLERANCE).wrong


def test_a_model_that_answers_as_another_one_is_seen() -> None:
    """A model that answers as another one is recognised at the first token."""
    llama, qwen = load()["llama"][0], load()["qwen"][0]
    (fault,) = compare(llama, qwen, EXPECTED_TOLERANCE).wrong
    assert fault.startswith("step 0: token ")


def answer(*steps: tuple[tuple[int, float], ...]) -> Answer:
    return Answer(steps)


SURE = ((1, -0.1), (2, -4.0), (3, -5.0))


def test_rounding_is_let_pass_and_nothing_more() -> None:
    near = answer(((1, -0.3), (2, -3.8), (3, -5.2)))
    far = answer(((1, -0.1), (2, -3.4), (3, -5.0)))

    assert compare(answer(SURE), near, 0.5).wrong == []
    assert pytest.approx(0.2) == compare(answer(SURE), near, 0.5).furthest
    assert ["step 0: token 2 has the logarithmic probability -3.400, not -4.000"] == compare(
        answer(SURE), far, 0.5
    ).wrong


def test_a_likely_token_that_is_missing_is_seen() -> None:
    """A missing token cannot be likelier than those there; an unlikely one may be overtaken."""
    missing = answer(((1, -0.1), (3, -5.0), (4, -5.1)))
    passed = answer(((1, -0.1), (2, -4.0), (4, -4.9)))

    assert ["step 0: token 2 has the logarithmic probability below -5.100, not -4.000"] == compare(
        answer(SURE), missing, 0.5
    ).wrong
    assert [] == compare(answer(SURE), passed, 0.5).wrong


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("places", [slice(0, 5), slice(4, 5), slice(0, 1)])
@pytest.mark.parametrize("step", [0, 11])
def test_what_is_no_number_is_seen(value: float | None, places: slice, step: int) -> None:
    """NaN is found in all tokens of a step, or in one, even with the expected tokens chosen."""
    right = load()["llama"][0]
    told = completion(right, right.tokens)
    ranks = told["logprobs"]["top_logprobs"][step]
    ranks.update(dict.fromkeys(list(ranks)[places], value))

    (fault,) = compare(right, from_completion(told), EXPECTED_TOLERANCE).wrong

    assert fault.startswith(f"step {step}: the logarithmic probability of token ")
    assert fault.endswith(" is not a number")


def test_the_file_is_json_whatever_is_measured(tmp_path: Path) -> None:
    """The file is JSON, which has no NaN, whatever is measured."""

    def refused(word: str) -> None:
        raise AssertionError(word)

    path = tmp_path / "out.jsonl"
    Results(path).check("x", lambda: {"some": [math.nan, -math.inf, 1.5]})

    assert ["nan", "-inf", 1.5] == json.loads(path.read_text(), parse_constant=refused)["some"]


def test_of_tokens_that_are_tied_either_may_be_said() -> None:
    """Either of two tied tokens may be chosen; what follows it is then not compared."""
    tied = answer(((1, -0.7), (2, -0.8), (3, -4.0)), SURE)
    other = answer(((2, -0.7), (1, -0.8), (3, -4.0)), ((9, 0.0), (8, -9.0), (7, -9.0)))

    found = compare(tied, other, 0.5)

    assert ([], 1) == (found.wrong, found.steps)
    (note,) = program.compared([tied], [other], 0.5)["notes"]
    assert note.startswith("prompt 0: step 0: tokens 2 and 1 are too near to each other to decide ")
    assert ["step 0: token 2 was chosen, not 1"] == compare(
        answer(SURE), answer((SURE[1], SURE[0], SURE[2])), 0.5
    ).wrong
    assert compare(tied, other, 0.05).wrong


def test_an_answer_that_ends_early_is_seen() -> None:
    assert ["1 tokens were generated, not 2"] == compare(
        answer(SURE, SURE), answer(SURE), 0.5
    ).wrong


def test_an_answer_that_ends_early_after_a_tie_is_seen() -> None:
    """An answer after a tie must have the same length, whatever its tokens are."""
    tied = answer(((1, -0.7), (2, -0.8)), SURE, SURE)
    assert ["1 tokens were generated, not 3"] == compare(
        tied, answer(((2, -0.7), (1, -0.8))), 0.5
    ).wrong


def test_an_answer_is_read_from_a_completion() -> None:
    """Of equally likely tokens, the chosen one comes first; five are kept."""
    ranks = {f"token_id:{n}": value for n, value in enumerate((-9.0, -8.0, -1.0, -1.0, -7.0, -6.0))}
    choice = {"token_ids": [3], "logprobs": {"top_logprobs": [ranks]}}

    found = from_completion(choice)

    assert [3] == found.tokens
    assert [3, 2, 5, 4, 1] == [token for token, _ in found.steps[0]]


def completion(answer: Answer, said: Sequence[int]) -> dict[str, Any]:
    """vLLM's form: the five likeliest tokens, and the chosen one besides."""
    ranks = [{f"token_id:{token}": value for token, value in step} for step in answer.steps]
    for token, each in zip(said, ranks, strict=True):
        each.setdefault(f"token_id:{token}", -25.0)
    return {"token_ids": list(said), "logprobs": {"top_logprobs": ranks}}


@pytest.mark.parametrize("model", PAIR)
@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
@pytest.mark.parametrize("wrong", [TOKENS, 1], ids=["all", "the last"])
def test_a_token_that_is_said_and_is_not_among_the_likeliest_is_seen(
    model: str, prompt: int, wrong: int
) -> None:
    """A sampler may take the wrong token, although all probabilities are right."""
    right = load()[model][prompt]
    said = [*right.tokens[: TOKENS - wrong], *range(900, 900 + wrong)]

    found = from_completion(completion(right, said))

    assert said == found.tokens
    assert {RANKS} == {len(step) for step in found.steps}
    (fault,) = compare(right, found, EXPECTED_TOLERANCE).wrong
    assert fault.startswith(f"step {TOKENS - wrong}: token 900 was chosen, which has -25.000, ")


def test_a_token_that_is_said_and_has_no_probability_is_seen() -> None:
    """A chosen token without a probability is found, and not mistaken for another one."""
    choice = {"token_ids": [7], "logprobs": {"top_logprobs": [{"token_id:1": -0.1}]}}
    with pytest.raises(ValueError, match="token 7 was generated, but its probability is missing"):
        from_completion(choice)


def test_a_token_that_the_device_itself_finds_unlikely_is_seen() -> None:
    """The device's own probabilities decide where the expected tokens are too close."""
    tied = answer(((1, -0.7), (2, -0.8)))
    assert ["step 0: token 9 was chosen, which has -25.000, but token 1 has -0.700"] == compare(
        tied, answer(((9, -25.0), (1, -0.7), (2, -0.8))), 0.5
    ).wrong


# --- what is judged: memory ----------------------------------------------------------------------

KV = 64 * MIB
WEIGHTS = 2 * MIB
HELD = KV + WEIGHTS


def seen(used: int, told: int = HELD, host: int = 0, **more: int) -> Seen:
    processes = Processes(3, 20, 90, 500 * MIB)
    return Seen(
        Device(1000 * MIB - used, 1000 * MIB, used, None), told, host, replace(processes, **more)
    )


AWAKE = seen(2 * HELD)
WELL = {
    "parked": Cycle("parked", "llama", KV, WEIGHTS, AWAKE, AWAKE, AWAKE, 0.1),
    "asleep": Cycle("asleep", "llama", KV, WEIGHTS, AWAKE, seen(HELD, 0, 2 * MIB), AWAKE, 0.1),
    "cold": Cycle("cold", "llama", KV, WEIGHTS, AWAKE, seen(HELD, 0), AWAKE, 0.1),
}


@pytest.mark.parametrize("way", WELL)
def test_a_cycle_that_is_well_is_called_so(way: str) -> None:
    assert [] == cycle_faults(WELL[way])


@pytest.mark.parametrize("way", ["asleep", "cold"])
def test_a_model_that_gives_nothing_back_is_seen(way: str) -> None:
    """A model that releases nothing is found, whatever the server reports."""
    faults = cycle_faults(replace(WELL[way], away=seen(2 * HELD, 0, 2 * MIB * (way == "asleep"))))
    assert [
        "0.0 MiB of the device were given back, but the model's KV memory alone is 64.0 MiB",
        "the server says that 66.0 MiB were given back; it was 0.0 MiB",
        (
            "tensors of 0.0 MiB have left the device, but the model's KV memory and weights are "
            "66.0 MiB"
        ),
    ] == faults


@pytest.mark.parametrize("way", ["asleep", "cold"])
def test_a_model_that_keeps_its_weights_is_seen(way: str) -> None:
    """Kept weights are found although KV memory is released, and the device's figure rounded."""
    away = seen(HELD + WEIGHTS, 0, WEIGHTS * (way == "asleep"))
    assert [
        (
            "tensors of 64.0 MiB have left the device, but the model's KV memory and weights are "
            "66.0 MiB"
        )
    ] == cycle_faults(replace(WELL[way], away=away))


@pytest.mark.parametrize(("follows", "judges"), [(True, True), (False, False)])
def test_weights_are_judged_where_torch_follows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follows: bool, judges: bool
) -> None:
    """Weights are judged where torch follows them; elsewhere the check says that they are not."""
    said: list[bool] = []
    monkeypatch.setattr(program, "check_packages", lambda: None)
    during = 257 if follows else 1
    monkeypatch.setattr(facts, "DEVICE", of_256_mib((1, during, 1), (1, 257, 1)))
    monkeypatch.setattr(facts, "PLATFORM", "print('hpu vllm_gaudi.platform.HpuPlatform')")
    monkeypatch.setattr(program, "check_refusal", lambda _: None)
    monkeypatch.setattr(
        program, "check_server", lambda *_, judges_weights, **__: said.append(judges_weights)
    )

    program.main([str(tmp_path / "out.jsonl")])

    assert [judges, judges] == said
    kept = replace(WELL["asleep"], away=seen(HELD + WEIGHTS, 0, WEIGHTS))
    assert judges == bool(cycle_faults(kept, judges_weights=judges))


@pytest.mark.parametrize("way", ["asleep", "cold"])
def test_what_is_rounded_besides_is_let_pass(way: str) -> None:
    """Less than half of the weights is tolerated; without torch's figure, nothing is judged."""
    cycle = WELL[way]
    some = replace(cycle.away.device, memory_allocated=HELD + WEIGHTS // 2)
    none = replace(cycle.away.device, memory_allocated=None)
    for device in (some, none):
        assert [] == cycle_faults(replace(cycle, away=replace(cycle.away, device=device)))


@pytest.mark.parametrize("model", PAIR)
def test_a_models_weights_are_what_its_checkpoint_has(model: str) -> None:
    """A model's weights are those in its checkpoint, without the file's header."""
    content = (expected.MODELS / model / "model.safetensors").read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    assert 0 < weights_bytes(model) - (len(content) - head) < 0.02 * len(content)


@pytest.mark.parametrize("model", PAIR)
def test_a_models_kv_memory_is_what_its_blocks_take(model: str) -> None:
    """A block has keys and values of 128 tokens, in bfloat16, of each layer."""
    told = json.loads((expected.MODELS / model / "config.json").read_text())
    values = told["num_hidden_layers"] * told["num_key_value_heads"] * told["head_dim"]
    assert LEAST_KV_BYTES == BLOCKS * BLOCK * 2 * 2 * values


@pytest.mark.parametrize("way", WELL)
def test_the_servers_own_word_is_not_all_that_is_judged_by(way: Way) -> None:
    """A server that reports no KV memory, and then releases nothing, is found."""
    nothing = Cycle(way, "llama", 0, WEIGHTS, AWAKE, seen(2 * HELD, HELD, 1), AWAKE, 0.1)
    found = cycle_faults(nothing, judges_weights=False)
    assert "the server says that the model's KV memory is 0.0 MiB; its blocks are 64.0 MiB" in found
    assert (way != "parked") == any(fault.startswith("0.0 MiB of the device") for fault in found)


@pytest.mark.parametrize(("host", "is_seen"), [(1, True), (MIB, True), (WEIGHTS, False)])
def test_a_sleeping_models_weights_are_in_host_memory(host: int, is_seen: bool) -> None:
    """All weights of a sleeping model are in host memory."""
    cycle = replace(WELL["asleep"], away=seen(HELD, 0, host))
    fault = (
        f"the server says that {host / MIB:.1f} MiB are in host memory, but the model's weights "
        "are 2.0 MiB"
    )
    assert ([fault] if is_seen else []) == cycle_faults(cycle)


def test_a_server_that_counts_wrongly_is_seen() -> None:
    """A server that reports that nothing was released, or that something is left, is found."""
    asleep, cold = WELL["asleep"], WELL["cold"]
    assert [
        "the server says that 0.0 MiB were given back; it was 66.0 MiB",
        "the server says that 0.0 MiB are in host memory, but the model's weights are 2.0 MiB",
    ] == cycle_faults(replace(asleep, away=seen(HELD)))
    assert ["the server says that an unloaded model holds memory"] == cycle_faults(
        replace(cold, away=seen(HELD, 1))
    )
    assert [
        "the server says that the model holds a different amount of memory than before"
    ] == cycle_faults(replace(cold, after=seen(2 * HELD, HELD + 9 * MIB)))
    assert [
        "the server says that the model holds a different amount of memory than before"
    ] == cycle_faults(replace(cold, after=seen(2 * HELD, HELD, 1)))
    assert [] == cycle_faults(replace(cold, after=seen(2 * HELD, HELD + 7 * MIB)))


@pytest.mark.parametrize(("off", "is_seen"), [(-9, True), (-7, False), (7, False), (9, True)])
@pytest.mark.parametrize("way", ["asleep", "cold"])
def test_a_server_that_tells_too_much_or_too_little_is_seen(
    way: str, off: int, is_seen: bool
) -> None:
    """A report that is off by more than an allocator may round is found."""
    told = HELD + off * MIB
    cycle = WELL[way]
    awake = replace(AWAKE, told_device_bytes=told)

    found = cycle_faults(replace(cycle, before=awake, after=awake))

    fault = f"the server says that {told / MIB:.1f} MiB were given back; it was 66.0 MiB"
    assert ([fault] if is_seen else []) == found


def test_a_model_that_comes_back_larger_is_seen() -> None:
    """A model that comes back larger is wrong; one that comes back smaller gets a note."""
    more, less = seen(2 * HELD + SLACK_BYTES + MIB), seen(2 * HELD - SLACK_BYTES - MIB)
    larger, smaller = (replace(WELL["cold"], after=after) for after in (more, less))

    assert ["9.0 MiB more of the device is in use than before"] == cycle_faults(larger)
    assert [] == notes(larger) == cycle_faults(smaller)
    assert ["9.0 MiB less of the device is in use than before"] == notes(smaller)


class Recorded(Server):
    """The steps of a cycle in their order, without running any."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def _status(self, model: str) -> dict[str, Any]:
        return {"kv_bytes": KV}

    def seen(self, model: str) -> Seen:
        self.did.append(f"look at {model}")
        return AWAKE

    def switch(self, model: str) -> float:
        self.did.append(f"switch to {model}")
        return 0.1

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        self.did.append(path)
        return {}

    def ask(self, model: str, prompts: Sequence[str] = PROMPTS) -> list[Answer]:
        self.did.append(f"ask {model}")
        return []


@pytest.mark.parametrize(
    ("way", "goes"),
    [
        ("parked", []),
        ("asleep", ["/admin/models/llama/sleep"]),
        ("cold", ["/admin/models/llama/unload"]),
    ],
)
def test_a_model_that_is_back_is_asked_before_it_is_looked_at(way: Way, goes: list[str]) -> None:
    """A model that is back answers before it is measured: the first answers take memory, too."""
    server = Recorded()

    server.cycle("llama", way, PROMPTS)

    away = ["look at llama", "switch to qwen", *goes, "look at llama"]
    assert [*away, "switch to llama", "ask llama", "look at llama"] == server.did


def test_a_parked_model_that_moves_is_seen() -> None:
    faults = cycle_faults(replace(WELL["parked"], away=seen(HELD)))
    assert ["66.0 MiB were given back by a model that was only parked"] == faults


def cycles(afters: list[Seen]) -> list[Cycle]:
    return [
        replace(WELL["cold"], model=PAIR[number % 2], after=after)
        for number, after in enumerate(afters)
    ]


def test_growth_is_seen_once_the_first_cycles_are_over() -> None:
    """Growth of the device, of processes' memory and of their resources counts by model."""
    first = [seen(2 * HELD - 50 * MIB, memory_bytes=100 * MIB)] * 2
    steady = [*first, *([AWAKE] * 18)]
    leak = [seen(2 * HELD + n * MIB, descriptors=90 + n // 4) for n in range(20)]
    host = [seen(2 * HELD, memory_bytes=n * HOST_SLACK_BYTES // 10) for n in range(20)]

    assert [] == growth(cycles(steady)).faults()
    assert [
        "memory of the device in use: 16.0 MiB more than in the first cycles",
        "open file descriptors: 4 more than in the first cycles",
    ] == growth(cycles(leak)).faults()
    (fault,) = growth(cycles(host)).faults()
    assert "memory of the processes: 102.4 MiB more than in the first cycles" == fault


def test_what_grows_with_use_and_stops_is_no_growth() -> None:
    """Pools of threads, and their resources, may grow for more than two cycles, then stop."""
    pool = [
        seen(2 * HELD, threads=20 + min(n, 8), descriptors=90 + min(n, 8), memory_bytes=size)
        for n in range(20)
        for size in [500 * MIB + min(n, 8) * HOST_SLACK_BYTES]
    ]
    late = [
        *pool[:18],
        *([replace(pool[19], processes=replace(pool[19].processes, threads=29))] * 2),
    ]

    found = growth(cycles(pool))

    assert ([], 5, 0) == (found.faults(), found.grown["threads"], found.lately["threads"])
    assert ["threads: 6 more than in the first cycles"] == growth(cycles(late)).faults()


@pytest.mark.parametrize("place", range(9))
def test_a_peak_does_not_hide_a_leak(place: int) -> None:
    """A compiler's short peak, in any cycle but the last, is not a leak either."""
    peak = {"threads": 200, "descriptors": 400, "memory_bytes": 3000 * MIB}
    leaking = [
        {"threads": 20 + n, "descriptors": 90 + 10 * n, "memory_bytes": (500 + 40 * n) * MIB}
        for n in range(10)
    ]
    steady = [leaking[0]] * 10

    def found(figures: list[dict[str, int]]) -> list[str]:
        figures = [*figures[:place], peak, *figures[place + 1 :]]
        return growth(cycles([seen(2 * HELD, **each) for each in figures for _ in PAIR])).faults()

    assert ["threads", "open file descriptors", "memory of the processes"] == [
        fault.partition(":")[0] for fault in found(leaking)
    ]
    assert [] == found(steady)


@pytest.mark.parametrize("place", range(4))
def test_a_peak_does_not_hide_a_leak_of_the_device(place: int) -> None:
    figures = [2 * HELD + 4 * n * MIB for n in range(6)]
    figures[place] += 500 * MIB

    found = growth(cycles([seen(used) for used in figures for _ in PAIR]))

    assert ["memory of the device in use"] == [each.partition(":")[0] for each in found.faults()]


WAIT = "import time; time.sleep(600)"


class Family:
    """A process with its resources and its children."""

    def __init__(self, threads: int, *children: Family, is_gone: bool = False) -> None:
        self._threads, self._children, self._is_gone = threads, children, is_gone

    def children(self, recursive: bool) -> list[Family]:
        return list(self._children)

    def num_threads(self) -> int:
        return self._threads

    def num_fds(self) -> int:
        if self._is_gone:
            raise psutil.NoSuchProcess(1)
        return 10

    def memory_full_info(self) -> Any:
        return type("Memory", (), {"uss": MIB, "rss": 100 * MIB})


def test_a_process_that_ends_while_it_is_looked_at_is_passed_over() -> None:
    """A process that ends is skipped, and memory that processes share is counted once."""
    server = Server.__new__(Server)
    server._below = set()
    server._process = Family(3, Family(4), Family(5, is_gone=True))
    assert Processes(2, 7, 20, 2 * MIB) == server.processes()


def test_what_processes_hold_is_what_the_system_tells(tmp_path: Path) -> None:
    """They are the resources of the server itself, here a waiting Python, and of its child."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', WAIT])".replace(
        "WAIT", repr(WAIT)
    )
    server = Server(tmp_path, eager=True, command=(sys.executable, "-c", code))
    try:
        wait_until(lambda: server.processes().processes == 2)
        found = server.processes()
    finally:
        for child in server._process.children():
            child.kill()
        server.end()
    assert found.threads >= 2
    assert found.descriptors >= 4
    assert found.memory_bytes > 2 * MIB


def test_cycles_that_failed_are_not_passed_over() -> None:
    """Failed cycles count: growth over fewer cycles than requested is not a result."""
    assert {"wrong": ["2 of 8 cycles failed"]} == grown(cycles([AWAKE] * 6), 8)


# --- a whole run ---------------------------------------------------------------------------------


class FakeServer:
    """Gives the expected answers. `leaks` bytes stay on the device at each load."""

    def __init__(
        self, leaks: int = 0, gives: int = HELD, model_of: dict[str, str] | None = None
    ) -> None:
        self._leaks, self._gives, self._used = leaks, gives, 2 * HELD
        self._model_of = model_of or {}
        self.is_running = True
        self.cycles: list[tuple[str, str]] = []
        self.answers_from = load()

    def wait(self) -> dict[str, Any]:
        return {}

    def switch(self, model: str) -> float:
        return 0.0

    def ask(self, model: str, prompts: Sequence[str] = PROMPTS) -> list[Answer]:
        return self.answers_from[self._model_of.get(model, model)][: len(prompts)]

    def refused(self, path: str, **body: Any) -> dict[str, Any]:
        return {"status": 400, "body": NO_LEVEL_2}

    def residency(self, model: str) -> str:
        return "parked"

    def cycle(self, model: str, way: Way, prompts: Sequence[str]) -> tuple[Cycle, list[Answer]]:
        before = seen(self._used)
        away = before
        if way != "parked":
            host = 2 * MIB if way == "asleep" else 0
            away = seen(self._used - self._gives, 0, host)
        if way == "cold":
            self._used += self._leaks
        self.cycles.append((model, way))
        cycle = Cycle(way, model, KV, WEIGHTS, before, away, seen(self._used), 0.1)
        return cycle, self.ask(model, prompts)


NO_LEVEL_2 = (
    '{"error":{"message":"model \'qwen\' has no sleep level 2 on this platform; levels: 1",'
    '"type":"invalid_request_error","param":"level","code":"invalid_request"}}'
)


@pytest.mark.parametrize(
    ("status", "body", "after", "fault"),
    [
        (200, "", "parked", "a sleep of level 2 is not refused"),
        (
            400,
            '{"message": "model \'qwen\' is not loaded"}',
            "parked",
            "refused for another reason",
        ),
        (503, NO_LEVEL_2, "parked", "a sleep of level 2 is not refused"),
        (400, NO_LEVEL_2, "asleep", "must change nothing, but qwen is asleep"),
    ],
)
def test_only_our_own_refusal_of_level_2_is_one(
    tmp_path: Path, status: int, body: str, after: str, fault: str
) -> None:
    """Only our refusal of level 2 counts, and only if the model does not sleep after it."""

    class Other(FakeServer):
        now = "parked"

        def refused(self, path: str, **_: Any) -> dict[str, Any]:
            self.now = after
            return {"status": status, "body": body}

        def residency(self, model: str) -> str:
            return self.now

    results = Results(tmp_path / "out.jsonl")
    found = Kind(results, Other(), "eager").no_level_2()  # type: ignore[arg-type]  # see `ran`

    assert fault in found["wrong"][0]


def test_the_refusal_of_level_2_is_the_products() -> None:
    """The product refuses level 2, with the expected message, where only level 1 is known."""
    footprint = SimpleNamespace(usage={Residency.ASLEEP: None})
    qwen = SimpleNamespace(alias="qwen", engine=SimpleNamespace(footprint=footprint))
    with pytest.raises(InvalidRequest) as refused:
        refuse_unknown_level(qwen, 2)  # type: ignore[arg-type]  # asks no more
    assert str(refused.value) in NO_LEVEL_2
    assert program.NO_LEVEL_2 in str(refused.value)


def ran(server: FakeServer, path: Path) -> list[str]:
    """Return the names of the checks that failed."""
    results = Results(path)
    Kind(results, server, "eager").run()  # type: ignore[arg-type]  # has all that is asked
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert results.all_well == all(line["ok"] for line in lines)
    return [line["check"] for line in lines if not line["ok"]]


def test_twenty_cycles_of_each_kind_are_made(tmp_path: Path) -> None:
    """Twenty cycles are made, the models in turn, and a correct server passes every check."""
    server = FakeServer()

    assert [] == ran(server, tmp_path / "out.jsonl")
    assert [(model, way) for way in WELL for model in PAIR * 10] == server.cycles


def test_the_rehearsal_asks_for_all_that_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rehearsal expects every check by its name, in its order."""

    class Whole(FakeServer):
        def stop(self) -> dict[str, Any]:
            return {}

        def end(self) -> int:
            return 1

    path = tmp_path / "out.jsonl"
    monkeypatch.setattr(program, "check_packages", lambda: None)
    monkeypatch.setattr(facts, "DEVICE", of_256_mib((1, 257, 1), (1, 257, 257)))
    monkeypatch.setattr(facts, "PLATFORM", "print('hpu vllm_gaudi.platform.HpuPlatform')")
    monkeypatch.setattr(program, "refusal", lambda _: {})
    monkeypatch.setattr(program, "Server", lambda *_, **__: Whole())

    assert 0 == program.main([str(path), "--eager-only", "--cycles", str(test_gaudi_check.CYCLES)])

    checks = [json.loads(line)["check"] for line in path.read_text().splitlines()]
    assert test_gaudi_check.CHECKS == checks


def keys_of(value: Any) -> set[str]:
    """Return all keys in it, at every depth."""
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


HELD_BY_A_MODEL = {"device_bytes": 1, "host_bytes": 1}
MODEL = {"residency": "parked", "weights_bytes": 1, "kv_bytes": 1, "held": HELD_BY_A_MODEL}
STATUS = {
    "models": dict.fromkeys(PAIR, MODEL),
    "memory": {
        "device": {"budget": 1, "used": 1, "base": 1, "others": 1},
        "host": {"budget": 1, "used": 1},
    },
}
"""How the server's start is reported."""


def checked_by(name: str, path: Path) -> list[dict[str, Any]]:
    """Return each line of the file of a run by a user with this name."""

    class Whole(FakeServer):
        def wait(self) -> dict[str, Any]:
            return STATUS | {"device": asdict(AWAKE.device)}

        def stop(self) -> dict[str, Any]:
            return {}

        def end(self) -> int:
            return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGNAME", name)
        patch.setenv("VLLM_API_KEY", name)
        patch.setattr(program, "check_packages", lambda: None)
        patch.setattr(facts, "DEVICE", of_256_mib((1, 257, 1), (1, 257, 257)))
        patch.setattr(facts, "PLATFORM", "print('hpu vllm_gaudi.platform.HpuPlatform')")
        patch.setattr(program, "refusal", lambda _: {"told": "", "wrong": []})
        patch.setattr(program, "Server", lambda *_, **__: Whole())
        path.unlink(missing_ok=True)
        assert 0 == program.main([str(path), "--eager-only", "--cycles", "6"])
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return a run by a user whose name is not a word of the results."""
    return checked_by("mmueller", tmp_path_factory.mktemp("usual") / "out.jsonl")


@pytest.mark.parametrize("name", ["ok", "memory", "allocated", "wrong", "follows", "check"])
def test_names_that_are_words_of_the_results_change_nothing(
    usual: list[dict[str, Any]], tmp_path: Path, name: str
) -> None:
    """A user or a secret may have such a name: verdicts stay the same, and the file readable."""
    shape = [(line["check"], line["ok"], keys_of(line)) for line in usual]
    lines = checked_by(name, tmp_path / "out.jsonl")
    assert shape == [(line["check"], line["ok"], keys_of(line)) for line in lines]


def test_all_keys_of_the_results_are_kept_as_they_are(usual: list[dict[str, Any]]) -> None:
    """Keys stay even if a user has their name. Only names of variables may identify a user."""
    for line in usual:
        line.pop("variables", None)
    keys = keys_of(usual)
    assert {"memory_allocated", "grown", "residency", "steps_compared", "vllm-gaudi"} < keys

    lost = [key for key in keys if key not in Blank({"LOGNAME": key, "TOKEN": key}).all({key: 1})]

    assert [] == lost
    assert {"<user>": 1} == Blank({"LOGNAME": "mmueller"}).all({"mmueller": 1})


class Drifting(FakeServer):
    """Its logarithmic probabilities are off by these amounts, at first and after the cycles."""

    def __init__(self, first: float, later: float) -> None:
        super().__init__()
        self._off = {0: first}
        self._later = later

    def ask(self, model: str, prompts: Sequence[str] = PROMPTS) -> list[Answer]:
        off = self._off.get(len(self.cycles), self._later)
        return [
            Answer([[(token, value - off) for token, value in step] for step in each.steps])
            for each in super().ask(model, prompts)
        ]


def test_answers_of_each_cycle_are_compared_with_the_expected_and_the_first(tmp_path: Path) -> None:
    """Answers that drift, or change although they are close to the expected ones, are found."""
    path = tmp_path / "out.jsonl"

    assert [] == ran(Drifting(0.2, 0.4), path)
    assert 60 == len(ran(Drifting(0.4, 0.6), path))
    assert "different than before" not in path.read_text()
    assert 60 == len(ran(Drifting(-0.2, 0.2), path))
    assert 60 == path.read_text().count('["different than before: prompt 0: step 0: token ')


def test_a_server_that_has_died_is_not_asked_on_and_on(tmp_path: Path) -> None:
    """A dead server gets no more requests; the missing cycles are reported."""

    class Dies(FakeServer):
        def cycle(self, model: str, way: Way, prompts: Sequence[str]) -> tuple[Cycle, list[Answer]]:
            self.is_running = False
            raise RuntimeError("Connection refused")

    wrong = ran(Dies(), tmp_path / "out.jsonl")

    assert [
        "eager: parked 1 llama",
        "eager: parked: growth",
        "eager: asleep: growth",
        "eager: cold: growth",
    ] == wrong


def test_a_small_leak_is_found_by_what_it_comes_to(tmp_path: Path) -> None:
    """A leak of a MiB at each load is found by its sum."""
    assert ["eager: cold: growth"] == ran(FakeServer(leaks=MIB), tmp_path / "out.jsonl")


def test_a_device_that_computes_nonsense_is_not_well(tmp_path: Path) -> None:
    """Nonsense is found even if it is always the same; nothing more is tried then."""
    server = FakeServer(model_of={"llama": "qwen"})
    assert ["eager: llama"] == ran(server, tmp_path / "out.jsonl")
    assert [] == server.cycles


def test_a_sleep_that_gives_nothing_back_is_not_well(tmp_path: Path) -> None:
    """Each sleep that releases nothing fails; parked models pass."""
    wrong = ran(FakeServer(gives=0), tmp_path / "out.jsonl")
    assert 40 == len(wrong)
    assert not [name for name in wrong if "parked" in name]
