"""When to switch, tested on single snapshots."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.scheduling import policies
from vllm_hotswap.scheduling.policies import batch, fifo, make_policy, round_robin
from vllm_hotswap.scheduling.policy import (
    NEVER,
    WORKED_S,
    ActiveView,
    Decision,
    Policy,
    PolicySettings,
    QueueView,
    ServeOn,
    Snapshot,
    SwitchTo,
    WaitUntil,
    decide,
)

NOW_S = 100.0
PLAIN = PolicySettings()


def queue(alias: str, **other: Any) -> QueueView:
    """Return a request that has waited 1 s; service takes 1 s, and a switch costs 1 s."""
    values: dict[str, Any] = {
        "position": ord(alias) - ord("a"),
        "requests": 1,
        "parked": 0,
        "first": 1,
        "oldest_s": NOW_S - 1,
        "mean_arrival_s": NOW_S - 1,
        "due_s": NOW_S + 29,
        "priority": 0,
        "weight": 1.0,
        "tokens": 10,
        "service_s": 1.0,
        "switch_cost_s": 1.0,
        "back_cost_s": 1.0,
    }
    return QueueView(alias=alias, **(values | other))


def active(alias: str = "a", **other: Any) -> ActiveView:
    """Return a model that has been active for 100 s and works on one request."""
    values: dict[str, Any] = {
        "position": ord(alias) - ord("a"),
        "since_s": 0.0,
        "in_flight": 1,
        "priority": 0,
        "weight": 1.0,
        "service_s": 1.0,
    }
    return ActiveView(alias=alias, **(values | other))


def snapshot(
    *others: QueueView, on: ActiveView | None = None, own: QueueView | None = None
) -> Snapshot:
    return Snapshot(NOW_S, on or active(), own, others)


IDLE = active(in_flight=0)
NO_MODEL = Snapshot(NOW_S, None, None, (queue("b", first=2), queue("c", first=1, requests=0 + 9)))


def always(decision: Decision) -> Policy:
    return lambda _: decision


# --- fifo -----------------------------------------------------------------------------------------


def test_fifo_switches_to_whoever_came_first() -> None:
    """`fifo` switches to the model of the oldest request, despite its cost and running requests."""
    seen = snapshot(queue("b", first=5), queue("c", first=3, switch_cost_s=99.0))

    assert SwitchTo("c") == fifo(PLAIN)(seen)


def test_fifo_admits_only_who_came_before_them() -> None:
    """`fifo` makes the active model's later requests wait for an older one of another model."""
    seen = snapshot(queue("b", first=5), own=queue("a", first=3))

    assert ServeOn(before=5) == fifo(PLAIN)(seen)


# --- batch ----------------------------------------------------------------------------------------


def test_batch_switches_when_the_model_is_idle() -> None:
    """`batch` leaves an idle model at once, unless its minimum active time is not over."""
    seen = snapshot(queue("b"), on=active(since_s=NOW_S - 2, in_flight=0))

    assert SwitchTo("b") == batch(PLAIN)(seen)
    assert WaitUntil(NOW_S + 3) == batch(PolicySettings(min_active_s=5.0))(seen)


def test_batch_serves_on_until_the_switch_gains_more_than_it_costs() -> None:
    """`batch` stays until the waiting time, counted twice, exceeds the cost of the switches."""
    seen = snapshot(queue("b"))

    assert WaitUntil(NOW_S - 1 + 6) == batch(PLAIN)(seen)


@pytest.mark.parametrize("requests", [6, 60])
def test_batch_switches_sooner_for_more_requests(requests: int) -> None:
    """`batch` switches sooner for more requests: six of them have lost 6 s after one second."""
    assert SwitchTo("b") == batch(PLAIN)(snapshot(queue("b", requests=requests)))


def test_batch_counts_weights() -> None:
    """`batch` counts a model of weight 6 as six requests; the active model's weight counts, too."""
    heavy = queue("b", weight=6.0)

    assert SwitchTo("b") == batch(PLAIN)(snapshot(heavy))
    assert WaitUntil(NOW_S) != batch(PLAIN)(snapshot(heavy, on=active(weight=2.0)))
    assert isinstance(batch(PLAIN)(snapshot(heavy, on=active(weight=2.0))), WaitUntil)


def test_batch_does_not_switch_to_and_fro() -> None:
    """With `batch`, a model with work stays active for two round trips of 2 s."""
    seen = snapshot(queue("b", requests=60), on=active(since_s=NOW_S - 1))

    assert WaitUntil(NOW_S + 3) == batch(PLAIN)(seen)


