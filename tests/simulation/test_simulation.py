"""The simulator, compared with results that can be worked out by hand."""

from __future__ import annotations

import random

import pytest

from vllm_hotswap.scheduling.policies import make_policy
from vllm_hotswap.scheduling.policy import NEVER, PolicySettings, ServeOn, Snapshot, SwitchTo
from vllm_hotswap.simulation.costs import CostModel, Costs, ResidencyModel, measured
from vllm_hotswap.simulation.report import figures, jain, table
from vllm_hotswap.simulation.run import Run, Served, World, simulate
from vllm_hotswap.simulation.service import Engine, Service
from vllm_hotswap.simulation.trace import Head, Trace, TracedModel, TracedRequest, TracedSwitch
from vllm_hotswap.states import Residency

SECOND = Service(step_s=1.0, per_request_s=0.0, prefill_s_per_token=0.0)
"""One token per second, however many requests run."""


def trace_of(*requests: TracedRequest, max_wait_s: float = 1000.0) -> Trace:
    return Trace(Head({alias: TracedModel(0, max_wait_s) for alias in "abc"}, "a"), requests)


def ask(number: int, model: str, arrived_s: float, tokens: int = 1) -> TracedRequest:
    return TracedRequest(number, model, arrived_s, output_tokens=tokens)


def play(
    trace: Trace,
    policy: str = "fifo",
    cost_s: float = 10.0,
    service: Service = SECOND,
    drain_timeout_s: float = 60.0,
    settings: PolicySettings = PolicySettings(),  # noqa: B008  # frozen
) -> Run:
    world = World(Costs(cost_s), service=service, drain_timeout_s=drain_timeout_s)
    return simulate(trace, make_policy(policy, settings), world)


def by_id(run: Run) -> dict[int, Served]:
    return {served.request.id: served for served in run}


# --- the engine -----------------------------------------------------------------------------------


def test_one_request_takes_its_prompt_and_its_steps() -> None:
    """One request takes its 3 prompt tokens at 0.5 s and its 4 steps of 1.25 s."""
    service = Service(step_s=1.0, per_request_s=0.25, prefill_s_per_token=0.5)
    run = play(
        trace_of(TracedRequest(0, "a", 2.0, prompt_tokens=3, output_tokens=4)), "fifo", 1.0, service
    )

    assert 8.5 == by_id(run)[0].ended_s == 2.0 + service.alone_s(3, 4)


def test_requests_that_run_together_share_steps() -> None:
    """Requests that run together share steps: the first runs alone for 2 s, then both at 1.5 s."""
    service = Service(step_s=0.5, per_request_s=0.5, prefill_s_per_token=0.0)
    run = play(trace_of(ask(0, "a", 0.0, 4), ask(1, "a", 2.0, 4)), service=service)

    assert (5.0, 7.0) == (by_id(run)[0].ended_s, by_id(run)[1].ended_s)


def test_a_prompt_holds_everybody_up() -> None:
    """A prompt of 10 tokens at 0.1 s delays the steps of another request."""
    service = Service(step_s=1.0, per_request_s=0.0, prefill_s_per_token=0.1)
    second = TracedRequest(1, "a", 2.0, prompt_tokens=10, output_tokens=1)
    run = play(trace_of(ask(0, "a", 0.0, 4), second), service=service)

    assert (5.0, 4.0) == (by_id(run)[0].ended_s, by_id(run)[1].ended_s)


def test_many_requests_end_when_step_by_step_they_would() -> None:
    """Many requests end when a loop over small steps of time says they do."""
    chance = random.Random(7)  # noqa: S311  # any numbers will do
    service = Service(step_s=0.3, per_request_s=0.1, prefill_s_per_token=0.01)
    jobs = [
        (chance.uniform(0, 30), chance.randrange(20), 1 + chance.randrange(9)) for _ in range(40)
    ]
    requests = [
        TracedRequest(i, "a", at, prompt_tokens=prompt, output_tokens=output)
        for i, (at, prompt, output) in enumerate(jobs)
    ]
    ended = {
        i: served.ended_s for i, served in by_id(play(trace_of(*requests), service=service)).items()
    }

    assert ended == pytest.approx(step_by_step(jobs, service), abs=0.02)


