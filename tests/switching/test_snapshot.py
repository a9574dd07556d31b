"""The server as one frozen value."""

from __future__ import annotations

import dataclasses

import pytest

from tests.conftest import MakeServer
from tests.helpers.support import Server
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.states import Residency, ServerState

MODEL_BYTES = 2 << 20


async def test_a_snapshot_tells_what_is_served(server: Server) -> None:
    """A snapshot has the state, the active model, the epoch, and every model in order."""
    seen = server.coordinator.snapshot()

    assert (ServerState.SERVING, "llama", 1, True) == (
        seen.serving.state,
        seen.serving.active,
        seen.serving.epoch,
        seen.serving.is_ready,
    )
    assert [
        ("llama", Residency.ACTIVE, True),
        ("qwen", Residency.PARKED, False),
        ("mistral", Residency.COLD, False),
    ] == [(model.alias, model.residency, model.is_active) for model in seen.models]


async def test_a_snapshot_tells_of_the_switch_under_way(server: Server) -> None:
    """During a switch, a snapshot has its target, its phase, and who runs and waits."""
    stream = await server.start_stream("llama")
    switch = server.switch("qwen")
    await server.settled()
    held = server.ask("qwen")
    await server.settled()

    seen = server.coordinator.snapshot()
    llama, qwen, _ = seen.models

    assert ("drain", "qwen") == (seen.serving.phase, seen.serving.target)
    assert (1, 1, 1) == (llama.in_flight, qwen.waiting, seen.waiting)
    await stream.finish()
    await switch
    await held


async def test_a_snapshot_stays_what_it_was(server: Server) -> None:
    """What happens afterwards changes nothing in a snapshot, and nobody can."""
    before = server.coordinator.snapshot()
    await server.switch("qwen")
    await server.post("/admin/models/llama/unload")
    after = server.coordinator.snapshot()

    assert ("llama", 1, 0) == (before.serving.active, before.serving.epoch, before.switches)
    assert ("qwen", 2, 1) == (after.serving.active, after.serving.epoch, after.switches)
    assert Residency.ACTIVE is before.models[0].residency
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.switches = 7  # type: ignore[misc]


async def test_the_parts_of_a_snapshot_sum_up(make_server: MakeServer) -> None:
    """What models hold is, together, what is used, as the planner counts it."""
    server = await make_server(budget=Usage(3 * MODEL_BYTES, 3 * MODEL_BYTES))
    await server.post("/admin/models/qwen/sleep", json={"level": 1})
    seen = server.coordinator.snapshot()

    assert server.coordinator.ladder.plans.used == seen.memory.used
    assert seen.memory.used.device == sum(model.held.device for model in seen.models)
    assert server.coordinator.ladder.plans.budget == seen.memory.budget


async def test_a_snapshot_counts_job_leases_by_model(server: Server) -> None:
    """A snapshot has the job leases, and how many of them each model has."""
    await server.post("/admin/leases", json={"model": "llama", "owner": "o", "ttl": 60})
    await server.post("/admin/leases", json={"model": "llama", "owner": "p", "ttl": 60})

    seen = server.coordinator.snapshot()

    assert ["o", "p"] == [lease.owner for lease in seen.job_leases]
    assert [2, 0, 0] == [model.job_leases for model in seen.models]


async def test_a_failed_engine_is_in_the_snapshot(server: Server) -> None:
    """A model whose engine has died has its cause in the snapshot, and holds nothing."""
    server.host.kill_engine("qwen")
    await server.settled()

    model = server.coordinator.snapshot().models[1]

    assert Residency.FAILED is model.residency
    assert model.failure
    assert Usage() == model.held
