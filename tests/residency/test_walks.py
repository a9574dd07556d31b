"""Any sequence of switches and operations stays within the budget, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from hypothesis import given, settings, strategies as st

from tests.helpers.depth import examples
from tests.helpers.support import Server
from tests.residency.models import ALIASES
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.testing.fake_settings import FakeSettings

ALIAS = st.sampled_from(ALIASES)
MOVES = st.one_of(
    st.tuples(st.just("switch"), ALIAS, st.just({})),
    st.tuples(st.sampled_from(["load", "wake", "unload", "prefetch"]), ALIAS, st.just({})),
    st.tuples(st.just("sleep"), ALIAS, st.fixed_dictionaries({"level": st.integers(1, 2)})),
)
PINS = st.tuples(st.just("pin"), st.just("llama"), st.fixed_dictionaries({"pinned": st.booleans()}))
FAILURES = st.tuples(
    st.just("fail"),
    ALIAS,
    st.fixed_dictionaries(
        {"what": st.sampled_from(["load", "wake", "sleep", "unload", "activate"])}
    ),
)
LEVELS = {"active": 0, "parked": 0, "asleep": 1, "discarded": 2, "cold": None}

Action = tuple[str, str, dict[str, Any]]


class Walk:
    """Run the steps that hypothesis chooses, and check the server after every step."""

    def __init__(self, budget: int, levels: list[frozenset[int]]) -> None:
        sizes = {
            alias: FakeSettings(weights_bytes=2, kv_bytes=2, levels=known)
            for alias, known in zip(ALIASES, levels, strict=True)
        }
        self.budget = budget
        self.server = Server(load=("llama",), settings=sizes, budget=Usage(budget, 9))
        self.answers: list[tuple[str, httpx.Response]] = []

    async def run(self, actions: list[tuple[Action, bool]]) -> Walk:
        await self.server.start()
        begun = [await self._do(*action, wait=wait) for action, wait in actions]
        self.answers = [(verb, await task) for verb, task in begun if task is not None]
        return self

    async def end(self) -> None:
        await self.server.stop()
        assert 0 == self.server.host.stepped_while_parked

    async def _do(
        self, verb: str, alias: str, body: dict[str, Any], wait: bool
    ) -> tuple[str, asyncio.Task[httpx.Response] | None]:
        task: asyncio.Task[httpx.Response] | None = None
        if verb == "fail":
            self.server.host.fail_next(body["what"], alias)
        elif verb == "switch":
            task = self.server.switch(alias)
        else:
            task = self.server.operate(alias, verb, **body)
        if wait:
            await self.server.settled()
        assert self.held_bytes <= self.budget
        return verb, task

    @property
    def alive(self) -> dict[str, str]:
        """Return the models that are not dead: one that cannot be stepped after a switch dies."""
        return {a: where for a, where in self.server.residencies.items() if where != "failed"}

    @property
    def held_bytes(self) -> int:
        return sum(self.server.host.engines[alias].held_bytes for alias in self.alive)

    def check(self) -> None:
        """Check what holds whenever nothing is under way."""
        engines, active = self.server.host.engines, self.server.coordinator.active
        assert "idle" == self.server.coordinator.serving().phase
        assert self.server.host.most_held_bytes <= self.budget or len(self.alive) < len(ALIASES)
        assert {alias: LEVELS[where] for alias, where in self.alive.items()} == {
            alias: engines[alias].level for alias in self.alive
        }
        assert [alias for alias, where in self.alive.items() if where == "active"] == [
            alias for alias in ALIASES if alias == active
        ]
        assert active is None or engines[active].is_stepped


levels = st.lists(
    st.sampled_from([frozenset([1, 2]), frozenset([1]), frozenset()]), min_size=3, max_size=3
)


@settings(max_examples=examples(25))
@given(levels, st.lists(MOVES, max_size=12))
def test_no_walk_exceeds_the_budget_and_every_switch_succeeds(
    levels: list[frozenset[int]], actions: list[Action]
) -> None:
    """Any sequence of actions, with memory for one and a half, stays within the budget."""

    async def run() -> None:
        walk = await Walk(6, levels).run([(action, True) for action in actions])
        walk.check()
        assert {200} >= {answer.status_code for verb, answer in walk.answers if verb == "switch"}
        assert {200, 400, 409} >= {answer.status_code for _, answer in walk.answers}
        await walk.end()

    asyncio.run(run())


@settings(max_examples=examples(25))
@given(levels, st.lists(st.tuples(MOVES | PINS | FAILURES, st.booleans()), max_size=12))
def test_no_walk_with_failures_leaves_anything_behind(
    levels: list[frozenset[int]], actions: list[tuple[Action, bool]]
) -> None:
    """After concurrent actions with failures and a pin, every model can be switched to."""

    async def run() -> None:
        walk = await Walk(9, levels).run(actions)
        await walk.server.settled()  # where no model was left, one is brought up again
        walk.check()
        assert {200, 400, 409, 500, 503} >= {answer.status_code for _, answer in walk.answers}
        for alias in ALIASES:
            answers = [await walk.server.switch(alias) for _ in range(len(actions) + 1)]
            died = walk.server.residency(alias) == "failed"
            assert (503 if died else 200) == answers[-1].status_code
        await walk.end()

    asyncio.run(run())
