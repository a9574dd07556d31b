"""Build the stand-in for a Gaudi: `PYTHON -m tests.gaudi_standin.build FOLDER`.

PYTHON is one that has torch, whose headers its wheel brings. Needs g++, and a minute.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
SITE = HERE / "site"
LIBRARY = "libhpu.so"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-D_GLIBCXX_USE_CXX11_ABI=1")


class BuildError(Exception):
    """The stand-in can't be built; the message says why and what to do."""


def torch_folder() -> Path:
    """Find torch without importing it, which may look for this library. Raises `BuildError`."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            f"{sys.executable} has no torch; use the Python of an environment with vLLM 0.26.0"
        )
    return Path(spec.origin).parent


def build(folder: Path) -> None:
    """Make the library in a folder, if its source is newer. Raises `BuildError`."""
    to, source = folder / LIBRARY, HERE / "device.cpp"
    if to.exists() and to.stat().st_mtime >= source.stat().st_mtime:
        return
    if shutil.which("g++") is None:
        raise BuildError("g++ is missing; install it (Debian, Ubuntu: apt-get install g++)")
    torch = torch_folder()
    folder.mkdir(parents=True, exist_ok=True)
    made = to.with_name(f".{to.name}")
    include = (torch / "include", torch / "include/torch/csrc/api/include")
    command = ["g++", *FLAGS, *(f"-I{path}" for path in include), str(source), "-o", str(made)]
    command += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", "-Xlinker", "-rpath"]
    command += ["-Xlinker", str(torch / "lib")]  # -Wl would split it at commas
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"g++ has failed:\n{done.stderr.strip()}")
    made.replace(to)  # at once: a program may have the old one loaded


def environment(folder: Path, others: Mapping[str, str]) -> dict[str, str]:
    """Return variables that lead a program to the stand-in as Intel's runtime; plus `others`."""
    paths = [str(SITE), others.get("PYTHONPATH", "")]
    return {
        "FAKEHPU_LIBRARY": str(folder / LIBRARY),
        "PYTHONPATH": ":".join(path for path in paths if path),
    }


def main() -> int:
    try:
        build(Path(sys.argv[1]).resolve())
    except BuildError as error:
        print(f"stand-in: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
