"""Kept responses: which frontend answers for them, and work that continues after a response."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.conftest import MakeServer
from tests.helpers.support import Server, Stream
from vllm_hotswap.access.keys import Keys, KeySource
from vllm_hotswap.access.rights import Group, Rights
from vllm_hotswap.access.roles import Access
from vllm_hotswap.api.responses import response_id_in_body
from vllm_hotswap.config.settings import LimitsConfig
from vllm_hotswap.testing.fake_settings import FakeSettings

RESPONSES = "/v1/responses"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """End a stream that has nothing more to send soon."""
    monkeypatch.setattr("vllm_hotswap.api.responses.STREAM_GRACE_S", 0.01)


def create(server: Server, **body: Any) -> Stream:
    return server.request("POST", RESPONSES, json.dumps({"input": "x", **body}).encode())


async def created(server: Server, **body: Any) -> dict[str, Any]:
    """Return the response as its creator gets it."""
    start = create(server, **body)
    answer = ""
    while not answer:
        answer = await start.next_event() or ""
    return dict(json.loads(answer))


async def begun(reader: Stream) -> dict[str, Any]:
    """Return the response as its first event has it."""
    event = ""
    while not event:
        event = await reader.next_event() or ""
    return dict(json.loads(event.split("data: ")[1])["response"])


def status(response: dict[str, Any]) -> tuple[str, str]:
    return response["model"], response["status"]


# --- ownership ------------------------------------------------------------------------------

TEAM = Group(Rights("team"), "rights.team", KeySource(Keys.of(["ann", "bob"], "team")))
KEYS = Access(user_keys=["eve", "eve-too"], admin_keys=["root"], groups=[TEAM])


async def ask(server: Server, key: str, method: str, path: str, **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    content = body or None
    return await server.call(method, path, json=content, headers=headers)


@pytest.mark.parametrize("stranger", ["eve", "root"])
async def test_response_is_there_for_its_group_of_keys_alone(
    make_server: MakeServer, stranger: str
) -> None:
    """Only its group of keys can read, continue or cancel a response; others cannot see it."""
    server = await make_server(access=KEYS)
    new = {"model": "llama", "input": "x"}
    mine = (await ask(server, "ann", "POST", RESPONSES, **new)).json()["id"]
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", f"{RESPONSES}/{mine}", {}),
        ("POST", f"{RESPONSES}/{mine}/cancel", {}),
        ("POST", RESPONSES, {**new, "previous_response_id": mine}),
    ]

    theirs = [await ask(server, "bob", *call[:2], **call[2]) for call in calls]
    refused = [await ask(server, stranger, *call[:2], **call[2]) for call in calls]
    unknown = await ask(server, stranger, "GET", f"{RESPONSES}/resp_x")

    assert [200, 200, 200] == [answer.status_code for answer in theirs]
    assert [404, 404, 404] == [answer.status_code for answer in refused]
    assert {"response_not_found"} == {answer.json()["error"]["code"] for answer in refused}
    assert unknown.text == refused[0].text.replace(mine, "resp_x")


async def test_keys_outside_of_groups_keep_their_responses_apart(make_server: MakeServer) -> None:
    server = await make_server(access=KEYS)
    answer = await ask(server, "eve", "POST", RESPONSES, model="llama", input="x")
    path = f"{RESPONSES}/{answer.json()['id']}"

    assert 200 == (await ask(server, "eve", "GET", path)).status_code
    assert 404 == (await ask(server, "eve-too", "GET", path)).status_code


async def test_nobody_overwrites_the_response_of_another(make_server: MakeServer) -> None:
    """A key may choose and reuse ids of its group's responses, but overwrites no other group's."""
    server = await make_server(access=KEYS)
    new = {"model": "llama", "input": "x", "request_id": "resp_mine"}
    answers = [await ask(server, key, "POST", RESPONSES, **new) for key in ("ann", "eve", "bob")]

    assert [200, 400, 200] == [answer.status_code for answer in answers]
    assert "request_id 'resp_mine' is in use" in answers[1].json()["error"]["message"]


async def test_oldest_responses_are_forgotten(make_server: MakeServer) -> None:
    """The oldest responses are forgotten, so that their number is limited."""
    server = await make_server(limits=LimitsConfig(kept_responses=2))
    ids = [(await created(server, model="llama"))["id"] for _ in range(4)]
    answers = [(await server.get(f"{RESPONSES}/{each}")).status_code for each in ids]

    assert [404, 404, 200, 200] == answers


async def test_response_that_is_not_kept_is_nobodys(make_server: MakeServer) -> None:
    """A refused request keeps no response, so its id stays free."""
    server = await make_server(access=KEYS)
    new = {"model": "llama", "input": "x", "request_id": "resp_x", "previous_response_id": "no"}
    refused = await ask(server, "ann", "POST", RESPONSES, **new)
    del new["previous_response_id"]
    answer = await ask(server, "eve", "POST", RESPONSES, **new)

    assert (404, 200) == (refused.status_code, answer.status_code)
    assert 1 == len(server.app.router.owners)


# --- which frontend keeps it ----------------------------------------------------------------


async def test_kept_response_is_given_whoever_is_active(server: Server) -> None:
    """A kept response is given by its own frontend, without a switch or a lease."""
    mine = await created(server, model="llama")
    await server.switch("qwen")
    other = await created(server, model="qwen")

    for response in (mine, other):
        again = (await server.get(f"{RESPONSES}/{response['id']}")).json()
        assert response == again
    assert "qwen" == server.coordinator.active


async def test_kept_response_outlives_the_weights_of_its_model(server: Server) -> None:
    """A kept response survives the unload of its model, because the frontend stays."""
    mine = await created(server, model="llama")
    await server.switch("qwen")
    await server.operate("llama", "unload")

    assert "cold" == server.residency("llama")
    assert mine == (await server.get(f"{RESPONSES}/{mine['id']}")).json()


@pytest.mark.parametrize(("method", "end"), [("GET", ""), ("POST", "/cancel")])
async def test_response_that_nobody_keeps_is_not_found(
    server: Server, method: str, end: str
) -> None:
    """An unknown response gets 404 in OpenAI's form; the message says when responses are kept."""
    answer = await server.request(method, f"{RESPONSES}/resp_nobody{end}", b"").finish()

    assert (404, "response_not_found") == (answer.status, answer.error["code"])
    assert "no model keeps a response with the id 'resp_nobody'" in answer.error["message"]
    assert "VLLM_ENABLE_RESPONSES_API_STORE=1" in answer.error["message"]


