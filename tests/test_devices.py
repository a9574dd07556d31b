"""Devices: which one a model is on, and how much memory processes hold."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from vllm_hotswap.devices import (
    CPU_WORKER,
    CUDA_WORKER,
    HOSTED_CPU_WORKER,
    CpuDevice,
    CudaDevice,
    Device,
    OwnSleepDevice,
    anonymous_bytes,
    device_of,
)

MIB = 1 << 20
HOLD = "import sys; held = b'x' * (48 << 20); print('holds', flush=True); sys.stdin.read()"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {HOLD!r}], stdin=0)
child.wait()
"""


def config(worker: str) -> SimpleNamespace:
    """What of vLLM's configuration is looked at."""
    return SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=worker))


@contextmanager
def process(code: str) -> Iterator[int]:
    """A process that has said that it holds its memory."""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert b"holds\n" == child.stdout.readline()
        yield child.pid
        assert child.stdin is not None
        child.stdin.close()


# --- which one a model is on ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "kind", "levels", "is_host_memory"),
    [
        (CPU_WORKER, CpuDevice, {1, 2}, True),
        (HOSTED_CPU_WORKER, CpuDevice, {1, 2}, True),
        (CUDA_WORKER, CudaDevice, set(), False),
        ("vllm_gaudi.v1.worker.hpu_worker.HPUWorker", OwnSleepDevice, {1}, False),
    ],
)
def test_device_is_told_by_the_worker(
    worker: str, kind: type[Device], levels: set[int], is_host_memory: bool
) -> None:
    """With the sleep levels that its workers really have, for one model alone."""
    device = device_of(config(worker))

    assert kind is type(device)
    assert (levels, is_host_memory) == (device.sleep_levels, device.is_host_memory)


def test_cpu_is_given_a_worker_that_can_sleep() -> None:
    """It stays the same device then."""
    cpu = config(CPU_WORKER)

    device_of(cpu).configure(cpu)

    assert HOSTED_CPU_WORKER == cpu.parallel_config.worker_cls
    assert "cpu" == device_of(cpu).name


@pytest.mark.parametrize("worker", [CUDA_WORKER, "some.other.Worker"])
def test_other_workers_are_left_as_their_platform_chose_them(worker: str) -> None:
    """Nothing is configured."""
    chosen = config(worker)

    device_of(chosen).configure(chosen)

    assert worker == chosen.parallel_config.worker_cls


# --- how much memory processes hold ---------------------------------------------------------


def test_memory_of_this_process_grows_with_what_it_holds() -> None:
    """And shrinks when that is given back."""
    before = CpuDevice().held_bytes()
    assert before > MIB

    held = b"x" * (64 * MIB)
    between = anonymous_bytes()
    del held

    assert between - before > 60 * MIB
    assert anonymous_bytes() - before < 16 * MIB


@pytest.mark.parametrize("code", [HOLD, PARENT])
def test_memory_of_a_process_is_that_of_all_it_has_started(code: str) -> None:
    """However many processes are between."""
    with process(code) as pid:
        held = anonymous_bytes(pid)

    assert 48 * MIB < held < 200 * MIB


def test_process_that_has_ended_holds_nothing() -> None:
    """Whether it was waited for or not."""
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()  # its end is the process's
        before_it_is_waited_for = anonymous_bytes(child.pid)
    assert before_it_is_waited_for < 32 * MIB

    assert 0 == anonymous_bytes(child.pid)


STARTING = """
import subprocess
held = bytearray(100 << 20)
for _ in range(100):
    subprocess.run(["true"], check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell no such thing")
def test_a_process_that_starts_another_is_not_counted_twice() -> None:
    """Until a child begins its program, its memory is its parent's."""
    most = 0
    with subprocess.Popen([sys.executable, "-c", STARTING]) as process:
        while process.poll() is None:
            most = max(most, anonymous_bytes(process.pid))

    assert 100 * MIB < most < 180 * MIB