def step_by_step(jobs: list[tuple[float, int, int]], service: Service) -> dict[int, float]:
    now_s, tick_s, prefill_s = 0.0, 0.0005, 0.0
    waiting = sorted((at, i) for i, (at, _, _) in enumerate(jobs))
    left: dict[int, float] = {}
    ended: dict[int, float] = {}
    while waiting or left:
        while waiting and waiting[0][0] <= now_s:
            _, i = waiting.pop(0)
            left[i] = float(jobs[i][2])
            prefill_s += jobs[i][1] * service.prefill_s_per_token
        now_s += tick_s
        if prefill_s > 0:
            prefill_s -= tick_s
            continue
        share = tick_s / service.step(len(left)) if left else 0.0
        left = {i: tokens - share for i, tokens in left.items()}
        ended |= {i: now_s for i, tokens in left.items() if tokens <= 0}
        left = {i: tokens for i, tokens in left.items() if tokens > 0}
    return ended


def test_an_engine_that_is_not_stepped_stands_still() -> None:
    """An engine that is not stepped for 10 s in the middle makes no progress then."""
    engine: Engine[str] = Engine(SECOND)
    engine.start(0.0)
    engine.begin("x", 0, 4, 0.0)
    engine.stop(1.0)
    assert NEVER == engine.next_end_s()

    engine.start(11.0)

    assert 14.0 == engine.next_end_s()
    assert "x" == engine.end_next(14.0)


def test_an_engine_may_take_nothing_but_its_prompts() -> None:
    """If tokens take no time, requests are done when their prompts are."""
    service = Service(step_s=0.0, per_request_s=0.0, prefill_s_per_token=1.0)
    requests = [
        TracedRequest(i, "a", at_s, prompt_tokens=prompt, output_tokens=i)
        for i, (at_s, prompt) in enumerate([(0.0, 4), (1.0, 2), (20.0, 0), (30.0, 3)])
    ]

    run = play(trace_of(*requests), service=service)

    assert [6.0, 6.0, 20.0, 33.0] == [served.ended_s for served in run]


def test_an_engine_that_is_stopped_when_its_prompts_are_done_has_nothing_left() -> None:
    """An engine stopped exactly when its prompts are done ends on its next step."""
    engine: Engine[str] = Engine(Service(0.0, 0.0, 1.0))
    engine.start(0.0)
    engine.begin("x", 3, 5, 0.0)
    engine.stop(4.0)

    engine.start(10.0)

    assert 10.0 == engine.next_end_s()


# --- switches -------------------------------------------------------------------------------------


def test_fifo_drains_and_switches_for_every_change_of_model() -> None:
    """For a, b, a, `fifo` drains before each switch, which takes 10 s."""
    run = play(trace_of(ask(0, "a", 0.0, 5), ask(1, "b", 1.0, 5), ask(2, "a", 2.0, 5)))

    times = [(served.admitted_s, served.ended_s) for served in run]
    assert [(0.0, 5.0), (15.0, 20.0), (30.0, 35.0)] == times
    assert [("a", "b", 1.0, 5.0, 15.0), ("b", "a", 15.0, 20.0, 30.0)] == [
        (s.source, s.target, s.began_s, s.drained_s, s.active_s) for s in run.switches
    ]


def test_batch_serves_the_queue_of_a_model_together() -> None:
    """`batch` serves an alternating burst one whole model after the other."""
    run = play(trace_of(*(ask(i, "ab"[i % 2], 0.0, 5) for i in range(10))), "batch")

    assert 1 == len(run.switches)
    assert {0.0, 15.0} == {served.admitted_s for served in run}


