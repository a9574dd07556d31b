"""Bounds of switch calls and of bodies."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.conftest import MakeServer
from vllm_hotswap.errors import BodyTimeout, BodyTooLarge, QueueFull
from vllm_hotswap.limits import Bodies, ClientGone, Rate
from vllm_hotswap.settings import LimitsConfig


class Clock:
    """Shows what it is set to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_burst_passes_and_then_the_rate_counts() -> None:
    """Who comes too early is told how long to wait, in whole seconds."""
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
    """An ASGI `receive` that says a body in parts."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if leaves:
        messages.append({"type": "http.disconnect"})
    elif messages:
        messages[-1]["more_body"] = False

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause_s)
        return messages.pop(0)

    return receive


async def test_body_is_counted_until_it_is_let_go() -> None:
    """All that are held count together."""
    bodies = Bodies(LimitsConfig())
    with bodies.hold() as first, bodies.hold() as second:
        assert b"one two" == await first.read(client(b"one ", b"two"))
        assert b"three" == await second.read(client(b"three"))
        assert 12 == bodies.held_bytes

        first.let_go()
        assert 5 == bodies.held_bytes
    assert "<Bodies held=0 of 536870912 bytes>" == repr(bodies)


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
    """And counts no longer."""
    bodies = Bodies(limits)
    with pytest.raises(error), bodies.hold() as body:
        await body.read(receive)
    assert 0 == bodies.held_bytes


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models/switch"])
async def test_too_long_a_body_gets_413(make_server: MakeServer, path: str) -> None:
    """On vLLM's routes and on ours."""
    server = await make_server(limits=LimitsConfig(body_bytes=1000))

    response = await server.post(path, content=b" " * 1001)

    assert (413, "body_too_large") == (response.status_code, response.json()["error"]["code"])


async def test_bodies_of_held_requests_count(make_server: MakeServer) -> None:
    """One too many gets 429 at once; those that are held are served."""
    server = await make_server(limits=LimitsConfig(held_bytes=5000))
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()
    held = [server.ask("qwen", text="x" * 2000) for _ in range(2)]
    await server.settled()

    assert 429 == (await server.ask("qwen", text="x" * 2000)).status_code

    server.host.release("activate", "qwen")
    await switch
    assert [200, 200] == [(await request).status_code for request in held]
    assert 0 == server.app.router.bodies.held_bytes


async def test_client_that_leaves_in_its_body_is_forgotten(make_server: MakeServer) -> None:
    """Nothing is left of it."""
    server = await make_server()
    stream = server.request("POST", "/v1/chat/completions")
    stream.say({"type": "http.request", "body": b"{", "more_body": True})
    await server.settled()
    assert 1 == server.app.router.bodies.held_bytes

    stream.say({"type": "http.disconnect"})
    await stream.task

    assert 0 == server.app.router.bodies.held_bytes
