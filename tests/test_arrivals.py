"""New connections: clients go round, a few steps in each turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from tests.listening import Raw, listening_with
from tests.support import Server
from tests.test_refusals import until
from vllm_hotswap import arrivals
from vllm_hotswap.arrivals import PER_TURN, Steps

MANY = 5 * PER_TURN


async def all_taken(steps: Steps) -> None:
    """Turn the loop until none waits."""
    while len(steps):  # noqa: ASYNC110  # it has no event
        await asyncio.sleep(0)


async def test_clients_go_round() -> None:
    """Who comes behind many of another one has the next turn but one step."""
    loop, steps, taken = asyncio.get_running_loop(), Steps(), list[str]()

    def step(name: str) -> Callable[[], None]:
        return lambda: taken.append(name)

    for _ in range(MANY):
        steps.take(loop, "A", step("A"))
    steps.take(loop, "B", step("B"))
    steps.take(loop, "B", step("B"))
    steps.take(loop, "C", step("C"))
    assert MANY - PER_TURN + 3 == len(steps)
    await all_taken(steps)

    assert ["A"] * PER_TURN == taken[:PER_TURN]
    assert ["A", "B", "C", "A", "B", "A"] == taken[PER_TURN:][:6]
    assert Counter(A=MANY, B=2, C=1) == Counter(taken)


async def test_few_steps_are_taken_in_a_turn() -> None:
    """Those that are taken at once count, and those that are taken from within another one."""
    loop, steps, turn, taken = asyncio.get_running_loop(), Steps(), 0, Counter[int]()

    def again(left: int) -> None:
        taken[turn] += 1
        if left:
            steps.take(loop, "A", lambda: again(left - 1))

    for _ in range(MANY):
        steps.take(loop, "A", lambda: again(2))
    while len(steps):
        turn += 1
        await asyncio.sleep(0)

    assert 3 * MANY == taken.total()
    assert {PER_TURN} == set(taken.values())


async def test_a_step_that_fails_costs_no_other() -> None:
    """The loop is told of it."""
    loop, steps, taken = asyncio.get_running_loop(), Steps(), list[int]()
    told: list[object] = []
    loop.set_exception_handler(lambda _, context: told.append(context))

    def fail() -> None:
        raise RuntimeError("of a socket that is closed")

    for _ in range(PER_TURN):
        steps.take(loop, "A", lambda: None)
    steps.take(loop, "A", fail)
    for number in range(MANY):
        steps.take(loop, "A", lambda number=number: taken.append(number))  # type: ignore[misc]
    await all_taken(steps)

    assert list(range(MANY)) == taken
    assert 1 == len(told)


async def test_no_more_is_accepted_than_can_be_looked_at(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits in the system's queue costs no file of ours."""
    monkeypatch.setattr(arrivals, "MOST_WAITING", 3)
    monkeypatch.setattr(Steps, "_go_on", lambda *_: None)  # no further turn
    async with listening_with(server) as at:
        (acceptor,) = at.acceptors
        clients = [await Raw.connect(at.port) for _ in range(PER_TURN + 10)]
        await until(lambda: len(at.shared.door.steps) == 3)
        assert PER_TURN + 3 == len(acceptor.arrivals)
        monkeypatch.undo()
        at.shared.door.steps._go_on(asyncio.get_running_loop())
        for client in clients:
            assert 200 == (await client.get()).status
            await client.close()


async def test_who_has_gone_before_its_turn_has_none(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a server that ends leaves none behind."""
    monkeypatch.setattr(Steps, "_go_on", lambda *_: None)
    async with listening_with(server) as at:
        (acceptor,) = at.acceptors
        clients = [await Raw.connect(at.port) for _ in range(PER_TURN + 3)]
        await until(lambda: len(at.shared.door.steps) == 3)
        acceptor.close()
        assert not acceptor.arrivals
        monkeypatch.undo()
        at.shared.door.steps._go_on(asyncio.get_running_loop())
        await until(lambda: not len(at.shared.door.steps))
        assert 0 == at.shared.places._all.count
        for client in clients:
            assert b"" == await client.rest()
            await client.close()
