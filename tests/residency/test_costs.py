"""What bringing a model up costs."""

from __future__ import annotations

import pytest

from vllm_hotswap.models.registry import Model
from vllm_hotswap.residency.costs import LINK_BYTES_PER_S, READ_BYTES_PER_S, up_cost_s
from vllm_hotswap.states import Residency
from vllm_hotswap.testing.fake_host import FakeHost
from vllm_hotswap.testing.fake_settings import FakeSettings

GIB = 1 << 30


@pytest.fixture
def model() -> Model:
    """A model whose weights stay in host memory while it sleeps."""
    sizes = FakeSettings(weights_bytes=GIB, kv_bytes=GIB, offloads=True)
    return Model("a", FakeHost(("a",), {"a": sizes}).engines["a"])


def test_model_that_is_up_costs_nothing(model: Model) -> None:
    """A loaded model is up already, whether or not it is active."""
    assert [0, 0] == [up_cost_s(model, at) for at in (Residency.PARKED, Residency.ACTIVE)]


def test_cost_that_was_not_measured_is_estimated_from_bytes(model: Model) -> None:
    """Unmeasured costs follow from the bytes: read from files, or copied from host memory."""
    read_s, copied_s = 1.0 + GIB / READ_BYTES_PER_S, 0.1 + GIB / LINK_BYTES_PER_S

    assert {"cold": read_s, "discarded": read_s, "asleep": copied_s} == {
        at.value: up_cost_s(model, at)
        for at in (Residency.COLD, Residency.DISCARDED, Residency.ASLEEP)
    }


def test_measured_cost_is_half_the_newest(model: Model) -> None:
    """The newest of several times counts as much as all earlier ones together."""
    for took_s in (8.0, 4.0, 2.0):
        model.came_up(Residency.ASLEEP, took_s)

    assert 4.0 == up_cost_s(model, Residency.ASLEEP)


def test_discarded_model_costs_what_its_load_did(model: Model) -> None:
    """Until it is measured itself, a discarded model costs as much as a cold one."""
    model.came_up(Residency.COLD, 9.0)
    assert 9.0 == up_cost_s(model, Residency.DISCARDED)

    model.came_up(Residency.DISCARDED, 5.0)
    assert [5.0, 9.0] == [up_cost_s(model, at) for at in (Residency.DISCARDED, Residency.COLD)]
