"""`max_wait` on a whole server, whatever runs on other models, and for however long."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given, settings, strategies as st

from tests.conftest import Play
from tests.helpers.depth import examples
from tests.helpers.support import CHAT, Server
from tests.helpers.virtual import VirtualLoop
from vllm_hotswap.events import SwitchEnded
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.models.registry import ModelSettings
from vllm_hotswap.scheduling.policies import POLICIES
from vllm_hotswap.scheduling.policy import (
    WORKED_S,
    Decision,
    Policy,
    PolicySettings,
    Snapshot,
    SwitchTo,
)
from vllm_hotswap.scheduling.scheduler import RequestTerms
from vllm_hotswap.testing.fake_settings import FakeSettings

pytestmark = pytest.mark.slow

ALIASES = ("llama", "qwen", "mistral")
TOKEN_S = 0.5
LONG = 140
"""Tokens of a stream that runs for 70 s, which is longer than a drain waits."""
SLACK_S = 0.05


def stubborn(snapshot: Snapshot) -> Decision:
    """A third-party policy that always switches to the last model, and never parks."""
    return SwitchTo(snapshot.others[-1].alias)


EVERY: dict[str, Policy] = {
    **{name: make(PolicySettings()) for name, make in POLICIES.items()},
    "stubborn": stubborn,
}


def longest_switch_s(cost_s: float) -> float:
    """Return the longest time of one switch for an overdue request."""
    return max(WORKED_S, 2 * cost_s) + cost_s + SLACK_S


@dataclass(frozen=True)
class Asked:
    """A request, and when it comes."""

    alias: str
    at_s: float
    words: int


asked = st.builds(
    Asked,
    alias=st.sampled_from(ALIASES),
    at_s=st.integers(0, 40).map(float),
    words=st.sampled_from([1, 20, LONG]),
)


def settings_of(cost_s: float, **other: object) -> dict[str, object]:
    one = FakeSettings(token_s=TOKEN_S, activate_s=cost_s)
    return {"mode": "auto", "load": ALIASES, "settings": dict.fromkeys(ALIASES, one), **other}


@pytest.mark.parametrize("policy", EVERY.values(), ids=EVERY)
@given(
    requests=st.lists(asked, min_size=2, max_size=8),
    cost_s=st.sampled_from([0.0, 0.002, 0.7, 2.0]),
    max_wait_s=st.sampled_from([0.0, 0.5, 5.0]),
)
@settings(max_examples=examples(6), deadline=None)
def test_nobody_waits_longer_than_promised(
    policy: Policy, requests: list[Asked], cost_s: float, max_wait_s: float
) -> None:
    """A request waits at most `max_wait`, the switch under way and one per model: no drain of a 70
    s stream is waited for, and every stream still comes to its end.
    """

    async def ask(server: Server, one: Asked) -> float:
        await asyncio.sleep(one.at_s)
        body = {"model": one.alias, "max_tokens": one.words}
        answer = await server.post(CHAT, json=body)
        assert (200, one.words) == (answer.status_code, answer.json()["usage"]["completion_tokens"])
        return float(answer.headers["x-hotswap-waited"])

    async def story() -> list[float]:
        server = await Server(
            clock=loop.time,
            **settings_of(cost_s, max_wait=max_wait_s, drain_timeout=60),  # type: ignore[arg-type]
        ).start()
        server.auto.scheduler.policy = policy
        try:
            return await asyncio.gather(*(ask(server, one) for one in requests))
        finally:
            await server.stop()

    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        waited = loop.run(story())
    finally:
        asyncio.set_event_loop(None)
        loop.close()

    assert max(waited) <= max_wait_s + (1 + len(ALIASES)) * longest_switch_s(cost_s)


def test_a_long_stream_is_parked_for_a_request_that_is_due(play: Play) -> None:
    """A due request parks a long stream, although `batch` would wait up to a minute for it."""

    async def story(server: Server) -> None:
        long = server.stream("llama", words=LONG)
        reading = asyncio.create_task(long.finish())
        await asyncio.sleep(3)
        answer = await server.ask("qwen")

        assert 0.5 <= float(answer.headers["x-hotswap-waited"]) <= 0.5 + longest_switch_s(0.002)
        assert (await reading).is_whole

    play(
        story,
        **settings_of(0.002, policy="fifo", max_wait=30, drain_timeout=60),
        model_settings={"qwen": ModelSettings(max_wait_s=0.5)},
    )


@pytest.mark.parametrize("late", ["llama", "qwen", "mistral"])
def test_a_request_that_comes_in_a_drain_and_is_due_ends_it(play: Play, late: str) -> None:
    """A request that becomes due ends a drain, be it for source, target or a third model."""

    async def story(server: Server) -> None:
        long = server.stream("llama", words=LONG)
        reading = asyncio.create_task(long.finish())
        await asyncio.sleep(3)
        first = server.ask("qwen", max_tokens=1)
        await asyncio.sleep(4)
        assert "drain" == server.coordinator.serving().phase
        terms = RequestTerms(max_wait_s=2.0)
        began_s = asyncio.get_running_loop().time()
        async with server.lease(late, terms) as lease:
            await server.auto.wait_for_turn(lease)
            waited_s = asyncio.get_running_loop().time() - began_s

        assert 200 == (await first).status_code
        assert 2.0 <= waited_s <= 2.0 + 2 * longest_switch_s(0.7)
        assert (await reading).is_whole

    play(story, **settings_of(0.7, policy="fifo", max_wait=300, drain_timeout=60))


def test_who_leaves_before_it_is_due_shortens_no_drain(play: Play) -> None:
    """A request that leaves before it is due shortens no drain: running ones keep their time."""

    async def story(server: Server) -> None:
        long = server.stream("llama", words=40)
        reading = asyncio.create_task(long.finish())
        await asyncio.sleep(3)
        first = server.ask("qwen", max_tokens=1)
        await asyncio.sleep(4)
        hasty = server.stream("mistral")
        await hasty.next_event()
        hasty.disconnect()

        assert 200 == (await first).status_code
        assert (await reading).is_whole
        assert [0] == [switch.requests_parked for switch in server.events.of(SwitchEnded)]

    play(
        story,
        **settings_of(0.7, policy="fifo", max_wait=300, drain_timeout=60),
        model_settings={"mistral": ModelSettings(max_wait_s=5.0)},
    )


def test_two_who_are_due_are_served_in_the_order_in_which_they_are(play: Play) -> None:
    """Two due requests are served in the order of their due times, whatever their priority."""

    async def story(server: Server) -> None:
        streams = [server.stream(alias, words=LONG) for alias in ALIASES]
        reading = [asyncio.create_task(stream.finish()) for stream in streams]
        assert all([(await answer).is_whole for answer in reading])
        first_two = [event.target for event in server.events.of(SwitchEnded)][:2]
        assert ["qwen", "mistral"] == first_two

    play(
        story,
        **settings_of(0.1, max_wait=30, min_active=1000),
        model_settings={
            "qwen": ModelSettings(max_wait_s=1.0),
            "mistral": ModelSettings(max_wait_s=1.5, priority=9),
        },
    )


def test_max_wait_counts_from_the_arrival(play: Play) -> None:
    """`max_wait` counts from arrival, not from the frontend's check or the end of a load."""

    async def story(server: Server) -> None:
        server.host.hold("load", "mistral")
        loading = server.ask("mistral", max_tokens=1)
        await asyncio.sleep(10)
        due = server.ask("qwen", max_tokens=1)
        await asyncio.sleep(10)
        server.host.release("load", "mistral")

        assert 10.0 <= float((await due).headers["x-hotswap-waited"]) <= 10 + longest_switch_s(0)
        assert 200 == (await loading).status_code

    play(story, **settings_of(0.0, max_wait=2) | {"load": ("llama", "qwen")})


