"""What is likely to be next, from what was."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from vllm_hotswap.prediction import DECAY, LIKELY, PRIOR, Prediction, Successions


def after(sequence: Iterable[str]) -> Prediction | None:
    seen = Successions()
    for alias in sequence:
        seen.observe(alias)
    return seen.predict()


@pytest.mark.parametrize("sequence", ["", "a", "ab", "aba", "abacabada"])
def test_what_has_not_become_a_habit_is_not_predicted(sequence: str) -> None:
    """Neither from nothing, nor from one time, nor from something else each time."""
    assert after(sequence) is None


def test_what_happened_twice_is_predicted() -> None:
    """Of two agents that take turns, the other one is next; with what probability is told."""
    prediction = after("ababa")

    assert prediction == Prediction("b", pytest.approx((1 + DECAY) / (1 + DECAY + PRIOR)))


def test_cycle_of_models_is_learned_in_its_second_round() -> None:
    """Each model has a row of its own."""
    assert after("abcdabcda") == Prediction("b", pytest.approx(1.8 / 2.8))
    assert after("abcdabcdab") == Prediction("c", pytest.approx(1.8 / 2.8))


def test_habit_that_changes_is_noticed_within_six_times() -> None:
    """Whatever was the rule for however long before."""
    prediction = after("ab" * 1000 + "ac" * 6 + "a")

    assert prediction is not None
    assert "c" == prediction.alias


def test_model_that_is_brought_back_follows_nothing() -> None:
    """A recovery makes the same model active once more."""
    assert after("ababa") == after("aabbbabaa")


@given(st.lists(st.sampled_from("abcdef"), max_size=200))
def test_prediction_is_another_model_and_likely(sequence: list[str]) -> None:
    """And never certain; only what has followed the active model is predicted."""
    prediction = after(sequence)

    if prediction is not None:
        assert LIKELY <= prediction.probability < 1
        assert (sequence[-1], prediction.alias) in pairwise(sequence)


def test_memory_is_bounded_by_the_models() -> None:
    """However long the server runs: at most a count for each pair."""
    seen = Successions()
    for alias in "abcd" * 100 + "dbac" * 100 + "acdb" * 100:
        seen.observe(alias)

    assert sum(len(row) for row in seen._counts.values()) <= 4 * 3
