"""Limits of switch calls and of bodies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from typing import Any

import pytest

from tests.conftest import MakeServer
from tests.helpers.support import CHAT
from tests.helpers.virtual import VirtualLoop
from vllm_hotswap.access.rights import EVERYBODY, Account
from vllm_hotswap.access.roles import Access
from vllm_hotswap.api.bodies import (
    BYTES_PER_VALUE,
    PIECE_BYTES,
    Bodies,
    ClientGone,
    Ledger,
    text_bytes,
)
from vllm_hotswap.config.settings import LimitsConfig
from vllm_hotswap.errors import BodyTimeout, BodyTooLarge, QueueFull
from vllm_hotswap.tasks.rate import Rate
from vllm_hotswap.tasks.turns import at_once


class Clock:
    """A clock that shows what it is set to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_burst_passes_and_then_the_rate_counts() -> None:
    """After a burst the rate applies; a call that is too early gets the wait in whole seconds."""
    clock = Clock()
    rate = Rate(per_second=0.5, burst=2, clock=clock)
    assert [None, None, 2, 2] == [rate.take() for _ in range(4)]

    clock.now_s = 1.0
    assert 1 == rate.take()
    clock.now_s = 2.0
    assert [None, 2] == [rate.take(), rate.take()]
    clock.now_s = 1e6
    assert [None, None, 2] == [rate.take() for _ in range(3)]
    assert "<Rate tokens=0.0 of 2>" == repr(rate)


def client(*parts: bytes, pause_s: float = 0.0, leaves: bool = False) -> Any:
    """Return an ASGI `receive` that delivers a body in parts."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if leaves:
        messages.append({"type": "http.disconnect"})
    elif messages:
        messages[-1]["more_body"] = False

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause_s)
        return messages.pop(0)

    return receive


async def test_body_is_counted_until_its_request_is_over() -> None:
    """A body counts until its request is over, and all held bodies count together."""
    bodies = Bodies(LimitsConfig())
    with bodies.hold() as first:
        with bodies.hold() as second:
            assert b"one two" == await first.read(client(b"one ", b"two"))
            assert b"three" == await second.read(client(b"three"))
            assert 12 == bodies.held_bytes
        assert 7 == bodies.held_bytes
    assert "<Bodies <Ledger held=0 of 1073741824 bytes>>" == repr(bodies)


ZEROS = bytes(PIECE_BYTES)


class Turns:
    """Count the loop's turns, and note in which of them a body was read."""

    def __init__(self) -> None:
        self.now = 0
        self.read: list[tuple[int, str]] = []
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_soon(self._step)

    def _step(self) -> None:
        self.now += 1
        self._handle = self._loop.call_soon(self._step)

    def stop(self) -> None:
        self._handle.cancel()

    def body(self, name: str, *pieces: int) -> Any:
        """Return an ASGI `receive` whose pieces, of so many bytes, are all there."""
        left = list(pieces)

        async def receive() -> dict[str, Any]:
            self.read.append((self.now, name))
            content = ZEROS[: left.pop(0)]
            return {"type": "http.request", "body": content, "more_body": bool(left)}

        return receive


async def test_large_bodies_take_turns() -> None:
    """Large bodies are read one piece per turn of the loop, however many; small ones at once."""
    turns, bodies = Turns(), Bodies(LimitsConfig())
    with contextlib.ExitStack() as held:
        receives = [turns.body("large", *[PIECE_BYTES] * 10) for _ in range(8)]
        receives.append(turns.body("small", *[1000] * 10))
        reads = [held.enter_context(bodies.hold()).read(receive) for receive in receives]
        sizes = [len(content) for content in await asyncio.gather(*reads)]
    turns.stop()

    assert [10 * PIECE_BYTES] * 8 + [10_000] == sizes
    in_turn = Counter(turn for turn, name in turns.read if name == "large")
    first, *later = sorted(in_turn)
    # All first pieces take no turn, and one second piece takes the first unused turn.
    assert (9, {1}) == (in_turn[first], {in_turn[turn] for turn in later})
    assert list(range(later[0], later[-1] + 1)) == later
    assert 1 == len({turn for turn, name in turns.read if name == "small"})


