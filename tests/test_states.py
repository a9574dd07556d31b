"""The residency ladder: what is in the table happens, what is not is refused."""

from __future__ import annotations

from itertools import product

import pytest

from vllm_hotswap.states import TRANSITIONS, IllegalTransition, Residency, Step, advance

LEGAL = [(residency, step) for residency, steps in TRANSITIONS.items() for step in steps]
ILLEGAL = [pair for pair in product(Residency, Step) if pair not in LEGAL]


def test_table_lists_every_residency() -> None:
    """No residency is forgotten, and each one can be reached or is where a model begins."""
    reached = {after for steps in TRANSITIONS.values() for after in steps.values()}

    assert set(Residency) == set(TRANSITIONS)
    assert set(Residency) == reached | {Residency.COLD}


def test_table_uses_every_step() -> None:
    """No step is without use."""
    assert set(Step) == {step for _, step in LEGAL}


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [
        ("cold", "load", "loading"),
        ("cold", "fail", "failed"),
        ("loading", "loaded", "parked"),
        ("loading", "load_failed", "cold"),
        ("loading", "fail", "failed"),
        ("parked", "activate", "active"),
        ("parked", "fail", "failed"),
        ("active", "park", "parked"),
        ("active", "fail", "failed"),
    ],
)
def test_step_leads_where_the_table_says(before: str, step: str, after: str) -> None:
    """The ladder, written out; nothing else is legal."""
    assert Residency(after) is advance("llama", Residency(before), Step(step))


def test_nothing_else_is_legal() -> None:
    """The list above is the whole table."""
    assert 9 == len(LEGAL)


@pytest.mark.parametrize(("residency", "step"), ILLEGAL)
def test_step_that_is_not_listed_is_refused(residency: Residency, step: Step) -> None:
    """An unknown pair raises, and the message names the model, its residency and the step."""
    with pytest.raises(IllegalTransition) as caught:
        advance("llama", residency, step)

    assert f"model 'llama' is {residency.value}: step {step.value!r} is not possible" == str(
        caught.value
    )
