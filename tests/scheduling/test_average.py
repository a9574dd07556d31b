"""A moving average."""

from __future__ import annotations

import pytest

from vllm_hotswap.scheduling.average import Average


def test_nothing_measured_has_no_value() -> None:
    """An average has no value before the first measurement, not 0."""
    assert Average(0.3).value is None


def test_first_measurement_is_taken_as_it_is() -> None:
    """The first measurement is the value, even if it is 0."""
    average = Average(0.3)

    average.add(0.0)

    assert 0.0 == average.value


@pytest.mark.parametrize(("weight", "value"), [(0.3, 3.7), (0.5, 5.5), (1.0, 10.0)])
def test_newer_measurement_counts_by_the_weight(weight: float, value: float) -> None:
    """A newer measurement counts by the average's weight; the earlier ones for the rest."""
    average = Average(weight)

    average.add(1.0)
    average.add(10.0)

    assert value == pytest.approx(average.value)
