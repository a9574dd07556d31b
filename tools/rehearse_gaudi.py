"""Rehearse a Gaudi on a machine without one: `make rehearse-gaudi PLUGIN=DIR`.

DIR is a copy of the vLLM Gaudi plugin at v0.26.0, which is not part of this repository. It is
copied, installed into an environment of its own on top of the one with which CUDA is rehearsed, and
run over the stand-in for Intel's runtime (tests/gaudi_standin). What the tests find is written to a
file of JSON lines: counts and bytes, never times, of which the stand-in knows nothing.

Each part has a limit of time, and all of them are run, whatever the results of the first ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.gaudi_standin.build import LIBRARY, environment as found_instead
from tools import rehearse_cuda
from tools.rehearsal import (
    OFFLINE,
    Part,
    RehearsalError,
    alone_in,
    check_paths,
    chosen,
    facts_of,
    own_surroundings,
    rehearse_all,
)
from tools.setup import (
    ROOT,
    SetupError,
    install,
    missing,
    output_of,
    pip_install,
    read,
    run,
    step,
)

VERSION = "0.26.0"
"""The version of the plugin, and of the vLLM that it is for."""

PACKAGE = "vllm_gaudi"
TREE = "b193392bf8bd249aa30f8cfe2e928aaa1133fca1"
"""Git's name of all that is in the plugin's package at that version, which is the same in a clone
and in an archive: `git rev-parse v0.26.0:vllm_gaudi`."""

FILES = {
    "pyproject.toml": "cf3aa24fea17f658f4e6e595a91f71442a1551a7",
    "setup.py": "b021262e5f1a82cbdf432c0792b420ee33740205",
    "requirements.txt": "0b587a4958e15c34e9855a807a2b630de2761af7",
    "pytest_compat.py": "bd33354f1ac18783a0cb7f4f58f51acdb1fe26f6",
    "README.md": "fe274133783c36d1ef073733c77dca93e2049505",
}
"""What an installation reads besides the package, and git's names of it. Nothing else is copied."""

COPY, NEW_COPY = "plugin", "plugin.new"
"""The plugin's copies in the rehearsal's folder. The old one stays until the new one is whole."""

COMPILED, VERSION_FILE = "__pycache__", "_version.py"
"""What an installation leaves in the package: the one in any folder, the other at its top."""

FOLDER, EMPTY = "40000", "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
"""Git's mode of a folder, and its name of an empty one. It never has that in another: a checkout
leaves folders behind in which there is compiled code alone."""

STANDIN, BASE_NOTE = "standin", "base.json"

LIST = "rehearse-gaudi.txt"

FLAGS = ("-p", "no:vllm_gaudi_compat", "-W", "ignore")
"""For pytest: the plugin's own does not belong to these tests, and it warns a lot."""

PARTS = (
    Part("the device", "tests/host/test_gaudi_device.py", 300),
    Part("servers, every residency", "tests/integration/test_gaudi_server.py", 2700),
    Part("starts that cannot work", "tests/integration/test_gaudi_refusals.py", 600),
    Part("quantised and other models", "tests/integration/test_gaudi_quantisation.py", 600),
    Part("other devices and models", "tests/integration/test_gaudi_kinds.py", 1200),
    Part("the check for a Gaudi", "tests/integration/test_gaudi_check.py", 900),
)


def named_plugin(name: str) -> Path:
    """Return PLUGIN. Raises `RehearsalError` if there is no name, which `make` leaves empty."""
    if not name:
        raise RehearsalError(
            f"PLUGIN is missing; clone vllm-project/vllm-gaudi at v{VERSION} and name its folder: "
            "make rehearse-gaudi PLUGIN=DIR"
        )
    return Path(name)


def check_plugin(folder: Path) -> None:
    """Raise `RehearsalError` if it is not the plugin, or is not this version of it, unchanged."""
    if not (folder / PACKAGE / "platform.py").is_file():
        raise RehearsalError(
            f"PLUGIN is '{folder}', and there is no {PACKAGE}/platform.py in it; clone "
            f"vllm-project/vllm-gaudi at v{VERSION} and name its folder"
        )
    for name, wanted in ((PACKAGE, TREE), *FILES.items()):
        found = name_of(folder / name)
        if found != wanted:
            is_now = "missing" if found is None else f"{found[:12]} to git"
            raise RehearsalError(
                f"PLUGIN is '{folder}', whose {name} is {is_now}, but that of v{VERSION} is "
                f"{wanted[:12]}; check out v{VERSION} there, without local changes"
            )


