"""The routes that move models, plan, and report events: their requests and responses."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.conftest import MakeServer
from tests.helpers.support import Server, Stream
from vllm_hotswap.access.roles import Access
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.testing.fake_settings import FakeSettings

MIB = 1 << 20
ADMIN = {"authorization": "Bearer admin"}
USER = {"authorization": "Bearer user"}
OPERATIONS = ("load", "unload", "sleep", "wake", "prefetch", "pin")


def size(mib: int) -> dict[str, int]:
    return {"device_bytes": mib * MIB, "host_bytes": 0}


# --- operations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alias", "name", "body", "before", "after"),
    [
        ("mistral", "load", {}, "cold", "parked"),
        ("qwen", "unload", {}, "parked", "cold"),
        ("qwen", "sleep", {}, "parked", "asleep"),
        ("qwen", "sleep", {"level": 1}, "parked", "asleep"),
        ("qwen", "sleep", {"level": 2}, "parked", "discarded"),
        ("qwen", "wake", {}, "parked", "parked"),
        ("llama", "load", {}, "active", "active"),
    ],
)
async def test_move_answers_with_what_it_did(
    server: Server, alias: str, name: str, body: dict[str, Any], before: str, after: str
) -> None:
    """A move reports where the model was and is, how long it took, and which models made room."""
    response = await server.operate(alias, name, **body)

    answer = response.json()
    duration_ms = answer.pop("duration_ms")
    assert 200 == response.status_code
    assert duration_ms >= 0
    assert {
        "operation": name,
        "model": alias,
        "changed": before != after,
        "before": before,
        "residency": after,
        "evicted": [],
    } == answer


async def test_load_answers_with_who_made_room(make_server: MakeServer) -> None:
    """A load lists the models that made room, with what each freed and costs to bring back."""
    server = await make_server(budget=Usage(5 * MIB))

    answer = (await server.operate("mistral", "load")).json()

    assert [
        {
            "model": "qwen",
            "before": "parked",
            "after": "asleep",
            "frees": size(1),
            "cost_s": 0.1,
        }
    ] == answer["evicted"]


async def test_prefetch_answers_with_what_was_read(server: Server) -> None:
    """A prefetch reports the bytes read; the model stays where it is."""
    answer = (await server.operate("mistral", "prefetch")).json()

    assert ("prefetch", "cold", False, MIB) == tuple(
        answer[key] for key in ("operation", "residency", "changed", "prefetched_bytes")
    )


async def test_cancelled_prefetch_says_so(server: Server) -> None:
    """A cancelled prefetch reports the cancellation and nothing else."""
    answer = (await server.operate("mistral", "prefetch", cancel=True)).json()

    assert {"operation": "prefetch", "model": "mistral", "cancelled": True} == answer


@pytest.mark.parametrize(
    ("body", "pinned"), [({}, True), ({"pinned": True}, True), ({"pinned": False}, False)]
)
async def test_pin_answers_with_what_holds_now(
    server: Server, body: dict[str, bool], pinned: bool
) -> None:
    """A pin reports the resulting state; without a body it pins, and status shows it."""
    answer = (await server.operate("qwen", "pin", **body)).json()

    assert {"operation": "pin", "model": "qwen", "pinned": pinned} == answer
    status = (await server.get("/admin/status")).json()
    assert pinned == status["models"]["qwen"]["pinned"]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("content", [b"", b"{}", b" {} "])
async def test_body_may_be_left_out(server: Server, name: str, content: bytes) -> None:
    """Every operation has defaults, so its body can be left out."""
    response = await server.post(f"/admin/models/qwen/{name}", content=content)

    assert (200, name) == (response.status_code, response.json()["operation"])


@pytest.mark.parametrize(
    ("name", "content", "param", "message"),
    [
        ("load", b"{", None, "the body is not valid JSON: EOF"),
        ("load", b"[]", None, "the body must be a JSON object; known"),
        ("load", b"null", None, "the body must be a JSON object; known"),
        (
            "load",
            b'{"level": 1}',
            "level",
            "level is unknown; known fields: none",
        ),
        ("unload", b'{"x": 1}', "x", "x is unknown; known fields: none"),
        ("wake", b'{"x": 1}', "x", "x is unknown; known fields: none"),
        ("sleep", b'{"level": 0}', "level", "level must be at least 1"),
        ("sleep", b'{"level": 3}', "level", "level must be at most 2"),
        ("sleep", b'{"level": "1"}', "level", "level must be a whole number"),
        ("sleep", b'{"level": 1.0}', "level", "level must be a whole number"),
        ("sleep", b'{"level": true}', "level", "level must be a whole number"),
        ("sleep", b'{"level": null}', "level", "level must be a whole number"),
        (
            "sleep",
            b'{"levle": 1}',
            "levle",
            "levle is unknown; known fields: level",
        ),
        ("pin", b'{"pinned": 1}', "pinned", "pinned must be true or false; known"),
        ("pin", b'{"pinned": "yes"}', "pinned", "pinned must be true or false; known"),
        ("prefetch", b'{"cancel": 1}', "cancel", "cancel must be true or false; known"),
    ],
)
async def test_body_that_is_wrong_is_refused(
    server: Server, name: str, content: bytes, param: str | None, message: str
) -> None:
    """A wrong body gets 400 with `param` naming the field, and nothing happens."""
    response = await server.post(f"/admin/models/qwen/{name}", content=content)

    error = response.json()["error"]
    assert (400, "invalid_request_error", "invalid_request", param) == (
        response.status_code,
        error["type"],
        error["code"],
        error["param"],
    )
    assert error["message"].startswith(message)
    assert [] == server.host.operations


@pytest.mark.parametrize(
    ("alias", "name", "status", "kind", "error"),
    [
        ("gpt", "load", 404, "invalid_request_error", "model_not_found"),
        ("gpt", "pin", 404, "invalid_request_error", "model_not_found"),
        ("llama", "sleep", 409, "conflict_error", "model_in_use"),
        ("mistral", "wake", 400, "invalid_request_error", "invalid_request"),
        ("mistral", "load", 409, "conflict_error", "no_room"),
    ],
)
async def test_refusals_are_openai_errors(
    make_server: MakeServer, alias: str, name: str, status: int, kind: str, error: str
) -> None:
    """Refused operations are OpenAI errors with the four fields that clients know."""
    server = await make_server(load=("llama",), budget=Usage(3 * MIB))

    response = await server.operate(alias, name)

    body = response.json()["error"]
    assert (status, kind, error) == (response.status_code, body["type"], body["code"])
    assert {"message", "type", "param", "code"} == set(body)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/admin/models/qwen/eat"),
        ("POST", "/admin/models/qwen"),
        ("POST", "/admin/models/load"),
        ("POST", "/admin/models//load"),
        ("POST", "/admin/models/"),
    ],
)
async def test_anything_else_is_no_operation(server: Server, method: str, path: str) -> None:
    """An unknown operation gets 404 with the code of an unknown route."""
    answer = await server.request(method, path, b"").finish()

    assert (404, "unknown_route") == (answer.status, answer.error["code"])
    assert [] == server.host.operations


@pytest.mark.parametrize("alias", ["org/model", "a/b/c", "load", "x/load", "q?v=1", "a#b", "ä b"])
async def test_alias_may_have_any_characters(make_server: MakeServer, alias: str) -> None:
    """An alias may contain slashes, names of operations, and characters special in addresses."""
    server = await make_server(aliases=("llama", alias), load=("llama",))

    answer = await server.request("POST", f"/admin/models/{alias}/load", b"").finish()

    assert (200, alias) == (answer.status, json.loads(answer.body)["model"])
    assert "parked" == server.residency(alias)


@pytest.mark.parametrize(
    ("path", "root"), [("/admin/models/qwen/sleep/", ""), ("/api/admin/models/qwen/sleep", "/api")]
)
async def test_paths_may_end_in_a_slash_or_begin_with_a_proxys_prefix(
    server: Server, path: str, root: str
) -> None:
    """Paths may end in a slash or begin with a proxy's prefix, as everywhere else."""
    assert 200 == (await server.request("POST", path, b"", root_path=root).finish()).status
    assert "asleep" == server.residency("qwen")