async def test_callers_take_turns_in_reading_bodies() -> None:
    """Callers alternate in reading, however many bodies one sends, in however small pieces."""
    turns, bodies = Turns(), Bodies(LimitsConfig())
    one, other = (Account(name, is_admin=True) for name in ("one", "other"))
    with contextlib.ExitStack() as held:
        receives = [(one, turns.body("one", *[PIECE_BYTES] * 8)) for _ in range(8)]
        receives.append((other, turns.body("other", *[PIECE_BYTES] * 8)))
        await asyncio.gather(
            *(held.enter_context(bodies.hold(who)).read(receive) for who, receive in receives)
        )
    turns.stop()

    last = max(turn for turn, name in turns.read if name == "other")
    between = [turn for turn, name in turns.read if name == "one" and turn <= last]
    # Each first piece, then two for each of the other's: it asks again only after reading one.
    assert len(between) <= 8 + 2 * 8


async def test_small_pieces_take_few_turns() -> None:
    """Small pieces take few turns: what counts is how much is read."""
    turns, bodies = Turns(), Bodies(LimitsConfig())
    with bodies.hold() as body:
        await body.read(turns.body("one", *[1024] * 1024))
    turns.stop()

    assert turns.now <= 1024 * 1024 // PIECE_BYTES


@pytest.mark.parametrize(
    ("limits", "receive", "error"),
    [
        (LimitsConfig(body_bytes=3), client(b"on", b"e two"), BodyTooLarge),
        (LimitsConfig(held_bytes=3), client(b"on", b"e two"), QueueFull),
        (LimitsConfig(body_timeout=0.01), client(b"one", b"two", pause_s=0.006), BodyTimeout),
        (LimitsConfig(), client(b"one", leaves=True), ClientGone),
    ],
)
async def test_body_beyond_a_limit_is_refused(
    limits: LimitsConfig, receive: Any, error: type[Exception]
) -> None:
    """A body beyond a limit is refused, and its bytes are released."""
    bodies = Bodies(limits)
    with pytest.raises(error), bodies.hold() as body:
        await body.read(receive)
    assert 0 == bodies.held_bytes


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models/switch"])
async def test_too_long_a_body_gets_413(make_server: MakeServer, path: str) -> None:
    """A body that is too long gets 413, on vLLM's routes and on ours."""
    server = await make_server(limits=LimitsConfig(body_bytes=1000))

    response = await server.post(path, content=b" " * 1001)

    assert (413, "body_too_large") == (response.status_code, response.json()["error"]["code"])


async def test_what_a_request_holds_counts_until_its_answer_has_ended(
    make_server: MakeServer,
) -> None:
    """A body counts until its response has ended, waiting included: vLLM keeps all of it."""
    server = await make_server(limits=LimitsConfig(held_bytes=10_000))
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()
    held = [server.ask("qwen", text="x" * 2000) for _ in range(2)]
    await server.settled()
    assert 429 == (await server.ask("qwen", text="x" * 2000)).status_code
    server.host.release("activate", "qwen")
    await switch
    assert [200, 200] == [(await request).status_code for request in held]

    stream = server.request("POST", CHAT, body_of("qwen", stream=True, text="x" * 3000))
    await stream.next_event()
    assert 2 * 3000 < server.app.router.bodies.held_bytes
    assert 429 == (await server.ask("qwen", text="x" * 2000)).status_code

    await stream.finish()
    assert 0 == server.app.router.bodies.held_bytes


@pytest.mark.parametrize("count", [100, 10_000], ids=["parsed", "scanned"])
async def test_many_small_values_weigh_more_than_their_bytes(
    make_server: MakeServer, count: int
) -> None:
    """Many small values weigh more than their bytes: 30 MiB of them once took 420 MiB."""
    server = await make_server()
    stream = server.request("POST", CHAT, body_of("llama", stream=True, kept=["ab"] * count))

    await stream.next_event()
    assert count * BYTES_PER_VALUE < server.app.router.bodies.held_bytes

    await stream.finish()
    assert 0 == server.app.router.bodies.held_bytes