def test_batch_goes_where_most_time_is_lost_for_each_second_that_it_takes() -> None:
    """`batch` prefers cheap switches, short requests, and old requests to new ones."""
    far = queue("b", requests=3, switch_cost_s=9.0)
    near = queue("c", requests=2)
    new = queue("d", requests=9, mean_arrival_s=NOW_S - 0.1)

    assert SwitchTo("c") == batch(PLAIN)(snapshot(far, near, new, on=IDLE))


def test_batch_takes_who_came_first_if_all_else_is_equal() -> None:
    """If all else is equal, `batch` takes the oldest request, not the first configured model."""
    seen = snapshot(queue("b", first=7), queue("c", first=4), on=IDLE)

    assert SwitchTo("c") == batch(PLAIN)(seen)


def test_batch_prefers_a_higher_priority() -> None:
    """`batch` goes to a higher priority at once, whatever else is to be gained."""
    seen = snapshot(queue("b", requests=99), queue("c", priority=1))

    assert SwitchTo("c") == batch(PLAIN)(seen)


def test_batch_is_not_called_away_from_the_same_priority() -> None:
    """`batch` is not called away if the active model runs or has waiting requests as important."""
    urgent = queue("b", priority=1)

    assert isinstance(batch(PLAIN)(snapshot(urgent, on=active(priority=1))), WaitUntil)
    assert isinstance(batch(PLAIN)(snapshot(urgent, own=queue("a", priority=1))), WaitUntil)


def test_batch_parks_where_switching_is_cheap() -> None:
    """`batch` parks where the way there and back is at most a fifth of a request's time."""
    cheap = queue("b", requests=60, switch_cost_s=0.1, back_cost_s=0.1)
    dearer = queue("b", requests=60, switch_cost_s=0.1, back_cost_s=0.11)

    assert SwitchTo("b", park=True) == batch(PLAIN)(snapshot(cheap))
    assert SwitchTo("b", park=False) == batch(PLAIN)(snapshot(dearer))


# --- round robin ----------------------------------------------------------------------------------


def test_round_robin_takes_turns_in_the_order_of_the_configuration() -> None:
    """`round_robin` follows the order of the configuration, and wraps around."""
    policy = round_robin(PLAIN)

    assert SwitchTo("c") == policy(snapshot(queue("a"), queue("c"), on=active("b", in_flight=0)))
    assert SwitchTo("a") == policy(snapshot(queue("a"), queue("b"), on=active("c", in_flight=0)))


def test_round_robin_parks_at_the_end_of_a_slice() -> None:
    """`round_robin` parks after a slice: the configured length times the model's weight."""
    policy = round_robin(PolicySettings(slice_s=2.0))
    since = active(since_s=NOW_S - 3)

    assert SwitchTo("b", park=True) == policy(snapshot(queue("b"), on=since))
    heavy = active(since_s=NOW_S - 3, weight=2.0)
    assert WaitUntil(NOW_S + 1) == policy(snapshot(queue("b"), on=heavy))


@pytest.mark.parametrize("name", ["fifo", "batch", "round_robin"])
def test_without_an_active_model_every_policy_switches(name: str) -> None:
    """Without an active model every policy switches, as no request could be served otherwise."""
    assert isinstance(make_policy(name, PLAIN)(NO_MODEL), SwitchTo)


# --- the promises ---------------------------------------------------------------------------------


def test_where_nobody_waits_for_another_model_the_active_one_is_served() -> None:
    """If all requests are for the active model, it is served without asking the policy."""
    assert ServeOn() == decide(always(SwitchTo("b")), snapshot(own=queue("a")))


def test_a_lease_is_kept() -> None:
    """A lease delays even a due request; when it ends, the decision is made again."""
    seen = snapshot(queue("b", due_s=NOW_S - 5), on=active(leased_until_s=NOW_S + 7))
    over = snapshot(queue("b"), on=active(leased_until_s=NOW_S))

    assert WaitUntil(NOW_S + 7) == decide(always(SwitchTo("b")), seen)
    assert isinstance(decide(always(SwitchTo("b")), over), SwitchTo)


def test_who_was_due_first_is_next() -> None:
    """The request that was due first is served next, whatever the policy says; others park."""
    seen = snapshot(queue("b", due_s=NOW_S - 1), queue("c", due_s=NOW_S - 2))

    decision = decide(always(SwitchTo("b")), seen)

    assert isinstance(decision, SwitchTo)
    assert ("c", True) == (decision.alias, decision.park)