def name_of(path: Path) -> str | None:
    """Return git's name; None where there is nothing, or nothing that git could have."""
    entry = entry_of(path, {VERSION_FILE})
    return None if entry is None else entry[1]


def check_apart(folder: Path, plugin: Path) -> None:
    """Raise `RehearsalError` if renewing the copy would remove PLUGIN, or copy it into itself."""
    named = plugin.resolve()
    for copy in (folder / COPY, folder / NEW_COPY):
        its = copy.resolve()
        if its == named or its in named.parents or named in its.parents:
            raise RehearsalError(
                f"PLUGIN is '{plugin}', but its copy would be {copy}, which is removed first; "
                "clone it outside of that folder, and name the clone"
            )


def tree(folder: Path, without: Collection[str] = ()) -> str:
    """Return git's name of a folder's contents: SHA-1, in hex, of its entries (gitformat-pack(5)).

    Raises:
        RehearsalError: there is something in it that git has no name for.
    """
    entries = []
    for path in folder.iterdir():
        if path.name == COMPILED or path.name in without:
            continue
        if (entry := entry_of(path)) is None:
            raise RehearsalError(
                f"'{path}' is not a file, link or folder, so not part of the plugin; remove it"
            )
        mode, name = entry
        if entry == (FOLDER, EMPTY):
            continue
        # Git sorts the names of folders as if they ended in a slash.
        order = path.name + "/" * (mode == FOLDER)
        content = f"{mode} {path.name}\0".encode() + bytes.fromhex(name)
        entries.append((order.encode(), content))
    return digest("tree", b"".join(content for _, content in sorted(entries)))


def entry_of(path: Path, without: Collection[str] = ()) -> tuple[str, str] | None:
    """Return git's mode and name; None where there is nothing, or nothing that git could have."""
    if path.is_symlink():
        return "120000", digest("blob", os.fsencode(path.readlink()))
    if path.is_dir():
        return FOLDER, tree(path, without)
    if path.is_file():
        mode = "100755" if path.stat().st_mode & 0o100 else "100644"
        return mode, digest("blob", path.read_bytes())
    return None


def digest(kind: str, content: bytes) -> str:
    head = f"{kind} {len(content)}\0".encode()
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()


def base_environment(named: Path | None) -> Path:
    """Return the Python of the environment below: the named one, or CUDA's, made if missing."""
    if named is None:
        with alone_in(rehearse_cuda.FOLDER):  # its rehearsal may be making it
            return rehearse_cuda.make_environment(rehearse_cuda.FOLDER / rehearse_cuda.ENVIRONMENT)
    return named.absolute() / "bin/python"


@dataclass(frozen=True, slots=True)
class Base:
    """The environment below. Ours is made for one, and for the torch that it had."""

    python: str
    version: str
    site: str
    """Where it has its packages."""
    vllm: Mapping[str, str]
    """vLLM's builds, with their versions."""
    torch: str | None
    """Its version, with its build."""


DESCRIBE = f"""
import importlib.metadata as m, json, platform, sysconfig
found = {{d.name: d.version for d in m.distributions()}}
vllm = {{name: found[name] for name in ("{rehearse_cuda.OTHER_BUILD}", "vllm") if name in found}}
print(json.dumps({{"version": platform.python_version(), "site": sysconfig.get_path("purelib"),
                  "vllm": vllm, "torch": found.get("torch")}}))
"""


def check_base(python: Path) -> Base:
    """Return the environment below. Raises `RehearsalError` if it is none, or has another vLLM."""
    remedy = "name another one (ENVIRONMENT=DIR), or none to make a new one"
    if not python.exists():
        raise RehearsalError(f"{python} is missing; {remedy}")
    try:
        base = Base(str(python), **json.loads(output_of(python, "-c", DESCRIBE)))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it does not answer"
        raise RehearsalError(f"{python} is not a working Python: {why}; {remedy}") from error
    if other := base.vllm.get(rehearse_cuda.OTHER_BUILD):
        raise RehearsalError(
            f"{python} has {rehearse_cuda.OTHER_BUILD} {other}, vLLM's build for the CPU, which "
            f"uses the CPU if it finds no Gaudi; {remedy}"
        )
    vllm = base.vllm.get("vllm")
    if vllm is None or vllm.partition("+")[0] != VERSION:
        raise RehearsalError(
            f"{python} has {f'vllm {vllm}' if vllm else 'no vLLM'}, but the plugin is for vLLM "
            f"{VERSION}; {remedy}"
        )
    return base


