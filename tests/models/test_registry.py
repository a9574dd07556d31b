"""Models by alias, their residency, and their leases."""

from __future__ import annotations

import asyncio

import pytest

from tests.helpers.support import lease as lease_of
from vllm_hotswap.errors import DrainCut, EngineUnavailable, UnknownModel
from vllm_hotswap.models.registry import Registry
from vllm_hotswap.states import IllegalTransition, Residency, Step
from vllm_hotswap.testing.fake_host import FakeHost


@pytest.fixture
def registry() -> Registry:
    return Registry(FakeHost(("llama", "qwen")).engines)


def test_models_keep_the_order_of_the_configuration(registry: Registry) -> None:
    """Models keep the order of the configuration, which is the order of all lists."""
    assert ["llama", "qwen"] == registry.aliases == [model.alias for model in registry]


def test_unknown_alias_is_refused_with_the_configured_ones(registry: Registry) -> None:
    """An unknown alias is refused with the configured ones; aliases are exact."""
    with pytest.raises(UnknownModel, match="'Llama' is not configured; configured: llama, qwen"):
        registry.resolve("Llama")


def test_model_begins_cold_and_climbs(registry: Registry) -> None:
    """A model starts cold and climbs; each step returns the residency before it."""
    model = registry.resolve("llama")

    assert Residency.COLD is model.step(Step.LOAD)
    assert Residency.LOADING is model.residency
    assert not model.is_loaded

    model.step(Step.LOADED)
    assert model.is_loaded
    model.step(Step.ACTIVATE)
    assert model.is_loaded


def test_illegal_step_leaves_the_residency(registry: Registry) -> None:
    """An illegal step is refused and changes nothing."""
    model = registry.resolve("llama")

    with pytest.raises(IllegalTransition):
        model.step(Step.ACTIVATE)

    assert Residency.COLD is model.residency


def test_model_tells_its_state(registry: Registry) -> None:
    """A model's state is readable in logs and failing tests."""
    model = registry.resolve("llama")
    model.leases[lease_of("llama", 1)] = None

    assert "<Model llama cold in_flight=1>" == repr(model)


def test_only_the_first_cause_ends_a_request() -> None:
    """Only the first cause that a request is given ends it."""
    lease = lease_of("llama", 1)
    first, second = DrainCut("llama", "qwen", 1), EngineUnavailable("gone")
    told: list[str] = []
    lease.on_cut = lambda: told.append("cut")

    lease.end(first)
    lease.end(second)

    assert first is lease.cut
    assert ["cut"] == told


async def test_request_that_goes_on_can_be_killed() -> None:
    """A request that continues after it was asked to end can be killed, which cancels it."""
    task = asyncio.create_task(asyncio.Event().wait())
    lease = lease_of("llama", 1, task=task)

    lease.end(EngineUnavailable("gone"))
    assert not task.cancelling()

    lease.kill()
    assert task.cancelling()


def test_lease_without_a_task_can_be_killed() -> None:
    """A lease without a task can be killed: there may be no task to cancel."""
    lease_of("llama", 1).kill()
