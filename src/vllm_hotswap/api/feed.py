"""The event stream: all events of the coordinator, for clients that watch.

Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html), one per
event, in order. The stream of a client that reads too slowly is ended, not buffered for ever.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from vllm_hotswap.api.redaction import redact_if_any
from vllm_hotswap.events import Event

MAX_BEHIND = 10_000
"""Events that a client may lag behind; then its stream ends."""
KEEP_ALIVE_S = 15.0


class EventFeed:
    """An observer that passes events on to its subscribers.

    The mutable state is `_queues`, one for each subscriber (None in a queue ends its stream), and
    `_is_closed`.
    """

    def __init__(self, snapshot: Callable[[], Mapping[str, Any]]) -> None:
        self._snapshot = snapshot
        self._queues: set[asyncio.Queue[str | None]] = set()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<EventFeed subscribers={len(self._queues)}>"

    def notify(self, event: Event) -> None:
        if not self._queues:
            return
        message = as_message(event_name(event), event_fields(event))
        for queue in list(self._queues):
            if queue.qsize() >= MAX_BEHIND:
                self._queues.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(message)

    def close(self) -> None:
        """End every stream. A stream that starts later ends after the snapshot."""
        self._is_closed = True
        for queue in self._queues:
            queue.put_nowait(None)
        self._queues.clear()

    async def stream(self) -> AsyncIterator[str]:
        """Yield the state now, as the event `snapshot`, and then every event."""
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        if self._is_closed:
            queue.put_nowait(None)
        self._queues.add(queue)  # before the snapshot is sent: no event in between is missed
        try:
            yield as_message("snapshot", self._snapshot())
            while (message := await _next(queue)) is not None:
                yield message
        finally:
            self._queues.discard(queue)


async def _next(queue: asyncio.Queue[str | None]) -> str | None:
    """Return the next message, or a comment if there was none for a while."""
    try:
        async with asyncio.timeout(KEEP_ALIVE_S):
            return await queue.get()
    except TimeoutError:
        return ": keep-alive\n\n"


def event_name(event: Event) -> str:
    """Return an event's name: `switch_ended` for `SwitchEnded`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()


def event_fields(event: Event) -> dict[str, Any]:
    """Return the event's fields, with times in seconds, and without its key: that is for admins."""
    names = [field.name for field in dataclasses.fields(event) if field.name != "key"]
    values = {name: getattr(event, name) for name in names}
    return values | {"cause": redact_if_any(values["cause"])} if "cause" in values else values


def as_message(name: str, data: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
