"""WebSockets: their model, their lease, and how they are refused or aborted."""

from __future__ import annotations

import json

import pytest
import websockets

from tests.conftest import MakeServer
from tests.helpers.listening import listening
from tests.helpers.support import Server
from vllm_hotswap.testing.fake_settings import FakeSettings

REALTIME = "/v1/realtime"
SPEECH = FakeSettings(tasks=("realtime",))


@pytest.fixture
async def speech(make_server: MakeServer) -> Server:
    """A server: ear is active, ear2 is parked, llama has no websockets, late is cold."""
    return await make_server(
        aliases=("ear", "ear2", "llama", "late"),
        load=("ear", "ear2", "llama"),
        default="ear",
        settings={"ear": SPEECH, "ear2": SPEECH, "late": SPEECH},
    )


async def test_websocket_goes_to_the_model_of_its_query(speech: Server) -> None:
    """A WebSocket goes to the model of its query, and holds it while it is open."""
    connection = speech.websocket(REALTIME, "model=ear")
    await speech.settled()
    assert 1 == speech.in_flight["ear"]

    connection.send("two words")
    await speech.settled()
    connection.leave()
    await connection.task

    deltas = [event["delta"] for event in connection.texts if "delta" in event]
    assert ["I", "am"] == deltas
    assert 0 == speech.in_flight["ear"]


async def test_websocket_without_a_model_goes_to_the_active_one(speech: Server) -> None:
    """A WebSocket without a model goes to the active one, as a request does."""
    connection = speech.websocket(REALTIME)
    await speech.settled()

    assert {"ear": 1, "ear2": 0, "llama": 0, "late": 0} == speech.in_flight
    assert ["accept", "send"] == connection.types


async def test_held_websocket_hears_its_client_from_the_beginning(speech: Server) -> None:
    """A held WebSocket loses nothing: what the client sent reaches the application in order."""
    speech.host.hold("activate", "ear2")
    switch = speech.switch("ear2")
    await speech.settled()
    connection = speech.websocket(REALTIME, "model=ear2")
    connection.send("one")
    await speech.settled()
    assert [] == connection.received

    speech.host.release("activate", "ear2")
    await switch
    await speech.settled()

    kinds = [event["type"] for event in connection.texts]
    assert ["session.created", "transcription.delta", "transcription.done"] == kinds


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("model=ear2", (404, "model_not_active")),
        ("model=late", (404, "model_not_active")),
        ("model=llama", (404, "wrong_task")),
        ("model=gpt", (404, "model_not_found")),
    ],
)
async def test_websocket_that_cannot_be_served_is_refused_with_an_error(
    speech: Server, query: str, expected: tuple[int, str]
) -> None:
    """A refused WebSocket gets an HTTP response with OpenAI's object, not a handshake."""
    connection = speech.websocket(REALTIME, query)
    await connection.task

    status, error = connection.denial
    assert expected == (status, error["code"])


async def test_websocket_of_an_unknown_path_is_refused_with_an_error(speech: Server) -> None:
    """An unknown path gets an error response, not the framework's silent 403."""
    connection = speech.websocket("/v1/nowhere")
    await connection.task

    status, error = connection.denial
    assert (404, "unknown_route") == (status, error["code"])
    assert "WEBSOCKET /v1/nowhere" in error["message"]


async def test_websocket_is_closed_with_the_reason_where_http_is_impossible(
    speech: Server,
) -> None:
    """Without HTTP responses a WebSocket is closed with 1008 and the reason, cut to one frame."""
    connection = speech.websocket(REALTIME, "model=ear2", can_deny=False)
    await connection.task

    (close,) = connection.received
    assert ("websocket.close", 1008) == (close["type"], close["code"])
    assert "model 'ear2' is configured but not active" in close["reason"]
    assert len(close["reason"].encode()) <= 123


async def test_websocket_that_is_open_is_cut_at_the_deadline_of_a_drain(speech: Server) -> None:
    """At a drain's deadline a WebSocket is closed with 1013 and the reason, and is counted."""
    connection = speech.websocket(REALTIME, "model=ear")
    await speech.settled()

    switch = await speech.switch("ear2", 0)
    await connection.task

    close = connection.received[-1]
    assert ("websocket.close", 1013) == (close["type"], close["code"])
    assert close["reason"].startswith("the request to 'ear' was aborted: it was still running 0 s")
    assert 1 == switch.json()["requests_cut"]
    assert 0 == speech.in_flight["ear"]


async def test_websocket_whose_client_leaves_lets_a_drain_end(speech: Server) -> None:
    """A drain waits for an open WebSocket, but not for one whose client has left."""
    connection = speech.websocket(REALTIME, "model=ear")
    await speech.settled()
    switch = speech.switch("ear2", 60)
    await speech.settled()
    assert not switch.done()

    connection.leave()

    assert 0 == (await switch).json()["requests_cut"]


# --- through a real listener ----------------------------------------------------------------


async def test_client_talks_through_a_real_connection(speech: Server) -> None:
    """Over a real connection, the client or a switch closes, with the code and the reason."""
    async with listening(speech) as port:
        address = f"ws://127.0.0.1:{port}"
        async with websockets.connect(f"{address}{REALTIME}?model=ear", proxy=None) as client:
            await client.recv()
            await client.send("word")
            assert "I" == json.loads(await client.recv())["delta"]
        async with websockets.connect(f"{address}{REALTIME}?model=ear", proxy=None) as client:
            await client.recv()
            switch = speech.switch("ear2", 0)
            await client.wait_closed()

    assert 1013 == client.close_code
    assert "the request to 'ear' was aborted" in str(client.close_reason)
    assert 1 == (await switch).json()["requests_cut"]


async def test_client_is_told_in_the_handshake_why_it_is_refused(speech: Server) -> None:
    """A refusal's status and error object are in the response to the handshake."""
    async with listening(speech) as port:
        address = f"ws://127.0.0.1:{port}"
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(f"{address}{REALTIME}?model=llama", proxy=None)

    answer = refused.value.response
    assert 404 == answer.status_code
    assert "wrong_task" == json.loads(answer.body or b"")["error"]["code"]