# --- access ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("access", "headers", "status"),
    [
        (Access(), {}, 403),
        (Access(dev_mode=True), {}, 200),
        (Access(user_keys=("user",)), {}, 401),
        (Access(user_keys=("user",), admin_keys=("admin",)), USER, 403),
        (Access(user_keys=("user",), admin_keys=("admin",)), ADMIN, 200),
    ],
)
async def test_operations_need_an_admin_key_or_dev_mode(
    make_server: MakeServer, access: Access, headers: dict[str, str], status: int, name: str
) -> None:
    """Operations need an admin key or dev mode; a user key moves nothing."""
    server = await make_server(access=access)

    response = await server.post(f"/admin/models/qwen/{name}", headers=headers)

    assert status == response.status_code
    pinned = server.coordinator.registry.resolve("qwen").pinned
    assert status == 200 or ("parked", False, []) == (
        server.residency("qwen"),
        pinned,
        server.host.operations,
    )


@pytest.mark.parametrize(("headers", "status"), [({}, 401), (USER, 200), (ADMIN, 200)])
async def test_plan_needs_a_user_key(
    make_server: MakeServer, headers: dict[str, str], status: int
) -> None:
    """A plan needs only a user key, because it changes nothing."""
    server = await make_server(access=Access(user_keys=("user",), admin_keys=("admin",)))

    response = await server.get("/admin/plan", params={"model": "qwen"}, headers=headers)

    assert status == response.status_code


