"""What each key may do in a minute."""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import MakeServer
from tests.helpers.support import Server
from vllm_hotswap.access.keys import Keys, KeySource
from vllm_hotswap.access.rights import EVERYBODY, Account, Group, PerMinute, Rights
from vllm_hotswap.access.roles import Access
from vllm_hotswap.api.rates import ELSEWHERE, Rates
from vllm_hotswap.config.settings import LimitsConfig
from vllm_hotswap.errors import RateLimited
from vllm_hotswap.tasks.rate import Rate
from vllm_hotswap.testing.fake_settings import FakeSettings

ANN, BEN = Account("key ann", "ann", is_bounded=True), Account("key ben", "ben", is_bounded=True)
ADMIN = Account("admin", "root", is_admin=True)


class Clock:
    """A clock that shows what it is set to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def rates(clock: Clock | None = None, is_local: bool = True, **limits: int) -> Rates:
    return Rates(LimitsConfig(**limits), clock or Clock(), lambda: is_local)


def take(bounds: Rates, account: Account, count: int) -> None:
    for _ in range(count):
        bounds.take(account)


def test_key_has_a_minutes_worth_at_once_and_then_the_rate() -> None:
    """A key has a minute's worth at once, then its rate, with the wait in whole seconds."""
    clock = Clock()
    bounds = rates(clock, requests_per_minute=30)
    take(bounds, ANN, 30)

    with pytest.raises(RateLimited, match="30 requests per minute") as caught:
        bounds.take(ANN)
    assert (429, "rate_limit_exceeded", 2) == (
        caught.value.status,
        caught.value.code,
        caught.value.retry_after_s,
    )
    take(bounds, BEN, 30)
    take(bounds, ADMIN, 1000)

    clock.now_s = 2.0
    bounds.take(ANN)
    with pytest.raises(RateLimited):
        bounds.take(ANN)


def test_what_is_given_back_is_there_again() -> None:
    """What is given back can be used again, up to a minute's worth."""
    bounds = rates(Clock(), requests_per_minute=2)
    take(bounds, ANN, 2)
    bounds.give_back(ANN)
    bounds.take(ANN)
    for _ in range(9):
        bounds.give_back(ANN)
        bounds.give_back(ADMIN)
    take(bounds, ANN, 2)
    with pytest.raises(RateLimited):
        bounds.take(ANN)


def test_tokens_are_paid_for_afterwards() -> None:
    """Tokens are charged afterwards, when their number is known; an overdrawn key waits."""
    clock = Clock()
    bounds = rates(clock, tokens_per_minute=600)
    bounds.take(ANN)
    bounds.spend(ANN, 700)
    bounds.spend(ADMIN, 700)

    with pytest.raises(RateLimited, match="600 tokens per minute") as caught:
        bounds.take(ANN)
    assert 11 == caught.value.retry_after_s
    bounds.take(BEN)
    clock.now_s = 11.0
    bounds.take(ANN)


def test_a_group_says_it_for_each_of_its_keys() -> None:
    """A group sets the limit of each of its keys: more, less, or none (0)."""
    bounds = rates(switches_per_minute=2)
    one, other, free = (
        Account("group team", key, is_bounded=True, per_minute=PerMinute(switches=switches))
        for key, switches in (("a", 1), ("b", 1), ("c", 0))
    )
    bounds.switch(one)
    bounds.switch(other)
    with pytest.raises(RateLimited, match="1 switches per minute"):
        bounds.switch(one)
    for _ in range(100):
        bounds.switch(free)
    bounds.switch(ANN)
    bounds.switch(ANN)
    with pytest.raises(RateLimited, match="2 switches per minute"):
        bounds.switch(ANN)


def test_defaults_count_elsewhere_than_on_loopback_and_for_keys() -> None:
    """Defaults apply only to keys beyond loopback: without keys, one caller would block all."""
    most = ELSEWHERE.requests
    assert most is not None
    take(rates(), ANN, most + 1)
    take(rates(is_local=False), EVERYBODY, most + 1)
    bounds = rates(is_local=False)
    take(bounds, ANN, most)
    with pytest.raises(RateLimited):
        bounds.take(ANN)

    take(rates(is_local=False, requests_per_minute=0), ANN, most + 1)
    bounds = rates(requests_per_minute=1)
    bounds.take(EVERYBODY)
    with pytest.raises(RateLimited):
        bounds.take(EVERYBODY)


def test_bucket_says_how_long_to_wait_without_taking() -> None:
    clock = Clock()
    rate = Rate(per_second=1, burst=3, clock=clock)
    assert [None, None] == [rate.wait_s(), rate.take()]
    assert None is rate.wait_s()
    rate.spend(5)
    assert 4 == rate.wait_s()


# --- at the server ----------------------------------------------------------------------------

TEAM = Group(
    Rights("team", per_minute=PerMinute(tokens=50)), "team", KeySource(Keys.of(["team"], "team"))
)
ACCESS = Access(user_keys=["ann", "ben"], admin_keys=["root"], groups=[TEAM])


async def ask(server: Server, key: str, **body: object) -> int:
    headers = {"authorization": f"Bearer {key}"}
    content = {"model": "llama", **body}
    return (await server.post("/v1/chat/completions", json=content, headers=headers)).status_code


