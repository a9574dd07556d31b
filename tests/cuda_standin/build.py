"""Build the stand-in for a CUDA device: `PYTHON -m tests.cuda_standin.build FOLDER`.

PYTHON is one that has torch's build for CUDA 13 and triton: their wheels bring NVIDIA's headers and
the real libcudart, whose list of functions is the list that is needed. What is not written in C
here gets a function that does nothing. Needs gcc and nm (binutils).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
DRIVER, RUNTIME, MANAGEMENT = "libcuda.so.1", "libcudart.so.13", "libnvidia-ml.so.1"
MULTIPLICATIONS = "libstandin-cublas.so"

FLAGS = (
    "-O1",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-missing-field-initializers",
)
DECLARED = re.compile(r"\b(cu[A-Z]\w*)\s*\(")
RENAMED = re.compile(r"#define\s+cu[A-Z]\w*\s+.*\b(cu[A-Z]\w*_v\d+)\b")


class BuildError(Exception):
    """The stand-in can't be built; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Wheels:
    """The places of NVIDIA's files in an environment."""

    driver_headers: Path
    runtime_headers: Path
    runtime: Path

    @classmethod
    def of_this_python(cls) -> Wheels:
        """Find them in this Python. Raises `BuildError` if one is missing."""
        site = Path(sysconfig.get_path("purelib"))
        found = cls(
            site / "triton/backends/nvidia/include",
            site / "nvidia/cu13/include",
            site / "nvidia/cu13/lib" / RUNTIME,
        )
        for path in (found.driver_headers / "cuda.h", found.runtime):
            if not path.exists():
                raise BuildError(
                    f"{path} is missing; use the Python of an environment with torch's build for "
                    "CUDA 13 and triton (make rehearse-cuda makes one)"
                )
        return found


def build(folder: Path) -> None:
    """Make the libraries in a folder. Raises `BuildError`."""
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise BuildError(f"{tool} is missing; install gcc and binutils")
    wheels = Wheels.of_this_python()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        include = [f"-I{wheels.runtime_headers}", f"-I{wheels.driver_headers}"]
        parts = [compiled(work, name, include[1:]) for name in ("device", "driver")]
        wanted = declared((wheels.driver_headers / "cuda.h").read_text())
        parts.append(stubs(work, "driver_rest", wanted, parts))
        link(folder / DRIVER, parts, "-ldl", "-lpthread")

        runtime = [compiled(work, "runtime", include)]
        runtime.append(stubs(work, "runtime_rest", exported(wheels.runtime), runtime))
        (work / "versions").write_text(f"{RUNTIME} {{ global: *; }};\n")
        versions = f"-Wl,--version-script={work / 'versions'}"
        link(folder / RUNTIME, runtime, versions, *on_driver(folder))
        link(folder / MANAGEMENT, [compiled(work, "nvml", [])], *on_driver(folder))
        link(folder / MULTIPLICATIONS, [compiled(work, "cublas", [])])


def compiled(work: Path, name: str, include: Iterable[str], source: Path | None = None) -> Path:
    """Compile one source of ours, or one that was made."""
    to = work / f"{name}.o"
    gcc(*FLAGS, *include, "-c", source or HERE / f"{name}.c", "-o", to)
    return to


def link(to: Path, parts: Iterable[Path], *options: str) -> None:
    """Link a library and replace the old one at once: a program may have that loaded."""
    made = to.with_name(f".{to.name}")
    gcc("-shared", "-fPIC", *parts, f"-Wl,-soname,{to.name}", *options, "-o", made)
    made.replace(to)


def on_driver(folder: Path) -> tuple[str, ...]:
    return (f"-L{folder}", f"-l:{DRIVER}", "-Wl,-rpath,$ORIGIN")


def stubs(work: Path, name: str, wanted: set[str], parts: Iterable[Path]) -> Path:
    """Return functions that do nothing and report success, for all that are not written."""
    names = sorted(wanted - set[str]().union(*(exported(part, "--defined-only") for part in parts)))
    source = work / f"{name}.c"
    source.write_text("".join(f"int {each}(void) {{ return 0; }}\n" for each in names))
    return compiled(work, name, ["-w"], source)


def declared(header: str) -> set[str]:
    """Return the driver's functions by the names that its library exports."""
    return {*DECLARED.findall(header), *RENAMED.findall(header)}


def exported(library: Path, *options: str) -> set[str]:
    """Return functions of a library or an object."""
    listing = output("nm", *(options or ("-D", "--defined-only")), str(library))
    found = (line.split() for line in listing.splitlines())
    names = {words[2].partition("@")[0] for words in found if len(words) > 2 and words[1] in "Tt"}
    return {name for name in names if re.match(r"(__)?cu", name)}


def gcc(*words: str | Path) -> None:
    output("gcc", *(str(word) for word in words))


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{command[0]} has failed:\n{done.stderr.strip()}")
    return done.stdout


def environment(folder: Path, others: Mapping[str, str]) -> dict[str, str]:
    """Return variables that lead a program to the stand-in; plus `others`."""
    paths = [str(HERE / "made_up"), others.get("PYTHONPATH", "")]
    return {
        "LD_LIBRARY_PATH": str(folder),
        "LD_PRELOAD": f"{folder / RUNTIME}:{folder / MULTIPLICATIONS}",
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