def test_what_cannot_be_parked_is_waited_for(play: Play) -> None:
    """If requests cannot be parked, the switch waits and aborts none, even beyond `max_wait`."""

    async def story(server: Server) -> None:
        long = server.stream("llama", words=40)
        reading = asyncio.create_task(long.finish())
        await asyncio.sleep(3)
        answer = await server.ask("qwen", max_tokens=1)

        assert 16.0 < float(answer.headers["x-hotswap-waited"]) < 20.0
        assert (await reading).is_whole

    cannot_sleep = FakeSettings(token_s=TOKEN_S, levels=frozenset())
    play(
        story,
        mode="auto",
        max_wait=1,
        drain_timeout=2,
        load=("llama",),
        settings=dict.fromkeys(ALIASES, cannot_sleep),
        budget=Usage(3 << 20, 0),
    )


def test_a_parked_stream_goes_on_before_it_would_be_ended(play: Play) -> None:
    """A parked stream continues before its park time ends, even if its model never gets a turn."""

    async def keep_busy(server: Server) -> None:
        while True:
            await server.ask("qwen", max_tokens=8)

    async def story(server: Server) -> None:
        long = server.stream("llama", words=100)
        reading = asyncio.create_task(long.finish())
        await asyncio.sleep(3)
        clients = [asyncio.create_task(keep_busy(server)) for _ in range(2)]
        assert (await reading).is_whole
        for client in clients:
            client.cancel()

    play(
        story,
        **settings_of(0.1, max_wait=3600, min_active=3600, parked_timeout=40, drain_timeout=1),
        model_settings={"qwen": ModelSettings(max_wait_s=1.0)},
    )
