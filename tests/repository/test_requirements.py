"""The lists in requirements/: every line has hashes; and `make hashes`, which writes them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.hash_requirements import (
    File,
    HashError,
    Indexes,
    changes,
    files_for,
    hash_of,
    main,
    read_page,
    rewritten,
    with_other_builds,
)
from tools.setup import LISTS, Pin, parse

ALL_LISTS = sorted(LISTS.glob("*.txt"))
A, B, C = ("a" * 64, "b" * 64, "c" * 64)
DIGEST_OF_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def names(files: list[File]) -> list[str]:
    return [file.name for file in files]


def some(*filenames: str) -> list[File]:
    return [File(name, f"https://index.invalid/{name}", A) for name in filenames]


@pytest.mark.parametrize("path", ALL_LISTS, ids=lambda path: path.name)
def test_every_line_of_every_list_has_hashes(path: Path) -> None:
    """Each line has an exact version and SHA-256 hashes in hexadecimal, each once."""
    pins = parse(path.read_text())

    assert pins
    assert [] == [pin.requirement for pin in pins if not pin.hashes]
    assert [] == [pin.requirement for pin in pins if len(set(pin.hashes)) < len(pin.hashes)]
    assert [] == [it for pin in pins for it in pin.hashes if not re.fullmatch("[0-9a-f]{64}", it)]
    assert [] == [
        pin.requirement for pin in pins if not re.match(r"[\w.-]+==[^\s*]+( ;|$)", pin.requirement)
    ]


@pytest.mark.parametrize("path", ALL_LISTS, ids=lambda path: path.name)
def test_lists_are_as_the_tool_writes_them(path: Path) -> None:
    """Lists are as the tool writes them, so all tools read the same and diffs show real changes."""
    text = path.read_text()

    assert text == rewritten(text, {pin.requirement: pin.hashes for pin in parse(text)})


@pytest.mark.parametrize("path", ALL_LISTS, ids=lambda path: path.name)
def test_lists_name_no_place_to_download_from(path: Path) -> None:
    """Lists name no place to download from: that is up to pip's configuration."""
    assert re.findall(r"\w+://|^\s*--(?!hash=)", path.read_text(), re.MULTILINE) == []


def test_one_package_has_the_same_hashes_in_all_lists() -> None:
    """A package has the same hashes in all lists that have it in the same version."""
    seen: dict[str, tuple[str, ...]] = {}
    pins = [pin for path in ALL_LISTS for pin in parse(path.read_text())]

    assert [] == [it for it in pins if seen.setdefault(it.requirement, it.hashes) != it.hashes]


def test_a_list_is_read_with_comments_markers_and_hashes() -> None:
    """A list is read with comments, markers and hashes, and a pin is written as it was read."""
    text = (
        '# why\nsix==1.17.0 ; python_version >= "3.12" \\\n'
        f"    --hash=sha256:{A} \\\n    --hash=sha256:{B}\n"
    )

    (pin,) = parse(text)

    assert Pin('six==1.17.0 ; python_version >= "3.12"', (A, B)) == pin
    assert f"# why\n{pin}\n" == text


def test_rewriting_a_list_keeps_comments_and_order() -> None:
    """Rewriting a list replaces or adds hashes, and keeps comments and order."""
    text = f"# first\nb==1 \\\n    --hash=sha256:{A}\n# second\na==2\n"

    new = rewritten(text, {"b==1": (B,), "a==2": (C, A)})

    assert new == (
        f"# first\nb==1 \\\n    --hash=sha256:{B}\n# second\n"
        f"a==2 \\\n    --hash=sha256:{C} \\\n    --hash=sha256:{A}\n"
    )


def test_a_json_page_of_an_index_is_read() -> None:
    """A JSON page (PEP 691) is read; addresses may be relative, and other hashes do not count."""
    page = (
        '{"meta": {"api-version": "1.1"}, "name": "demo", "files": ['
        '{"filename": "demo-1.0-py3-none-any.whl", "url": "../../f/demo.whl",'
        f' "hashes": {{"sha256": "{A}"}}}},'
        '{"filename": "demo-1.0.tar.gz", "url": "https://h.invalid/d", "hashes": {"md5": "0"}}]}'
    )

    files = read_page(page, "application/vnd.pypi.simple.v1+json", "file:///i/simple/demo/")

    assert files == [
        File("demo-1.0-py3-none-any.whl", "file:///i/f/demo.whl", A),
        File("demo-1.0.tar.gz", "https://h.invalid/d", None),
    ]


