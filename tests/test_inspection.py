"""The process in which vLLM looks at models' classes. A start that ends does not wait for it."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from vllm_hotswap.compat.inspection import _one_process

FOR_EVER_S = 3600.0


def begin() -> None:
    """Nothing: vLLM is not needed here."""


def test_a_start_that_is_interrupted_does_not_wait_for_it() -> None:
    """The other process would be at work for an hour. Without a kill this test does not end."""
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
