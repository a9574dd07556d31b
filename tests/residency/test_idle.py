"""Models that move down when no request has used them for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from tests.helpers.support import Recorder, lease as lease_of, settled
from vllm_hotswap.models.registry import ModelSettings
from vllm_hotswap.switching.coordinator import Coordinator
from vllm_hotswap.testing.fake_host import FakeHost
from vllm_hotswap.testing.fake_settings import FakeSettings


class Clocked:
    """A coordinator with a clock set by the test; a is active, b and c rest when idle."""

    def __init__(
        self, fakes: Mapping[str, FakeSettings] | None = None, **policies: ModelSettings
    ) -> None:
        self.now = 1000.0
        self.host = FakeHost(("a", "b", "c"), fakes)
        self.events = Recorder()
        self.coordinator = Coordinator(
            self.host, self.events, model_settings=policies, clock=lambda: self.now
        )

    async def start(self, *load: str) -> Clocked:
        await self.host.start()
        await self.coordinator.start(load or ("a", "b", "c"), "a")
        return self

    async def after(self, seconds: float) -> dict[str, str]:
        """Return the residencies that much later, once idle models have been moved."""
        self.now += seconds
        await self.coordinator.idle.rest()
        return {model.alias: model.residency.value for model in self.coordinator.registry}


async def test_idle_models_sleep_and_are_unloaded_in_time() -> None:
    """Idle models sleep and are unloaded by their own policies; one without a policy stays."""
    policy = ModelSettings(idle_sleep_s=10, idle_unload_s=60)
    clocked = await Clocked(b=policy).start()

    assert {"a": "active", "b": "parked", "c": "parked"} == await clocked.after(9)
    assert {"a": "active", "b": "asleep", "c": "parked"} == await clocked.after(1)
    assert {"a": "active", "b": "asleep", "c": "parked"} == await clocked.after(49)
    assert {"a": "active", "b": "cold", "c": "parked"} == await clocked.after(1)


async def test_active_model_never_rests() -> None:
    """The active model never rests; its idle time starts when another model becomes active."""
    clocked = await Clocked(a=ModelSettings(idle_unload_s=10)).start()
    assert "active" == (await clocked.after(999))["a"]

    await clocked.coordinator.switch("b")

    assert "parked" == (await clocked.after(9))["a"]
    assert "cold" == (await clocked.after(1))["a"]


async def test_time_begins_when_a_model_comes_up() -> None:
    """The idle time of a model starts when it is loaded or woken."""
    policy = ModelSettings(idle_sleep_s=10)
    clocked = await Clocked(b=policy).start("a")
    await clocked.after(500)

    await clocked.coordinator.operations.load("b")
    assert "parked" == (await clocked.after(9))["b"]
    assert "asleep" == (await clocked.after(1))["b"]

    await clocked.coordinator.operations.wake("b")
    assert "parked" == (await clocked.after(9))["b"]
    assert "asleep" == (await clocked.after(1))["b"]


async def test_pinned_and_busy_models_do_not_rest() -> None:
    """Pinned and busy models neither sleep nor are unloaded."""
    policy = ModelSettings(idle_sleep_s=10, idle_unload_s=20)
    clocked = await Clocked(b=ModelSettings(pinned=True, idle_sleep_s=10), c=policy).start()
    model = clocked.coordinator.registry.resolve("c")
    model.leases[lease_of("c", 1)] = None

    assert {"a": "active", "b": "parked", "c": "parked"} == await clocked.after(99)

    model.leases.clear()
    assert "cold" == (await clocked.after(0))["c"]


async def test_model_whose_device_knows_no_sleep_is_only_unloaded() -> None:
    """A model whose device cannot sleep is only unloaded; its time to sleep has no effect."""
    awake = {"b": FakeSettings(levels=frozenset())}
    clocked = await Clocked(awake, b=ModelSettings(idle_sleep_s=10, idle_unload_s=20)).start()

    assert "parked" == (await clocked.after(15))["b"]
    assert "cold" == (await clocked.after(5))["b"]


async def test_model_that_is_used_while_its_rest_waits_stays_up() -> None:
    """A due rest is not made if a request has woken the model in the meantime."""
    clocked = await Clocked(b=ModelSettings(idle_unload_s=10)).start()
    await clocked.coordinator.operations.sleep("b", 1)
    clocked.host.hold("wake", "b")
    waking = asyncio.create_task(clocked.coordinator.operations.wake("b"))
    await settled()
    resting = asyncio.create_task(clocked.after(10))
    await settled()

    clocked.host.release("wake", "b")
    await waking

    assert "parked" == (await resting)["b"]


async def test_idle_models_are_looked_at_until_the_server_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The idle check runs until the server ends, even if a model cannot be put to sleep."""
    monkeypatch.setattr("vllm_hotswap.switching.idle.IDLE_CHECK_S", 0)
    clocked = await Clocked(b=ModelSettings(idle_sleep_s=10)).start()
    clocked.now += 10
    clocked.host.fail_next("sleep", "b")
    resting = asyncio.create_task(clocked.coordinator.rest_idle_models())

    while clocked.coordinator.registry.resolve("b").residency.value != "asleep":  # noqa: ASYNC110
        await asyncio.sleep(0)

    resting.cancel()
    assert [("sleep", "b")] * 2 == clocked.host.operations[-2:]


async def test_nobody_is_looked_at_where_no_model_ever_rests() -> None:
    """Without a policy for any model, there is no idle check."""
    clocked = await Clocked().start()

    await asyncio.wait_for(clocked.coordinator.rest_idle_models(), 1)