async def test_model_in_the_query_is_the_only_one_that_is_asked(server: Server) -> None:
    """If the query names a model only that one is asked: clients may choose equal ids on two."""
    mine = await created(server, model="llama")
    path = f"{RESPONSES}/{mine['id']}"

    assert 200 == (await server.get(path, params={"model": "llama"})).status_code
    other = await server.get(path, params={"model": "qwen"})
    assert 404 == other.status_code
    assert "model 'qwen' does not keep a response" in other.text


async def test_conversation_goes_on_with_the_model_that_keeps_it(server: Server) -> None:
    """A request that continues a response goes to that response's model, named or not."""
    mine = await created(server, model="llama")
    await server.switch("qwen")
    unnamed = await create(server, previous_response_id=mine["id"]).finish()
    await server.switch("llama")

    assert "model 'llama' is configured but not active" in unnamed.error["message"]
    for body in ({}, {"model": "llama"}):
        next_one = await created(server, previous_response_id=mine["id"], **body)
        assert ("llama", "completed") == status(next_one)


async def test_conversation_does_not_go_on_with_another_model(server: Server) -> None:
    """Continuing a response with another model gets 400; the message names the right model."""
    mine = await created(server, model="llama")
    await server.switch("qwen")

    answer = await create(server, model="qwen", previous_response_id=mine["id"]).finish()

    assert (400, "previous_response_id") == (answer.status, answer.error["param"])
    assert "belongs to model 'llama', but the request is to 'qwen'" in answer.error["message"]


