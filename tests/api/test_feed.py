"""The event stream: first the state, then every event, for each subscriber that reads in time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.helpers.support import settled
from vllm_hotswap.api.feed import EventFeed, as_message, event_fields, event_name
from vllm_hotswap.events import PinChanged, ResidencyChanged, SwitchEnded
from vllm_hotswap.states import Residency

PINNED = PinChanged(3, "llama", True)


@pytest.fixture
def feed() -> EventFeed:
    return EventFeed(lambda: {"active": "llama"})


def parse(message: str) -> tuple[str, dict[str, Any]]:
    event, data, *rest = message.split("\n")
    assert ["", ""] == rest
    return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def rest_of(stream: AsyncIterator[str]) -> list[str]:
    return [message async for message in stream]


async def test_stream_begins_with_the_state(feed: EventFeed) -> None:
    """A stream begins with the state, so that a later subscriber needs no other request."""
    assert ("snapshot", {"active": "llama"}) == parse(await anext(feed.stream()))


async def test_events_follow_in_order(feed: EventFeed) -> None:
    """Events since the snapshot follow in order, and none from before it."""
    feed.notify(PinChanged(1, "before", True))
    stream = feed.stream()
    await anext(stream)

    for epoch in range(3):
        feed.notify(PinChanged(epoch, "llama", True))

    events = [parse(await anext(stream)) for _ in range(3)]
    assert [("pin_changed", {"epoch": n, "model": "llama", "pinned": True}) for n in range(3)] == (
        events
    )


async def test_every_subscriber_gets_every_event(feed: EventFeed) -> None:
    """Every subscriber gets every event, also after another has left."""
    first, second = feed.stream(), feed.stream()
    for stream in (first, second):
        await anext(stream)
    assert "<EventFeed subscribers=2>" == repr(feed)

    feed.notify(PINNED)
    await first.aclose()
    feed.notify(PINNED)

    assert ["pin_changed"] * 2 == [parse(await anext(second))[0] for _ in range(2)]
    assert "<EventFeed subscribers=1>" == repr(feed)


async def test_subscriber_that_is_cancelled_is_forgotten(feed: EventFeed) -> None:
    """A subscriber that leaves while nothing happens is forgotten."""
    reading = asyncio.create_task(rest_of(feed.stream()))
    await settled()

    reading.cancel()
    await settled()

    assert "<EventFeed subscribers=0>" == repr(feed)


async def test_subscriber_that_does_not_read_is_let_go(
    feed: EventFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscriber that does not read gets the kept events and the end; the others continue."""
    monkeypatch.setattr("vllm_hotswap.api.feed.MAX_BEHIND", 2)
    slow = feed.stream()
    await anext(slow)

    for _ in range(9):
        feed.notify(PINNED)
    fast = feed.stream()
    await anext(fast)
    feed.notify(PINNED)

    assert 2 == len(await rest_of(slow))
    assert "pin_changed" == parse(await anext(fast))[0]


async def test_silence_is_broken_by_comments(
    feed: EventFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comments keep proxies from closing an idle stream, and cost no event."""
    monkeypatch.setattr("vllm_hotswap.api.feed.KEEP_ALIVE_S", 0.001)
    stream = feed.stream()
    await anext(stream)

    assert ": keep-alive\n\n" == await anext(stream)

    feed.notify(PINNED)
    assert "pin_changed" == parse(await anext(stream))[0]


async def test_closing_ends_every_stream(feed: EventFeed) -> None:
    """Closing sends earlier events and then ends every stream."""
    stream = feed.stream()
    await anext(stream)
    feed.notify(PINNED)

    feed.close()
    feed.notify(PINNED)

    assert ["pin_changed"] == [parse(message)[0] for message in await rest_of(stream)]


async def test_stream_that_begins_after_the_end_is_short(feed: EventFeed) -> None:
    """A stream that starts after the end is short: a server that shuts down delays no client."""
    feed.close()

    assert ["snapshot"] == [parse(message)[0] for message in await rest_of(feed.stream())]


def test_message_is_a_server_sent_event() -> None:
    """A message is named like the event, with its fields as JSON, and states as words."""
    event = ResidencyChanged(1, "org/llama", Residency.PARKED, Residency.ACTIVE)

    assert (
        'event: residency_changed\ndata: {"epoch": 1, "model": "org/llama", "before": "parked", '
        '"after": "active"}\n\n'
    ) == as_message(event_name(event), event_fields(event))


def test_text_of_several_lines_stays_one_message() -> None:
    """A cause with line breaks stays one message."""
    event = SwitchEnded("switch-1", 1, None, "qwen", "failed", 0.5, 0, "a\n\nb")

    message = as_message(event_name(event), event_fields(event))

    assert ("switch_ended", "a\n\nb") == (parse(message)[0], parse(message)[1]["cause"])
