"""Tasks of large calls yield the event loop to others after a few steps."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager

import anyio
import anyio.lowlevel
import pytest
from starlette.types import Message

from tests.helpers.support import lease as lease_of
from vllm_hotswap.api.relay import ResponseRelay
from vllm_hotswap.models.pace import PER_TURN, Pace, merged, pace_tasks
from vllm_hotswap.models.registry import current_lease

MANY = 100


class Turns:
    """Another task, which uses every turn of the loop and counts them."""

    def __init__(self) -> None:
        self.now = 0
        self.steps: list[int] = []
        self._task = asyncio.create_task(self._use())

    async def _use(self) -> None:
        while True:
            self.now += 1
            await asyncio.sleep(0)

    def note(self) -> None:
        """Note that a step ran in this turn."""
        self.steps.append(self.now)

    @property
    def most(self) -> int:
        """Return the largest number of steps in one turn."""
        return max(Counter(self.steps).values())

    def stop(self) -> None:
        self._task.cancel()


@pytest.fixture
async def pace() -> AsyncIterator[Pace]:
    yield pace_tasks()
    asyncio.get_running_loop().set_task_factory(None)


@pytest.fixture
async def turns(pace: Pace) -> AsyncIterator[Turns]:
    turns = Turns()
    yield turns
    turns.stop()


@contextmanager
def call(requests: int) -> Iterator[None]:
    """Make tasks inside belong to a call of so many engine requests."""
    token = current_lease.set(lease_of("llama", 1, calls=requests))
    try:
        yield
    finally:
        current_lease.reset(token)


async def test_tasks_of_a_large_call_take_few_steps_in_a_turn(turns: Turns) -> None:
    """A large call's tasks run few steps per turn, at the start and when all are ready at once."""
    ready = asyncio.Event()

    async def work(number: int) -> int:
        turns.note()
        await ready.wait()
        turns.note()
        await asyncio.sleep(0)
        turns.note()
        return number

    with call(MANY):
        tasks = [asyncio.create_task(work(number)) for number in range(MANY)]
    for _ in range(MANY):
        await asyncio.sleep(0)
    assert MANY == len(turns.steps)
    ready.set()

    assert list(range(MANY)) == await asyncio.gather(*tasks)
    assert 3 * MANY == len(turns.steps)
    assert turns.most <= PER_TURN


async def test_large_calls_share_the_places(turns: Turns) -> None:
    """Large calls together take no more places than one, and none waits for all of another."""
    done: list[str] = []

    async def work(name: str) -> None:
        turns.note()
        await asyncio.sleep(0)
        done.append(name)

    tasks = []
    for name in ("a", "b"):
        with call(MANY):
            tasks += [asyncio.create_task(work(name)) for _ in range(MANY)]
    await asyncio.gather(*tasks)

    assert turns.most <= PER_TURN
    assert {"a", "b"} == {*done[: MANY + 1]}


async def test_tasks_of_others_are_as_they_were(turns: Turns) -> None:
    """Tasks of single-request calls, or without a lease, are not slowed down."""

    async def work() -> None:
        turns.note()

    with call(1):
        tasks = [asyncio.create_task(work()) for _ in range(MANY)]
    tasks += [asyncio.create_task(work()) for _ in range(MANY)]
    await asyncio.gather(*tasks)

    assert 1 == len(set(turns.steps))


async def test_one_task_may_wait_for_its_turn_by_itself(pace: Pace, turns: Turns) -> None:
    """A task can yield between the parts of a long loop."""

    async def work() -> None:
        for _ in range(MANY):
            await pace.wait()
            turns.note()

    with call(MANY):
        await work()
    assert turns.most <= PER_TURN

    before = turns.now
    await work()
    assert before == turns.now


async def test_a_client_that_leaves_is_no_single_turn(turns: Turns) -> None:
    """When a client leaves, its call's tasks are cancelled at once, but their cleanup is spread."""

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            turns.note()

    with call(MANY):
        tasks = [asyncio.create_task(work()) for _ in range(MANY)]
    for _ in range(MANY):
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    assert all(task.cancelled() for task in tasks)
    assert MANY == len(turns.steps)
    assert turns.most <= PER_TURN