def make_environment(folder: Path, base: Path, plugin: Path) -> Path:
    """Make it, or add what is missing in an existing one; return its Python.

    One that was made on another base, or does not answer, is made again: it would look for packages
    of another Python, and the stand-in is linked to another torch.
    """
    below, environment = check_base(base), folder / "environment"
    python, note = environment / "bin/python", folder / BASE_NOTE
    described = json.dumps(asdict(below)) + "\n"
    if environment.resolve() in (base.parent.parent.resolve(), *base.resolve().parents):
        raise RehearsalError(
            f"ENVIRONMENT is '{environment}', which the rehearsal makes on top of another one; "
            "name that one"
        )
    site = site_of(python)
    if site is None or not note.exists() or note.read_text(encoding="utf-8") != described:
        if environment.exists() and not (environment / "pyvenv.cfg").is_file():
            raise RehearsalError(f"'{environment}' was not made by the rehearsal; move it away")
        note.unlink(missing_ok=True)
        (folder / STANDIN / LIBRARY).unlink(missing_ok=True)
        with step("environment"):
            if not run(base, "-m", "venv", "--clear", "--without-pip", environment):
                raise RehearsalError(f"{base} cannot make an environment, for the reason above")
        site = site_of(python)
    if site is None:
        raise RehearsalError(f"{python} does not answer; remove {environment}, and try again")
    (site / "below.pth").write_text(f"{below.site}\n", encoding="utf-8")
    note.write_text(described, encoding="utf-8")
    wanted = missing(python, {pin.name: pin for pin in read(LIST)})
    with step("what the plugin imports"):
        if wanted and not install(pip_install(python), wanted):
            raise RehearsalError("packages could not be installed, for the reason above")
    with step("the plugin, from a copy"):
        command = (*pip_install(python), "--no-build-isolation", copied(plugin, folder))
        settings = {"SETUPTOOLS_SCM_PRETEND_VERSION": VERSION, "PYTHONWARNINGS": "ignore"}
        if not run(*command, env=settings):
            raise RehearsalError("the plugin could not be installed, for the reason above")
    return python


def site_of(python: Path) -> Path | None:
    """Return where a Python has its packages; None if it is missing, or does not answer."""
    with suppress(OSError):
        said = output_of(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        return Path(said.strip()) if said.strip() else None
    return None


def copied(plugin: Path, folder: Path) -> Path:
    """Make the copy again, of what was checked and nothing else; return it.

    Raises:
        RehearsalError: before anything is removed.
    """
    check_apart(folder, plugin)
    copy, new = folder / COPY, folder / NEW_COPY
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(parents=True)
    ignored = shutil.ignore_patterns(COMPILED, VERSION_FILE)
    shutil.copytree(plugin / PACKAGE, new / PACKAGE, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copyfile(plugin / name, new / name)
    if copy.exists():
        shutil.rmtree(copy)
    return new.rename(copy)


def build(python: Path, folder: Path) -> None:
    """Build the stand-in. Raises `RehearsalError`, whose cause an earlier line has reported."""
    with step("stand-in for Intel's runtime"):
        command = [str(python), "-m", "tests.gaudi_standin.build", str(folder)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            raise RehearsalError("the stand-in could not be built, for the reason above")


def surroundings(folder: Path, results: Path) -> dict[str, str]:
    """Return the environment variables of the tests."""
    return {
        **own_surroundings(),
        **OFFLINE,
        **found_instead(folder / STANDIN, {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}),
        "REHEARSAL_RESULTS": str(results),
        "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT", str(folder / "cache")),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make rehearse-gaudi", description=__doc__)
    parser.add_argument("--plugin", required=True, help="the plugin's folder")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/rehearse-gaudi")
    parser.add_argument(
        "--environment", type=Path, help="with vLLM 0.26.0; default: that of make rehearse-cuda"
    )
    parser.add_argument("tests", nargs="*", help="only these files; default: all parts")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    results = folder / "rehearsal.jsonl"
    environment = surroundings(folder, results)
    try:
        parts = chosen(PARTS, args.tests)
        check_paths(ROOT, folder)
        plugin = named_plugin(args.plugin)
        check_plugin(plugin)
        check_apart(folder, plugin)
        base = base_environment(args.environment)
        check_paths(Path(check_base(base).site))
        with alone_in(folder):
            python = make_environment(folder, base, plugin.resolve())
            build(python, folder / STANDIN)
            facts = facts_of(python, ("vllm", "vllm-gaudi", "transformers"), environment)
            facts["plugin"] = f"v{VERSION}, its {PACKAGE} {TREE}"
            return rehearse_all(python, parts, environment, results, facts, FLAGS)
    except (SetupError, RehearsalError, OSError) as error:
        print(f"rehearsal: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