def body_of(alias: str, **fields: Any) -> bytes:
    return json.dumps({"model": alias, **fields}).encode()


def test_no_account_takes_all_of_a_pot() -> None:
    """An account alone has its share, two have less each, and a new one always finds room."""
    ledger = Ledger(1000, share=0.5)
    ann, ben, carl = (Account(name, is_bounded=True) for name in ("ann", "ben", "carl"))

    assert ledger.fits(ann, 500)
    assert not ledger.fits(ann, 501)
    ledger.add(ann, 500)
    assert ledger.fits(ben, 250)
    assert not ledger.fits(ben, 251)
    ledger.add(ben, 250)
    assert ledger.fits(carl, 125)
    assert ledger.fits(Account("admin", is_admin=True), 250)
    assert not ledger.fits(Account("admin", is_admin=True), 251)

    ledger.add(ann, -500)
    assert ledger.fits(ben, 250)
    assert "<Ledger held=250 of 1000 bytes>" == repr(ledger)


def test_whole_share_is_no_bound() -> None:
    """A share of 1 is no limit: without keys all callers are one account, which may have all."""
    assert Ledger(1000, share=1).fits(Account("ann", is_bounded=True), 1000)
    assert Ledger(1000, share=0.5).fits(EVERYBODY, 1000)
    assert not Ledger(1000, share=1).fits(EVERYBODY, 1001)


KEYS = Access(user_keys=["ann", "ben"], admin_keys=["root"])


def as_who(key: str, **more: str) -> list[tuple[bytes, bytes]]:
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json", **more}
    return [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]


async def test_unfinished_bodies_of_one_key_shut_nobody_out(make_server: MakeServer) -> None:
    """Unfinished bodies of one key block neither admins nor others; what fits still is served."""
    server = await make_server(access=KEYS, limits=LimitsConfig(held_bytes=100_000))
    for _ in range(10):
        hog = server.request("POST", CHAT, headers=as_who("ann"))
        hog.say({"type": "http.request", "body": b" " * 5000, "more_body": True})
    await server.settled()
    assert 50_000 == server.app.router.bodies.held_bytes
    hog = server.request("POST", CHAT, b" " * 5000, headers=as_who("ann"))
    assert 429 == (await hog.finish()).status

    for key in ("ben", "root"):
        headers = {"authorization": f"Bearer {key}"}
        answer = await server.post(CHAT, json={"model": "llama"}, headers=headers)
        assert 200 == answer.status_code
    headers = {"authorization": "Bearer root"}
    switch = await server.post("/v1/models/switch", json={"model": "qwen"}, headers=headers)
    assert 200 == switch.status_code


async def test_own_routes_are_open_when_the_pot_is_full(make_server: MakeServer) -> None:
    """When the pot is full, our own routes still answer, also where no key is required."""
    server = await make_server(limits=LimitsConfig(held_bytes=1000))
    hog = server.request("POST", CHAT, headers=[(b"content-type", b"application/json")])
    hog.say({"type": "http.request", "body": b" " * 1000, "more_body": True})
    await server.settled()

    assert 429 == (await server.ask("llama")).status_code
    assert 200 == (await server.switch("qwen")).status_code


@pytest.mark.parametrize(
    ("path", "length", "status"),
    [(CHAT, 1001, 413), (CHAT, 801, 429), ("/v1/models/switch", (1 << 20) + 1, 413)],
)
async def test_announced_length_that_does_not_fit_is_not_waited_for(
    make_server: MakeServer, path: str, length: int, status: int
) -> None:
    """An announced length that does not fit is refused before the first byte of the body."""
    limits = LimitsConfig(body_bytes=1000 if path == CHAT else 1 << 30, held_bytes=800)
    server = await make_server(limits=limits)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]

    request = server.request("POST", path, headers=headers)

    assert status == (await request.finish()).status


