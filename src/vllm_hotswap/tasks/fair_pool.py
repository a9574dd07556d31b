"""Threads that callers share: the caller that has had the least is next, however much others ask.

A thread pool of the standard library works in the order of arrival, so one caller's hundred jobs
are done before another's first. Here each caller has a queue of its own. A free thread takes a job
of the caller with the fewest jobs under way. Among several, the one that was served longest ago is
next. So a caller without a job under way waits until one job ends, and no longer.

A job cannot be stopped from here. A spare thread, where there is one, makes up for a job that takes
longer than `LONG_S`. Its caller's other jobs are refused until it ends. The threads are daemons: no
job keeps the process from ending.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

LONG_S = 10.0
"""A job that takes longer is overdue, in a pool with spare threads."""


class Overdue(Exception):
    """A job was not done, because an earlier one is taking too long.

    That one is the caller's own, or so many are overdue that no thread is left.
    """

    def __init__(self, after_s: float) -> None:
        super().__init__(f"an earlier job takes more than {after_s:g} s")
        self.after_s = after_s


class Job:
    """Something to do for a caller."""

    __slots__ = ("began_s", "caller", "future", "work")

    def __init__(self, caller: str, work: Callable[[], Any]) -> None:
        self.caller = caller
        self.work = work
        self.future: Future[Any] = Future()
        self.began_s = 0.0


class FairPool:
    """A few threads, shared between callers by name.

    The mutable state, which `_lock` guards from many callers and threads:

    - `_queues`: each caller's jobs that have not started; `_running`: the jobs that have;
    - `_served`: each caller's last turn, as a count;
    - `_threads`: those that were started, of which `_idle` have nothing to do;
    - `_is_shut`: whether the pool was shut down.
    """

    def __init__(
        self,
        threads: int,
        name: str = "",
        spare: int = 0,
        clock: Callable[[], float] = time.monotonic,
        long_s: float = LONG_S,
        is_last: bool = False,
    ) -> None:
        """Make a pool that starts its threads when there is something to do.

        Args:
            threads: how many jobs run at a time.
            name: the name of the threads.
            spare: how many more threads there may be, one for each overdue job; 0: no job ever
                counts as overdue.
            clock: seconds, as `time.monotonic` counts them.
            long_s: a job that takes longer is overdue.
            is_last: whether the threads, and those that they start, have the lowest priority.
        """
        self._long_s, self._is_last = long_s, is_last
        self._most, self._spare = threads, spare
        self._name = name
        self._clock = clock
        self._lock = threading.Condition()
        self._queues: dict[str, deque[Job]] = {}
        self._running: set[Job] = set()
        self._served: dict[str, int] = {}
        self._turns = 0
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._is_shut = False

    def __repr__(self) -> str:
        with self._lock:
            running = dict(self._counts())
            waiting = {caller: len(jobs) for caller, jobs in self._queues.items()}
        return f"<FairPool running={running} waiting={waiting}>"

    def submit_for(self, caller: str, work: Callable[..., T], *args: Any) -> Future[T]:
        """Submit work for a caller; a thread does it when it is the caller's turn.

        Raises:
            RuntimeError: the pool has been shut down.
            Overdue: a job of the caller is overdue, or so many are that no thread is left.
        """
        job = Job(caller, lambda: work(*args))
        with self._lock:
            if self._is_shut:
                raise RuntimeError("cannot submit work after shutdown")
            overdue = self._overdue()
            if caller in (one.caller for one in overdue) or self._is_full_of(overdue):
                raise Overdue(self._long_s)
            self._queues.setdefault(caller, deque()).append(job)
            self._relieve(overdue)
        return job.future

    def check_overdue(self) -> None:
        """Make up for jobs that are overdue by now, and refuse jobs that would wait for them.

        A caller that waits for a job must call this now and then: the pool has no thread for it.
        """
        with self._lock:
            overdue = self._overdue()
            late = {job.caller for job in overdue}
            if self._is_full_of(overdue):
                late |= self._queues.keys()
            refused = [job for caller in late for job in self._queues.pop(caller, ())]
            self._relieve(overdue)
        for job in refused:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Overdue(self._long_s))

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        """Accept no new jobs. Jobs that wait are still done, unless `cancel_futures` is set.

        Args:
            wait: return when all threads have ended.
            cancel_futures: cancel the jobs that have not started.
        """
        with self._lock:
            self._is_shut = True
            queued = [job for jobs in self._queues.values() for job in jobs]
            if cancel_futures:
                self._queues.clear()
            threads = self._threads[:]
            self._idle = 0
            self._lock.notify_all()
        if cancel_futures:
            for job in queued:
                job.future.cancel()
        if wait:
            for thread in threads:
                thread.join()

    def _overdue(self) -> list[Job]:
        if not self._spare:
            return []
        now_s = self._clock()
        return [job for job in self._running if now_s - job.began_s > self._long_s]

    def _is_full_of(self, overdue: list[Job]) -> bool:
        return len(overdue) >= self._most + self._spare

    def _relieve(self, overdue: list[Job]) -> None:
        """Wake or start a thread for jobs that wait, if there may be one more."""
        if not self._queues:
            return
        if self._idle:
            # Counted here, not by the thread: a second job must not count on the same thread.
            self._idle -= 1
            self._lock.notify()
        elif len(self._threads) < self._most + min(len(overdue), self._spare):
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        """Do one job after the other, until this thread has to end. Each thread runs this."""
        if self._is_last:
            _lower_priority()
        while (job := self._next()) is not None:
            result, error = None, None
            try:
                result = job.work()
            except BaseException as raised:  # noqa: BLE001  # handed on to the caller that waits
                error = raised
            # Before the result is set: with it, the caller may submit its next job at once.
            with self._lock:
                self._running.discard(job)
                self._forget(job.caller)
            if error is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(error)
            del job, result, error  # the thread may wait for long now

    def _next(self) -> Job | None:
        """Wait for a job and return it as running; return None if this thread has to end."""
        with self._lock:
            while True:
                if len(self._threads) > self._most + len(self._overdue()):
                    break  # it was a spare one
                if (job := self._take()) is not None:
                    return job
                if self._is_shut:
                    break
                self._idle += 1
                self._lock.wait()
            self._threads.remove(threading.current_thread())
            return None

    def _take(self) -> Job | None:
        """Return the next job, now running; None if there is none that was not cancelled."""
        counts = self._counts()
        while self._queues:
            caller = min(self._queues, key=lambda one: (counts[one], self._served.get(one, 0)))
            job = self._queues[caller].popleft()
            if not self._queues[caller]:
                del self._queues[caller]
            if job.future.set_running_or_notify_cancel():
                self._turns += 1
                self._served[caller] = self._turns
                job.began_s = self._clock()
                self._running.add(job)
                return job
            self._forget(caller)
        return None

    def _counts(self) -> Counter[str]:
        return Counter(job.caller for job in self._running)

    def _forget(self, caller: str) -> None:
        """Forget a caller that has no jobs."""
        if caller not in self._queues and caller not in self._counts():
            self._served.pop(caller, None)


def _lower_priority() -> None:
    """Give this thread the lowest priority, on Linux, where each thread has its own."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
