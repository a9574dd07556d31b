"""Clients take turns, a few steps in each turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from vllm_hotswap.tasks.steps import Steps

PER_TURN = 8
MANY = 5 * PER_TURN


async def all_taken(steps: Steps) -> None:
    """Turn the loop until no step waits."""
    while len(steps):  # noqa: ASYNC110  # it has no event
        await asyncio.sleep(0)


async def test_clients_go_round() -> None:
    """Clients alternate: one behind another client's many steps has the next turn but one step."""
    loop, steps, taken = asyncio.get_running_loop(), Steps(PER_TURN), list[str]()

    def step(name: str) -> Callable[[], None]:
        return lambda: taken.append(name)

    for _ in range(MANY):
        steps.take(loop, "A", step("A"))
    steps.take(loop, "B", step("B"))
    steps.take(loop, "B", step("B"))
    steps.take(loop, "C", step("C"))
    assert f"<Steps left=0 waiting={MANY - PER_TURN + 3} clients=3>" == repr(steps)
    await all_taken(steps)

    assert ["A"] * PER_TURN == taken[:PER_TURN]
    assert ["A", "B", "C", "A", "B", "A"] == taken[PER_TURN:][:6]
    assert Counter(A=MANY, B=2, C=1) == Counter(taken)


async def test_few_steps_are_taken_in_a_turn() -> None:
    """Only a few steps run per turn, counting immediate ones and those started by another step."""
    loop, steps, turn, taken = asyncio.get_running_loop(), Steps(PER_TURN), 0, Counter[int]()

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
    """A step that fails is reported to the loop, and the others run."""
    loop, steps, taken = asyncio.get_running_loop(), Steps(PER_TURN), list[int]()
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