def test_an_html_page_of_an_index_is_read() -> None:
    """An HTML page of an index (PEP 503) is read: the hash follows the address, perhaps escaped."""
    page = (
        '<!DOCTYPE html><html><body><a href="../">up</a>'
        f'<a href="../../f/demo-1.0%2Bcpu-py3-none-any.whl#sha256={A}" data-yanked="">any text</a>'
        '<a href="demo-1.0.tar.gz#md5=0">demo</a></body></html>'
    )

    files = read_page(page, "text/html; charset=utf-8", "file:///mirror/simple/demo/")

    assert files[1:] == [
        File(
            "demo-1.0+cpu-py3-none-any.whl", "file:///mirror/f/demo-1.0%2Bcpu-py3-none-any.whl", A
        ),
        File("demo-1.0.tar.gz", "file:///mirror/simple/demo/demo-1.0.tar.gz", None),
    ]


def test_only_files_that_a_supported_machine_installs_count() -> None:
    """Only files for glibc Linux on x86-64 or Arm, CPython 3.11 to 3.14 and that version count."""
    good = [
        "demo-1.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "demo-1.0-cp314-cp314-manylinux_2_28_aarch64.whl",
        "demo-1.0-cp38-abi3-manylinux_2_17_x86_64.whl",
        "demo-1.0-py2.py3-none-any.whl",
    ]
    others = [
        "demo-1.0-cp310-cp310-manylinux_2_17_x86_64.whl",
        "demo-1.0-cp315-abi3-manylinux_2_17_x86_64.whl",
        "demo-1.0-cp314-cp314t-manylinux_2_28_x86_64.whl",
        "demo-1.0-cp311-cp311-musllinux_1_2_x86_64.whl",
        "demo-1.0-cp311-cp311-macosx_11_0_arm64.whl",
        "demo-1.0-cp311-cp311-win_amd64.whl",
        "demo-1.0-pp311-pypy311_pp73-manylinux_2_17_x86_64.whl",
        "demo-1.0-py2-none-any.whl",
        "demo-1.1-py3-none-any.whl",
        "other-1.0-py3-none-any.whl",
        "demo-1.0.tar.gz",
        "demo-1.0.exe",
    ]

    assert sorted(good) == names(files_for(Pin("demo==1.0", ()), some(*good, *others)))


def test_a_source_archive_counts_where_a_machine_has_no_wheel() -> None:
    """Where a machine has no wheel the source archive counts, unless a marker excludes it."""
    files = some("demo-1.0-py3-none-manylinux1_x86_64.whl", "demo-1.0.tar.gz")

    everywhere = files_for(Pin("demo==1.0", ()), files)
    on_one = files_for(Pin('demo==1.0 ; platform_machine == "x86_64"', ()), files)

    assert ["demo-1.0-py3-none-manylinux1_x86_64.whl", "demo-1.0.tar.gz"] == names(everywhere)
    assert ["demo-1.0-py3-none-manylinux1_x86_64.whl"] == names(on_one)


def index(folder: Path, name: str, **files: str) -> Path:
    """Make an index of HTML pages in a folder, with one package: the SHA-256 of each file."""
    page = folder / name / "index.html"
    page.parent.mkdir(parents=True)
    anchors = [f'<a href="{it}.whl#sha256={digest}">{it}</a>' for it, digest in files.items()]
    page.write_text("\n".join(anchors))
    return folder


WHEEL = "demo-1.0-py3-none-any"
DEMO = Pin("demo==1.0", ())


def test_hashes_come_from_where_pip_looks_first(tmp_path: Path) -> None:
    """Hashes come from the first index that pip uses; an extra index's other files are ignored."""
    first = index(tmp_path / "1", "demo", **{WHEEL: A})
    extra = index(tmp_path / "2", "demo", **{WHEEL: A, "demo-1.0-1-py3-none-any": B})

    places = Indexes({"index-url": str(first), "extra-index-url": extra.as_uri()})

    assert (A,) == places.hashes(DEMO)


def test_two_indexes_that_differ_about_a_file_are_an_error(tmp_path: Path) -> None:
    """If two indexes differ about a file, the error has no address, which may hold a password."""
    first = index(tmp_path / "1", "demo", **{WHEEL: A})
    extra = index(tmp_path / "2", "demo", **{WHEEL: B})

    with pytest.raises(HashError, match=f"^{WHEEL}.whl: two of pip's indexes give") as caught:
        Indexes({"index-url": first.as_uri(), "extra-index-url": str(extra)}).hashes(DEMO)

    assert str(tmp_path) not in str(caught.value)


