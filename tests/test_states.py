"""The tables of states: their steps work, and all others are refused."""

from __future__ import annotations

from itertools import product

import pytest

from vllm_hotswap.states import (
    DOWN,
    LADDER,
    REQUEST_TRANSITIONS,
    TRANSITIONS,
    IllegalTransition,
    RequestState,
    RequestStep,
    Residency,
    Step,
    advance,
    advance_request,
    is_below,
)

LEGAL = [(residency, step) for residency, steps in TRANSITIONS.items() for step in steps]
ILLEGAL = [pair for pair in product(Residency, Step) if pair not in LEGAL]


def test_table_lists_every_residency() -> None:
    """The table lists every residency, and each can be reached or is where a model starts."""
    reached = {after for steps in TRANSITIONS.values() for after in steps.values()}

    assert set(Residency) == set(TRANSITIONS)
    assert set(Residency) == reached | {Residency.COLD}


def test_table_uses_every_step() -> None:
    """The table uses every step."""
    assert set(Step) == {step for _, step in LEGAL}


LISTED = [
    ("cold", "load", "loading"),
    ("cold", "fail", "failed"),
    ("loading", "loaded", "parked"),
    ("loading", "load_failed", "cold"),
    ("loading", "fail", "failed"),
    ("parked", "activate", "active"),
    ("parked", "sleep", "asleep"),
    ("parked", "discard", "discarded"),
    ("parked", "unload", "cold"),
    ("parked", "fail", "failed"),
    ("active", "park", "parked"),
    ("active", "fail", "failed"),
    ("asleep", "wake", "parked"),
    ("asleep", "wake_failed", "cold"),
    ("asleep", "discard", "discarded"),
    ("asleep", "unload", "cold"),
    ("asleep", "fail", "failed"),
    ("discarded", "wake", "parked"),
    ("discarded", "wake_failed", "cold"),
    ("discarded", "unload", "cold"),
    ("discarded", "fail", "failed"),
    ("failed", "revive", "cold"),
]


@pytest.mark.parametrize(("before", "step", "after"), LISTED)
def test_step_leads_where_the_table_says(before: str, step: str, after: str) -> None:
    """Each step leads where the ladder, written out here, says."""
    assert Residency(after) is advance("llama", Residency(before), Step(step))


def test_nothing_else_is_legal() -> None:
    """The list above is the whole table."""
    assert len(LISTED) == len(LEGAL)


def test_ladder_is_in_order() -> None:
    """Each rung holds less than the one above it; a model that is moving is on none."""
    assert ["active", "parked", "asleep", "discarded", "cold"] == [str(r) for r in LADDER]
    assert [True, False, False] == [
        is_below(Residency(lower), Residency.PARKED) for lower in ("asleep", "parked", "active")
    ]


@pytest.mark.parametrize(("to", "step"), DOWN.items())
def test_step_down_leads_to_where_it_is_said_to_lead(to: Residency, step: Step) -> None:
    """A step down leads to its rung from every higher residency that has the step."""
    above = [r for r, steps in TRANSITIONS.items() if r in LADDER and step in steps]

    assert above
    assert all(is_below(to, residency) for residency in above)
    assert {to} == {TRANSITIONS[residency][step] for residency in above}


@pytest.mark.parametrize(("residency", "step"), ILLEGAL)
def test_step_that_is_not_listed_is_refused(residency: Residency, step: Step) -> None:
    """An unlisted step raises, and the message names the model, its residency and the step."""
    with pytest.raises(IllegalTransition) as caught:
        advance("llama", residency, step)

    assert f"model 'llama' is {residency.value}: step {step.value!r} is not possible" == str(
        caught.value
    )


REQUEST_LEGAL = [(state, step) for state, steps in REQUEST_TRANSITIONS.items() for step in steps]
REQUEST_ILLEGAL = sorted(set(product(RequestState, RequestStep)) - set(REQUEST_LEGAL))


def test_every_state_of_a_request_is_reached_and_can_end() -> None:
    """Every state has a row, is reached from `entered`, and leads to `over`."""
    assert set(RequestState) == set(REQUEST_TRANSITIONS)
    reached = {RequestState.ENTERED}
    for _ in RequestState:
        reached |= {to for state in reached for to in REQUEST_TRANSITIONS[state].values()}

    assert set(RequestState) == reached
    for state in set(RequestState) - {RequestState.OVER}:
        assert RequestState.OVER is advance_request("llama", state, RequestStep.END)


def test_a_request_that_has_been_cut_is_not_revived() -> None:
    """From `ending` and `over`, no step leads to any other state than these."""
    dead = {RequestState.ENDING, RequestState.OVER}

    assert all(set(REQUEST_TRANSITIONS[state].values()) <= dead for state in dead)
    assert {RequestState.OVER} == set(REQUEST_TRANSITIONS[RequestState.OVER].values())


@pytest.mark.parametrize(("state", "step"), REQUEST_ILLEGAL)
def test_step_of_a_request_that_is_not_listed_is_refused(
    state: RequestState, step: RequestStep
) -> None:
    """An unlisted step raises, and the message names the model, the state and the step."""
    with pytest.raises(IllegalTransition) as caught:
        advance_request("llama", state, step)

    assert f"a request of 'llama' is {state.value}: step {step.value!r} is not possible" == str(
        caught.value
    )
