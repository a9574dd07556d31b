"""Generated traces have the properties of their names."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from statistics import mean, pvariance

import pytest

from vllm_hotswap.simulation.generate import KINDS, Kind, Shape, generate, shares
from vllm_hotswap.simulation.trace import Trace, TracedModel, TracedSwitching

pytestmark = pytest.mark.slow

MANY = Shape(models=4, requests=20_000, rate=10.0)


def make(shape: Shape) -> Trace:
    return generate(shape, TracedModel(), TracedSwitching())


def arrivals(trace: Trace) -> list[float]:
    return [request.arrived_s for request in trace.requests if request.arrived_s is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_makes_the_same_trace(kind: Kind) -> None:
    """The same seed makes the same trace, and another seed makes another one."""
    shape = Shape(kind=kind)

    assert make(shape) == make(shape)
    assert make(shape) != make(replace(shape, seed=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_is_as_long_as_it_was_asked_for(kind: Kind) -> None:
    """A trace has its length and models, and requests that refer to earlier ones only."""
    trace = make(Shape(kind=kind, models=11, requests=123, rate=50))

    assert 123 == len(trace.requests)
    assert [f"m{number:02}" for number in range(11)] == list(trace.head.models)
    assert all(r.after is None or r.after < r.id for r in trace.requests)


@pytest.mark.parametrize("kind", ["poisson", "bursty", "burst"])
def test_requests_come_at_the_rate(kind: Kind) -> None:
    """Requests come in order, at the rate that was asked for."""
    times = arrivals(make(replace(MANY, kind=kind)))

    assert sorted(times) == times
    assert 10.0 == pytest.approx(len(times) / times[-1], rel=0.1)


def test_poisson_requests_are_independent() -> None:
    """Poisson requests of different seconds are independent, with the law's variance."""
    seconds = Counter(int(time_s) for time_s in arrivals(make(MANY)))

    counts = [seconds[second] for second in range(1900)]
    assert 1.0 == pytest.approx(pvariance(counts) / mean(counts), abs=0.15)


def test_bursty_requests_come_together() -> None:
    """Bursty requests have many times the variance of Poisson's law."""
    seconds = Counter(int(time_s) for time_s in arrivals(make(replace(MANY, kind="bursty"))))

    counts = [seconds[second] for second in range(1500)]
    assert pvariance(counts) / mean(counts) > 5


def test_models_are_asked_for_by_the_law_of_zipf() -> None:
    """By Zipf's law the second model gets half as many requests, the fourth a quarter."""
    asked = Counter(request.model for request in make(MANY).requests)

    assert 2.0 == pytest.approx(asked["m0"] / asked["m1"], rel=0.1)
    assert 4.0 == pytest.approx(asked["m0"] / asked["m3"], rel=0.1)
    assert [0.25] * 4 == shares(4, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_whose_share_is_nothing_is_not_asked_for(kind: Kind) -> None:
    """A model without a share gets no requests; 2 ** -2000 is zero for a float."""
    asked = {request.model for request in make(Shape(kind=kind, requests=40, zipf=2000)).requests}

    assert "m0" in asked
    assert (kind in ("poisson", "bursty")) == (asked == {"m0"})


def test_a_burst_asks_for_one_model_after_the_other() -> None:
    """In a burst, no two neighbours have the same model."""
    asked = [request.model for request in make(Shape(kind="burst")).requests]

    assert ["m0", "m1", "m2", "m0"] == asked[:4]
    assert all(one != other for one, other in pairwise(asked))


def test_agents_alternate_and_wait_for_their_answers() -> None:
    """Each agent has two models, and one request at a time."""
    trace = make(Shape(kind="agents", agents=3, models=5, requests=30))
    by_id = {request.id: request for request in trace.requests}

    first, second, third = (r for r in trace.requests if r.id % 3 == 1 and r.id < 9)
    assert (None, 1, 4) == (first.after, second.after, third.after)
    assert ("m1", "m2", "m1") == (first.model, second.model, third.model)
    assert all(r.model != by_id[r.after].model for r in trace.requests if r.after is not None)


def test_lengths_are_about_what_was_asked_for() -> None:
    """Lengths are at least one token, and have the requested means."""
    requests = make(replace(MANY, prompt_tokens=100, output_tokens=1)).requests

    assert 100 == pytest.approx(mean(r.prompt_tokens for r in requests), rel=0.05)
    assert {1} == {r.output_tokens for r in requests}


def test_models_that_are_all_but_never_asked_for_hold_nothing_up() -> None:
    """Models that are almost never requested delay nothing, though first due in millennia."""
    trace = make(Shape(kind="bursty", models=50, requests=10, zipf=8.0))

    assert 10 == len(trace.requests)


def test_many_models_that_are_asked_for_alike_all_count() -> None:
    """All of many equally likely models count, however few requests there are for each."""
    trace = make(Shape(kind="bursty", models=2000, requests=1, zipf=0.0))

    assert 1 == len(trace.requests)