def test_files_in_a_folder_are_read_for_their_hash(tmp_path: Path) -> None:
    """A folder for find-links has no page, so its wheels are read for their hashes."""
    (tmp_path / f"{WHEEL}.whl").touch()

    hashes = Indexes({"no-index": "1", "find-links": str(tmp_path)}).hashes(DEMO)

    assert (DIGEST_OF_EMPTY,) == hashes


def test_a_version_that_no_index_has_is_an_error(tmp_path: Path) -> None:
    """A version that no index has is an error, and the lists stay as they were."""
    with pytest.raises(HashError, match=r"^demo==1\.0: no index .* has a file for Linux$"):
        Indexes({"index-url": str(tmp_path)}).hashes(DEMO)


def test_a_file_without_a_hash_is_an_error() -> None:
    """A file without a hash is an error: it would have to be downloaded and trusted unseen."""
    with pytest.raises(HashError, match=r"^demo\.whl: its index has no SHA-256 for it$"):
        hash_of(File("demo.whl", "index:demo.whl", None))


def test_builds_that_are_on_no_common_index_keep_their_hashes() -> None:
    """Builds on no common index keep their hashes: a folder may lack those of other machines."""
    assert (A, B, C) == with_other_builds(Pin("torch==1.0+cpu", (A, B)), (B, C))
    assert (B, C) == with_other_builds(Pin("torch==1.0", (A, B)), (B, C))


def test_changed_hashes_of_one_version_are_told() -> None:
    """A changed hash for one version is reported, because published files do not change."""
    assert changes(Pin("demo==1.0", (A, B)), (B, C)) == (
        "demo==1.0: 1 hashes removed, 1 new, for the same version"
    )
    assert changes(Pin("demo==1.0", ()), (A,)) is None
    assert changes(Pin("demo==1.0", (A, B)), (B, A)) is None


def only_index(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Configure pip so that it looks nowhere else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", folder.as_uri())
    for option in ("FIND_LINKS", "EXTRA_INDEX_URL", "NO_INDEX", "CERT", "PROXY"):
        monkeypatch.delenv(f"PIP_{option}", raising=False)


def test_the_command_writes_lists_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command rewrites lists from the indexes in pip's configuration, and prints no address."""
    place = index(tmp_path / "index", "demo", **{WHEEL: A})
    only_index(monkeypatch, place)
    (listed := tmp_path / "list.txt").write_text("# why\ndemo==1.0\n")

    assert main([str(listed)]) == 0

    assert f"# why\ndemo==1.0 \\\n    --hash=sha256:{A}\n" == listed.read_text()
    assert capsys.readouterr().out == "hashes: 1 packages in 1 lists\n"


def test_a_list_stays_as_it_was_where_a_hash_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list stays as it was if a hash cannot be had; one line names it."""
    only_index(monkeypatch, tmp_path / "none")
    (listed := tmp_path / "list.txt").write_text("demo==1.0\n")

    assert main([str(listed)]) == 1

    assert listed.read_text() == "demo==1.0\n"
    assert capsys.readouterr().err == (
        "hashes: error: demo==1.0: no index that pip is configured with has a file for Linux\n"
    )


def test_a_build_that_no_index_has_keeps_its_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A build on no index keeps its hashes, and the other lists are still written."""
    only_index(monkeypatch, index(tmp_path / "index", "demo", **{WHEEL: A}))
    kept = f"torch==1.0+cpu \\\n    --hash=sha256:{B} \\\n    --hash=sha256:{C}\n"
    (listed := tmp_path / "list.txt").write_text(f"{kept}demo==1.0\n")

    assert main([str(listed)]) == 0

    assert f"{kept}demo==1.0 \\\n    --hash=sha256:{A}\n" == listed.read_text()
    assert capsys.readouterr().out == "hashes: 2 packages in 1 lists\n"


def test_a_build_without_hashes_that_no_index_has_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A build without hashes that no index has is an error: there is nothing to keep."""
    only_index(monkeypatch, tmp_path / "none")
    (listed := tmp_path / "list.txt").write_text("torch==1.0+cpu\n")

    assert main([str(listed)]) == 1

    assert "hashes: error: torch==1.0+cpu: no index" in capsys.readouterr().err
