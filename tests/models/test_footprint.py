"""What a model holds in each residency: estimated before its first load, measured after it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm_hotswap.engines.memory_figures import footprint_of
from vllm_hotswap.host.devices import (
    CpuDevice,
    CudaDevice,
    Device,
    GaudiDevice,
    OwnSleepDevice,
    RocmDevice,
)
from vllm_hotswap.host.messages import Loaded
from vllm_hotswap.launch.budget import ModelNeeds
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.states import Residency

NEEDS = ModelNeeds(
    alias="one",
    weights_bytes=300,
    kv_bytes=96,
    min_kv_bytes=1,
    max_kv_bytes=1000,
    overhead_bytes=64,
    more_weights_bytes=100,
)


def device_bytes(loaded: Loaded | None, device: Device | None = None) -> dict[str, int]:
    footprint = footprint_of(NEEDS, device or CpuDevice(), loaded)
    return {where.value: usage.device for where, usage in footprint.usage.items()}


def test_second_copies_count_before_the_first_load() -> None:
    """Second copies count before the first load; they come and go with the weights."""
    assert {"parked": 560, "asleep": 464, "discarded": 64, "cold": 0} == device_bytes(None)


def test_the_peak_is_above_what_is_held_then() -> None:
    """The peak of a load is above what is held then: reading takes more than holding."""
    assert Usage(560 + NEEDS.reading_bytes) == footprint_of(NEEDS, CpuDevice(), None).peak


def test_a_measured_model_counts_as_measured() -> None:
    """Measured values replace estimates, second copies included; the level's release is known."""
    loaded = Loaded(kv_bytes=96, held_bytes=430, can_discard=True, weights_bytes=400)

    assert {"parked": 526, "asleep": 430, "discarded": 30, "cold": 0} == device_bytes(loaded)


def test_files_larger_than_their_weights_hide_nothing() -> None:
    """What stays after dropping the weights counts, although the files are larger."""
    loaded = Loaded(kv_bytes=96, held_bytes=200, can_discard=True, weights_bytes=150)

    assert {"parked": 296, "asleep": 200, "discarded": 50, "cold": 0} == device_bytes(loaded)


def test_a_load_that_reused_free_memory_holds_its_weights_at_least() -> None:
    """A load that reused free memory, and so grew little, holds at least its weights."""
    loaded = Loaded(kv_bytes=96, held_bytes=120, can_discard=True, weights_bytes=400)

    assert 496 == device_bytes(loaded)["parked"]


@pytest.mark.parametrize("device", [OwnSleepDevice(), RocmDevice()], ids=lambda d: d.name)
def test_weights_asleep_leave_an_accelerator(device: Device) -> None:
    """Sleeping weights leave an accelerator, where such a level exists."""
    usage = footprint_of(NEEDS, device, Loaded(96, 350, can_discard=False)).usage

    assert Usage(350 + 96) == usage[Residency.PARKED]
    assert Residency.DISCARDED not in usage
    asleep = usage.get(Residency.ASLEEP)
    assert asleep == (Usage(50, 300) if device.sleep_levels else None)


# --- CUDA, where a worker tells what its sleep gives back and takes ------------------------------

CUDA_NEEDS = replace(NEEDS, overhead_bytes=80, residue_bytes=70)


def test_a_model_that_sleeps_on_cuda_leaves_something_on_the_device() -> None:
    """Graphs and buffers, estimated before the first load, stay; the rest goes to the host."""
    usage = footprint_of(CUDA_NEEDS, CudaDevice(), None).usage

    assert Usage(300 + 100 + 80 + 96) == usage[Residency.PARKED]
    assert Usage(70, 300 + 100 + 10) == usage[Residency.ASLEEP]
    assert Residency.DISCARDED not in usage


def test_what_a_load_on_cuda_has_measured_counts() -> None:
    """A CUDA load's measurements replace estimates of what is held, released and copied."""
    loaded = Loaded(96, 350, can_discard=False, sleep_bytes=400, copy_bytes=310)
    usage = footprint_of(CUDA_NEEDS, CudaDevice(), loaded).usage

    assert Usage(350 + 96) == usage[Residency.PARKED]
    assert Usage(350 + 96 - 400, 310) == usage[Residency.ASLEEP]


def test_what_a_load_on_a_gaudi_has_measured_counts() -> None:
    """A Gaudi's measured blocks are held, and released by a sleep, as buffers are."""
    loaded = Loaded(96, 350, can_discard=False, sleep_bytes=430, copy_bytes=320)
    usage = footprint_of(NEEDS, GaudiDevice(), loaded).usage

    assert Usage(350 + 96) == usage[Residency.PARKED]
    assert Usage(350 + 96 - 430, 320) == usage[Residency.ASLEEP]


def test_weights_stay_in_host_memory_once_a_model_has_slept() -> None:
    """After one sleep weights stay in host memory, where they count while the model is awake."""
    loaded = Loaded(96, 350, can_discard=False, sleep_bytes=400, copy_bytes=310)
    footprint = footprint_of(CUDA_NEEDS, CudaDevice(), loaded, has_copy=True)

    assert Usage(350 + 96, 310) == footprint.at(Residency.ACTIVE)
    assert Usage(46, 310) == footprint.at(Residency.ASLEEP)
    assert Usage() == footprint.at(Residency.COLD)


def test_a_model_holds_what_its_sleep_gives_back_at_least() -> None:
    """A model holds at least what its sleep releases, even if other processes hide some of it."""
    loaded = Loaded(96, 20, can_discard=False, sleep_bytes=400, copy_bytes=310)
    usage = footprint_of(CUDA_NEEDS, CudaDevice(), loaded).usage

    assert Usage(400) == usage[Residency.PARKED]
    assert Usage(0, 310) == usage[Residency.ASLEEP]


def test_packing_a_layer_counts_where_it_takes_more_than_reading() -> None:
    """Packing a layer counts where it takes more than reading; the two never add up."""
    small = ModelNeeds("a", 300, None, 0, 0, packing_bytes=20)
    large = ModelNeeds("b", 300, None, 0, 0, packing_bytes=700)

    assert (300, 700) == (small.reading_bytes, large.reading_bytes)