@pytest.mark.parametrize("previous", ["resp_nobody", "", None, 7])
async def test_conversation_that_nobody_keeps_is_the_models_matter(
    server: Server, previous: object
) -> None:
    """If no model keeps the previous response, the model's own answer is passed on."""
    answer = await create(server, model="llama", previous_response_id=previous).finish()

    assert (200 if previous is None else 404) == answer.status


# --- work in the background -----------------------------------------------------------------


async def test_drain_waits_for_work_in_the_background(server: Server) -> None:
    """A drain waits for background work, although its response is complete: it was accepted."""
    server.host.hold("step", "llama")
    mine = await created(server, model="llama", background=True)
    assert ("llama", "queued") == status(mine)
    switch = server.switch("qwen", 60)
    await server.settled()
    assert not switch.done()
    assert 1 == server.in_flight["llama"]

    server.host.release("step", "llama")

    assert 0 == (await switch).json()["requests_cut"]
    assert 0 == server.in_flight["llama"]
    again = (await server.get(f"{RESPONSES}/{mine['id']}")).json()
    assert ("llama", "completed") == status(again)


async def test_work_in_the_background_that_is_cut_says_so(server: Server) -> None:
    """At the deadline, background work is aborted and its response has failed, with the reason."""
    server.host.hold("step", "llama")
    mine = await created(server, model="llama", background=True)

    switch = await server.switch("qwen", 0)

    assert 1 == switch.json()["requests_cut"]
    again = (await server.get(f"{RESPONSES}/{mine['id']}")).json()
    assert ("llama", "failed") == status(again)
    assert "still running 0 s after a switch to 'qwen'" in again["error"]["message"]
    assert 1 == server.host.engines["llama"].steps.aborted


async def test_death_of_the_host_ends_work_in_the_background(server: Server) -> None:
    """When the host dies background work fails, so no polling client waits for ever."""
    server.host.hold("step", "llama")
    mine = await created(server, model="llama", background=True)

    server.host.kill("the engine host was killed by signal 9")
    await server.settled()

    again = (await server.get(f"{RESPONSES}/{mine['id']}")).json()
    assert ("llama", "failed") == status(again)
    assert "killed by signal 9" in again["error"]["message"]


