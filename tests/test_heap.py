"""Memory that is freed while weights are read goes back at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MIB = 1 << 20

FREE_EVERY_OTHER_BLOCK = """
from vllm_hotswap.devices import anonymous_bytes
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
    """Whatever the allocator has learnt before: one large block freed raises its threshold.

    In a process of its own, whose heap has no holes to be filled.
    """
    freed = subprocess.check_output([sys.executable, "-c", FREE_EVERY_OTHER_BLOCK])

    assert int(freed) > 28 * MIB
