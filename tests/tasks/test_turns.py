"""Long work on the event loop: in pieces, one per turn, shared among all works."""

from __future__ import annotations

import asyncio

import pytest

from vllm_hotswap.tasks.turns import Turns, Work


class Clock:
    """Count the turns of the event loop."""

    def __init__(self) -> None:
        self.turn = 0
        self._handle = asyncio.get_running_loop().call_soon(self._tick)

    def _tick(self) -> None:
        self.turn += 1
        self._handle = asyncio.get_running_loop().call_soon(self._tick)

    def stop(self) -> None:
        self._handle.cancel()


async def test_one_turn_of_the_loop_has_one_piece_of_all_works() -> None:
    """Each turn of the loop has one piece of all works, long, short, late or ending."""
    clock, turns = Clock(), Turns()
    had: list[int] = []

    def work(pieces: int) -> Work[int]:
        for _ in range(pieces - 1):
            had.append(clock.turn)
            yield
        had.append(clock.turn)
        return pieces

    lengths = [1, 5, 1, 2, 3, 1]
    results = await asyncio.gather(*(turns.run(work(pieces)) for pieces in lengths))
    clock.stop()

    assert lengths == results
    assert sum(lengths) == len(had) == len(set(had))


async def test_a_short_work_waits_one_piece_of_a_long_one() -> None:
    """A short work waits for one piece of a long one, not for all."""
    turns = Turns()
    had: list[str] = []

    def work(name: str, pieces: int) -> Work[None]:
        for _ in range(pieces):
            had.append(name)
            yield

    long = asyncio.create_task(turns.run(work("long", 100)))
    await asyncio.sleep(0)
    assert had
    await turns.run(work("short", 1))

    assert not long.done()
    assert had.index("short") <= 2
    await long


async def test_a_work_that_fails_or_is_given_up_holds_up_nobody() -> None:
    """A work that fails or is cancelled delays no other."""
    turns = Turns()

    def failing() -> Work[None]:
        yield
        raise ValueError

    def endless() -> Work[None]:
        while True:
            yield

    def short() -> Work[str]:
        yield
        return "done"

    given_up = asyncio.create_task(turns.run(endless()))
    failed = asyncio.create_task(turns.run(failing()))
    with pytest.raises(ValueError, match=r"^$"):
        await failed
    given_up.cancel()

    assert "done" == await turns.run(short())
