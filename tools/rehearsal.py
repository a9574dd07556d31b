"""What the rehearsals of devices have in common: parts that are run one after the other.

Each part is some tests, on a stand-in for a device. They write what they find to one file of JSON
lines.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.setup import ROOT

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
"""Variables with which nothing is fetched or sent."""


class RehearsalError(Exception):
    """It can't begin; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some tests."""

    name: str
    tests: str
    limit_s: int
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of this part, besides those of all."""


def rehearse_all(
    python: Path,
    parts: Sequence[Part],
    environment: Mapping[str, str],
    results: Path,
    flags: Sequence[str] = (),
    before_each: Callable[[], None] = lambda: None,
) -> int:
    """Run the parts, and say what failed. Returns the exit status.

    Args:
        results: where the tests write; what was there is removed.
        flags: for pytest.
    """
    results.unlink(missing_ok=True)
    failed = []
    for number, part in enumerate(parts, 1):
        print(f"rehearsal: {number} of {len(parts)}: {part.name} ...", flush=True)
        start = time.monotonic()
        before_each()
        if not rehearse(python, part, environment, flags):
            failed.append(part.name)
        print(f"rehearsal: {part.name}: {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        print(f"rehearsal: failed: {'; '.join(failed)}", file=sys.stderr)
        return 1
    print(f"rehearsal: all went well; {results} has what was counted")
    return 0


def chosen(parts: Sequence[Part], tests: Sequence[str]) -> list[Part]:
    """Those with these files; all, if none is named."""
    return [part for part in parts if not tests or part.tests in tests]


def rehearse(
    python: Path, part: Part, environment: Mapping[str, str], flags: Sequence[str]
) -> bool:
    """Run a part to its end or its limit; say whether all went well."""
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", *flags, "-v", part.tests]
    variables = {**environment, **part.variables}
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
