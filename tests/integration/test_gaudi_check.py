"""`python -m tools.gaudi.check` itself, over the real vLLM Gaudi plugin and a stand-in for Intel's
runtime: all is well there.

Runs under `make rehearse-gaudi`; elsewhere there is no `hpu`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gaudi_standin.common import needs_plugin
from tests.helpers.rehearsal_results import record
from tests.integration.processes import ROOT

CYCLES = 6
LIMIT_S, END_LIMIT_S = 720, 120
"""Limits of the check, and of its end when it takes longer: it ends its server then. Both are less
than its part of the rehearsal has."""

pytestmark = [
    pytest.mark.wide,
    pytest.mark.timeout(LIMIT_S + END_LIMIT_S + 30),
    needs_plugin,
]

WAYS = ("parked", "asleep", "cold")
PAIR = ("llama", "qwen")
CHECKS = [
    *("versions", "device", "platform", "refused: QUANT_CONFIG"),
    *("eager: start", "eager: llama", "eager: qwen", "eager: no level 2"),
    *(
        name
        for way in WAYS
        for name in (
            *(f"eager: {way} {number + 1} {PAIR[number % 2]}" for number in range(CYCLES)),
            f"eager: {way}: growth",
        )
    ),
    "eager: end",
]


@pytest.fixture(autouse=True)
def llama_is_active() -> None:
    """Do nothing: the check has servers of its own."""


def check(out: Path) -> int:
    """Run the check; return its exit status. After too long, Ctrl-C makes it end its server."""
    command = [sys.executable, "-m", "tools.gaudi.check", str(out)]
    process = subprocess.Popen([*command, "--eager-only", "--cycles", str(CYCLES)], cwd=ROOT)
    try:
        return process.wait(LIMIT_S)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(END_LIMIT_S)


def test_the_check_is_made_to_its_end_and_all_is_well(tmp_path: Path) -> None:
    """The check runs to its end, every line says that all is well, and none is missing."""
    out = tmp_path / "results.jsonl"

    status = check(out)

    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [] == [line for line in lines if not line["ok"]]
    assert (0, CHECKS) == (status, [line["check"] for line in lines])
    cycles = [line for line in lines if "back_s" in line]
    assert all(line["before"]["device"]["memory_allocated"] for line in cycles)
    grown = {line["check"]: line["grown"]["device_bytes"] for line in lines if "grown" in line}
    record(
        "the check",
        checks=len(lines),
        furthest_logprob=max(line["furthest_logprob"] for line in cycles),
        device_bytes_grown=grown,
    )
