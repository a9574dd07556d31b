"""How long `vllm-hotswap check` takes, compared with importing vLLM alone.

::

    python -m benchmarks.check FILE [--before SRC] [--rounds N] [--output JSON]

The sides take turns: importing what vLLM's flags need, `check` of this package, and `check` of the
source tree that `--before` names. Each runs without vLLM's cache of architectures (cold), and with
it (warm). Times are processor seconds of all processes of a command: other work on the machine
changes them less than elapsed time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import vllm_hotswap
from benchmarks.environment import describe

IMPORT = ["-c", "from vllm.entrypoints.launchers.cli_args import make_arg_parser"]
OURS = Path(vllm_hotswap.__file__).parent.parent


def cpu_s(arguments: Sequence[str], source: Path, cache: Path) -> float:
    """Return the processor seconds that Python takes with these arguments."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(source),
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        check=True,
        timeout=1800,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rounds(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield every sample as it is taken; the sides alternate."""
    check = ["-m", "vllm_hotswap", "check", str(options.file)]
    sides = {"import": (IMPORT, OURS), "check": (check, OURS)}
    if options.before:
        sides["check before"] = (check, options.before)
    for number in range(options.rounds):
        for side, (arguments, source) in sides.items():
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm")[: 1 if side == "import" else 2]:
                    taken = cpu_s(arguments, source, Path(cache))
                    yield {"round": number, "side": side, "state": state, "cpu_s": taken}


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.check", description=__doc__)
    parser.add_argument("file", type=Path, help="the YAML file to check")
    parser.add_argument("--before", type=Path, metavar="SRC", help="another source tree")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="JSON", help="a file for all samples")
    options = parser.parse_args()
    samples = []
    for sample in rounds(options):
        samples.append(sample)
        print(json.dumps(sample), flush=True)
    kinds = dict.fromkeys((sample["side"], sample["state"]) for sample in samples)
    for kind in kinds:
        of = [one["cpu_s"] for one in samples if (one["side"], one["state"]) == kind]
        print(f"{kind[0]:14} {kind[1]:6} {median(of):7.1f} s")
    if options.output:
        content = {"environment": describe(sys.argv[1:]), "samples": samples}
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
