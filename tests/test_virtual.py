"""The event loop that the invariants are tested on: time jumps, and a hang is an error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from tests.virtual import START_S, NothingCanHappen, TimeStandsStill, VirtualLoop


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run(asyncio.sleep(0))
    loop.close()


def test_a_day_passes_in_no_time(loop: VirtualLoop) -> None:
    """Nobody waits for timers; the clock shows afterwards that they have run."""
    began_s = time.perf_counter()

    loop.run(asyncio.sleep(24 * 3600.0))

    assert START_S + 24 * 3600.0 == loop.time()
    assert time.perf_counter() - began_s < 10


def test_timers_run_in_the_order_of_their_times(loop: VirtualLoop) -> None:
    """Whoever waits for less is first, whoever began first."""
    woken: list[float] = []

    async def wake_after(seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append(seconds)

    async def main() -> None:
        await asyncio.gather(*map(wake_after, [30.0, 0.001, 7.0, 0.0]))

    loop.run(main())

    assert [0.0, 0.001, 7.0, 30.0] == woken


def test_a_deadline_ends_a_wait_that_nothing_else_would_end(loop: VirtualLoop) -> None:
    """`asyncio.timeout` counts virtual seconds."""

    async def main() -> None:
        async with asyncio.timeout(60):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        loop.run(main())

    assert START_S + 60 == pytest.approx(loop.time())


def test_a_wait_without_an_end_is_an_error_that_names_who_waits(loop: VirtualLoop) -> None:
    """A hang does not hang the test."""

    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(NothingCanHappen, match=r"nothing can ever happen again.*\n.*Event\.wait"):
        loop.run(wait_for_ever())


def test_busy_waiting_is_an_error(loop: VirtualLoop) -> None:
    """Time passes only when nothing is ready; who keeps the loop busy keeps it from passing."""

    async def spin() -> None:
        until_s = loop.time() + 1
        while loop.time() < until_s:  # noqa: ASYNC110  # that is what is forbidden
            await asyncio.sleep(0)

    with pytest.raises(TimeStandsStill):
        loop.run(spin())


def test_what_is_under_way_goes_on_with_the_next_run(loop: VirtualLoop) -> None:
    """Between two runs everything stands still, and nothing is lost."""
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
    """No other thread runs, whose time would be real; its errors are the caller's."""
    assert 3 == loop.run(asyncio.to_thread(lambda: 3))

    with pytest.raises(ZeroDivisionError):
        loop.run(asyncio.to_thread(lambda: 1 // 0))
