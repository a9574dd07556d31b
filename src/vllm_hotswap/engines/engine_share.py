"""Each account's share of one engine, so that no account has the engine for itself.

vLLM's scheduler takes requests of all clients in the order of arrival. When one client sends a
thousand, another's single request waits behind them. Here requests wait before the engine, in one
queue per account. The engine gets no more requests of one account than keep it busy:

- places: an account may have its share of the requests that the engine runs at a time. All accounts
  together leave one place in `KEPT` free for an account that has none;
- tokens: an account's prompts without an output yet may have its share of the tokens that the
  engine takes in `STEPS` steps. More of them in the engine would make nothing faster, and other
  accounts would wait behind them.

The share counts while several accounts use the engine, and for `RECENT_S` after that. An account
that is alone may have everything.

An account that has nothing in the engine never waits here. A place that becomes free goes to the
account with the fewest requests in the engine. Among several, the one that was served longest ago
gets it. Everything runs on one event loop.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

RECENT_S = 60.0
"""Time after its last request for which an account counts as one that uses the engine."""

KEPT = 8
"""One place in so many is kept free."""

STEPS = 2
"""Engine steps for which one account's prompts may wait in the engine: while one step runs, the
next is made ready."""


class _Place(Enum):
    FREE = auto()
    OWN_SHARE_TAKEN = auto()
    """The account has its whole share."""
    ALL_TAKEN = auto()


@dataclass(eq=False, slots=True)
class _Request:
    """One request, at the door or in the engine."""

    account: str
    tokens: int
    share: float
    turn: asyncio.Future[None] | None = None
    """Its result lets the request in; None if the request did not have to wait."""
    has_output: bool = False
    """Whether an output of the request has come."""


@dataclass(slots=True)
class EngineShare:
    """The door of one engine.

    The mutable state:

    - `_inside`: the requests that the engine has, by id. Per account, `_places` counts them, and
      `_tokens` the tokens of prompts without an output;
    - `_waiting`: the requests before the door, by account and id; `_held`: the same by id alone;
    - `_heap`: a heap of accounts that may be next. Some entries are out of date: `_precedences` has
      the precedence of each account now;
    - `_asked_s`: when each account asked last; `_served`: its last turn, as a count.
    """

    places: int
    """Requests that the engine runs at a time."""
    step_tokens: int
    """Tokens of prompts that the engine takes in one step."""
    clock: Callable[[], float]
    """Seconds, as `time.monotonic` counts them."""
    _inside: dict[str, _Request] = field(default_factory=dict)
    _places: Counter[str] = field(default_factory=Counter)
    _tokens: Counter[str] = field(default_factory=Counter)
    _waiting: dict[str, dict[str, _Request]] = field(default_factory=dict)
    _held: dict[str, _Request] = field(default_factory=dict)
    _heap: list[tuple[int, int, str]] = field(default_factory=list)
    _precedences: dict[str, tuple[int, int]] = field(default_factory=dict)
    _asked_s: dict[str, float] = field(default_factory=dict)
    _served: dict[str, int] = field(default_factory=dict)
    _turns: int = 0

    def __repr__(self) -> str:
        waiting = {account: len(queue) for account, queue in self._waiting.items()}
        return f"<EngineShare inside={dict(self._places)} waiting={waiting}>"

    async def enter(self, request_id: str, account: str, tokens: int, share: float) -> None:
        """Return when the engine may have the request.

        Args:
            request_id: one that is inside already only has more input, and passes at once.
            account: the account of the request.
            tokens: tokens of its prompt.
            share: the part of the engine's places that one account may have, above 0 and below 1.

        Raises:
            asyncio.CancelledError: another task called `leave` for it during the wait.
        """
        if request_id in self._inside:
            return
        self._note(account)
        request = _Request(account, max(tokens, 1), share)
        if account not in self._waiting and self._place_for(request) is _Place.FREE:
            self._admit_one(request_id, request)
            return
        request.turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(account, {})[request_id] = request
        self._held[request_id] = request
        self._push(account)
        try:
            await request.turn
        except asyncio.CancelledError:
            # It may be inside by now: it got its turn, and its task was cancelled before it ran.
            self.leave(request_id)
            raise

    def note_output(self, request_id: str) -> None:
        """Note that an output of the request has come. Idempotent."""
        request = self._inside.get(request_id)
        if request is not None and not request.has_output:
            request.has_output = True
            _subtract(self._tokens, request.account, request.tokens)
            self._admit_waiting(request.account)

    def leave(self, request_id: str) -> None:
        """Take out a request that has ended, or is given up before its turn. Idempotent."""
        if (request := self._inside.pop(request_id, None)) is not None:
            _subtract(self._places, request.account, 1)
            if not request.has_output:
                _subtract(self._tokens, request.account, request.tokens)
            self._admit_waiting(request.account)
        elif (held := self._held.get(request_id)) is not None:
            self._remove(request_id, held)
            if held.turn is not None:
                held.turn.cancel()
            self._admit_waiting(held.account)

    def _remove(self, request_id: str, request: _Request) -> None:
        del self._held[request_id]
        queue = self._waiting[request.account]
        del queue[request_id]
        if not queue:
            del self._waiting[request.account]

    def _note(self, account: str) -> None:
        now_s = self.clock()
        self._asked_s.pop(account, None)
        self._asked_s[account] = now_s  # the last one
        oldest = next(iter(self._asked_s))
        while oldest != account and now_s - self._asked_s[oldest] > RECENT_S:
            del self._asked_s[oldest]
            if oldest not in self._places and oldest not in self._waiting:
                self._served.pop(oldest, None)
            oldest = next(iter(self._asked_s))

    def _is_alone(self, account: str) -> bool:
        """Whether no other account uses the engine, waits for it, or has asked lately."""
        if len(self._places) > 1 or len(self._waiting) > 1:
            return False
        if any(one != account for one in (*self._places, *self._waiting)):
            return False
        last = next((one for one in reversed(self._asked_s) if one != account), None)
        return last is None or self.clock() - self._asked_s[last] > RECENT_S

    def _place_for(self, request: _Request) -> _Place:
        has = self._places.get(request.account, 0)
        if not has:
            return _Place.FREE
        is_alone = self._is_alone(request.account)
        share = 1.0 if is_alone else request.share
        waiting = self._tokens.get(request.account, 0)
        if waiting and waiting + request.tokens > share * STEPS * self.step_tokens:
            return _Place.OWN_SHARE_TAKEN
        # An account that is alone has one more, which keeps the engine busy.
        most = self.places + 1 if is_alone else math.ceil(share * self.places)
        if has >= most:
            return _Place.OWN_SHARE_TAKEN
        if not is_alone and len(self._inside) >= self.places - self.places // KEPT:
            return _Place.ALL_TAKEN
        return _Place.FREE

    def _admit_one(self, request_id: str, request: _Request) -> None:
        self._turns += 1
        self._served[request.account] = self._turns
        self._inside[request_id] = request
        self._places[request.account] += 1
        self._tokens[request.account] += request.tokens

    def _push(self, account: str) -> None:
        """Enter an account that waits into the heap, with its precedence now."""
        if account not in self._waiting:
            return
        precedence = self._precedence(account)
        if self._precedences.get(account) == precedence:
            return
        self._precedences[account] = precedence
        heapq.heappush(self._heap, (*precedence, account))
        if len(self._heap) > 2 * len(self._precedences) + 64:  # most are out of date
            self._heap = [(*found, one) for one, found in self._precedences.items()]
            heapq.heapify(self._heap)

    def _admit_waiting(self, changed: str) -> None:
        """Let in the requests that fit now that something of the account `changed` has ended."""
        self._push(changed)
        while self._heap:
            *precedence, account = self._heap[0]
            if self._precedences.get(account) != tuple(precedence):
                heapq.heappop(self._heap)
                continue
            queue = self._waiting.get(account)
            if queue is None:
                self._pop(account)
                continue
            request_id, request = next(iter(queue.items()))
            place = self._place_for(request)
            if place is _Place.ALL_TAKEN:
                return  # accounts behind it would find no place either
            self._pop(account)
            if place is _Place.OWN_SHARE_TAKEN:
                continue  # it is considered again when one of its own requests has ended
            self._remove(request_id, request)
            assert request.turn is not None
            if not request.turn.done():  # else its task was cancelled, and has not run since
                self._admit_one(request_id, request)
                request.turn.set_result(None)
            self._push(account)

    def _pop(self, account: str) -> None:
        heapq.heappop(self._heap)
        del self._precedences[account]

    def _precedence(self, account: str) -> tuple[int, int]:
        return self._places.get(account, 0), self._served.get(account, 0)


def _subtract(counter: Counter[str], account: str, count: int) -> None:
    counter[account] -= count
    if not counter[account]:
        del counter[account]
