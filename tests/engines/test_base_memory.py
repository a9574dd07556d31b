"""Memory of an engine host without a model: starts and checks plan with the same figure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from vllm_hotswap.engines import base_memory
from vllm_hotswap.engines.base_memory import STEP_BYTES, expected_memory, with_known_base
from vllm_hotswap.host.devices import CpuDevice, DeviceMemory, OwnSleepDevice

MIB = 1 << 20
MEASURED = DeviceMemory(total=8000 * MIB, free=6000 * MIB, held=430 * MIB)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate cache folder, known without an import of vLLM."""
    monkeypatch.setattr(base_memory, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(base_memory, "cpu_capability", lambda: "AVX2")
    return tmp_path / "cache"


@dataclass
class Measuring(CpuDevice):
    """A CPU whose memory the test chooses, in a process that is not an engine host."""

    found: DeviceMemory

    def memory(self) -> DeviceMemory:
        return self.found


def start(held: int = MEASURED.held) -> DeviceMemory:
    return with_known_base(replace(MEASURED, held=held), CpuDevice())


def check(free: int = MEASURED.free) -> tuple[DeviceMemory, list[str]]:
    told: list[str] = []
    here = Measuring(DeviceMemory(MEASURED.total, free, 700 * MIB))
    return expected_memory(here, told.append), told


A_WHOLE_STEP = range(MEASURED.held, MEASURED.held + STEP_BYTES + 1, STEP_BYTES // 8)
"""What the first start measures: values between two steps, and on either of them."""


@pytest.mark.parametrize("held", A_WHOLE_STEP)
def test_a_start_counts_whole_steps_and_leaves_that_much_less_free(held: int) -> None:
    """Rounding to whole steps loses nothing measured, and leaves room for one more step."""
    memory = start(held)

    assert STEP_BYTES <= memory.held - held < 2 * STEP_BYTES
    assert 0 == memory.held % STEP_BYTES
    assert memory.free + memory.held == MEASURED.free + held


@pytest.mark.parametrize("held", A_WHOLE_STEP)
@pytest.mark.parametrize("more", [-20 * MIB, -4096, 0, 4096, STEP_BYTES])
def test_two_starts_count_the_same(held: int, more: int) -> None:
    """A few pages more or less in the second one change no plan, wherever the first one was."""
    first = start(held)

    assert first.held == start(held + more).held


@pytest.mark.parametrize("held", A_WHOLE_STEP)
def test_starts_that_take_turns_count_the_same(held: int) -> None:
    """Starts of several servers, which write the same file, never change each other's plans."""
    counted = {start(held + more).held for more in (0, 4096, -4096, STEP_BYTES, 0, 4096)}

    assert 1 == len(counted)


def test_a_host_that_holds_more_counts_more() -> None:
    """A host that holds more is counted higher, and stays so."""
    start()
    grown = start(MEASURED.held + 100 * MIB).held

    assert grown >= MEASURED.held + 100 * MIB
    assert grown == start(MEASURED.held + 99 * MIB).held


def test_a_host_that_holds_much_less_counts_anew() -> None:
    """A host that holds much less is counted lower: an old count does not last for ever."""
    start()

    assert start(200 * MIB).held < 200 * MIB + 2 * STEP_BYTES


def test_a_check_plans_as_the_last_start_did() -> None:
    """A check excludes a future host's memory from what is free, and ignores its own."""
    counted = start().held
    memory, told = check()

    assert (counted, MEASURED.free - counted) == (memory.held, memory.free)
    assert [] == told


def test_a_cache_that_cannot_be_written_is_done_without(root: Path) -> None:
    """If the cache cannot be written, each start measures."""
    root.write_text("no folder")

    assert start().held >= MEASURED.held


@pytest.mark.parametrize("text", ["", "[]", '{"host_bytes": "430"}', '{"host_bytes": -1}'])
def test_what_is_written_down_wrongly_is_written_anew(root: Path, text: str) -> None:
    """Wrong contents of the file are replaced: it is only a cache."""
    counted = start().held
    (file,) = (root / "vllm-hotswap").iterdir()
    file.write_text(text)

    assert counted == start().held
    assert counted == check()[0].held


def test_an_accelerators_memory_is_as_it_was_measured() -> None:
    """An accelerator's figure stays as measured: the host's use does not depend on libraries."""
    assert MEASURED == with_known_base(MEASURED, OwnSleepDevice())