# --- the plan -------------------------------------------------------------------------------


async def test_plan_says_what_a_switch_would_do(make_server: MakeServer) -> None:
    """A plan lists moves, their costs, and memory at each moment; it changes nothing."""
    server = await make_server(load=("llama",), budget=Usage(3 * MIB))

    response = await server.get("/admin/plan", params={"model": "mistral"})

    answer = response.json()
    assert answer["cost_s"] == answer["bring_up"].pop("cost_s") >= 1
    assert {
        "model": "mistral",
        "active": "llama",
        "evict": [
            {
                "model": "llama",
                "before": "active",
                "after": "asleep",
                "frees": size(1),
                "cost_s": 0.1,
            }
        ],
        "give_up_wake": [],
        "bring_up": {"model": "mistral", "before": "cold", "after": "parked", "frees": size(-2)},
        "cost_s": answer["cost_s"],
        "memory": {
            "budget": size(3),
            "before": size(2),
            "peak": size(3),
            "after": size(3),
        },
    } == answer
    assert [] == server.host.operations
    assert {"llama": "active", "qwen": "cold", "mistral": "cold"} == server.residencies


async def test_plan_is_what_the_switch_then_does(make_server: MakeServer) -> None:
    """The switch then evicts what its plan listed, although the source has running requests."""
    server = await make_server(
        load=("llama",), budget=Usage(2 * MIB), settings={"llama": FakeSettings()}
    )
    stream = await server.start_stream("llama")

    planned = (await server.get("/admin/plan", params={"model": "qwen"})).json()["evict"]
    switch = server.switch("qwen")
    await stream.finish()

    assert planned == (await switch).json()["evicted"]
    assert ["discarded"] == [move["after"] for move in planned]


@pytest.mark.parametrize(("alias", "cost_s"), [("llama", 0), ("qwen", 0)])
async def test_plan_for_a_model_that_is_up_is_empty(
    server: Server, alias: str, cost_s: float
) -> None:
    """A plan for a model that is up is empty, because there is nothing to bring up."""
    answer = (await server.get("/admin/plan", params={"model": alias})).json()

    assert ([], None, cost_s) == (answer["evict"], answer["bring_up"], answer["cost_s"])


async def test_cost_of_a_plan_is_what_was_measured(make_server: MakeServer) -> None:
    """A plan's cost is the measured one: after a load, the next is expected to take as long."""
    server = await make_server(load=("llama",), settings={"qwen": FakeSettings(load_s=0.02)})
    await server.operate("qwen", "load")
    await server.operate("qwen", "unload")

    cost_s = (await server.get("/admin/plan", params={"model": "qwen"})).json()["cost_s"]

    assert 0.02 <= cost_s < 0.9


@pytest.mark.parametrize(
    ("query", "status", "code", "param"),
    [
        ("", 400, "invalid_request", "model"),
        ("?model=", 400, "invalid_request", "model"),
        ("?model=gpt", 404, "model_not_found", "model"),
        ("?model=qwen", 409, "no_room", None),
    ],
)
async def test_plan_that_cannot_be_made_says_why(
    make_server: MakeServer, query: str, status: int, code: str, param: str | None
) -> None:
    """A plan that cannot be made gives the reason, with the arithmetic if there is no room."""
    server = await make_server(load=("llama",), budget=Usage(3 * MIB))
    await server.operate("llama", "pin")

    response = await server.get(f"/admin/plan{query}")

    error = response.json()["error"]
    assert (status, code, param) == (response.status_code, error["code"], error["param"])


