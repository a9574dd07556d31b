"""Bounds: of switch calls per time, and of the bytes of requests that have not been admitted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from starlette.types import Message, Receive

from vllm_hotswap.errors import BodyTimeout, BodyTooLarge, QueueFull
from vllm_hotswap.settings import LimitsConfig

LARGE_BYTES = 2 << 20
"""Bodies from here on are put together beside the event loop."""


class Rate:
    """A token bucket: `burst` at once, `per_second` in the long run."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._filled_s = clock()

    def __repr__(self) -> str:
        return f"<Rate tokens={self._tokens:.1f} of {self._burst}>"

    def take(self) -> int | None:
        """Take one token; where there is none, how many whole seconds to wait for it."""
        now_s = self._clock()
        filled = self._tokens + (now_s - self._filled_s) * self._per_second
        self._tokens, self._filled_s = min(filled, self._burst), now_s
        if self._tokens < 1:
            return max(1, math.ceil((1 - self._tokens) / self._per_second))
        self._tokens -= 1
        return None


class ClientGone(Exception):
    """The client left before its request was complete or admitted."""


class Bodies:
    """The bodies of requests that are being read or held; `held_bytes` is what they are together.

    Once a request is admitted, its body is the engine's frontend's.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self.held_bytes = 0

    def __repr__(self) -> str:
        return f"<Bodies held={self.held_bytes} of {self._limits.held_bytes} bytes>"

    def hold(self, own_limit: int | None = None) -> HeldBody:
        """`own_limit` are the bytes that the route takes, where it does not take as many."""
        return HeldBody(self, self._limits, own_limit)


class HeldBody:
    """One request's body. As a context manager it counts until the end, or until `let_go`."""

    def __init__(self, bodies: Bodies, limits: LimitsConfig, own_limit: int | None) -> None:
        self._bodies = bodies
        self._limits = limits
        self._own_limit = own_limit
        self._size = 0

    def __enter__(self) -> HeldBody:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()

    def let_go(self) -> None:
        """The body counts no longer. Idempotent."""
        self._bodies.held_bytes -= self._size
        self._size = 0

    async def read(self, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            BodyTooLarge, BodyTimeout, QueueFull: it is beyond a limit.
            ClientGone: the client left.
        """
        chunks = []
        try:
            async with asyncio.timeout(self._limits.body_timeout):
                while (message := await receive()).get("more_body", False):
                    chunks.append(self._take(message))
        except TimeoutError:
            raise BodyTimeout(self._limits.body_timeout) from None
        last = self._take(message)
        if self._size < LARGE_BYTES:
            return b"".join((*chunks, last)) if chunks else last
        # For large ones, joining lets go of the interpreter while it copies.
        return await asyncio.to_thread(b"".join, (*chunks, last))

    def _take(self, message: Message) -> bytes:
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        self._size += len(chunk)
        self._bodies.held_bytes += len(chunk)
        if self._size > self._limits.body_bytes:
            raise BodyTooLarge(self._limits.body_bytes)
        if self._own_limit is not None and self._size > self._own_limit:
            raise BodyTooLarge(self._own_limit, "the most that this route takes")
        if self._bodies.held_bytes > self._limits.held_bytes:
            raise QueueFull(
                f"the bodies of requests that wait are {self._limits.held_bytes} bytes together "
                "already (limits.held_bytes); retry later",
                retry_after_s=1,
            )
        return chunk
