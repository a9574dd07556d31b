"""Tests on the stand-in: where they can run, and a device that another process has."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

needs_plugin = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("habana_frameworks", "vllm_gaudi")),
    reason="there is no Gaudi plugin and no device for it",
)

HOLD = "import torch; made = torch.ones(3, device='hpu'); print('held', flush=True); input()"


@contextmanager
def held_by_another(board: Path) -> Iterator[None]:
    """Hold the device, whose counts are in this folder, in another process."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env={**os.environ, "FAKEHPU_BOARD": str(board)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert "held\n" == holder.stdout.readline()
        yield
        holder.kill()