def test_what_runs_beyond_the_drain_timeout_is_parked_and_goes_on() -> None:
    """A request still running at `drain_timeout` is parked with 6 of its 10 s left."""
    requests = (ask(0, "a", 30.0, 10), ask(1, "b", 31.0, 2))
    run = play(trace_of(*requests), drain_timeout_s=3.0)

    assert (31.0, 34.0) == (run.switches[0].began_s, run.switches[0].drained_s)
    assert (46.0, 56.0 + 6.0) == (by_id(run)[1].ended_s, by_id(run)[0].ended_s)
    assert 0.0 == by_id(run)[0].waited_s


def test_what_runs_is_not_parked_before_it_was_worth_the_switches() -> None:
    """Before parking, a model stays active for the 20 s that the way there and back takes."""
    requests = (ask(0, "a", 0.0, 30), ask(1, "b", 1.0, 30))
    run = play(trace_of(*requests), drain_timeout_s=0.0)

    assert [20.0, 50.0, 70.0] == [switch.drained_s for switch in run.switches]
    assert (70.0, 90.0) == (by_id(run)[0].ended_s, by_id(run)[1].ended_s)


def test_round_robin_parks_at_the_end_of_a_slice() -> None:
    """`round_robin` parks at the end of slices of 4 s, for weight 1."""
    requests = (ask(0, "a", 0.0, 6), ask(1, "b", 0.0, 6))
    run = play(trace_of(*requests), "round_robin", 1.0, settings=PolicySettings(slice_s=4.0))

    assert [4.0, 9.0, 12.0] == [switch.began_s for switch in run.switches]
    assert (12.0, 15.0) == (by_id(run)[0].ended_s, by_id(run)[1].ended_s)


def test_a_request_may_wait_for_the_answer_to_another_one() -> None:
    """A request may arrive at the end of another one, after a think time."""
    run = play(trace_of(ask(0, "a", 1.0, 2), TracedRequest(1, "a", after=0, think_s=0.5)))

    assert 3.5 == by_id(run)[1].arrived_s


def test_who_is_looked_at_has_arrived_and_does_not_wait_yet() -> None:
    """A request that is being validated keeps its place and its waiting time from its arrival."""
    requests = (
        TracedRequest(0, "a", 0.0, prepared_s=4.0, output_tokens=1),
        ask(1, "b", 1.0),
        ask(2, "a", 2.0),
    )
    run = play(trace_of(*requests), "batch", cost_s=0.0)
    found = by_id(run)

    assert [1.0, 2.0, 4.0] == sorted(found[number].admitted_s for number in range(3))
    assert (4.0, 4.0) == (found[0].admitted_s, found[0].waited_s)


def test_a_policy_that_never_switches_is_overruled_when_a_request_is_due() -> None:
    """A policy that never switches is overruled after 10 s of `max_wait`; a switch follows."""

    def stubborn(_: Snapshot) -> ServeOn:
        return ServeOn()

    trace = trace_of(ask(0, "a", 0.0, 100), ask(1, "b", 5.0), max_wait_s=10.0)
    run = simulate(trace, stubborn, World(Costs(1.0), service=SECOND, drain_timeout_s=0.0))

    assert 11.0 == by_id(run)[1].waited_s


def test_a_policy_that_asks_for_nonsense_is_told() -> None:
    """A policy that asks for nonsense is reported, not simulated."""
    with pytest.raises(ValueError, match="for which no request waits"):
        simulate(trace_of(ask(0, "b", 0.0)), lambda _: SwitchTo("c"), World(Costs(1.0)))


def test_a_trace_without_a_model_at_first_begins_with_a_switch() -> None:
    """A trace that starts without a model starts with a switch."""
    trace = Trace(Head({"a": TracedModel()}, None), (ask(0, "a", 0.0),))
    run = play(trace)

    assert [(None, "a")] == [(switch.source, switch.target) for switch in run.switches]


