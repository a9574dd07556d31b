"""The benchmark of the mode `auto`: its requests, the judgement of answers, and its report."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.auto import agreement, results, workloads
from benchmarks.auto.__main__ import parse
from benchmarks.auto.agreement import Recorded, Simulated
from benchmarks.auto.checkpoints import GREETINGS
from benchmarks.auto.play import Outcome, Played, judge
from benchmarks.auto.run import Case, Found
from benchmarks.auto.workloads import LEAST_TOKENS, WARM_UP, Amount, prompt, workload
from benchmarks.client import BadAnswer
from benchmarks.wire import End, Reply
from vllm_hotswap.scheduling.policies import make_policy
from vllm_hotswap.scheduling.policy import PolicySettings
from vllm_hotswap.simulation.costs import Costs
from vllm_hotswap.simulation.run import World, simulate
from vllm_hotswap.simulation.service import Service
from vllm_hotswap.simulation.trace import Trace, TracedRequest, TracedSwitch, TracedSwitching
from vllm_hotswap.states import Residency

SWITCHING = TracedSwitching(policy="fifo")
REQUEST = TracedRequest(id=0, model="qwen", arrived_s=0.0, output_tokens=9)
GOLDEN = "I am qwen, the tiny Qwen. Hello!"
GOLDENS = {("qwen", prompt(0)): GOLDEN}


def asked(name: str, requests: int = 30) -> Trace:
    return workload(name, Amount(requests, rate=5.0), SWITCHING)


# --- the requests -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_every_trace_is_for_the_three_models(name: str) -> None:
    """Every trace uses the three models, with answers long enough for a name, and is repeatable."""
    trace = asked(name)
    assert list(GREETINGS) == list(trace.head.models)
    assert set(GREETINGS) == {request.model for request in trace.requests}
    assert min(request.output_tokens for request in trace.requests) > LEAST_TOKENS
    assert trace == asked(name)


def test_burst_comes_at_once_and_alternates() -> None:
    """A burst alternates: the worst order for a server that switches at every change of name."""
    trace = asked("burst")
    assert ["llama", "qwen", "pirate"] * 10 == [request.model for request in trace.requests]
    assert max(request.arrived_s or 0.0 for request in trace.requests) < 0.001


def test_agents_go_on_with_another_model_when_they_are_answered() -> None:
    """Each request of an agent, except its first, follows one for another model."""
    requests = {request.id: request for request in asked("agents").requests}
    followers = [request for request in requests.values() if request.after is not None]
    assert len(requests) - workloads.AGENTS == len(followers)
    assert all(requests[r.after].model != r.model for r in followers if r.after is not None)


# --- the judgement of answers -------------------------------------------------------------------


def reply(text: str = f" {GOLDEN[:20]}", **other: object) -> Reply:
    told: dict[str, object] = {
        "model": "qwen",
        "choices": [{"text": text}],
        "usage": {"completion_tokens": 9},
        **other,
    }
    headers = {"x-hotswap-waited": "0.250", "x-hotswap-model": "qwen"}
    body = bytearray(json.dumps(told).encode())
    return Reply(End.COMPLETE, 200, headers=headers, body=body, ended_s=1.0)


def test_answer_of_the_named_model_counts() -> None:
    """An answer of the named model counts, with the wait that the server reports."""
    outcome = judge(REQUEST, reply(), GOLDENS)
    assert (None, 0.25, True) == (outcome.error, outcome.waited_s, outcome.matches_reference)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (reply(model="llama"), "asked 'qwen'"),
        (reply(" I am llama, the tiny"), "asked 'qwen'"),
        (reply(usage={"completion_tokens": 3}), "asked for 9 tokens"),
        (replace(reply(), headers={"x-hotswap-model": "qwen"}), "how long it waited"),
        (replace(reply(), status=503), "complete 503"),
        (Reply(detail="no connection"), "lost 0 no connection"),
    ],
)
def test_any_other_answer_is_an_error(wrong: Reply, error: str) -> None:
    """An answer of another model, a cut one, one without its wait, and a lost one are errors."""
    assert error in str(judge(REQUEST, wrong, GOLDENS).error)


def test_another_text_of_the_same_model_is_told() -> None:
    """Another text is reported, but is not an error: numbers vary with the rest of a batch."""
    outcome = judge(REQUEST, reply(" I am qwen, who else?"), GOLDENS)
    assert (None, False) == (outcome.error, outcome.matches_reference)


# --- the simulator beside the server ------------------------------------------------------------


def recorded(played: Trace, world: World) -> Trace:
    """The recording of a server that behaves like the simulator."""
    run = simulate(played, make_policy("fifo", PolicySettings()), world)
    requests = tuple(
        replace(
            one.request,
            after=None,
            arrived_s=one.arrived_s,
            waited_s=one.waited_s,
            service_s=one.ended_s - one.admitted_s,
            switched=0,
            result="served",
        )
        for one in run
    )
    switches = tuple(
        TracedSwitch(
            at_s=one.began_s,
            source=one.source,
            target=one.target,
            residency=Residency.PARKED,
            cost_s=one.active_s - one.drained_s,
            drain_s=one.drained_s - one.began_s,
        )
        for one in run.switches
    )
    return Trace(played.head, requests, switches)


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_simulator_agrees_with_a_server_that_is_like_it(name: str) -> None:
    """The simulator agrees from a recording alone, without knowing costs or service times."""
    asked_for = asked(name, 90)
    seen = recorded(asked_for, World(Costs(0.05), service=Service(0.01, 0.0, 0.0)))
    outcomes = tuple(
        Outcome(one.model, 0.0, 0.0, paused_s=None if one.after is None else one.think_s)
        for one in asked_for.requests
    )
    played = Played(outcomes, len(seen.switches), 0.0)
    found = agreement.simulated(Recorded(seen, Trace(seen.head)), asked_for, played, resident=None)
    assert found.mean_wait_s == pytest.approx(found.recorded_mean_wait_s, rel=0.03)
    assert found.switches == pytest.approx(found.recorded_switches, rel=0.03)
    assert {"parked": found.recorded_switches} == found.residencies
    assert (agreement.SIMULATIONS if name == "agents" else 1) == len(found.simulations)


def test_simulations_of_agents_differ_in_who_is_looked_at_for_how_long() -> None:
    """Simulations of agents differ in their preview times, and are the same each time."""
    asked_for = asked("agents", 40)
    seen = recorded(asked_for, World(Costs(0.05), service=Service(0.01, 0.0, 0.0)))
    requests = (replace(one, prepared_s=0.2 * (one.id % 4)) for one in seen.requests)
    seen = replace(seen, requests=tuple(requests))
    outcomes = tuple(
        Outcome(one.model, 0.0, 0.0, paused_s=None if one.after is None else one.think_s)
        for one in asked_for.requests
    )
    found, again = (
        agreement.simulated(Recorded(seen, Trace(seen.head)), asked_for, played, resident=None)
        for played in [Played(outcomes, len(seen.switches), 0.0)] * 2
    )
    assert found == again
    assert len(set(found.simulations)) > 1


def test_recording_is_split_into_what_was_played() -> None:
    """Requests before the traces, and those of the warm-ups, belong to none of them."""
    world = World(Costs(0.05))
    first, second = asked("burst", 9), asked("zipf", 12)
    sent = [TracedRequest(id=0, model="qwen", arrived_s=0.0, result="served")]
    switches: list[TracedSwitch] = []
    for number, trace in enumerate((first, second)):
        begin_s = 100.0 * (1 + number)
        warm_up = [
            TracedRequest(id=0, model=alias, arrived_s=begin_s - 50 + place, result="served")
            for place, alias in enumerate(WARM_UP)
        ]
        seen = recorded(trace, world)
        sent += [
            *warm_up,
            *(replace(r, arrived_s=begin_s + (r.arrived_s or 0.0)) for r in seen.requests),
        ]
        switches += [
            TracedSwitch(
                at_s=begin_s - 49, source="qwen", target="llama", residency=None, cost_s=1
            ),
            *(replace(s, at_s=begin_s + s.at_s) for s in seen.switches),
        ]
    whole = Trace(first.head, tuple(sent), tuple(switches))

    parts = list(agreement.split(whole, 1, [first, second]))
    assert [Counter(r.model for r in trace.requests) for trace in (first, second)] == [
        Counter(r.model for r in part.trace.requests) for part in parts
    ]
    assert [len(recorded(trace, world).switches) for trace in (first, second)] == [
        len(part.trace.switches) for part in parts
    ]
    before = [1 + len(WARM_UP), 1 + 2 * len(WARM_UP) + 9]
    assert before == [len(part.before.requests) for part in parts]
    assert [1, 2 + len(parts[0].trace.switches)] == [len(part.before.switches) for part in parts]


def test_recording_that_lacks_a_request_is_refused() -> None:
    """A recording with a gap is refused: everything after it would be misread."""
    trace = asked("burst", 9)
    warm_up = [TracedRequest(id=0, model=a, arrived_s=0.0, result="served") for a in WARM_UP]
    seen = recorded(trace, World(Costs(0.05))).requests
    later = [replace(r, arrived_s=100.0 + (r.arrived_s or 0.0)) for r in seen]
    lacking = Trace(trace.head, (*warm_up, *later[1:]))

    with pytest.raises(BadAnswer, match="recorded"):
        list(agreement.split(lacking, 0, [trace]))


def test_warm_up_leaves_the_first_model_active() -> None:
    """Warm-up leaves the first model active, as the simulator does."""
    assert WARM_UP[-1] == asked("burst").head.active


# --- the report ---------------------------------------------------------------------------------


def played(waits_s: list[float], switches: int) -> Played:
    return Played(tuple(Outcome("qwen", wait_s, 1.0) for wait_s in waits_s), switches, 9.0)


def found(fifo: Played, batch: Played, simulated_s: float = 1.0) -> Found:
    result = Found()
    for name, one in (("fifo", fifo), ("batch", batch)):
        for workload_name in workloads.WORKLOADS:
            case = Case("cheap", workload_name, name)
            result.played[case].append(one)
            result.simulated[case].append(Simulated(simulated_s, 1.0, 7, 7, {"parked": 7}))
    return result


def bars(found_: Found) -> dict[str, bool]:
    return {bar.name: bar.met for bar in results.part(found_).bars}


def test_bars_are_met() -> None:
    """A quarter of the switches, and waits that are not longer, meet the bars."""
    part = results.part(found(played([1.0, 2.0], 40), played([1.0, 2.0], 10)))
    assert all(bar.met for bar in part.bars)
    assert "100% from parked" in part.tables[0].title


def test_missed_bars_are_told() -> None:
    """Each bar can be missed alone, and is then reported."""
    assert not bars(found(played([1.0], 40), played([1.0], 11)))[
        "burst, cheap: switches, batch / fifo"
    ]
    assert not bars(found(played([1.0], 40), played([1.1], 1)))[
        "burst, cheap: p95 wait, batch / fifo"
    ]
    off = bars(found(played([1.0], 40), played([1.0], 1), simulated_s=0.84))
    assert not off["simulator, cheap burst fifo: mean wait, off by"]
    wrong = replace(played([1.0], 1), outcomes=(Outcome("qwen", 1.0, 1.0, "503"),))
    assert not bars(found(played([1.0], 40), wrong))["errors"]


def test_each_run_is_told_beside_the_medians() -> None:
    """Two runs that miss in opposite directions do not count as agreement."""
    both = found(played([1.0], 40), played([1.0], 1), simulated_s=0.5)
    for runs in both.simulated.values():
        runs += [Simulated(1.0, 1.0, 7, 7, {}), Simulated(1.5, 1.0, 14, 7, {})]
    row = results.part(both).tables[-1].rows[0]
    assert ("+0%", "-50%, +0%, +50%") == row[3:5]
    assert ("+0%", "+0%, +0%, +100%") == row[7:9]


def test_options_are_checked() -> None:
    """A run without requests is refused."""
    assert {"cheap": Amount(300, 10.0), "dear": Amount(60, 2.0)} == dict(parse([]).plan.amounts)
    assert ["dear"] == list(parse(["--only", "dear"]).plan.amounts)
    with pytest.raises(SystemExit):
        parse(["--requests", "0"])