def test_body_that_dribbles_is_ended() -> None:
    """A body slower than the rate for 20 s is refused; above it, the total time applies."""

    async def story() -> None:
        fast = client(*[b"x" * 30_000] * 10, pause_s=5)
        with Bodies(LimitsConfig()).hold() as body:
            assert 300_000 == len(await body.read(fast))

        loop = asyncio.get_running_loop()
        began_s = loop.time()
        dribble = client(b"x" * (1 << 20), *[b"x" * 1000] * 100, pause_s=1)
        with pytest.raises(BodyTimeout), Bodies(LimitsConfig()).hold() as body:
            await body.read(dribble)
        assert 41 == loop.time() - began_s

        began_s = loop.time()
        long = client(*[b"x" * 8000] * 1000, pause_s=1)
        with pytest.raises(BodyTimeout), Bodies(LimitsConfig()).hold() as body:
            await body.read(long)
        assert 300 == loop.time() - began_s

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(story())


def test_short_body_may_stall() -> None:
    """A short body may stall, as on a phone without network, until the body's time is over."""

    async def story() -> None:
        with Bodies(LimitsConfig()).hold() as body:
            assert 1000 == len(await body.read(client(b"x" * 500, b"x" * 500, pause_s=100)))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(story())


def test_what_waits_to_be_read_is_not_slow() -> None:
    """After a pause of the server itself, a body that waits to be read does not count as slow."""

    async def story() -> None:
        paused_s = [0.0, 20.0, 0.5]

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(paused_s.pop(0))
            await asyncio.sleep(0)  # later in the same turn, and in the next one
            return {"type": "http.request", "body": b"x" * 100_000, "more_body": bool(paused_s)}

        with Bodies(LimitsConfig()).hold() as body:
            assert 300_000 == len(await body.read(receive))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(story())


IMAGE = "A" * 1_000_000


@pytest.mark.parametrize(
    ("texts", "times"),
    [
        (["a" * 1000], 2),
        (["é" + "a" * 1000], 4),
        ([IMAGE, "ab" * 100_000], 2),
        ([IMAGE, "中"], 2.6),
        (["中", IMAGE, "中" * 10], 2.6),
        ([IMAGE + "中"], 4),
        (["中" + IMAGE], 4),
        (["中" + 'x"' + IMAGE], 4),
        ([IMAGE + '"中'], 4),
        ([IMAGE + "x" * 70_000 + "中" + IMAGE], 4),
    ],
)
@pytest.mark.parametrize("is_escaped", [True, False])
def test_texts_weigh_what_they_become(texts: list[str], times: float, is_escaped: bool) -> None:
    """Texts count at least what Python takes for them; an image counts less than text beside it."""
    body = json.dumps(texts, ensure_ascii=is_escaped).encode()

    weight = at_once(text_bytes(body))

    assert weight >= sum(sys.getsizeof(text) - sys.getsizeof("") for text in texts)
    assert 2 * len(body) <= weight <= times * len(body)


async def test_images_of_one_key_fit(make_server: MakeServer) -> None:
    """As many images as a client sends at once fit into one key's share, each counted twice."""
    server = await make_server(access=KEYS, limits=LimitsConfig(held_bytes=10_000_000))
    body = body_of("llama", stream=True, image=IMAGE)
    images = [server.request("POST", CHAT, body, headers=as_who("ann")) for _ in range(2)]
    for image in images:
        assert await image.next_event()
    assert 4_000_000 < server.app.router.bodies.held_bytes < 4_100_000
    for image in images:
        await image.finish()


async def test_client_that_leaves_in_its_body_is_forgotten(make_server: MakeServer) -> None:
    """Nothing is left of a client that leaves while it sends its body."""
    server = await make_server()
    stream = server.request("POST", "/v1/chat/completions")
    stream.say({"type": "http.request", "body": b"{", "more_body": True})
    await server.settled()
    assert 1 == server.app.router.bodies.held_bytes

    stream.say({"type": "http.disconnect"})
    await stream.task

    assert 0 == server.app.router.bodies.held_bytes