def test_an_empty_trace_takes_no_time() -> None:
    """An empty trace takes no time, and has figures."""
    assert 0 == figures("fifo", play(trace_of())).requests


# --- costs ----------------------------------------------------------------------------------------


def switch(at_s: float, source: str, target: str, residency: str, cost_s: float) -> TracedSwitch:
    return TracedSwitch(at_s, source, target, Residency(residency), cost_s)


def test_costs_are_what_was_recorded() -> None:
    """Costs are the recorded ones by source, target and residency, else by fewer of them."""
    costs = measured(
        [
            switch(1, "a", "b", "cold", 5.0),
            switch(2, "b", "a", "parked", 0.1),
            switch(3, "a", "b", "parked", 0.2),
            switch(4, "c", "b", "parked", 0.4),
            switch(5, "a", "b", "parked", 0.4),
            TracedSwitch(6, "a", "b", Residency.PARKED, 99.0, result="failed"),
        ],
        default_s=1.0,
    )

    found = {
        key: list(costs.of(*key)[1])
        for key in (
            ("a", "b", Residency.COLD),
            ("a", "b", Residency.PARKED),
            ("x", "b", Residency.PARKED),
            ("x", "c", Residency.COLD),
            ("x", "c", Residency.ASLEEP),
        )
    }
    assert [[5.0], [0.2, 0.4], [0.2, 0.4, 0.4], [5.0], [0.4]] == list(found.values())
    assert {"a": Residency.PARKED, "b": Residency.COLD} == costs.first


def test_switches_cost_one_after_the_other_what_they_did() -> None:
    """Switches cost what the recorded ones did, in turn; the policy expects past measures."""
    costs = measured([switch(at, "a", "b", "parked", at) for at in (1.0, 3.0)], default_s=9.0)
    prices = CostModel(costs)
    key = ("a", "b", Residency.PARKED)
    found = []
    for _ in range(3):
        cost_s = prices.next_s(*key)
        found.append((prices.expected_s(*key), cost_s))
        prices.record_switch(*key, cost_s)

    assert [(1.0, 1.0), (1.0, 3.0), (pytest.approx(1.6), 1.0)] == found
    assert 2.0 == prices.next_s("b", "c", Residency.COLD)  # the median of all that is known


def test_the_policy_knows_switches_from_before() -> None:
    """The policy knows earlier switches, whatever they cost now."""
    before = [switch(1, "a", "b", "parked", 0.5)]
    prices = CostModel(measured([switch(2, "a", "b", "parked", 4.0)], 9.0), before)

    assert 0.5 == prices.expected_s("a", "b", Residency.PARKED)
    assert 4.0 == prices.next_s("a", "b", Residency.PARKED)


def test_the_first_switch_to_a_cold_model_costs_what_it_did() -> None:
    """The first switch to a cold model costs its recorded time; later ones find it parked."""
    costs = Costs(1.0, by_residency={Residency.COLD: [7.0]}, first={"b": Residency.COLD})
    requests = (ask(0, "b", 0.0), ask(1, "a", 10.0), ask(2, "b", 20.0))
    run = simulate(
        trace_of(*requests), make_policy("fifo", PolicySettings()), World(costs, service=SECOND)
    )

    assert [7.0, 1.0, 1.0] == [s.active_s - s.drained_s for s in run.switches]


def test_only_so_many_models_stay_parked() -> None:
    """With two parked places, the model that was active longest ago becomes cold."""
    costs = Costs(1.0, by_residency={Residency.COLD: [7.0]})
    requests = tuple(ask(i, model, 20.0 * i) for i, model in enumerate("bacbca"))
    world = World(costs, service=SECOND, resident=2)
    run = simulate(trace_of(*requests), make_policy("fifo", PolicySettings()), world)

    assert [("b", 7.0), ("a", 1.0), ("c", 7.0), ("b", 7.0), ("c", 1.0), ("a", 7.0)] == [
        (s.target, s.active_s - s.drained_s) for s in run.switches
    ]


