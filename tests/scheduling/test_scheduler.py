"""Queues, admission, and what a snapshot says about them."""

from __future__ import annotations

import pytest

from vllm_hotswap.scheduling.costs import SwitchCosts
from vllm_hotswap.scheduling.policy import (
    NEVER,
    Decision,
    Policy,
    ServeOn,
    Snapshot,
    SwitchTo,
    WaitUntil,
)
from vllm_hotswap.scheduling.scheduler import ModelTerms, RequestTerms, Scheduler, Ticket
from vllm_hotswap.states import Residency


class Told:
    """A policy that returns what the test sets."""

    def __init__(self) -> None:
        self.decision: Decision = ServeOn()

    def __call__(self, _: Snapshot) -> Decision:
        return self.decision


def make(policy: Policy | None = None, active: str | None = "a") -> Scheduler:
    terms = [ModelTerms("a", 1, 10.0, 2.0), ModelTerms("b", 0, 20.0), ModelTerms("c", 0, 20.0)]
    scheduler = Scheduler(terms, policy or Told(), lambda source, target: 1.0 if source else 3.0)
    if active is not None:
        scheduler.activate(active, 0.0)
    return scheduler


def enter(scheduler: Scheduler, alias: str, now_s: float, **terms: float) -> Ticket:
    ticket = scheduler.ticket(alias, now_s, RequestTerms(**terms))  # type: ignore[arg-type]
    scheduler.enter(ticket, now_s)
    return ticket


def test_a_request_for_the_active_model_is_admitted_at_once() -> None:
    """A request for the active model is admitted at once if no other waits and no switch runs."""
    scheduler = make()

    assert scheduler.enter(scheduler.ticket("a", 1.0), 1.0)
    assert not scheduler.enter(scheduler.ticket("a", 1.0), 1.0, is_open=False)
    assert not scheduler.enter(scheduler.ticket("b", 2.0), 2.0)
    assert not scheduler.enter(scheduler.ticket("a", 3.0), 3.0)
    assert (2, 1, 3) == (scheduler.waiting_for("a"), scheduler.waiting_for("b"), scheduler.waiting)


def test_a_request_has_the_terms_of_its_model_or_its_own() -> None:
    """A request's priority and maximum wait are its own, or else its model's."""
    scheduler = make()
    plain = scheduler.ticket("a", 5.0)
    special = scheduler.ticket("a", 5.0, RequestTerms(priority=7, max_wait_s=0.5))

    assert (1, 15.0) == (plain.priority, plain.due_s)
    assert (7, 5.5) == (special.priority, special.due_s)


def test_a_snapshot_says_who_waits() -> None:
    """A snapshot has the waiting requests, their times and urgency, and the switch's cost."""
    scheduler = make()
    enter(scheduler, "b", 2.0, max_wait_s=9.0).tokens = 0
    enter(scheduler, "b", 4.0, priority=5)

    (view,) = scheduler.snapshot(6.0).others

    assert ("b", 1, 2, 0, 1) == (view.alias, view.position, view.requests, view.parked, view.first)
    assert (2.0, 3.0, 11.0, 5) == (view.oldest_s, view.mean_arrival_s, view.due_s, view.priority)
    assert (1.0, 1.0, 6.0) == (view.switch_cost_s, view.back_cost_s, view.waited_s(6.0))


def test_who_leaves_is_not_waited_for() -> None:
    """A request that leaves is neither counted nor waited for, and its due time is forgotten."""
    scheduler = make()
    first, second = enter(scheduler, "b", 2.0, max_wait_s=1.0), enter(scheduler, "b", 4.0)

    scheduler.leave(first, 5.0)
    scheduler.leave(first, 5.0)

    (view,) = scheduler.snapshot(6.0).others
    assert (1, 4.0, 24.0) == (view.requests, view.oldest_s, view.due_s)
    assert [second] == scheduler.queue("b")


def test_requests_keep_their_order_though_one_took_longer_to_come() -> None:
    """Requests keep their order of arrival, even if one took longer to validate."""
    scheduler = make()
    tickets = [scheduler.ticket("b", float(number)) for number in range(4)]
    for place in (1, 3, 0, 2):
        scheduler.enter(tickets[place], 9.0)

    assert tickets == scheduler.queue("b") == scheduler.activate("b", 10.0)


def test_what_a_request_takes_is_remembered() -> None:
    """Service times are remembered; a newer one counts for a part."""
    scheduler = make()
    for took_s in (2.0, 4.0):
        ticket = enter(scheduler, "a", 10.0)
        scheduler.leave(ticket, 10.0 + took_s)

    assert 2.0 + 0.3 * 2.0 == pytest.approx(scheduler.service_s("a"))


def test_how_long_a_connection_was_open_is_not_what_a_request_takes() -> None:
    """The open time of a connection is not taken as a request's service time."""
    scheduler = make()
    scheduler.leave(enter(scheduler, "a", 10.0), 12.0)
    scheduler.leave(enter(scheduler, "a", 12.0), 3612.0, counts=False)

    assert 2.0 == scheduler.service_s("a")
    assert scheduler.is_empty


def test_a_model_serves_at_least_the_request_that_it_was_switched_to_for() -> None:
    """After a switch, the request that caused it is served, even if the policy would switch on."""
    policy = Told()
    scheduler = make(policy)
    first, second = enter(scheduler, "b", 1.0), enter(scheduler, "b", 2.0)
    enter(scheduler, "c", 3.0)
    policy.decision = SwitchTo("c")

    assert [first] == scheduler.activate("b", 4.0)
    assert [second] == scheduler.queue("b")


