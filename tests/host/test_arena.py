"""Zeroed memory that takes no physical pages until it is written."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest

from vllm_hotswap.host.arena import Arena
from vllm_hotswap.host.heap import give_back_free_memory

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")


def test_memory_is_zero_and_costs_nothing_until_it_is_written() -> None:
    """Neither allocating the memory nor reading it makes the process much larger."""
    before = resident_bytes()

    memory = Arena().allocate(512 * MIB)

    assert 0 == memory[0] == memory[-1]
    assert resident_bytes() - before < 64 * MIB


def test_memory_given_back_is_zero_and_costs_nothing_but_stays_mapped() -> None:
    """Released memory is zero again, takes no pages, and can be written again."""
    arena = Arena()
    memory = arena.allocate(64 * MIB)
    memory[:] = b"x" * len(memory)
    full = resident_bytes()

    arena.give_back()

    assert full - resident_bytes() > 48 * MIB
    assert 0 == memory[0]
    memory[0] = 7
    assert 7 == memory[0]


def test_memory_that_nobody_uses_is_unmapped() -> None:
    """Unused memory is unmapped: the arena neither keeps it nor can release it again."""
    arena = Arena()
    memory = arena.allocate(MIB)
    seen = weakref.ref(memory)
    assert "<Arena bytes=1048576>" == repr(arena)

    del memory
    gc.collect()

    assert seen() is None
    assert 0 == arena.nbytes
    arena.give_back()


def test_memory_that_is_in_use_outlives_its_arena() -> None:
    """A tensor in the memory of an arena can be read after its worker is gone."""
    memory = Arena().allocate(MIB)
    view = memoryview(memory)
    del memory

    assert 0 == view[0]


def test_free_memory_can_be_given_back_at_any_time() -> None:
    """Free memory can be released at any time, whatever the allocator is."""
    give_back_free_memory()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
