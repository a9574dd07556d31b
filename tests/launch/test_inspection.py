"""The process in which vLLM inspects model classes. An interrupted start does not wait for it."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from vllm_hotswap.launch.inspection import _one_process

FOR_EVER_S = 3600.0


def begin() -> None:
    """Do nothing: vLLM is not needed here."""


def test_a_start_that_is_interrupted_does_not_wait_for_it() -> None:
    """An interrupted start ends at once, although the other process would work for an hour."""
    workers: list[psutil.Process] = []

    def start() -> None:
        with _one_process(begin) as pool:
            workers.append(psutil.Process(pool.submit(os.getpid).result()))
            pool.submit(time.sleep, FOR_EVER_S)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start()

    assert not any(worker.is_running() for worker in workers)


def test_it_ends_with_its_work() -> None:
    with _one_process(begin) as pool:
        worker = psutil.Process(pool.submit(os.getpid).result())

    assert not worker.is_running()
