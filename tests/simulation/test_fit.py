"""Service times are recovered from the recording of a simulated server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm_hotswap.scheduling.policies import make_policy
from vllm_hotswap.scheduling.policy import PolicySettings
from vllm_hotswap.simulation.costs import Costs
from vllm_hotswap.simulation.fit import Clock, common, least_squares, non_negative, services
from vllm_hotswap.simulation.generate import Shape, generate
from vllm_hotswap.simulation.run import World, simulate
from vllm_hotswap.simulation.service import Service
from vllm_hotswap.simulation.trace import (
    Head,
    Trace,
    TracedModel,
    TracedRequest,
    TracedSwitch,
    TracedSwitching,
)
from vllm_hotswap.states import Residency

pytestmark = pytest.mark.slow


def recorded(world: World, shape: Shape) -> Trace:
    """A generated trace with the results of its requests."""
    trace = generate(shape, TracedModel(), TracedSwitching())
    run = simulate(trace, make_policy("batch", PolicySettings()), world)
    return replace(
        trace,
        requests=tuple(
            replace(
                served.request,
                arrived_s=served.arrived_s,
                after=None,
                waited_s=served.waited_s,
                service_s=served.ended_s - served.admitted_s,
                result="served",
            )
            for served in run
        ),
        switches=tuple(
            TracedSwitch(
                s.began_s,
                s.source,
                s.target,
                Residency.PARKED,
                s.active_s - s.drained_s,
                s.drained_s - s.began_s,
            )
            for s in run.switches
        ),
    )


@pytest.mark.parametrize("kind", ["poisson", "agents"])
def test_the_service_is_found_again(kind: str) -> None:
    """Service times are recovered: for two different models predictions are right to 10 %."""
    truth = {"m0": Service(0.02, 0.001, 0.0002), "m1": Service(0.005, 0.004, 0.0004)}
    shape = Shape(kind=kind, models=2, requests=2000, rate=4, agents=6)  # type: ignore[arg-type]
    found = services(recorded(World(Costs(0.01), truth), shape))

    for alias, expected in truth.items():
        for running in (1, 4):
            assert expected.step(running) == pytest.approx(found[alias].step(running), rel=0.1)
        assert expected.alone_s(64, 32) == pytest.approx(found[alias].alone_s(64, 32), rel=0.1)


def test_one_request_is_enough_to_know_a_step() -> None:
    """One request is enough for a step's time, but not for what it shares with others."""
    request = TracedRequest(
        0, "a", 1.0, output_tokens=10, waited_s=0.0, service_s=0.5, result="served"
    )

    trace = Trace(Head({"a": TracedModel()}), (request,))

    assert 0.5 == pytest.approx(services(trace)["a"].alone_s(0, 10))


def test_the_clock_of_a_model_stands_still_while_it_is_parked() -> None:
    """A model's clock stands still from the end of a drain until the model is active again."""
    away = TracedSwitch(10.0, "a", "b", Residency.PARKED, 5.0, 2.0)
    back = TracedSwitch(20.0, "b", "a", Residency.PARKED, 5.0, 2.0)
    failed = TracedSwitch(1.0, "a", "b", Residency.PARKED, 1.0, 1.0, "failed")
    trace = Trace(Head({"a": TracedModel(), "b": TracedModel()}), (), (back, away, failed))

    assert [5.0, 12.0, 12.0, 15.0] == [Clock("a", trace).at(at_s) for at_s in (5, 14, 27, 30)]
    assert [0.0, 0.0, 5.0, 5.0] == [Clock("b", trace).at(at_s) for at_s in (5, 17, 22, 30)]


def test_nothing_is_below_zero() -> None:
    """A column for which plain least squares would give less is left out."""
    rows, values = [(1.0, 0.0), (1.0, 1.0), (1.0, 2.0)], [3.0, 2.0, 1.0]

    assert (3.0, -1.0) == pytest.approx(least_squares(rows, values))
    assert (2.0, 0.0) == pytest.approx(non_negative(rows, values))


def test_columns_that_say_the_same_are_not_both_used() -> None:
    """Of two proportional columns only one is used: there is no unique solution."""
    rows, values = [(1.0, 2.0), (2.0, 4.0)], [1.0, 2.0]

    assert least_squares(rows, values) is None
    first, second = non_negative(rows, values)
    assert 1.0 == pytest.approx(first + 2 * second)


def test_models_of_which_nothing_is_known_are_like_the_others() -> None:
    """Unknown models get the medians, or the defaults if no model is known."""
    known = [Service(1.0, 5.0, 2.0), Service(2.0, 6.0, 1.0), Service(3.0, 4.0, 3.0)]

    assert Service(2.0, 5.0, 2.0) == common(known)
    assert Service() == common([])
