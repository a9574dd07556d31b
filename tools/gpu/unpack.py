"""Put together what `tools.gpu.pack` has made, and run the check.

    python3 unpack.py [--to FOLDER] [--run -- ARGUMENTS OF THE CHECK]

Needs Python 3.11 or newer and nothing else. It lies beside the parts, which may have come one by
one.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VARIABLES = {
    # FlashInfer and DeepGEMM are not packed. Without these vLLM would import or compile them.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    # No network; no reports of use.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


class UnpackError(Exception):
    """It cannot be unpacked; the message says why and what to do."""


def unpack(parts: Path, to: Path) -> Path:
    """Check the parts and unpack them. Returns the file of shell variables.

    Raises:
        UnpackError: a part is missing, or is not as it was packed.
    """
    names = checked(parts)
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to) as work:
        whole = Path(work) / "whole.tar"
        with whole.open("wb") as file:
            for name in names:
                file.write((parts / name).read_bytes())
        with tarfile.open(whole) as archive:
            archive.extractall(work, filter="data")
        whole.unlink()
        found = sorted(Path(work).glob("*.tar.xz"))
        with ThreadPoolExecutor() as pool:  # lzma works without the interpreter's lock
            list(pool.map(lambda path: _extract(path, to / _folder(path)), found))
    compileall.compile_dir(to, quiet=2, workers=0)  # as installers do; some sources may not compile
    return _write_variables(to)


def checked(parts: Path) -> list[str]:
    """Return names of the parts in their order. Raises `UnpackError`."""
    sums = parts / "SHA256SUMS"
    if not sums.is_file():
        raise UnpackError(f"{parts} has no SHA256SUMS: name the folder of the parts")
    wanted = [line.split() for line in sums.read_text(encoding="ascii").splitlines()]
    missing = [name for _, name in wanted if not (parts / name).is_file()]
    if missing:
        raise UnpackError(f"{', '.join(missing)} is missing; copy it to {parts}")
    for digest, name in wanted:
        if hashlib.sha256((parts / name).read_bytes()).hexdigest() != digest:
            raise UnpackError(f"{name} differs from what was packed; copy it again")
    return [name for _, name in wanted]


def _folder(path: Path) -> str:
    name = path.name.partition(".")[0]
    return {"product": "product", "extra": "extra"}.get(name, "site")


def _extract(path: Path, to: Path) -> None:
    to.mkdir(exist_ok=True)
    with lzma.open(path) as packed, tarfile.open(fileobj=packed, mode="r|") as archive:
        archive.extractall(to, filter="data")


def variables(to: Path) -> dict[str, str]:
    """Return the variables with which a program finds it all."""
    there = to.resolve()
    paths = [there / "product" / "src", there / "product", there / "site"]
    extra = there / "extra"
    caches = {"TRITON_CACHE_DIR": extra / "triton", "VLLM_CACHE_ROOT": extra / "vllm"}
    return {
        **VARIABLES,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        **{name: str(path) for name, path in caches.items()},
    }


def _write_variables(to: Path) -> Path:
    lines = [f"export {name}='{value}'\n" for name, value in variables(to).items()]
    path = to / "env.sh"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="unpack", description="Put the parts together.")
    parser.add_argument("--parts", type=Path, default=Path(__file__).parent)
    parser.add_argument("--to", type=Path, default=Path("check-gpu"))
    parser.add_argument("--run", action="store_true", help="then run the check")
    parser.add_argument("arguments", nargs="*", help="arguments of the check, after --")
    args = parser.parse_args(argv)
    before_s = time.monotonic()
    try:
        made = unpack(args.parts, args.to)
    except (UnpackError, OSError, tarfile.TarError, lzma.LZMAError) as error:
        print(f"unpack: error: {error}", file=sys.stderr)
        return 1
    print(f"unpack: {time.monotonic() - before_s:.1f} s; . {made}", flush=True)
    if not args.run:
        return 0
    command = [sys.executable, "-m", "tools.gpu.check", *args.arguments]
    return subprocess.run(command, env=os.environ | variables(args.to), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