async def test_work_that_fails_by_itself_is_not_queued_for_ever(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Background work that fails reports no internals; its cause is logged, once."""
    server.host.hold("step", "llama")
    mine = await created(server, model="llama", background=True)
    engine = server.host.engines["llama"]

    def broken(*_: object) -> None:
        raise RuntimeError("no more tokens")

    monkeypatch.setattr(server.host, "check_stepped", broken)
    for _ in range(3):
        assert "queued" == (await server.get(f"{RESPONSES}/{mine['id']}")).json()["status"]
    server.host.release("step", "llama")
    await server.settled()

    again = (await server.get(f"{RESPONSES}/{mine['id']}")).json()
    assert ("llama", "failed") == status(again)
    assert "processing failed; see the server log" in again["error"]["message"]
    assert 1 == caplog.text.count("event=background_failed model=llama cause='no more tokens'")
    assert 0 == server.in_flight["llama"]
    assert 0 == engine.steps.served


async def test_work_in_the_background_can_be_cancelled_whoever_is_active(server: Server) -> None:
    """Background work is cancelled by its id alone, whatever is active, and frees its model."""
    server.host.hold("step", "llama")
    mine = await created(server, model="llama", background=True)

    cancelled = await server.post(f"{RESPONSES}/{mine['id']}/cancel")
    await server.settled()

    assert ("llama", "cancelled") == status(cancelled.json())
    assert ("llama", "cancelled") == status((await server.get(f"{RESPONSES}/{mine['id']}")).json())
    assert 0 == server.in_flight["llama"]


async def test_stream_in_the_background_goes_on_without_its_reader(server: Server) -> None:
    """A background stream continues without its reader, holds its model, and can be read later."""
    server.host.hold("step", "llama")
    reader = create(server, model="llama", background=True, stream=True, max_output_tokens=2)
    mine = await begun(reader)
    reader.disconnect()
    await server.settled()
    assert 1 == server.in_flight["llama"]
    switch = server.switch("qwen", 60)
    late = server.request("GET", f"{RESPONSES}/{mine['id']}", query_string=b"stream=true")

    server.host.release("step", "llama")

    assert 0 == (await switch).json()["requests_cut"]
    kinds = [event.split("\n")[0] for event in (await late.finish()).events]
    assert ["event: response.created", "event: response.completed"] == [kinds[0], kinds[-1]]
    assert 2 == kinds.count("event: response.output_text.delta")


async def test_streams_of_work_that_is_cut_end_with_an_error(server: Server) -> None:
    """When background work is aborted, all its streams end with an error event of the API."""
    server.host.hold("step", "llama")
    reader = create(server, model="llama", background=True, stream=True)
    mine = await begun(reader)
    follower = server.request("GET", f"{RESPONSES}/{mine['id']}", query_string=b"stream=true")
    reading = asyncio.create_task(reader.finish()), asyncio.create_task(follower.finish())
    await server.settled()

    await server.switch("qwen", 0)

    ends = [json.loads((await answer).events[-1].split("data: ")[1]) for answer in reading]
    assert ["error", "error"] == [end["type"] for end in ends]
    assert ["drain_timeout", "response_ended"] == [end["code"] for end in ends]
    assert "failed" == (await server.get(f"{RESPONSES}/{mine['id']}")).json()["status"]


async def test_stream_of_work_that_is_cancelled_does_not_hold_its_model(server: Server) -> None:
    """Cancelled work ends its stream: vLLM would keep it open, and a switch would wait for it."""
    server.host.hold("step", "llama")
    reader = create(server, model="llama", background=True, stream=True)
    mine = await begun(reader)
    reading = asyncio.create_task(reader.finish())
    await server.settled()

    await server.post(f"{RESPONSES}/{mine['id']}/cancel")

    assert "response_ended" in (await reading).events[-1]
    await server.settled()
    assert 0 == server.in_flight["llama"]


async def test_slow_reader_of_work_that_has_ended_gets_all_that_there_is(server: Server) -> None:
    """A slow reader gets all of ended work: only a stream with nothing left to send is ended."""
    server.host.hold("step", "llama")
    reader = create(server, model="llama", background=True, stream=True, max_output_tokens=5)
    await begun(reader)
    server.host.release("step", "llama")
    await asyncio.sleep(0.05)  # several times the grace

    answer = await reader.finish()

    assert answer.complete
    assert answer.events[-1].startswith("event: response.completed")


@pytest.mark.parametrize(
    ("body", "is_event_stream", "expected"),
    [
        (b'{"id": "resp_1", "output": []}', False, "resp_1"),
        (b'{"error": {"id": "x"}}', False, None),
        (b'event: response.created\ndata: {"response": {"id": "resp_1"}}\n\n', True, "resp_1"),
        (b'data: {"error": "x"}\n\n', True, None),
        (b'data: {"response": 1}\n\n', True, None),
        (b"data: [DONE]\n\n", True, None),
        (b": keep-alive\n\n", True, None),
    ],
)
def test_answer_names_its_response_in_its_first_piece(
    body: bytes, is_event_stream: bool, expected: str | None
) -> None:
    """A response's id is found in its first piece, whole or an event; an error has none."""
    assert expected == response_id_in_body(body, is_event_stream)


async def test_responses_of_a_model_without_that_api_are_not_looked_for(
    make_server: MakeServer,
) -> None:
    """Models without the Responses API, as embedding models, are not asked for responses."""
    embed = FakeSettings(tasks=("embed",))
    server = await make_server(
        aliases=("embed",), load=("embed",), default="embed", settings={"embed": embed}
    )
    answer = await create(server, model="embed").finish()

    assert (404, "wrong_task") == (answer.status, answer.error["code"])
    assert 404 == (await server.get(f"{RESPONSES}/resp_1")).status_code
