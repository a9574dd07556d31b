"""Steps of a fake engine: the words of its answers, and which of its requests have ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator

from vllm_hotswap.engines import make_stamp
from vllm_hotswap.errors import WrongStamp
from vllm_hotswap.models import current_lease
from vllm_hotswap.testing.fake_answers import WORDS


class FakeSteps:
    """The requests of one fake engine, answered while it is stepped.

    The mutable state is `stamp`, whether the engine is stepped, `_released` (ids of requests whose
    end is counted already), and two counters, `served` and `aborted`. It is all of the event
    loop's, and changed by this class alone.
    """

    def __init__(
        self,
        alias: str,
        token_s: float,
        request_ids: Iterator[int],
        before_token: Callable[[], Awaitable[None]],
    ) -> None:
        """`before_token` is waited for before each word."""
        self.stamp = (alias, 0)
        """Alias and epoch of its outputs."""
        self.served = 0
        self.aborted = 0
        self._alias = alias
        self._token_s = token_s
        self._request_ids = request_ids
        self._before_token = before_token
        self._released: set[str] = set()
        self._stepped = asyncio.Event()

    def __repr__(self) -> str:
        return f"<FakeSteps {self._alias} stepped={self.is_stepped} stamp={self.stamp}>"

    @property
    def is_stepped(self) -> bool:
        return self._stepped.is_set()

    def set_stepped(self, stepped: bool) -> None:
        if stepped:
            self._stepped.set()
        else:
            self._stepped.clear()

    def release(self, requests: Collection[str]) -> None:
        """Count requests as aborted now, and not when their answers end."""
        self.aborted += len(requests)
        self._released.update(requests)

    async def tokens(self, max_tokens: int, name: str) -> AsyncIterator[str]:
        """The words of an answer, as `name`; each one waits until the engine is stepped."""
        lease, request_id = current_lease.get(), f"fake-{next(self._request_ids)}"
        if lease is not None:
            lease.requests.add(request_id)
            if lease.wait_for_turn is not None:
                await lease.wait_for_turn(max_tokens)
        try:
            for number in range(max_tokens):
                await self._stepped.wait()
                if self._token_s:
                    await asyncio.sleep(self._token_s)
                    await self._stepped.wait()  # parked meanwhile, it goes on later
                await self._before_token()
                self.check_stamp()
                if lease is not None:
                    lease.output_tokens += 1
                yield word(number, name)
            self.served += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += request_id not in self._released
            raise
        finally:
            self._released.discard(request_id)
            if lease is not None:
                lease.requests.discard(request_id)

    def check_stamp(self) -> None:
        """Check the stamp of an output, as the real frontend does for every output.

        Raises:
            asyncio.CancelledError: the request does not accept it, and has been ended.
        """
        lease = current_lease.get()
        if lease is not None and not lease.accepts_stamp(*self.stamp):
            lease.end(WrongStamp(lease.alias, make_stamp(*self.stamp)))
            raise asyncio.CancelledError


def word(number: int, name: str) -> str:
    """Word `number` of an answer as `name`."""
    return WORDS[number % len(WORDS)].format(alias=name)
