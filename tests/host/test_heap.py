"""Memory that is freed while weights are read is returned to the system at once."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vllm_hotswap.host.heap import give_back_free_memory

MIB = 1 << 20

FREE_EVERY_OTHER_BLOCK = """
from vllm_hotswap.host.devices import anonymous_bytes
from vllm_hotswap.host.heap import large_blocks_mapped

learnt = bytearray(31 << 20)
del learnt
with large_blocks_mapped():
    blocks = [bytearray(4 << 20) for _ in range(16)]
    held = anonymous_bytes()
    blocks[::2] = [None] * 8
    print(held - anonymous_bytes())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or "malloc" in os.environ.get("LD_PRELOAD", ""),
    reason="only glibc has these thresholds",
)
def test_a_block_freed_between_others_is_given_back_at_once() -> None:
    """A freed block is returned, although an earlier large one has raised the allocator's
    threshold.

    It runs in a separate process, whose heap has no holes to fill.
    """
    freed = subprocess.check_output([sys.executable, "-c", FREE_EVERY_OTHER_BLOCK])

    assert int(freed) > 28 * MIB


@pytest.mark.parametrize("has_device", [True, False])
def test_what_torch_keeps_on_a_device_is_given_back_too(
    monkeypatch: pytest.MonkeyPatch, has_device: bool
) -> None:
    """What torch keeps on a device is released, too, but only if this process has used one."""
    calls: list[str] = []
    cuda = SimpleNamespace(
        is_initialized=lambda: has_device, empty_cache=lambda: calls.append("empty_cache")
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))

    give_back_free_memory()

    assert (["empty_cache"] if has_device else []) == calls
