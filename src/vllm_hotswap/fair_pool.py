"""Threads that callers share: whoever has had least of them is next, however much others ask for.

A thread pool of the standard library works in the order of arrival, so one caller's hundred jobs
are done before another's first. Here each caller has a queue of its own. A free thread takes a job
of the caller who has the fewest jobs under way, and among those of whoever was last served longest
ago. So a caller without a job under way waits until one job ends, and for no more than that.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

Job = tuple["Future[Any]", Callable[[], Any]]


class FairPool:
    """A few threads, shared between callers by name.

    The mutable state is `_queues`, what each caller has asked for and has not begun; `_running`,
    how many jobs each has under way; `_served`, when each of these had its last turn, as a count.
    `_lock` guards it: callers and threads are many.
    """

    def __init__(self, threads: int, name: str = "") -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._queues: dict[str, deque[Job]] = {}
        self._running: Counter[str] = Counter()
        self._served: dict[str, int] = {}
        self._turns = 0

    def __repr__(self) -> str:
        waiting = {caller: len(jobs) for caller, jobs in self._queues.items()}
        return f"<FairPool running={dict(self._running)} waiting={waiting}>"

    def submit_for(self, caller: str, work: Callable[..., T], *args: Any) -> Future[T]:
        """Have a thread do some work for a caller, in its turn.

        Raises:
            RuntimeError: the pool has been shut down.
        """
        future: Future[T] = Future()
        with self._lock:
            self._queues.setdefault(caller, deque()).append((future, lambda: work(*args)))
        try:
            self._threads.submit(self._run_next)  # whichever is next then
        except RuntimeError:
            future.cancel()
            raise
        return future

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        """Begin nothing new; what `cancel_futures` leaves in its queues is done first.

        Args:
            wait: return when all threads have ended.
            cancel_futures: cancel what has not begun.
        """
        if cancel_futures:
            with self._lock:
                queued = [future for jobs in self._queues.values() for future, _ in jobs]
                self._queues.clear()
            for future in queued:
                future.cancel()
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)

    def _run_next(self) -> None:
        if (found := self._take()) is None:
            return  # it was cancelled
        caller, (future, work) = found
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  # handed on to whoever waits
            future.set_exception(error)
        finally:
            self._end(caller)

    def _take(self) -> tuple[str, Job] | None:
        """The next job, which is running now; None if all that there are have been cancelled."""
        with self._lock:
            while self._queues:
                caller = min(self._queues, key=self._rank)
                job = self._queues[caller].popleft()
                if not self._queues[caller]:
                    del self._queues[caller]
                if job[0].set_running_or_notify_cancel():
                    self._turns += 1
                    self._served[caller] = self._turns
                    self._running[caller] += 1
                    return caller, job
                self._forget(caller)
        return None

    def _rank(self, caller: str) -> tuple[int, int]:
        return self._running[caller], self._served.get(caller, 0)

    def _end(self, caller: str) -> None:
        with self._lock:
            self._running[caller] -= 1
            self._forget(caller)

    def _forget(self, caller: str) -> None:
        """Keep nothing of a caller who asks for nothing."""
        if self._running[caller] <= 0:
            del self._running[caller]
            if caller not in self._queues:
                self._served.pop(caller, None)