def test_the_way_back_to_a_model_that_has_to_go_is_that_from_cold() -> None:
    """The way back to an evicted model is from cold with one place, from parked with two."""
    found = {}
    for resident in (None, 1, 2):
        models = ResidencyModel(Costs(1.0, first={"b": Residency.PARKED}), resident)
        models.activate("a")
        found[resident] = models.before("b", "a")

    assert {None: Residency.PARKED, 1: Residency.COLD, 2: Residency.PARKED} == found


def test_a_model_that_had_to_go_is_where_the_recording_has_found_it() -> None:
    """An evicted model is where the recording found it, with its switch costs from there."""
    lay = [Residency.COLD, Residency.DISCARDED, Residency.DISCARDED, Residency.PARKED]
    seen = [
        TracedSwitch(
            at_s=at, source=source, target=target, residency=residency, cost_s=float(10 + at)
        )
        for at, (source, target, residency) in enumerate(zip("abab", "baba", lay, strict=True))
    ]
    requests = tuple(ask(i, model, 50.0 * i) for i, model in enumerate("abab"))
    world = World(measured(seen, 0.0), service=SECOND, resident=1)

    run = simulate(trace_of(*requests), make_policy("fifo", PolicySettings()), world)

    assert [10.0, 11.0, 12.0] == [s.active_s - s.drained_s for s in run.switches]


def test_a_model_that_had_to_go_is_cold_wherever_it_lay_at_first() -> None:
    """An evicted model is cold until it is active again, wherever it was at first."""
    models = ResidencyModel(Costs(1.0, first={"a": Residency.PARKED}), resident=1)
    found = []
    for alias in "aba":
        models.activate(alias)
        found.append(models.of("a"))

    assert [Residency.PARKED, Residency.COLD, Residency.PARKED] == found


# --- figures --------------------------------------------------------------------------------------


def test_the_figures_say_where_the_time_went() -> None:
    """The figures show where time went: a 5 s, switch 10 s, b 5 s, idle 20 s, b 1 s."""
    run = play(trace_of(ask(0, "a", 0.0, 5), ask(1, "b", 1.0, 5), ask(2, "b", 40.0, 1)))
    found = figures("fifo", run)

    assert (41.0, 1) == (found.end_s, found.switches)
    assert (11 / 41, 10 / 41, 20 / 41) == pytest.approx(
        (found.serving, found.switching, found.idle)
    )
    assert (14 / 3, 0.0, 14.0) == pytest.approx(
        (found.wait_mean_s, found.wait_p50_s, found.wait_max_s)
    )
    assert (5 + 19 + 1) / 3 == pytest.approx(found.took_mean_s)
    assert 0.5 == found.fairness


def test_who_waits_longer_than_promised_is_counted() -> None:
    """Requests that wait longer than promised are counted: the last of four due models does."""
    models = {alias: TracedModel(max_wait_s=0.0) for alias in "abcd"}
    requests = tuple(ask(i, alias, 0.0) for i, alias in enumerate("abcd"))

    assert 1 == figures("fifo", play(Trace(Head(models, "a"), requests))).late


@pytest.mark.parametrize(
    ("values", "index"), [([1, 1, 1], 1.0), ([5, 0, 0, 0], 0.25), ([0, 0], 1.0), ([], 1.0)]
)
def test_the_index_of_fairness(values: list[float], index: float) -> None:
    """The index of fairness is 1 if all are equal, 1/n if one has everything."""
    assert index == jain(values)


def test_a_table_has_a_line_for_every_policy() -> None:
    """A table has titles and one line for every policy."""
    run = play(trace_of(ask(0, "b", 0.0)))
    lines = table([figures("fifo", run), figures("batch", run)]).splitlines()

    assert ["policy", "fifo", "batch"] == [line.split()[0] for line in lines]
    assert "90.9%" in lines[1]
