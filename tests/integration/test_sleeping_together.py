"""An engine whose workers are several processes: all of them sleep and wake, or none.

Here the engine runs with an executor that has no workers. `tests/host/test_cuda_worker.py` checks
what workers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_hotswap.errors import NoRoom
from vllm_hotswap.host.devices import HOSTED_CPU_WORKER, HOSTED_CUDA_WORKER
from vllm_hotswap.host.engine import HostedEngine
from vllm_hotswap.host.together import HalfAsleep


class Executor:
    """Note the calls. `answers` are those of the workers, by method."""

    def __init__(self, answers: Mapping[str, list[Any]], fails: bool = False) -> None:
        self.told: list[str] = []
        self.answers, self.fails, self.is_sleeping = answers, fails, False

    def collective_rpc(self, method: str, *_: Any, **__: Any) -> list[Any]:
        self.told.append(method)
        return self.answers.get(method, [None, None])

    def sleep(self, level: int) -> None:
        self.told.append(f"sleep {level}")
        if self.fails:
            raise RuntimeError("Worker failed with error 'cuMemUnmap: unknown error'")
        self.is_sleeping = True

    def wake_up(self) -> None:
        self.told.append("wake_up")
        self.is_sleeping = False


def engine(executor: Executor, workers: int = 2, worker: str = HOSTED_CUDA_WORKER) -> HostedEngine:
    """Return an engine without a model, whose scheduler has nothing to do."""

    class Idle(HostedEngine):
        def __init__(self) -> None:
            self.model_executor = executor
            self.structured_output_manager = SimpleNamespace()
            parallel = SimpleNamespace(world_size=workers, worker_cls=worker)
            self.vllm_config = SimpleNamespace(parallel_config=parallel)

        def pause_scheduler(self, *_: Any, **__: Any) -> None:
            executor.told.append("pause")

        def resume_scheduler(self) -> None:
            executor.told.append("resume")

        def has_work(self) -> bool:
            return False

        def _notify_idle_state_callbacks(self) -> None:
            """Do nothing: no caller waits."""

        def _reset_caches(self) -> None:
            """Do nothing: there are no caches."""

    return Idle()


def test_a_model_sleeps_and_wakes_once_all_workers_can() -> None:
    """All workers are asked first: none frees memory, or counts on any, before all agree."""
    executor = Executor({})
    of_two = engine(executor)

    of_two.sleep()
    of_two.wake()

    assert [
        *("pause", "get_ready_to_sleep", "sleep 1"),
        *("get_ready_to_wake", "wake_up", "resume"),
    ] == executor.told


def test_a_model_goes_on_if_a_worker_cannot_sleep() -> None:
    """If a worker cannot sleep, the others undo their preparation and none sleeps."""
    executor = Executor({"get_ready_to_sleep": [None, "no host memory for 5.0 MiB"]})

    with pytest.raises(NoRoom, match="no host memory"):
        engine(executor).sleep()

    assert ["pause", "get_ready_to_sleep", "stay_awake", "resume"] == executor.told


def test_a_model_sleeps_on_if_a_worker_cannot_wake() -> None:
    """If a worker cannot wake, the others give back what they have taken."""
    executor = Executor({"get_ready_to_wake": ["no room", None]})

    with pytest.raises(NoRoom, match="no room"):
        engine(executor).wake()

    assert ["get_ready_to_wake", "give_up_wake"] == executor.told


@pytest.mark.parametrize("worker", [HOSTED_CUDA_WORKER, HOSTED_CPU_WORKER])
def test_a_worker_that_fails_to_sleep_all_the_same_is_told_as_such(worker: str) -> None:
    """A failed sleep leaves it unknown what other workers did, and says so; on CPUs, too."""
    executor = Executor({}, fails=True)

    with pytest.raises(HalfAsleep, match=r"a worker could not fall asleep: .*cuMemUnmap"):
        engine(executor, worker=worker).sleep()

    assert (worker == HOSTED_CUDA_WORKER) is ("get_ready_to_sleep" in executor.told)


def test_a_model_with_one_worker_needs_nobodys_consent() -> None:
    """With one worker no consent is needed, because a failed sleep changes nothing."""
    executor = Executor({}, fails=True)

    with pytest.raises(RuntimeError, match="Worker failed"):
        engine(executor, workers=1).sleep()

    assert ["pause", "sleep 1", "resume"] == executor.told


def test_slices_reach_all_workers() -> None:
    """Slices reach all workers, and their bytes are added."""
    executor = Executor({"wake_some": [(2, 7), (3, 7)], "give_up_wake": [0, 4]})

    progress = engine(executor).wake_some()

    assert (5, 14) == (progress.done_bytes, progress.total_bytes)
    assert 4 == engine(executor).give_up_wake()