def test_who_waits_for_the_active_model_and_was_due_first_is_admitted_first() -> None:
    """The active model's request is admitted first if it was due first, and all is decided anew."""
    seen = snapshot(queue("b", due_s=NOW_S - 1), own=queue("a", due_s=NOW_S - 2))

    assert WaitUntil(NOW_S, before=0) == decide(always(SwitchTo("b")), seen)


def test_whatever_the_policy_waits_for_is_cut_short_when_somebody_is_due() -> None:
    """A wait of the policy ends when a request of another model, or one held back, is due."""
    seen = snapshot(queue("b", due_s=NOW_S + 9), own=queue("a", due_s=NOW_S + 5))

    assert WaitUntil(NOW_S + 9) == decide(always(ServeOn()), seen)
    assert WaitUntil(NOW_S + 9) == decide(always(WaitUntil(NEVER)), seen)
    assert WaitUntil(NOW_S + 3) == decide(always(WaitUntil(NOW_S + 3)), seen)
    assert WaitUntil(NOW_S + 5, before=0) == decide(always(ServeOn(before=0)), seen)


def test_a_time_that_is_over_is_not_waited_for() -> None:
    """A time in the past is not waited for: the decision would be made again and again."""
    seen = snapshot(queue("b", due_s=NOW_S + 9))

    assert WaitUntil(NOW_S + 9) == decide(always(WaitUntil(NOW_S)), seen)


def test_what_runs_is_not_parked_before_it_was_worth_the_switches() -> None:
    """Requests run at least for the time there and back, and for some steps, before parking."""
    dear = decide(always(SwitchTo("b", park=True)), snapshot(queue("b"), on=active(since_s=99.0)))
    free = decide(
        always(SwitchTo("b", park=True)),
        snapshot(queue("b", switch_cost_s=0.0, back_cost_s=0.0), on=active(since_s=NOW_S)),
    )

    assert SwitchTo("b", True, park_from_s=101.0) == dear
    assert SwitchTo("b", True, park_from_s=NOW_S + WORKED_S) == free
    assert (101.0, 102.0) == tuple(dear.drain_until_s(s, 60.0, NEVER) for s in (NOW_S, 102.0))


def test_what_runs_is_waited_for_until_somebody_is_due() -> None:
    """A drain ends at `drain_timeout` or a due time, but not before the switches have paid off."""
    switch = SwitchTo("b", park_from_s=101.0)

    assert NOW_S + 60.0 == switch.drain_until_s(NOW_S, 60.0, NEVER)
    assert NOW_S + 7.0 == switch.drain_until_s(NOW_S, 60.0, due_s=NOW_S + 7.0)
    assert 101.0 == switch.drain_until_s(NOW_S, 60.0, due_s=NOW_S - 5.0)


def test_a_switch_to_a_model_for_which_nobody_waits_is_an_error() -> None:
    """A policy that switches to a model without waiting requests is an error that names it."""
    with pytest.raises(ValueError, match="'x', for which no request waits"):
        decide(always(SwitchTo("x")), snapshot(queue("b")))


# --- names ----------------------------------------------------------------------------------------


def test_an_unknown_policy_is_told_with_those_that_are_known() -> None:
    """An unknown policy is reported with the known ones, and with the way to add one."""
    with pytest.raises(ConfigError, match=r"known: fifo, batch, round_robin; .*entry point"):
        make_policy("best", PLAIN)


def lifo(_: PolicySettings) -> Policy:
    return lambda seen: SwitchTo(max(seen.others, key=lambda q: q.first).alias)


def broken(_: PolicySettings) -> Policy:
    raise RuntimeError("no licence\nfound")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package that adds two policies."""
    points = [EntryPoint(name, f"{__name__}:{name}", policies.GROUP) for name in ("lifo", "broken")]
    monkeypatch.setattr(policies, "entry_points", lambda group: points)


@pytest.mark.usefixtures("installed")
def test_a_package_may_add_a_policy() -> None:
    """A package can add a policy through an entry point."""
    seen = snapshot(queue("b", first=1), queue("c", first=2))

    assert SwitchTo("c") == make_policy("lifo", PLAIN)(seen)


@pytest.mark.usefixtures("installed")
def test_a_policy_that_cannot_be_made_is_told_in_one_line() -> None:
    """A policy that cannot be made is reported in one line, with its cause."""
    with pytest.raises(ConfigError, match="'broken' cannot be created: no licence found"):
        make_policy("broken", PLAIN)
