"""What cannot have room is refused before anything moves."""

from __future__ import annotations

import pytest

from tests.conftest import MakeServer
from tests.helpers.support import Server
from tests.residency.models import MIB, ONE_AND_A_HALF, sized
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.models.registry import ModelSettings


@pytest.mark.parametrize(
    ("budget", "pinned", "message"),
    [
        (3, (), "no room: 'llama' needs 4.0 MiB; the budget for models is 3.0 MiB; raise"),
        (
            7,
            ("qwen",),
            "no room: 'llama' needs 4.0 MiB; 'qwen' keeps 4.0 MiB (pinned); the budget for models",
        ),
    ],
)
async def test_configuration_that_can_never_fit_is_refused_at_the_start(
    budget: int, pinned: tuple[str, ...], message: str
) -> None:
    """A configuration that can never fit is refused before loading, models on demand included."""
    policies = {alias: ModelSettings(pinned=True) for alias in pinned}
    server = Server(
        load=("llama",), settings=sized(), budget=Usage(budget * MIB), model_settings=policies
    )

    with pytest.raises(ConfigError) as caught:
        await server.start()

    assert message in caught.value.message
    assert [] == server.host.operations
    await server.stop()


async def test_switch_that_can_never_have_room_is_refused_before_the_drain(
    make_server: MakeServer,
) -> None:
    """A switch that can never have room is refused before the drain; the source is undisturbed."""
    server = await make_server(load=("llama",), settings=sized(), budget=ONE_AND_A_HALF)
    await server.operate("llama", "pin")
    stream = await server.start_stream("llama")

    response = await server.switch("qwen", 0)

    message = response.json()["error"]["message"]
    assert (503, "switch_failed") == (response.status_code, response.json()["error"]["code"])
    assert "failed in phase validate: no room: 'qwen' needs 4.0 MiB; 'llama' keeps 4.0" in message
    assert "'llama' is still active" in message
    assert (await stream.finish()).is_whole


async def test_failed_model_is_planned_for_like_a_cold_one(server: Server) -> None:
    """A switch to a failed model loads it, like a cold one."""
    server.host.kill_engine("qwen", "RuntimeError: boom")

    response = await server.get("/admin/plan", params={"model": "qwen"})

    move = response.json()["bring_up"]
    assert ("cold", "parked") == (move["before"], move["after"])


async def test_load_that_only_the_active_model_could_make_room_for_is_refused(
    tight: Server,
) -> None:
    """A load that needs the active model's memory gets 409 with the arithmetic; a switch could."""
    response = await tight.operate("qwen", "load")

    error = response.json()["error"]
    assert (409, "no_room") == (response.status_code, error["code"])
    assert "'llama' keeps 4.0 MiB (active)" in error["message"]
    assert {"llama": "active", "qwen": "cold", "mistral": "cold"} == tight.residencies
