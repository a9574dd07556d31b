"""Threads are shared between callers, not given to the caller with most jobs."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future

import pytest

from vllm_hotswap.tasks.fair_pool import LONG_S, FairPool, Overdue

SOON_S = 30.0


class Work:
    """Jobs that note their names when they start. The first one continues when it is released."""

    def __init__(self, pool: FairPool) -> None:
        self._pool = pool
        self.began: list[str] = []
        self.is_held, self._gate = threading.Event(), threading.Event()

    def hold(self, caller: str) -> Future[None]:
        """Occupy a thread; return once it is occupied."""
        future = self._pool.submit_for(caller, self._wait)
        assert self.is_held.wait(SOON_S)
        return future

    def ask(self, caller: str, count: int) -> list[Future[str]]:
        return [
            self._pool.submit_for(caller, self._begin, f"{caller}{number}")
            for number in range(count)
        ]

    def let_go(self) -> None:
        self._gate.set()

    def _wait(self) -> None:
        self.is_held.set()
        assert self._gate.wait(SOON_S)

    def _begin(self, name: str) -> str:
        self.began.append(name)
        return name


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def pool() -> Iterator[FairPool]:
    pool = FairPool(1)
    yield pool
    pool.shutdown()


@pytest.fixture
def work(pool: FairPool) -> Iterator[Work]:
    work = Work(pool)
    yield work
    work.let_go()


def done(futures: list[Future[str]]) -> list[str]:
    return [future.result(SOON_S) for future in futures]


def test_a_caller_waits_for_one_job_of_another(pool: FairPool, work: Work) -> None:
    """A caller waits for one job of another, however many that has, and served before or not."""
    work.hold("a")
    jobs = work.ask("a", 100) + work.ask("b", 2) + work.ask("c", 1)
    work.let_go()

    assert [*(f"a{n}" for n in range(100)), "b0", "b1", "c0"] == done(jobs)
    assert ["b0", "c0", "a0", "b1", "a1", "a2"] == work.began[:6]
    assert "<FairPool running={} waiting={}>" == repr(pool)


def test_a_caller_with_a_thread_lets_others_have_the_next() -> None:
    """A caller with a thread gets no second one while a caller without one waits."""
    pool = FairPool(2)
    work, other = Work(pool), Work(pool)
    work.hold("a")
    other.hold("b")
    jobs = work.ask("a", 3) + work.ask("c", 2)
    other.let_go()  # one thread is free, and `a` has the other one
    done(jobs)
    assert "c0" == work.began[0]
    work.let_go()
    pool.shutdown()


def test_what_is_given_up_is_not_begun(pool: FairPool, work: Work) -> None:
    """A cancelled job never starts; its caller's other jobs do, and so do those of others."""
    work.hold("a")
    first, second = work.ask("a", 2)
    other = work.ask("b", 1)
    assert first.cancel()
    assert other[0].cancel()
    work.let_go()

    assert "a1" == second.result(SOON_S)
    assert ["a1"] == work.began
    assert "<FairPool running={} waiting={}>" == repr(pool)


def test_what_goes_wrong_is_told(pool: FairPool, work: Work) -> None:
    """An error of a job goes to its caller, and the thread continues."""

    def fail() -> None:
        raise ValueError("no grammar")

    with pytest.raises(ValueError, match="no grammar"):
        pool.submit_for("a", fail).result(SOON_S)
    assert ["a0"] == done(work.ask("a", 1))


@pytest.mark.parametrize("cancels", [False, True])
def test_a_pool_that_ends_does_what_it_has_or_gives_it_up(work: Work, cancels: bool) -> None:
    """Running jobs end, queued ones run or are dropped as asked, and new ones are refused."""
    pool = FairPool(1)
    mine = Work(pool)
    running = mine.hold("a")
    queued = mine.ask("a", 1)
    pool.shutdown(wait=False, cancel_futures=cancels)
    mine.let_go()

    assert running.result(SOON_S) is None
    result: Callable[[], str] = lambda: queued[0].result(SOON_S)  # noqa: E731
    if cancels:
        with pytest.raises(CancelledError):
            result()
    else:
        assert "a0" == result()
    with pytest.raises(RuntimeError, match="after shutdown"):
        mine.ask("b", 1)


