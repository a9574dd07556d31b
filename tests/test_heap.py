"""Memory that is freed while weights are read goes back at once."""

from __future__ import annotations

import os
import sys

import pytest

from vllm_hotswap.devices import anonymous_bytes
from vllm_hotswap.host.heap import large_blocks_mapped

MIB = 1 << 20


@pytest.mark.skipif(
    sys.platform != "linux" or "malloc" in os.environ.get("LD_PRELOAD", ""),
    reason="only glibc has these thresholds",
)
def test_a_block_freed_between_others_is_given_back_at_once() -> None:
    """Whatever the allocator has learnt before: one large block freed raises its threshold."""
    del (learnt := [bytearray(31 * MIB)])[:]
    with large_blocks_mapped():
        blocks: list[bytearray | None] = [bytearray(4 * MIB) for _ in range(16)]
        held = anonymous_bytes()
        blocks[::2] = [None] * 8
        freed = held - anonymous_bytes()

    assert not learnt
    assert freed > 28 * MIB