async def test_calls_of_one_key_are_counted(make_server: MakeServer) -> None:
    """Each key's calls are counted, whatever `n` they ask for; others and admins are served."""
    clock = Clock()
    limits = LimitsConfig(requests_per_minute=3)
    server = await make_server(access=ACCESS, limits=limits, clock=clock)

    assert [200, 200, 200, 429] == [await ask(server, "ann", n=n) for n in (3, 20, 1, 1)]
    assert [200, 200, 200, 429] == [await ask(server, "ben", n=n) for n in (3, 20, 1, 1)]
    assert {200} == {await ask(server, "root") for _ in range(9)}
    clock.now_s = 20.0
    assert 200 == await ask(server, "ann")


async def test_batches_of_embeddings_pass_by_default(make_server: MakeServer) -> None:
    """Five of the largest batches of embeddings pass at once, and more within the minute."""
    models = {"llama": FakeSettings(tasks=("embed",))}
    server = await make_server(access=ACCESS, clock=Clock(), settings=models)
    server.app.router._rates._is_local = lambda: False
    headers = {"authorization": "Bearer ann"}
    content = {"model": "llama", "input": ["a"] * 2048}

    async def embed() -> int:
        path = "/v1/embeddings"
        return (await server.post(path, json=content, headers=headers)).status_code

    assert [200] * 5 == await asyncio.gather(*(embed() for _ in range(5)))
    assert [200] * 5 == [await embed() for _ in range(5)]


async def test_call_that_the_server_refuses_costs_nothing(make_server: MakeServer) -> None:
    """A refused call, for an inactive model or without room, costs nothing: it may be retried."""
    limits = LimitsConfig(requests_per_minute=1, in_flight=5)
    server = await make_server(access=ACCESS, limits=limits, clock=Clock())

    assert [404] * 3 == [await ask(server, "ann", model="qwen") for _ in range(3)]
    assert [429] * 3 == [await ask(server, "ann", n=6) for _ in range(3)]
    assert 200 == await ask(server, "ann")
    again = await server.post(
        "/v1/chat/completions", json={"model": "llama"}, headers={"authorization": "Bearer ann"}
    )
    assert "rate_limit_exceeded" == again.json()["error"]["code"]


async def test_call_that_finds_no_place_in_the_queue_costs_nothing(make_server: MakeServer) -> None:
    """In the mode `auto`, a call that finds the queue full costs nothing."""
    limits = LimitsConfig(requests_per_minute=1)
    server = await make_server(
        access=ACCESS, limits=limits, mode="auto", max_waiting=1, clock=Clock()
    )
    server.host.hold("activate", "qwen")
    waiting = asyncio.create_task(ask(server, "ben", model="qwen"))
    await server.settled()

    assert [429] * 3 == [await ask(server, "ann", model="qwen") for _ in range(3)]
    server.host.release("activate", "qwen")
    assert 200 == await waiting
    assert 200 == await ask(server, "ann", model="qwen")


async def test_tokens_of_one_key_are_counted(make_server: MakeServer) -> None:
    """A key's tokens are counted by its group's limit, after they were generated."""
    server = await make_server(access=ACCESS, clock=Clock())

    assert 200 == await ask(server, "team", max_tokens=60)
    assert 429 == await ask(server, "team", max_tokens=60)
    assert 200 == await ask(server, "ann", max_tokens=60)


async def test_switches_of_one_key_are_counted(make_server: MakeServer) -> None:
    """In the mode `auto`, requests that bring a model up count as switches of their key."""
    limits = LimitsConfig(switches_per_minute=2)
    server = await make_server(access=ACCESS, limits=limits, mode="auto", clock=Clock())

    models = ("qwen", "qwen", "llama", "llama", "qwen")
    assert [200, 200, 200, 200, 429] == [await ask(server, "ann", model=m) for m in models]
    assert 200 == await ask(server, "ben", model="qwen")


async def test_requests_that_never_switch_are_no_switches(make_server: MakeServer) -> None:
    """Requests that need no engine, or are refused before they wait, do not count as switches."""
    limits = LimitsConfig(switches_per_minute=1)
    server = await make_server(access=ACCESS, limits=limits, mode="auto", clock=Clock())
    headers = {"authorization": "Bearer ann"}

    async def tokenize() -> int:
        content = {"model": "qwen", "prompt": "a"}
        return (await server.post("/tokenize", json=content, headers=headers)).status_code

    assert [200] * 3 == [await tokenize() for _ in range(3)]
    assert [400] * 3 == [
        await ask(server, "ann", model="qwen", max_tokens="many") for _ in range(3)
    ]
    assert 200 == await ask(server, "ann", model="qwen")
    assert 200 == await tokenize()
    assert 429 == await ask(server, "ann", model="llama")
    assert 429 == await ask(server, "ann", model="mistral")
    assert ("load", "mistral") not in server.host.operations


async def test_calls_that_switch_are_counted_where_everybody_may(make_server: MakeServer) -> None:
    """Switch calls are counted with `VLLM_SERVER_DEV_MODE` and no admin key, too."""
    server = await make_server(limits=LimitsConfig(switches_per_minute=1), clock=Clock())

    assert 200 == (await server.switch("qwen")).status_code
    refused = await server.switch("llama")
    assert (429, "60") == (refused.status_code, refused.headers["retry-after"])
    assert "rate_limit_exceeded" == refused.json()["error"]["code"]