def test_a_model_serves_all_who_are_due_and_who_came_before_them() -> None:
    """Due requests are admitted with all that came before them, even if the first is not due."""
    policy = Told()
    scheduler = make(policy)
    early = enter(scheduler, "b", 1.0, max_wait_s=90.0)
    due = enter(scheduler, "b", 2.0, max_wait_s=1.0)
    late = enter(scheduler, "b", 3.0, max_wait_s=90.0)
    enter(scheduler, "c", 3.0)
    policy.decision = SwitchTo("c")

    assert [early, due] == scheduler.activate("b", 4.0)
    assert [late] == scheduler.queue("b")


def test_requests_that_a_policy_holds_back_are_admitted_when_they_are_due() -> None:
    """Requests that a policy holds back are admitted when due, without asking it before."""
    policy = Told()
    policy.decision = ServeOn(before=0)
    scheduler = make(policy)
    enter(scheduler, "b", 1.0)
    own = enter(scheduler, "a", 2.0)

    assert ([], WaitUntil(12.0, before=0)) == scheduler.advance(3.0)
    assert ([own], WaitUntil(12.0, before=0)) == scheduler.advance(12.0)
    assert ([], WaitUntil(21.0, before=0)) == scheduler.advance(12.0)


def test_parked_requests_wait_anew_and_go_on_first() -> None:
    """Parked requests get a new time to wait and go first; their old due time is forgotten."""
    scheduler = make()
    enter(scheduler, "b", 0.0)
    old = enter(scheduler, "a", 1.0)
    assert [old] == scheduler.advance(2.0)[0]

    scheduler.park([old], 8.0)
    scheduler.activate("b", 9.0)
    new = enter(scheduler, "a", 10.0)

    (view,) = scheduler.snapshot(12.0).others
    assert (2, 1, 18.0) == (view.requests, view.parked, view.due_s)
    assert (1, 2) == (scheduler.waiting_for("a"), view.requests)
    assert [old, new] == scheduler.activate("a", 13.0)


def test_a_drain_ends_when_whoever_waits_is_due() -> None:
    """A drain ends when any waiting request is due, except one for a model that fails."""
    scheduler = make()
    switch = SwitchTo("b", park_from_s=1.0)
    first = enter(scheduler, "b", 2.0, max_wait_s=30.0)
    assert 32.0 == scheduler.drain_until_s(switch, 3.0, 60.0)

    enter(scheduler, "a", 4.0, max_wait_s=5.0)
    assert 9.0 == scheduler.drain_until_s(switch, 3.0, 60.0)
    scheduler.pause("a", 50.0)
    assert 32.0 == scheduler.drain_until_s(switch, 3.0, 60.0)

    scheduler.leave(first, 5.0)
    assert 50.0 == scheduler.drain_until_s(switch, 3.0, 60.0)


def test_a_parked_request_is_due_before_it_would_be_ended() -> None:
    """A parked request is due before its park time ends, however long it may wait."""
    scheduler = make()
    patient = enter(scheduler, "a", 1.0, max_wait_s=NEVER)

    scheduler.park([patient], 8.0, at_most_s=300.0)
    scheduler.activate("b", 9.0)

    assert 308.0 == scheduler.snapshot(9.0).others[0].due_s


def test_a_request_may_be_parked_twice_at_the_same_moment_of_being_due() -> None:
    """A request may be parked twice with the same due time; equal entries need no order."""
    scheduler = make()
    ticket = enter(scheduler, "a", 1.0, max_wait_s=NEVER)
    for now_s in (2.0, 3.0):
        scheduler.park([ticket], now_s)
        scheduler.activate("b", now_s)
        assert NEVER == scheduler.snapshot(now_s).others[0].due_s
        assert [ticket] == scheduler.activate("a", now_s)


def test_without_an_active_model_everybody_waits() -> None:
    """Without an active model all requests wait, and a switch has its cost from none."""
    scheduler = make(active=None)
    enter(scheduler, "a", 1.0)
    seen = scheduler.snapshot(2.0)

    assert (None, None, 3.0) == (seen.active, seen.own, seen.others[0].switch_cost_s)
    scheduler.activate("b", 3.0)
    assert 1.0 == scheduler.snapshot(3.0).others[0].switch_cost_s
    scheduler.deactivate()
    assert 3.0 == scheduler.snapshot(3.0).others[0].switch_cost_s


def test_a_model_that_is_held_for_a_job_is_told() -> None:
    """A snapshot shows a model that is held for a job."""
    scheduler = make()
    scheduler.leased_until_s = 50.0
    seen = scheduler.snapshot(1.0)

    assert seen.active is not None
    assert 50.0 == seen.active.leased_until_s


def test_costs_are_those_of_the_pair_or_else_of_the_target() -> None:
    """Costs are the pair's, else the target's, by its residency; newer ones count for a part."""
    costs = SwitchCosts()
    assert 9.0 == costs.estimate("a", "b", Residency.COLD, 9.0)

    costs.add("a", "b", Residency.COLD, 2.0)
    costs.add("a", "b", Residency.COLD, 4.0)

    assert 2.6 == pytest.approx(costs.estimate("a", "b", Residency.COLD, 9.0))
    assert 2.6 == pytest.approx(costs.estimate("c", "b", Residency.COLD, 9.0))
    assert 9.0 == costs.estimate("a", "b", Residency.PARKED, 9.0)