async def test_a_task_that_is_cancelled_early_is_cancelled(turns: Turns) -> None:
    """Cancelling works before the first step, while waiting for a place, and when repeated."""
    ended: list[int] = []

    async def work(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    with call(MANY):
        tasks = [asyncio.create_task(work(number)) for number in range(MANY)]
        never = asyncio.create_task(work(MANY))
    never.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
    await asyncio.gather(*tasks, never, return_exceptions=True)

    assert all(task.cancelled() for task in [*tasks, never])
    assert MANY not in ended


async def test_what_goes_wrong_is_raised(pace: Pace) -> None:
    """An exception is raised to the awaiting task too; a task that catches one continues."""

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("told")

    async def work() -> str:
        with pytest.raises(ValueError, match="told"):
            await asyncio.create_task(fail())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        return "went on"

    with call(MANY):
        assert "went on" == await asyncio.create_task(work())


async def test_steps_of_generators_are_tasks_too(pace: Pace) -> None:
    """Each `anext` of vLLM's generators is a task, and its end reaches the caller."""

    async def numbers() -> AsyncGenerator[int, None]:
        yield 1
        await asyncio.sleep(0)
        yield 2

    with call(MANY):
        generator = numbers()
        loop = asyncio.get_running_loop()
        found = [await loop.create_task(anext(generator)) for _ in range(2)]  # type: ignore[arg-type]
        with pytest.raises(StopAsyncIteration):
            await loop.create_task(anext(generator))  # type: ignore[arg-type]
    assert [1, 2] == found


async def test_task_groups_of_anyio_work(pace: Pace) -> None:
    """anyio's task groups, which Starlette uses, can inspect the coroutines of paced tasks."""
    began: list[int] = []

    async def work(number: int) -> None:
        began.append(number)
        await anyio.sleep_forever()

    with call(MANY):
        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(work, number)
            while len(began) < 3:
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
    assert [0, 1, 2] == began


async def test_a_loop_has_one_pace(pace: Pace) -> None:
    """All models together share one pace per loop."""
    assert pace is pace_tasks()
    assert f"<Pace left={PER_TURN} waiting=0>" == repr(pace)


async def numbers(of: int, count: int, failing: bool = False) -> AsyncGenerator[str, None]:
    try:
        for number in range(count):
            await asyncio.sleep(0)
            yield f"{of}.{number}"
        if failing:
            raise ValueError("told")
    finally:
        closed.append(of)


closed: list[int] = []


@pytest.mark.parametrize("generators", [1, 2, 50])
async def test_what_generators_yield_is_merged(turns: Turns, generators: int) -> None:
    """A merge yields every item with its generator's number, in order, and closes all at last."""
    closed.clear()
    with call(MANY):
        found = [pair async for pair in merged(*(numbers(n, 3) for n in range(generators)))]

    for n in range(generators):
        assert [f"{n}.{i}" for i in range(3)] == [item for of, item in found if of == n]
    assert sorted(closed) == list(range(generators))


async def test_a_generator_that_fails_ends_the_merge(pace: Pace) -> None:
    """A failing generator, or a reader that stops early, ends the merge and closes them all."""
    closed.clear()
    with call(MANY):
        with pytest.raises(ValueError, match="told"):
            async for _ in merged(numbers(0, 1, failing=True), numbers(1, 10**9)):
                pass
        merge = merged(numbers(2, 9), numbers(3, 9))
        await anext(merge)
        await merge.aclose()
    for _ in range(3):
        await asyncio.sleep(0)
    assert [0, 1, 2, 3] == sorted(closed)


async def test_one_generator_is_not_merged_with_anything(turns: Turns) -> None:
    """A single generator, the common case, costs no turn, and its errors stay its own."""
    closed.clear()

    async def ready() -> AsyncGenerator[int, None]:
        try:
            for number in range(MANY):
                yield number
            raise ValueError("told")
        finally:
            closed.append(0)

    found = []

    async def take() -> None:
        async for pair in merged(ready()):
            turns.note()
            found.append(pair)

    with pytest.raises(ValueError, match="told"):
        await take()
    assert [(0, number) for number in range(MANY)] == found
    assert 1 == len(set(turns.steps))
    assert [0] == closed
    left = merged(ready())
    await anext(left)
    await left.aclose()
    assert [0, 0] == closed


async def test_a_merge_of_what_is_ready_gives_the_event_loop_back(turns: Turns) -> None:
    """A merge yields the event loop after a few items, even if all generators are ready."""

    async def ready() -> AsyncGenerator[int, None]:
        yield 1

    with call(MANY):
        async for _ in merged(*(ready() for _ in range(MANY))):
            turns.note()
    assert MANY == len(turns.steps)
    assert turns.most <= 2 * PER_TURN


@pytest.mark.parametrize(("requests", "most"), [(MANY, PER_TURN), (1, MANY)])
async def test_events_that_are_ready_are_sent_a_few_in_a_turn(
    turns: Turns, requests: int, most: int
) -> None:
    """Ready events of a large call are sent a few per turn, although one task sends them all."""

    async def note(_: Message) -> None:
        turns.note()

    async def receive() -> Message:
        raise AssertionError("nobody listens")

    answer = ResponseRelay({"type": "http"}, receive, note)
    with call(requests):
        for _ in range(MANY):
            await answer.send({"type": "http.response.body", "body": b"", "more_body": True})
    assert MANY == len(turns.steps)
    assert turns.most == most
