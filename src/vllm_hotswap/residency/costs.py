"""What bringing a model up costs: measured, or estimated from the bytes that have to move."""

from __future__ import annotations

from vllm_hotswap.models import Model
from vllm_hotswap.states import Residency

READ_BYTES_PER_S = 500e6
"""Assumed speed of reading weights, for the cost of a load that has not been measured yet."""

LINK_BYTES_PER_S = 20e9
"""Assumed speed from host memory to an accelerator, for a wake that has not been measured yet:
about that of PCI Express 4.0 with 16 lanes."""


def up_cost_s(model: Model, where: Residency) -> float:
    """Return seconds from a residency to `parked`, measured or estimated from bytes to read."""
    if where in (Residency.PARKED, Residency.ACTIVE):
        return 0.0
    if where is Residency.ASLEEP and model.waking is not None:
        return model.waking.left * _wake_cost_s(model)
    if (measured_s := model.measured_up_s(where)) is not None:
        return measured_s
    if where is Residency.ASLEEP:
        return _wake_cost_s(model)
    if where is Residency.DISCARDED:
        measured_s = model.measured_up_s(Residency.COLD)  # a load reads the same bytes
        if measured_s is not None:
            return measured_s
    return 1.0 + model.engine.memory.weights_bytes / READ_BYTES_PER_S


def _wake_cost_s(model: Model) -> float:
    if (measured_s := model.measured_up_s(Residency.ASLEEP)) is not None:
        return measured_s
    return 0.1 + model.engine.footprint.at(Residency.ASLEEP).host / LINK_BYTES_PER_S