# --- events ---------------------------------------------------------------------------------


async def next_event(stream: Stream) -> tuple[str, dict[str, Any]]:
    message = await stream.next_event()
    assert message is not None
    event, data = message.rstrip().split("\n")
    return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def events_until(stream: Stream, last: str) -> list[tuple[str, dict[str, Any]]]:
    events = [await next_event(stream)]
    while last != events[-1][0]:
        events.append(await next_event(stream))
    return events


async def test_events_begin_with_the_status(server: Server) -> None:
    """Events begin with the same object that `/admin/status` answers."""
    stream = server.request("GET", "/admin/events")
    name, snapshot = await next_event(stream)

    status = (await server.get("/admin/status")).json()

    assert "snapshot" == name
    assert status.keys() == snapshot.keys()
    assert ("llama", 1, "parked") == (
        snapshot["active"],
        snapshot["epoch"],
        snapshot["models"]["qwen"]["residency"],
    )
    stream.disconnect()


async def test_events_tell_the_story_of_a_switch(make_server: MakeServer) -> None:
    """A switch's phases, residencies and moves are events with its id, in order of time."""
    server = await make_server(load=("llama",), budget=Usage(3 * MIB))
    stream = server.request("GET", "/admin/events")
    await next_event(stream)

    result = (await server.switch("qwen")).json()
    events = await events_until(stream, "switch_ended")

    assert [
        ("validate", "started"),
        ("validate", "finished"),
        ("drain", "started"),
        ("drain", "finished"),
        ("make_room", "started"),
        ("make_room", "finished"),
        ("bring_up", "started"),
        ("bring_up", "finished"),
        ("activate", "started"),
        ("activate", "finished"),
        ("verify", "started"),
        ("verify", "finished"),
    ] == [(data["phase"], data["status"]) for name, data in events if name == "phase_changed"]
    assert [
        ("llama", "active", "parked"),
        ("llama", "parked", "asleep"),
        ("qwen", "cold", "loading"),
        ("qwen", "loading", "parked"),
        ("qwen", "parked", "active"),
    ] == [
        (data["model"], data["before"], data["after"])
        for name, data in events
        if name == "residency_changed"
    ]
    assert ["llama"] == [data["model"] for name, data in events if name == "model_moved"]
    assert "load_progress" in {name for name, _ in events}
    assert {result["operation_id"]} == {
        data["operation_id"] for name, data in events if name in ("phase_changed", "switch_ended")
    }
    stream.disconnect()


async def test_events_tell_of_operations(server: Server) -> None:
    """Moves and pins are events that name the model."""
    stream = server.request("GET", "/admin/events")
    await next_event(stream)

    await server.operate("qwen", "sleep")
    await server.operate("qwen", "pin")
    events = await events_until(stream, "pin_changed")

    assert ["residency_changed", "model_moved", "pin_changed"] == [name for name, _ in events]
    assert events[1][1]["duration_s"] >= 0
    assert {"epoch": 1, "model": "qwen", "pinned": True} == events[2][1]
    stream.disconnect()


async def test_events_are_a_stream_of_server_sent_events(server: Server) -> None:
    """Events are server-sent events, and a client that leaves is forgotten."""
    stream = server.request("GET", "/admin/events")
    await next_event(stream)
    assert "<EventFeed subscribers=1>" == repr(server.app.feed)

    stream.disconnect()
    answer = await stream.finish()

    assert 200 == answer.status
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "<EventFeed subscribers=0>" == repr(server.app.feed)


async def test_events_end_with_the_server(server: Server) -> None:
    """When the server ends, event streams end; a later call gets a short one."""
    stream = server.request("GET", "/admin/events")
    await next_event(stream)

    server.app.feed.close()

    assert (await asyncio.wait_for(stream.finish(), 1)).complete
    late = await asyncio.wait_for(server.get("/admin/events"), 1)
    assert late.text.startswith("event: snapshot\n")


@pytest.mark.parametrize(
    ("headers", "status"), [([], 401), ([(b"authorization", b"Bearer user")], 200)]
)
async def test_events_need_a_user_key(
    make_server: MakeServer, headers: list[tuple[bytes, bytes]], status: int
) -> None:
    """Events need a user key, because they reveal as much as the status."""
    server = await make_server(access=Access(user_keys=("user",)))
    server.app.feed.close()

    answer = await server.request("GET", "/admin/events", headers=headers).finish()

    assert status == answer.status
