"""What requests are promised, whatever the policy does: checked over traces from hypothesis.

The simulator drives the scheduler of the server. The policies are the built-in ones, and
adversaries: one that never switches, one that never admits what it may hold back, one that switches
all the time, to the last model, and one that also parks at once.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from tests.helpers.depth import examples
from vllm_hotswap.scheduling.policies import POLICIES
from vllm_hotswap.scheduling.policy import (
    NEVER,
    WORKED_S,
    Decision,
    Policy,
    PolicySettings,
    ServeOn,
    Snapshot,
    SwitchTo,
    WaitUntil,
)
from vllm_hotswap.simulation.costs import Costs
from vllm_hotswap.simulation.run import Run, Served, Simulation, Switched, World
from vllm_hotswap.simulation.service import Service
from vllm_hotswap.simulation.trace import Head, Trace, TracedModel, TracedRequest

pytestmark = pytest.mark.slow

ALIASES = "abcd"
SLACK_S = 1e-6


def never(_: Snapshot) -> Decision:
    return ServeOn()


def stingy(snapshot: Snapshot) -> Decision:
    return WaitUntil(snapshot.now_s - 1, before=0)


def restless(snapshot: Snapshot) -> Decision:
    return SwitchTo(snapshot.others[-1].alias)


def rude(snapshot: Snapshot) -> Decision:
    return SwitchTo(snapshot.others[0].alias, park=True)


ADVERSARIES: dict[str, Policy] = {
    "never": never,
    "stingy": stingy,
    "restless": restless,
    "rude": rude,
}
SETTINGS = PolicySettings(min_active_s=0.5, slice_s=1.5)
ALL = {name: make(SETTINGS) for name, make in POLICIES.items()} | ADVERSARIES

moments = st.integers(0, 120).map(lambda quarter: quarter / 4)
requests = st.builds(
    TracedRequest,
    id=st.just(0),
    model=st.sampled_from(ALIASES),
    arrived_s=moments,
    priority=st.one_of(st.none(), st.integers(-2, 2)),
    max_wait_s=st.one_of(st.none(), st.sampled_from([0.0, 1.0, 7.0])),
    prompt_tokens=st.integers(0, 3),
    output_tokens=st.one_of(st.integers(0, 12), st.just(40)),
)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Draw some requests; some of them come after the end of others."""
    drawn = draw(st.lists(requests, min_size=1, max_size=25))
    after = draw(st.lists(st.booleans(), min_size=len(drawn), max_size=len(drawn)))
    numbered = [
        TracedRequest(
            id=number,
            model=request.model,
            arrived_s=None if number and follows else request.arrived_s,
            after=number // 2 if number and follows else None,
            think_s=0.25,
            priority=request.priority,
            max_wait_s=request.max_wait_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
        )
        for number, (request, follows) in enumerate(zip(drawn, after, strict=True))
    ]
    waits = draw(st.sampled_from([0.0, 5.0, 20.0]))
    models = {alias: TracedModel(max_wait_s=waits) for alias in ALIASES}
    return Trace(Head(models, draw(st.sampled_from([None, "a"]))), tuple(numbered))


worlds = st.builds(
    World,
    costs=st.sampled_from([0.0, 0.002, 0.3, 1.7, 10.0]).map(Costs),
    service=st.sampled_from([Service(1.0, 0.5, 0.25), Service(0.05, 0.0, 0.0)]),
    drain_timeout_s=st.sampled_from([0.0, 2.0, 1000.0]),
)

anything = pytest.mark.parametrize("policy", ALL.values(), ids=ALL)


def play(trace: Trace, policy: Policy, world: World) -> Run:
    """Run the whole trace; a simulation without progress is a failure, not a hang."""
    simulation = Simulation(trace, policy, world)
    tokens = sum(1 + request.prompt_tokens + request.output_tokens for request in trace.requests)
    most_s = sum(world.service.alone_s(r.prompt_tokens, r.output_tokens) for r in trace.requests)
    visits = len(trace.requests) + most_s / max(WORKED_S, 2 * world.costs.default_s)
    for _ in range(10 * tokens + int(6 * visits) + 1000):
        if not simulation.left:
            return simulation.play()
        simulation.step()
    raise AssertionError(f"it gets nowhere: {simulation!r}")


def switches_before(run: Run, one: Served) -> list[Switched]:
    """Return the switches that a request waited for once it was due; where nothing takes time, many
    end at the same moment.
    """
    behind = []
    for switch in run.switches:
        if one.due_s < switch.active_s <= one.admitted_s:
            behind.append(switch)
            if (switch.target, switch.active_s) == (one.request.model, one.admitted_s):
                break
    return behind


def longest_switch_s(world: World) -> float:
    """Return the time of a switch for a due request: what runs is parked once its model was active
    for long enough, and then the switch takes what it costs.
    """
    cost_s = world.costs.default_s
    return max(WORKED_S, 2 * cost_s) + cost_s


