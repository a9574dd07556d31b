"""Accounts share an engine: no account waits for earlier requests of another."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given, settings, strategies as st

from vllm_hotswap.engines.engine_share import RECENT_S, STEPS, EngineShare, _Place, _Request

PLACES = 8
STEP_TOKENS = 100
HALF = 0.5


class Door:
    """An engine's admission, and the requests that arrive at it."""

    def __init__(self, places: int = PLACES, step_tokens: int = STEP_TOKENS) -> None:
        self.now_s = 0.0
        self.share = EngineShare(places, step_tokens, lambda: self.now_s)
        self.inside: list[str] = []
        self.waiting: dict[str, asyncio.Task[None]] = {}
        self._ids: Iterator[int] = count()

    async def ask(self, account: str, number: int = 1, tokens: int = 1) -> list[str]:
        """Send so many requests, and return the ids of those that were admitted at once."""
        ids = [f"{account}{next(self._ids)}" for _ in range(number)]
        for one in ids:
            self.waiting[one] = asyncio.create_task(self._enter(one, account, tokens))
        before = set(self.inside)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return [one for one in ids if one in self.inside and one not in before]

    async def _enter(self, request_id: str, account: str, tokens: int) -> None:
        await self.share.enter(request_id, account, tokens, HALF)
        self.inside.append(request_id)

    async def begin(self, *ids: str) -> list[str]:
        """Report a first output of each, and return the requests that this admitted."""
        return await self._changed(self.share.note_output, *ids)

    async def end(self, *ids: str) -> list[str]:
        for one in ids:
            self.inside.remove(one)
        return await self._changed(self.share.leave, *ids)

    async def _changed(self, change: object, *ids: str) -> list[str]:
        before = len(self.inside)
        for one in ids:
            change(one)  # type: ignore[operator]
        for _ in range(3):
            await asyncio.sleep(0)
        return self.inside[before:]

    def of(self, account: str) -> int:
        return sum(one.startswith(account) for one in self.inside)

    def forgotten(self) -> list[str]:
        """Return the accounts that wait although their first request would fit."""
        first = (next(iter(queue.values())) for queue in self.share._waiting.values())
        return [asked.account for asked in first if self.share._place_for(asked) is _Place.FREE]

    async def close(self) -> None:
        for task in self.waiting.values():
            task.cancel()
        await asyncio.gather(*self.waiting.values(), return_exceptions=True)


async def test_who_is_alone_has_all_places() -> None:
    """A lone account has all places, and one more, so that the engine never waits."""
    door = Door()

    assert PLACES + 1 == len(await door.ask("a", 20))
    await door.close()


async def test_who_is_not_alone_has_its_share() -> None:
    door = Door()
    await door.ask("b")

    assert 4 == len(await door.ask("a", 20))
    await door.close()


async def test_a_place_is_kept_for_who_has_none() -> None:
    """One of the eight places stays free for an account without any, whatever others want."""
    door = Door()
    await door.ask("a")
    for _ in range(10):
        await door.ask("b")
        await door.ask("c")

    assert PLACES - 1 == len(door.inside)
    assert 1 == len(await door.ask("d"))
    await door.close()


async def test_others_count_for_a_minute_after_their_last_request() -> None:
    door = Door()
    (one,) = await door.ask("b")
    await door.ask("a", 20)
    assert [] == await door.end(one)  # there is room, but it is the other account's

    door.now_s = RECENT_S + 1
    assert "a" in (await door.end(door.inside[0]))[0]
    assert PLACES + 1 == door.of("a")
    await door.close()


async def test_who_has_nothing_in_the_engine_never_waits() -> None:
    """A request of an account with nothing in the engine enters it at once, however full it is."""
    door = Door()
    await door.ask("a", 20)

    assert 1 == len(await door.ask("b"))
    assert 1 == len(await door.ask("c"))
    assert 0 == len(await door.ask("b"))
    await door.close()


async def test_what_is_free_goes_to_who_has_least() -> None:
    door = Door()
    await door.ask("a", 20)
    await door.ask("b", 2)
    await door.ask("c", 2)

    let_in = [name[0] for one in list(door.inside) if one[0] == "a" for name in await door.end(one)]

    assert ["b", "c"] == sorted(let_in[:2])
    assert {"a"} == set(let_in[2:])
    await door.close()


async def test_accounts_with_as_many_take_turns() -> None:
    """Among accounts with as many requests, the one that was served longest ago is next."""
    door = Door()
    await door.ask("a", 9)
    for account in "cdb":
        await door.ask(account, 9)

    ends = [one for one in door.inside if one[0] == "a"]
    order = [name[0] for one in ends for name in await door.end(one)]

    assert ["c", "d", "b"] == order[:3]
    await door.close()


async def test_prompts_wait_before_the_engine_beyond_what_some_steps_take() -> None:
    """Prompts beyond some steps wait, and those that have an output no longer count."""
    door = Door(places=100)

    inside = await door.ask("a", 20, tokens=STEP_TOKENS)
    assert STEPS == len(inside)

    assert 1 == len(await door.begin(inside[0]))
    assert [] == await door.begin(inside[0])
    await door.close()