ENDLESS = """
import threading
from vllm_hotswap.tasks.fair_pool import FairPool

began = threading.Event()

def go_on():
    began.set()
    threading.Event().wait()

pool = FairPool(1)
pool.submit_for("a", go_on)
pool.submit_for("a", go_on)
assert began.wait(30)
pool.shutdown(wait=False, cancel_futures=True)
print("over")
"""


def test_a_job_without_end_does_not_keep_the_process() -> None:
    """The interpreter's exit does not wait for a job without end."""
    ended = subprocess.run(
        [sys.executable, "-c", ENDLESS], capture_output=True, text=True, timeout=SOON_S, check=True
    )
    assert "over\n" == ended.stdout


def test_several_jobs_at_once_have_a_thread_each() -> None:
    """Several jobs at once each have a thread, an idle one or a new one."""
    pool = FairPool(2)
    assert ["a0"] == done(Work(pool).ask("a", 1))
    both = threading.Barrier(2)
    met = [pool.submit_for("a", both.wait, SOON_S) for _ in range(2)]

    assert {0, 1} == {future.result(SOON_S) for future in met}
    pool.shutdown()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def spare(clock: Clock) -> Iterator[FairPool]:
    """One thread, and two spare threads for overdue jobs."""
    pool = FairPool(1, spare=2, clock=clock)
    yield pool
    pool.shutdown()


def test_others_do_not_wait_for_a_job_that_is_overdue(spare: FairPool, clock: Clock) -> None:
    """Others get a spare thread; jobs of the overdue job's caller are refused until it ends."""
    slow = Work(spare)
    slow.hold("a")
    mine, others = Work(spare).ask("a", 2), Work(spare).ask("b", 2)
    clock.now_s = LONG_S
    spare.check_overdue()
    assert not any(future.done() for future in mine + others)

    clock.now_s += 1
    spare.check_overdue()
    assert ["b0", "b1"] == done(others)
    for future in mine:
        with pytest.raises(Overdue):
            future.result(SOON_S)
    with pytest.raises(Overdue):
        slow.ask("a", 1)

    slow.let_go()
    both = Work(spare)
    assert ["b0"] == done(both.ask("b", 1))
    spare.shutdown()
    assert "<FairPool running={} waiting={}>" == repr(spare)


def test_a_caller_is_served_again_when_its_job_has_ended(spare: FairPool, clock: Clock) -> None:
    """A caller is served again after its overdue job, however long that took."""
    slow = Work(spare)
    held = slow.hold("a")
    clock.now_s = LONG_S + 1
    with pytest.raises(Overdue):
        slow.ask("a", 1)
    slow.let_go()

    assert held.result(SOON_S) is None
    assert ["a0"] == done(slow.ask("a", 1))


def test_there_is_an_end_to_spare_threads(spare: FairPool, clock: Clock) -> None:
    """When overdue jobs occupy all threads, new jobs are refused at once."""
    slow = []
    for caller in "abc":
        slow.append(Work(spare))
        slow[-1].hold(caller)
        clock.now_s += LONG_S + 1
        if caller == "b":
            queued = Work(spare).ask("d", 1)
            assert ["d0"] == done(queued)
    with pytest.raises(Overdue):
        slow[0].ask("d", 1)

    for work in slow:
        work.let_go()


def test_what_waits_is_refused_when_the_last_thread_is_overdue(
    spare: FairPool, clock: Clock
) -> None:
    """When the last thread is overdue, the waiting jobs of every caller are refused."""
    slow = [Work(spare) for _ in "abc"]
    for work, caller in zip(slow, "abc", strict=True):
        work.hold(caller)
        clock.now_s += LONG_S + 1 if caller != "c" else 0
    queued = Work(spare).ask("d", 1)
    clock.now_s += LONG_S + 1
    spare.check_overdue()

    with pytest.raises(Overdue):
        queued[0].result(SOON_S)
    for work in slow:
        work.let_go()


def test_a_pool_without_spare_threads_has_nothing_overdue(pool: FairPool, work: Work) -> None:
    """Without spare threads, queued jobs keep waiting."""
    work.hold("a")
    later = work.ask("a", 1)
    pool.check_overdue()
    work.let_go()
    assert ["a0"] == done(later)