@anything
@given(trace=traces(), world=worlds)
@settings(max_examples=examples(12), deadline=None)
def test_no_request_waits_longer_than_promised(policy: Policy, trace: Trace, world: World) -> None:
    """From its due time until its admission, a request waits for switches only: the one under way,
    at most one to each model with requests due before, and the one to its own. In that time,
    requests are admitted only on arrival at one of these models. It waits for no drain besides the
    switches, whatever runs there, and for however long.
    """
    run = play(trace, policy, world)
    served = list(run)
    for one in served:
        behind = switches_before(run, one)
        targets = [switch.target for switch in behind[1:]]
        arrivals = {switch.active_s for switch in behind}

        promised_s = one.due_s - one.arrived_s
        assert one.waited_s <= promised_s + len(behind) * longest_switch_s(world) + SLACK_S
        assert len(set(targets)) == len(targets)
        assert set(targets) <= {
            other.request.model
            for other in served
            if other is one or other.due_s <= one.due_s <= other.ended_s
        }
        assert one.admitted_s in {one.arrived_s, one.due_s} | arrivals or one.admitted_s < one.due_s
        assert all(
            other.admitted_s in arrivals or other.due_s <= one.due_s
            for other in served
            if one.due_s < other.admitted_s < one.admitted_s
        )


@anything
@given(trace=traces(), world=worlds)
@settings(max_examples=examples(8), deadline=None)
def test_max_wait_bounds_how_long_a_request_is_parked(
    policy: Policy, trace: Trace, world: World
) -> None:
    """A request parked for `max_wait` is due again, and continues after the switch under way and at
    most one switch to each other model.
    """
    run = play(trace, policy, world)
    most_s = (len(ALIASES) + 1) * longest_switch_s(world)
    for number, switch in enumerate(run.switches):
        parked = [
            one
            for one in run
            if one.request.model == switch.source
            and one.admitted_s <= switch.drained_s < one.ended_s
            and one.admitted_s < switch.active_s
        ]
        if parked:
            back_s = next(s.active_s for s in run.switches[number:] if s.target == switch.source)
            promised_s = min(one.due_s - one.arrived_s for one in parked)
            assert back_s - switch.drained_s <= promised_s + most_s + SLACK_S


def first_due_s(run: Run, switch: Switched) -> float:
    """Return when the first of the requests that wait while a switch drains is due."""
    waiting = [
        one.due_s
        for one in run
        if one.arrived_s < switch.drained_s
        and one.admitted_s >= switch.active_s
        and (one.admitted_s > switch.began_s or one.request.model != switch.source)
    ]
    return min(waiting, default=NEVER)


@anything
@given(trace=traces(), world=worlds)
@settings(max_examples=examples(8), deadline=None)
def test_a_switch_takes_no_longer_than_promised(policy: Policy, trace: Trace, world: World) -> None:
    """A drain ends with the last running request, at `drain_timeout`, or when a request is due, but
    not before its source was active for as long as the way there and back takes.
    """
    run = play(trace, policy, world)
    cost_s = world.costs.default_s
    worked_s = max(WORKED_S, 2 * cost_s)
    since_s = 0.0
    for switch in run.switches:
        drained_s = min(switch.began_s + world.drain_timeout_s, first_due_s(run, switch))
        latest_s = max(switch.began_s, drained_s, since_s + worked_s)
        ended = [s.ended_s for s in run if s.request.model == switch.source]

        assert switch.drained_s <= latest_s + SLACK_S
        assert (
            switch.drained_s in {switch.began_s, *ended}
            or switch.drained_s >= min(latest_s, since_s + worked_s) - SLACK_S
        )
        assert cost_s == pytest.approx(switch.active_s - switch.drained_s)
        since_s = switch.active_s


@anything
@given(trace=traces(), world=worlds)
@settings(max_examples=examples(6), deadline=None)
def test_requests_of_a_model_are_admitted_in_the_order_in_which_they_came(
    policy: Policy, trace: Trace, world: World
) -> None:
    """A model's requests are admitted in order of arrival, despite priority and `max_wait`."""
    by_model: dict[str, list[Served]] = defaultdict(list)
    for one in play(trace, policy, world):
        by_model[one.request.model].append(one)

    for served in by_model.values():
        ordered = sorted(served, key=lambda one: one.arrived_s)
        assert all(
            one.admitted_s <= other.admitted_s
            for one, other in pairwise(ordered)
            if one.arrived_s < other.arrived_s
        )


@anything
@given(trace=traces(), world=worlds)
@settings(max_examples=examples(6), deadline=None)
def test_every_switch_gets_somebody_further(policy: Policy, trace: Trace, world: World) -> None:
    """A switch admits or resumes its requests at once; they work until they end, the drain is over,
    or for the time there and back, so two models cannot alternate without progress.
    """
    run = play(trace, policy, world)
    least_s = max(WORKED_S, 2 * world.costs.default_s)
    for switch, after in pairwise(run.switches):
        working = [
            one
            for one in run
            if one.request.model == switch.target
            and one.admitted_s <= switch.active_s <= one.ended_s
        ]
        assert working
        if after.drained_s - switch.active_s < least_s - SLACK_S:
            assert all(one.ended_s <= after.drained_s for one in run if one in working)


@anything
@given(trace=traces(), world=worlds)
@settings(max_examples=examples(6), deadline=None)
def test_every_request_is_served(policy: Policy, trace: Trace, world: World) -> None:
    """Every request is served once, to its end, not faster than alone, in a limited time."""
    for one in play(trace, policy, world):
        request = one.request
        alone_s = world.service.alone_s(request.prompt_tokens, request.output_tokens)
        assert one.arrived_s <= one.admitted_s
        assert one.ended_s - one.admitted_s >= alone_s - SLACK_S
