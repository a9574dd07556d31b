"""Operations on one model: what they do, what they refuse, and one at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.conftest import MakeServer
from tests.helpers.support import Server
from tests.residency.models import ALIASES, MIB, code, request_of, sized
from vllm_hotswap.errors import HotswapError
from vllm_hotswap.events import PinChanged
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.testing.fake_settings import FakeSettings


async def test_load_brings_a_model_up_beside_the_active_one(server: Server) -> None:
    """A load brings a model up, parked beside the active one; a switch then moves the pointer."""
    body = (await server.operate("mistral", "load")).json()

    assert ("cold", "parked", True) == (body["before"], body["residency"], body["changed"])
    assert "active" == server.residency("llama")
    server.host.operations.clear()
    await server.switch("mistral")
    assert [("activate", "mistral")] == server.host.operations


async def test_load_moves_others_but_never_the_active_one(make_server: MakeServer) -> None:
    """A load may put parked models to sleep; the active model and its requests are untouched."""
    server = await make_server(settings=sized(), budget=Usage(10 * MIB))
    stream = await server.start_stream("llama")

    body = (await server.operate("mistral", "load")).json()

    assert ["qwen"] == [move["model"] for move in body["evicted"]]
    assert {"llama": "active", "qwen": "asleep", "mistral": "parked"} == server.residencies
    assert (await stream.finish()).is_whole


@pytest.mark.parametrize(
    ("name", "body", "steps", "residency"),
    [
        ("load", {}, ["load"], "parked"),
        ("sleep", {"level": 1}, ["load", "sleep"], "asleep"),
        ("sleep", {"level": 2}, ["load", "sleep"], "discarded"),
        ("unload", {}, ["load", "unload"], "cold"),
    ],
)
async def test_operations_are_idempotent(
    server: Server, name: str, body: dict[str, Any], steps: list[str], residency: str
) -> None:
    """A repeated operation does nothing, and the response says so."""
    await server.operate("mistral", "load")

    first = (await server.operate("mistral", name, **body)).json()
    again = await server.operate("mistral", name, **body)

    assert residency == first["residency"] == server.residency("mistral")
    assert (200, False) == (again.status_code, again.json()["changed"])
    assert steps == [verb for verb, alias in server.host.operations if alias == "mistral"]


async def test_wake_is_idempotent(server: Server) -> None:
    """A wake leaves a model that is up as it is, the active one included."""
    await server.operate("qwen", "sleep")

    bodies = [(await server.operate("qwen", "wake")).json() for _ in range(2)]

    assert [("asleep", True), ("parked", False)] == [(b["before"], b["changed"]) for b in bodies]
    assert not (await server.operate("llama", "wake")).json()["changed"]
    assert [("sleep", "qwen"), ("wake", "qwen")] == server.host.operations


async def test_sleeping_model_may_go_further_down_but_not_up_by_sleeping(server: Server) -> None:
    """Level 2 after level 1 drops the weights; level 1 after level 2 changes nothing."""
    for level, residency in ((1, "asleep"), (2, "discarded"), (1, "discarded")):
        await server.operate("qwen", "sleep", level=level)
        assert residency == server.residency("qwen")


async def test_wake_of_a_cold_model_is_refused(server: Server) -> None:
    """A wake of a cold model is refused, and the message says what to do."""
    response = await server.operate("mistral", "wake")

    assert 400 == response.status_code
    assert "is cold, so it cannot be woken; load it instead" in response.text


async def test_level_that_the_device_does_not_know_is_refused(make_server: MakeServer) -> None:
    """A sleep level that the device does not support is refused, naming the supported ones."""
    one = FakeSettings(levels=frozenset([1]))
    none = FakeSettings(levels=frozenset())
    server = await make_server(load=ALIASES, settings={"qwen": one, "mistral": none})

    first = (await server.operate("qwen", "sleep", level=2)).json()["error"]
    second = (await server.operate("mistral", "sleep", level=1)).json()["error"]

    assert ("level", "level") == (first["param"], second["param"])
    assert "has no sleep level 2 on this platform; levels: 1" in first["message"]
    assert "levels: none (it can be unloaded)" in second["message"]


@pytest.mark.parametrize(("name", "body"), [("sleep", {}), ("sleep", {"level": 2}), ("unload", {})])
async def test_active_model_is_not_taken_down(
    server: Server, name: str, body: dict[str, Any]
) -> None:
    """Taking the active model down gets 409, and the message says what to do first."""
    response = await server.operate("llama", name, **body)

    error = response.json()["error"]
    assert (409, "model_in_use") == (response.status_code, error["code"])
    assert "it is active; switch to another model first" in error["message"]
    assert [] == server.host.operations


@pytest.mark.parametrize(("name", "body"), [("sleep", {}), ("unload", {})])
async def test_pinned_model_is_not_taken_down(
    server: Server, name: str, body: dict[str, Any]
) -> None:
    """A pinned model is not taken down until it is unpinned, as the message says."""
    await server.operate("qwen", "pin")
    response = await server.operate("qwen", name, **body)

    assert (409, "model_in_use") == (response.status_code, response.json()["error"]["code"])
    assert (
        'POST /admin/models/qwen/pin {"pinned": false} first' in response.json()["error"]["message"]
    )

    await server.operate("qwen", "pin", pinned=False)
    assert 200 == (await server.operate("qwen", name, **body)).status_code


async def test_pin_is_told_of_once(server: Server) -> None:
    """A repeated pin changes nothing and makes no event; a model can be pinned anywhere."""
    for pinned in (True, True, False):
        await server.operate("mistral", "pin", pinned=pinned)

    assert [("mistral", True), ("mistral", False)] == [
        (event.model, event.pinned) for event in server.events.of(PinChanged)
    ]


async def test_requests_of_a_parked_model_keep_it_from_losing_its_weights(server: Server) -> None:
    """A parked model with requests may sleep, because they survive that, but keeps its weights."""
    with request_of(server, "qwen"):
        dropping = await code(server.operate("qwen", "sleep", level=2))
        unloading = await server.operate("qwen", "unload")
        sleeping = await server.operate("qwen", "sleep", level=1)

    assert (409, "model_in_use") == dropping
    assert "1 requests are in flight; retry later" in unloading.json()["error"]["message"]
    assert 200 == sleeping.status_code


async def test_operation_that_fails_is_told_and_changes_nothing(server: Server) -> None:
    """A failed operation reports an error and leaves the model where it was; a retry works."""
    server.host.fail_next("sleep", "qwen", HotswapError("worker is stuck"))

    response = await server.operate("qwen", "sleep")

    message = "sleep of model 'qwen' failed: worker is stuck; fix the cause and retry"
    assert (503, "load_failed") == (response.status_code, response.json()["error"]["code"])
    assert message == response.json()["error"]["message"]
    assert "parked" == server.residency("qwen")
    assert 200 == (await server.operate("qwen", "sleep")).status_code


async def test_dead_model_can_be_loaded_again(server: Server) -> None:
    """A dead model can be loaded again; until then the status gives the cause of death."""
    server.host.kill_engine("qwen", "RuntimeError: boom")
    status = (await server.get("/admin/status")).json()["models"]["qwen"]
    assert ("failed", "RuntimeError: boom") == (status["residency"], status["failed"])

    body = (await server.operate("qwen", "load")).json()

    assert ("cold", "parked") == (body["before"], body["residency"])
    assert None is (await server.get("/admin/status")).json()["models"]["qwen"]["failed"]


async def test_dead_host_takes_no_operation(server: Server) -> None:
    """While the host is dead, operations are refused for every model."""
    server.host.kill("the engine host was killed by signal 9")

    response = await server.operate("mistral", "load")

    assert 503 == response.status_code
    assert "killed by signal 9" in response.text


# --- one at a time --------------------------------------------------------------------------


async def test_operation_waits_for_the_switch_under_way(server: Server) -> None:
    """An operation waits for the switch under way; it is refused if its model is then active."""
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()
    sleeping, unloading = server.operate("qwen", "sleep"), server.operate("llama", "unload")
    await server.settled()
    assert [False, False] == [sleeping.done(), unloading.done()]

    server.host.release("activate", "qwen")

    assert (409, "model_in_use") == await code(sleeping)
    assert "cold" == (await unloading).json()["residency"]
    assert 200 == (await switch).status_code


async def test_load_that_waited_for_a_switch_keeps_the_model_that_is_active_then(
    make_server: MakeServer,
) -> None:
    """A load that waited for a switch keeps the model that is active after it, not before."""
    server = await make_server(settings=sized(), budget=Usage(10 * MIB))
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()
    loading = server.operate("mistral", "load")
    await server.settled()

    server.host.release("activate", "qwen")

    await switch
    assert ["llama"] == [move["model"] for move in (await loading).json()["evicted"]]
    assert {"llama": "asleep", "qwen": "active", "mistral": "parked"} == server.residencies
    assert "qwen" == (await server.ask(None)).json()["model"]


async def test_switch_waits_for_the_operation_under_way(server: Server) -> None:
    """A switch waits for the operation under way, then starts from wherever the target is."""
    server.host.hold("sleep", "qwen")
    sleeping = server.operate("qwen", "sleep")
    await server.settled()
    switch = server.switch("qwen")
    await server.settled()
    assert "validate" == server.coordinator.serving().phase
    assert "llama" == (await server.ask("llama")).json()["model"]

    server.host.release("sleep", "qwen")

    assert 200 == (await switch).status_code
    assert "asleep" == (await sleeping).json()["residency"]
    assert [("sleep", "qwen"), ("wake", "qwen"), ("activate", "qwen")] == server.host.operations


async def test_operations_are_made_one_after_the_other(server: Server) -> None:
    """Operations run one after the other: memory is only counted between two moves."""
    server.host.hold("sleep", "qwen")
    sleeping = server.operate("qwen", "sleep")
    await server.settled()
    loading = server.operate("mistral", "load")
    await server.settled()
    assert [("sleep", "qwen")] == server.host.operations

    server.host.release("sleep", "qwen")
    await asyncio.gather(sleeping, loading)

    assert [("sleep", "qwen"), ("load", "mistral")] == server.host.operations