async def test_a_prompt_of_many_steps_is_let_in_alone() -> None:
    door = Door()

    (first,) = await door.ask("a", 2, tokens=STEP_TOKENS * 50)
    assert 1 == len(await door.begin(first))
    await door.close()


async def test_a_request_that_says_more_goes_through() -> None:
    """Another part of a divided request goes through: vLLM sends parts under one id."""
    door = Door(places=1)
    (one,) = await door.ask("a")
    await door.ask("a", 5)

    await door.share.enter(one, "a", 1, HALF)

    await door.end(one)
    assert door.of("a") == 2  # it was counted once
    await door.close()


async def test_the_share_counts_for_what_waits_in_the_engine_too() -> None:
    """The share limits waiting prompts, so that another account's is in one of the next steps."""
    door = Door(places=100)
    await door.ask("b")

    assert STEPS * HALF == len(await door.ask("a", 20, tokens=STEP_TOKENS))
    await door.close()


@pytest.mark.parametrize("how", ["its task is cancelled", "it is given up", "both"])
async def test_nothing_is_kept_of_who_leaves(how: str) -> None:
    """An account that leaves while it waits leaves nothing behind."""
    door = Door(places=1)
    inside = await door.ask("a", 4)
    waiting = [one for one in door.waiting if one not in inside]
    for one in waiting:
        if how != "its task is cancelled":
            door.share.leave(one)
        if how != "it is given up":
            door.waiting[one].cancel()
    results = await asyncio.gather(*(door.waiting[o] for o in waiting), return_exceptions=True)

    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    await door.end(*inside)
    assert "<EngineShare inside={} waiting={}>" == repr(door.share)


async def test_who_leaves_in_the_turn_that_lets_it_in_gives_its_place_back() -> None:
    door = Door(places=1)
    first, _second = await door.ask("a", 4)
    third = next(one for one in door.waiting if one not in door.inside)
    door.inside.remove(first)
    door.share.leave(first)  # admits the third one, whose task does not know it yet
    door.waiting[third].cancel()
    for _ in range(3):
        await asyncio.sleep(0)

    assert third not in door.inside
    assert 2 == len(door.inside)  # the fourth has its place
    await door.end(*list(door.inside))
    assert "<EngineShare inside={} waiting={}>" == repr(door.share)


async def test_what_it_knows_of_accounts_is_forgotten() -> None:
    """Accounts are forgotten: there may be a hundred thousand keys, one after the other."""
    door = Door()
    for number in range(50):
        door.now_s += RECENT_S / 10
        await door.end(*(await door.ask(f"account {number} ")))

    assert len(door.share._asked_s) <= 11
    assert len(door.share._served) <= 11


async def test_thousands_of_accounts_cost_no_more_than_a_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With thousands of accounts, the end of a request costs no more than with a few."""
    door = Door(places=16)
    for number in range(300):
        await door.ask(f"account {number} ", 3)
    looks = 0
    look = EngineShare._place_for

    def counted(share: EngineShare, asked: _Request) -> _Place:
        nonlocal looks
        looks += 1
        return look(share, asked)

    monkeypatch.setattr(EngineShare, "_place_for", counted)
    for one in door.inside[:100]:
        door.share.note_output(one)
        door.share.leave(one)

    assert looks <= 400
    await door.close()


STEP = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from("abcd"), st.integers(1, 12), st.integers(0, 150)),
    st.tuples(st.sampled_from(["begin", "end", "give up", "time"]), st.integers(0, 1000)),
)


@given(st.integers(1, 12), st.lists(STEP, max_size=60))
@settings(deadline=None)
def test_bounds_hold_and_nobody_is_forgotten(places: int, steps: list[tuple[object, ...]]) -> None:
    """In any order of events, every request is admitted or has left in the end."""

    async def walk() -> None:
        door = Door(places)
        asked = left = 0
        for step in steps:
            match step:
                case ("ask", str(account), int(number), int(tokens)):
                    had = door.of(account)
                    let_in = await door.ask(account, number, tokens)
                    asked += number
                    assert had or let_in  # the first is admitted
                case ("time", int(seconds)):
                    door.now_s += seconds
                case (str(what), int(which)) if door.inside and what in ("begin", "end"):
                    one = door.inside[which % len(door.inside)]
                    await (door.begin(one) if what == "begin" else door.end(one))
                    left += what == "end"
                case ("give up", int(which)):
                    held = [one for one, task in door.waiting.items() if not task.done()]
                    if held:
                        door.share.leave(held[which % len(held)])
                        await asyncio.sleep(0)
                        left += 1
            assert len(door.inside) <= places + 4  # one more each
            if not door.now_s:  # an account that becomes alone is admitted at the next event
                assert not door.forgotten()
        while door.inside:
            await door.end(door.inside[0])
            left += 1
        assert asked == left
        assert "<EngineShare inside={} waiting={}>" == repr(door.share)
        await door.close()

    asyncio.run(walk())
