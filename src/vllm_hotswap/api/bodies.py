"""Bounds on rates, and on the bytes that requests hold until they are answered."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from vllm_hotswap.access import EVERYBODY, Account
from vllm_hotswap.config import LimitsConfig
from vllm_hotswap.errors import BodyTimeout, BodyTooLarge, QueueFull
from vllm_hotswap.tasks import Pause, Steps, Work

_BACKSLASH = ord("\\")

LARGE_BYTES = 2 << 20
"""Bodies of at least this size are joined in a thread, not on the event loop."""

PIECE_BYTES = 256 << 10
"""Bytes of a body that are read in one go; then callers alternate in reading more."""

OWN_BODY_BYTES = 1 << 20
"""The longest body of a request to one of our own routes, which parse it in one go."""

OWN_POT_BYTES = 64 << 20
"""Bytes of all such bodies together, except those of admins."""

PACE_S = 20.0
"""The period in which a body must come as fast as `limits.body_rate` says; it starts anew."""

PACED_BYTES = 64 << 10
"""Bytes from which on the pace counts. Fewer cost nothing, and a client may stall for a while."""

SECOND_CHECK_S = 1.0
"""Seconds in which data that has come is read, if the server itself was busy for long."""

BYTES_PER_BYTE = 4
"""What a byte of a JSON body becomes at most: a text with an unusual character takes four bytes for
each of its characters. Measured with `json.loads` of Python 3.11."""

PLAIN_BYTES_PER_BYTE = 2
"""The same for a byte of ASCII text: once in the body, once in the text. Measured likewise."""

WINDOW_BYTES = 64 << 10
"""Bytes of a body looked at between two yields. Only a longer text can be plain by itself."""

BYTES_PER_VALUE = 160
"""What a JSON value takes at most, besides its bytes: an object with one key, measured likewise."""


def text_bytes(body: bytes) -> Work[int]:
    """Return the bytes that a JSON body and its texts take at most, once they are parsed.

    One unusual character makes all of its text wide, but not other texts: an image beside it, in
    base64, stays as it is.
    """
    plain = yield from _plain_bytes(body)
    return PLAIN_BYTES_PER_BYTE * plain + BYTES_PER_BYTE * (len(body) - plain)


def _plain_bytes(body: bytes) -> Work[int]:
    """Return how many bytes surely stay narrow: all of them, or whole texts that are long."""
    windows = range(0, len(body), WINDOW_BYTES)
    is_plain = True
    for start in windows:
        is_plain = is_plain and _is_plain(body, start, start + WINDOW_BYTES)
        yield
    if is_plain:
        return len(body)
    plain, begin, is_text = 0, 0, False  # the last two: of the text that the last window ended in
    for start in windows:
        end = start + WINDOW_BYTES
        if (first := body.find(b'"', start, end)) < 0:
            is_text = is_text and _is_plain(body, start, end)
        else:
            if is_text and _is_plain(body, start, first) and body[first - 1] != _BACKSLASH:
                plain += first - begin
            begin = body.rfind(b'"', start, end)
            is_text = body[max(0, begin - 1)] != _BACKSLASH and _is_plain(body, begin, end)
        yield
    return plain


def _is_plain(body: bytes, start: int, end: int) -> bool:
    """Whether all characters are ASCII, and none is written as `\\u`."""
    piece = body[start : end + 1]  # one byte more: an escape may begin at the end
    return piece.isascii() and b"\\u" not in piece


class ClientGone(Exception):
    """The client left before its request was complete or admitted."""


class Ledger:
    """The bytes that each account holds of one pot.

    No account can empty the pot: the share bounds what it holds in proportion to what is left free.
    With a share of a half, that is as much as is free. So one account alone may hold half of the
    pot, two a third each, and the next one finds the last third. Source: Choudhury and
    Hahne, Dynamic queue length thresholds for shared-memory packet switches, 1998.
    """

    def __init__(self, size: int, share: float) -> None:
        self._size = size
        self._per_free = math.inf if share >= 1 else share / (1 - share)
        self._of: Counter[str] = Counter()
        self.held = 0

    def __repr__(self) -> str:
        return f"<Ledger held={self.held} of {self._size} bytes>"

    def fits(self, account: Account, more: int) -> bool:
        """Whether the account may hold so many more bytes."""
        free = self._size - self.held - more
        if free < 0:
            return False
        if not account.is_bounded or self._per_free == math.inf:
            return True
        return self._of[account.name] + more <= self._per_free * free

    def add(self, account: Account, more: int) -> None:
        """Note that the account holds so many more bytes, or fewer."""
        self.held += more
        self._of[account.name] += more
        if not self._of[account.name]:
            del self._of[account.name]


class Bodies:
    """The bytes that requests hold, from the first byte of a body until their responses end."""

    def __init__(self, limits: LimitsConfig, *, are_own: bool = False) -> None:
        """`are_own`: for our own routes, whose bodies are small; users cannot fill their pot."""
        self.limits = limits
        self.are_own = are_own
        size = OWN_POT_BYTES if are_own else limits.held_bytes
        self.ledger = Ledger(size, limits.held_share)
        self._pieces = Steps(per_turn=1)

    def __repr__(self) -> str:
        return f"<Bodies {self.ledger!r}>"

    @property
    def held_bytes(self) -> int:
        """Bytes that all requests hold together."""
        return self.ledger.held

    async def wait_for_turn(self, account: Account) -> None:
        """Wait until one more piece of a body may be read: one per iteration of the event loop."""
        pause = Pause()
        self._pieces.take(asyncio.get_running_loop(), account.name, pause.end)
        await pause.wait_ended()

    def hold(self, account: Account = EVERYBODY) -> HeldBody:
        return HeldBody(self, account)


class HeldBody:
    """The bytes that one request holds. As a context manager, it gives them back at the end."""

    def __init__(self, bodies: Bodies, account: Account) -> None:
        self._bodies = bodies
        self._limits = bodies.limits
        self._account = account
        self._is_free = bodies.are_own and account.is_admin
        self._size = 0
        self._counted = 0
        self._pace: asyncio.TimerHandle

    def __enter__(self) -> HeldBody:
        return self

    def __exit__(self, *_: object) -> None:
        self._bodies.ledger.add(self._account, -self._counted)
        self._counted = 0

    async def read(self, receive: Receive, headers: Headers | None = None) -> bytes:
        """Read the whole body.

        Raises:
            BodyTooLarge, QueueFull: its announced or real length is beyond a limit.
            BodyTimeout: it does not come, or comes too slowly.
            ClientGone: the client left.
        """
        if headers is not None:
            self._refuse_announced(headers.get("content-length", ""))
        chunks: list[bytes] = []
        read = 0
        try:
            async with asyncio.timeout(self._limits.body_timeout) as deadline:
                self._watch(deadline)
                while (message := await receive()).get("more_body", False):
                    chunks.append(self._take(message))
                    if self._size - read >= PIECE_BYTES:
                        read = self._size
                        await self._bodies.wait_for_turn(self._account)
        except TimeoutError:
            raise BodyTimeout(self._limits.body_timeout, self._limits.body_rate, PACE_S) from None
        finally:
            self._pace.cancel()
        last = self._take(message)
        if self._size < LARGE_BYTES:
            return b"".join((*chunks, last)) if chunks else last
        # For large bodies, `join` releases the interpreter's lock while it copies.
        return await asyncio.to_thread(b"".join, (*chunks, last))

    def _watch(self, deadline: asyncio.Timeout) -> None:
        """Check after `PACE_S` how much has come since now."""
        loop = asyncio.get_running_loop()
        self._pace = loop.call_later(PACE_S, self._check_pace, deadline, self._size)

    def _check_pace(self, deadline: asyncio.Timeout, size_before: int) -> None:
        if self._is_slow(size_before):
            # Its data may wait to be read: after a pause of the server, this timer runs first.
            loop = asyncio.get_running_loop()
            self._pace = loop.call_later(
                SECOND_CHECK_S, self._check_pace_again, deadline, size_before
            )
        else:
            self._watch(deadline)

    def _check_pace_again(self, deadline: asyncio.Timeout, size_before: int) -> None:
        if self._is_slow(size_before):
            deadline.reschedule(asyncio.get_running_loop().time())
        else:
            self._watch(deadline)

    def _is_slow(self, size_before: int) -> bool:
        came = self._size - size_before
        return self._size >= PACED_BYTES and came < self._limits.body_rate * PACE_S

    def weigh(self, text_bytes: int, values: int) -> None:
        """Count what the body becomes when it is parsed: all its bytes, and its JSON values.

        Raises `QueueFull`.
        """
        self._count(max(0, text_bytes - self._size) + BYTES_PER_VALUE * values)

    def _refuse_announced(self, length: str) -> None:
        if length.isdecimal() and length.isascii() and len(length) < 20:
            self._refuse_beyond(int(length))
            if not self._fits(int(length)):
                raise self._full()

    def _refuse_beyond(self, size: int) -> None:
        if size > self._limits.body_bytes:
            raise BodyTooLarge(self._limits.body_bytes)
        if self._bodies.are_own and size > OWN_BODY_BYTES:
            raise BodyTooLarge(OWN_BODY_BYTES, "the limit of this route")

    def _take(self, message: Message) -> bytes:
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        self._size += len(chunk)
        self._refuse_beyond(self._size)
        self._count(len(chunk))
        return chunk

    def _count(self, more: int) -> None:
        if more and not self._fits(more):
            raise self._full()
        self._bodies.ledger.add(self._account, more)
        self._counted += more

    def _fits(self, more: int) -> bool:
        return self._is_free or self._bodies.ledger.fits(self._account, more)

    def _full(self) -> QueueFull:
        if self._bodies.are_own:
            return QueueFull(
                "too many bodies are being sent to the server's own routes; retry later",
                retry_after_s=1,
            )
        return QueueFull(
            f"no room for this body: requests hold {self._bodies.held_bytes} of "
            f"{self._limits.held_bytes} bytes (limits.held_bytes), and one caller may hold only "
            "its share (limits.held_share); retry later",
            retry_after_s=1,
        )
