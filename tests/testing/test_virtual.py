"""The event loop that the invariants are tested on: time jumps, and a hang is an error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from tests.helpers.virtual import START_S, NothingCanHappen, TimeStandsStill, VirtualLoop


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run(asyncio.sleep(0))
    loop.close()


def test_a_day_passes_in_no_time(loop: VirtualLoop) -> None:
    """Virtual time passes at once, and afterwards the clock shows that timers ran."""
    began_s = time.perf_counter()

    loop.run(asyncio.sleep(24 * 3600.0))

    assert START_S + 24 * 3600.0 == loop.time()
    assert time.perf_counter() - began_s < 10


def test_timers_run_in_the_order_of_their_times(loop: VirtualLoop) -> None:
    """Timers run in the order of their times, whichever started first."""
    woken: list[float] = []

    async def wake_after(seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append(seconds)

    async def main() -> None:
        await asyncio.gather(*map(wake_after, [30.0, 0.001, 7.0, 0.0]))

    loop.run(main())

    assert [0.0, 0.001, 7.0, 30.0] == woken


def test_a_deadline_ends_a_wait_that_nothing_else_would_end(loop: VirtualLoop) -> None:
    """`asyncio.timeout` counts virtual seconds, and ends a wait that nothing else would."""

    async def main() -> None:
        async with asyncio.timeout(60):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        loop.run(main())

    assert START_S + 60 == pytest.approx(loop.time())


def test_a_wait_without_an_end_is_an_error_that_names_who_waits(loop: VirtualLoop) -> None:
    """A wait without an end is an error that names the waiting task, not a hang of the test."""

    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(NothingCanHappen, match=r"nothing can ever happen again.*\n.*Event\.wait"):
        loop.run(wait_for_ever())


def test_busy_waiting_is_an_error(loop: VirtualLoop) -> None:
    """Busy waiting is an error: time passes only when no task is ready."""

    async def spin() -> None:
        until_s = loop.time() + 1
        while loop.time() < until_s:  # noqa: ASYNC110  # that is what is forbidden
            await asyncio.sleep(0)

    with pytest.raises(TimeStandsStill):
        loop.run(spin())


def test_what_is_under_way_goes_on_with_the_next_run(loop: VirtualLoop) -> None:
    """Between two runs everything stands still, and work continues with the next."""
    done = asyncio.Event()

    async def later() -> None:
        await asyncio.sleep(5)
        done.set()

    task = loop.create_task(later())
    loop.run(asyncio.sleep(4))

    assert not done.is_set()

    loop.run(asyncio.sleep(2))

    assert done.is_set()
    assert task.done()


def test_work_for_a_thread_is_done_at_once(loop: VirtualLoop) -> None:
    """Work for a thread is done at once in this one; its errors reach the caller."""
    assert 3 == loop.run(asyncio.to_thread(lambda: 3))

    with pytest.raises(ZeroDivisionError):
        loop.run(asyncio.to_thread(lambda: 1 // 0))
