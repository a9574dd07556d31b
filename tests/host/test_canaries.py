"""Inside an engine, a canary runs before all other waiting requests, and alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from vllm_hotswap.host.canaries import Canaries
from vllm_hotswap.host.messages import CANARY_ID


@dataclass(eq=False)
class Request:
    request_id: str


class Queue(deque[Request]):
    """A queue of waiting requests like vLLM's."""

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.remove(request)

    def prepend_request(self, request: Request) -> None:
        self.appendleft(request)


@dataclass
class Scheduler:
    requests: dict[str, Request] = field(default_factory=dict)
    waiting: Queue = field(default_factory=Queue)

    def add(self, *ids: str) -> None:
        for request_id in ids:
            self.requests[request_id] = request = Request(request_id)
            self.waiting.append(request)

    def end(self, request_id: str) -> None:
        request = self.requests.pop(request_id)
        if request in self.waiting:
            self.waiting.remove(request)

    @property
    def order(self) -> list[str]:
        return [request.request_id for request in self.waiting]


CANARY = f"{CANARY_ID}1"


@pytest.fixture
def scheduler() -> Scheduler:
    scheduler = Scheduler()
    scheduler.add("a", "b", "c")
    return scheduler


def begin(canaries: Canaries, scheduler: Scheduler) -> None:
    scheduler.add(CANARY)
    canaries.note_request(scheduler.requests[CANARY])


def step(canaries: Canaries, scheduler: Scheduler, ends: str = "") -> None:
    if ends:
        scheduler.end(ends)
    canaries.after_step(scheduler)


def test_others_wait_for_the_canary_and_keep_their_order(scheduler: Scheduler) -> None:
    """No request is stepped before it; requests that arrive in the meantime come last."""
    canaries = Canaries()
    canaries.expect(scheduler, True)
    assert canaries.is_expected
    assert [] == scheduler.order

    begin(canaries, scheduler)
    assert (False, True) == (canaries.is_expected, canaries.is_under_way)
    step(canaries, scheduler)
    assert [CANARY] == scheduler.order
    scheduler.add("d")
    step(canaries, scheduler, ends=CANARY)

    assert ["a", "b", "c", "d"] == scheduler.order
    assert not canaries.is_under_way


def test_who_was_aborted_meanwhile_does_not_come_back(scheduler: Scheduler) -> None:
    """An aborted request has ended, and stays out of the queue."""
    canaries = Canaries()
    canaries.expect(scheduler, True)
    begin(canaries, scheduler)
    scheduler.requests.pop("b")

    step(canaries, scheduler, ends=CANARY)

    assert ["a", "c"] == scheduler.order


def test_a_canary_that_never_comes_can_be_given_up(scheduler: Scheduler) -> None:
    """If a canary is given up, the other requests are stepped."""
    canaries = Canaries()
    canaries.expect(scheduler, True)

    canaries.expect(scheduler, False)

    assert not canaries.is_expected
    assert ["a", "b", "c"] == scheduler.order


def test_other_requests_are_no_canaries(scheduler: Scheduler) -> None:
    """Other requests do not count as canaries, whatever their names are."""
    canaries = Canaries()
    canaries.note_request(Request("cmpl-hotswap-canary"))

    assert not canaries.is_under_way
