"""Predict the next model from the past ones."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from vllm_hotswap.residency.prediction import DECAY, LIKELY, PRIOR, Prediction, TransitionCounts


def after(sequence: Iterable[str]) -> Prediction | None:
    seen = TransitionCounts()
    for alias in sequence:
        seen.observe(alias)
    return seen.predict()


@pytest.mark.parametrize("sequence", ["", "a", "ab", "aba", "abacabada"])
def test_what_has_not_become_a_habit_is_not_predicted(sequence: str) -> None:
    """Without a repeated habit there is no prediction: not from nothing, once, or mixed pasts."""
    assert after(sequence) is None


def test_what_happened_twice_is_predicted() -> None:
    """What happened twice is predicted, with its probability: of two agents, the other one."""
    prediction = after("ababa")

    assert prediction == Prediction("b", pytest.approx((1 + DECAY) / (1 + DECAY + PRIOR)))


def test_cycle_of_models_is_learned_in_its_second_round() -> None:
    """A cycle of models is learned in its second round; each model has a row of its own."""
    assert after("abcdabcda") == Prediction("b", pytest.approx(1.8 / 2.8))
    assert after("abcdabcdab") == Prediction("c", pytest.approx(1.8 / 2.8))


def test_habit_that_changes_is_noticed_within_six_times() -> None:
    """A changed habit is noticed within six times, however long the old one lasted."""
    prediction = after("ab" * 1000 + "ac" * 6 + "a")

    assert prediction is not None
    assert "c" == prediction.alias


def test_model_that_is_brought_back_follows_nothing() -> None:
    """A recovery, which activates the same model again, does not change the prediction."""
    assert after("ababa") == after("aabbbabaa")


@given(st.lists(st.sampled_from("abcdef"), max_size=200))
def test_prediction_is_another_model_and_likely(sequence: list[str]) -> None:
    """A prediction is another model that has followed before: likely, and never certain."""
    prediction = after(sequence)

    if prediction is not None:
        assert LIKELY <= prediction.probability < 1
        assert (sequence[-1], prediction.alias) in pairwise(sequence)


# --- what it is good for ----------------------------------------------------------------------

MODELS = "abcde"
COUNT = 10_000


def draw() -> random.Random:
    return random.Random(7)  # noqa: S311  # repeatable, no secret


def in_order(at_random: float = 0.0, changes_every: int = COUNT) -> Iterator[str]:
    """Yield models in a fixed order, some of them at random; now and then the order changes."""
    number, order, chance = 0, list(MODELS), draw()
    for turn in range(COUNT):
        if turn % changes_every == changes_every - 1:
            chance.shuffle(order)
        is_random = chance.random() < at_random
        number = chance.randrange(len(MODELS)) if is_random else (number + 1) % len(MODELS)
        yield order[number]


def by_chance(*weights: float) -> list[str]:
    return draw().choices(MODELS[: len(weights)], weights, k=COUNT)


def worth(sequence: Iterable[str]) -> tuple[float, float]:
    """Return the share of switches with a prediction, and the share of those that were right."""
    seen, switches, hits, misses = TransitionCounts(), 0, 0, 0
    for alias in sequence:
        prediction = None if alias == seen.current else seen.predict()
        switches += alias != seen.current
        hits += prediction is not None and prediction.alias == alias
        misses += prediction is not None and prediction.alias != alias
        seen.observe(alias)
    return (hits + misses) / switches, hits / max(1, hits + misses)


@pytest.mark.parametrize(
    ("sequence", "predicted", "right"),
    [
        (["a", "b"] * (COUNT // 2), 1.00, 1.00),
        (in_order(), 1.00, 1.00),
        (in_order(at_random=0.1), 0.98, 0.94),
        (in_order(at_random=0.3), 0.75, 0.81),
        (in_order(changes_every=50), 0.64, 0.83),
    ],
    ids=["two", "order", "some chance", "more chance", "changes"],
)
def test_order_is_predicted(sequence: Iterable[str], predicted: float, right: float) -> None:
    """Orders are predicted with the figures in the documentation."""
    assert (predicted, right) == pytest.approx(worth(sequence), abs=0.01)


def test_chance_is_seldom_predicted() -> None:
    """Random sequences are seldom predicted, so that little is read for nothing."""
    zipf, alike = worth(by_chance(1, 1 / 2, 1 / 3, 1 / 4, 1 / 5)), worth(by_chance(1, 1, 1, 1, 1))

    assert (0.10, 0.50) == pytest.approx(zipf, abs=0.02)
    assert alike[0] == pytest.approx(0.01, abs=0.01)


def test_memory_is_bounded_by_the_models() -> None:
    """Memory is limited to a count for each pair of models, however long the server runs."""
    seen = TransitionCounts()
    for alias in "abcd" * 100 + "dbac" * 100 + "acdb" * 100:
        seen.observe(alias)

    assert sum(len(row) for row in seen._counts.values()) <= 4 * 3
