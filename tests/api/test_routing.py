"""The switching rules as clients see them: responses, errors, streams."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.conftest import MakeServer
from tests.helpers.support import CHAT, Server
from tests.helpers.walk import Shape, World
from vllm_hotswap.api.relay import PARKED_COMMENT, ResponseTruncated
from vllm_hotswap.config.settings import LimitsConfig
from vllm_hotswap.errors import EngineUnavailable
from vllm_hotswap.events import ClientEvicted, RequestEnded
from vllm_hotswap.models.drain import CUT_GRACE_S
from vllm_hotswap.testing.fake_settings import FakeSettings

WORDS = "I am {}, a fake engine of vllm-hotswap."
EMBEDDINGS = "/v1/embeddings"
AUDIO = "/v1/audio/transcriptions"
SWITCH = "/v1/models/switch"
JSON_HEADERS = [(b"content-type", b"application/json")]


def add_route(
    server: Server, path: str, endpoint: Callable[[Request], Awaitable[Response]]
) -> None:
    """Add a route to llama."""
    server.host.engines["llama"].add_route(Route(path, endpoint, methods=["POST"]))


def text(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


def code(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


async def error_of(call: asyncio.Task[httpx.Response]) -> tuple[int, str]:
    response = await call
    return response.status_code, code(response)


# --- which model answers --------------------------------------------------------------------


async def test_request_for_the_active_model_is_served(server: Server) -> None:
    """A request for the active model is answered by that model."""
    response = await server.ask("llama")

    assert 200 == response.status_code
    assert WORDS.format("llama") == text(response)


async def test_request_without_a_model_goes_to_the_active_one(server: Server) -> None:
    """A request without `model` goes to the active model, as with vLLM itself."""
    assert WORDS.format("llama") == text(await server.ask(None))


async def test_request_without_a_model_waits_for_the_target(server: Server) -> None:
    """During a switch, a request without `model` waits for the target."""
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()
    held = server.ask(None)
    await server.settled()
    assert not held.done()

    server.host.release("activate", "qwen")

    assert WORDS.format("qwen") == text(await held)
    await switch


async def test_unknown_alias_is_refused_with_the_configured_ones(server: Server) -> None:
    """An unknown alias gets 404, and the message lists the configured models."""
    response = await server.ask("gpt")

    assert (404, "model_not_found") == (response.status_code, code(response))
    assert "configured: llama, qwen, mistral" in response.json()["error"]["message"]


async def test_model_that_is_not_active_is_refused_with_the_way_to_switch(server: Server) -> None:
    """An inactive model gets 404, and the message names the active one and the switch call."""
    response = await server.ask("qwen")

    assert (404, "model_not_active") == (response.status_code, code(response))
    message = response.json()["error"]["message"]
    assert "the active model is 'llama'" in message
    assert 'POST /v1/models/switch {"model": "qwen"}' in message


async def test_empty_alias_is_refused(server: Server) -> None:
    """An empty `model` is an error, and does not mean the active one."""
    assert (400, "invalid_request") == await error_of(server.ask(""))


async def test_body_is_passed_on_whole(server: Server) -> None:
    """The application gets the whole body, in however many parts it comes."""
    body = json.dumps({"x": "y" * 999, "model": "llama"}).encode()

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    add_route(server, "/pooling", echo)
    answer = await server.request(
        "POST", "/pooling", body[:7], body[7:500], b"", body[500:]
    ).finish()

    assert body == answer.body


FORM = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nqwen\r\n--b--\r\n'
JSON = "application/json"


@pytest.mark.parametrize(
    ("path", "content_type", "query", "body"),
    [
        (AUDIO, "multipart/form-data; boundary=b", "", FORM),
        (AUDIO, "Multipart/Form-Data; boundary=b", "", FORM),
        (AUDIO, "application/x-www-form-urlencoded", "", b"model=qwen"),
        (EMBEDDINGS, JSON, "model=qwen", b"{}"),
        (EMBEDDINGS, None, "model=qwen", b""),
        (EMBEDDINGS, JSON, "model=llama", b'{"model": "qwen"}'),
        (EMBEDDINGS, "Application/JSON; charset=utf-8", "", b'{"model": "qwen"}'),
        (EMBEDDINGS, JSON, "", b'\xef\xbb\xbf{"model": "qwen"}'),
        (EMBEDDINGS, JSON, "", '{"model": "qwen"}'.encode("utf-16")),
        (EMBEDDINGS, JSON, "", '{"model": "qwen"}'.encode("utf-32-be")),
        (EMBEDDINGS, JSON, "", b'{"model": "llama", "model": "qwen"}'),
        (EMBEDDINGS, JSON, "", b'{"more": [' + b"[]," * 99_999 + b'1], "model": "qwen"}'),
    ],
)
async def test_model_is_found_wherever_a_route_has_it(
    server: Server, path: str, content_type: str | None, query: str, body: bytes
) -> None:
    """The model is found in a form, in the query, or in JSON of any kind, which comes first."""
    headers = {"content-type": content_type} if content_type else {}
    answer = await server.post(path, content=body, headers=headers, params=query)

    assert 404 == answer.status_code
    assert "model 'qwen'" in answer.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
async def test_encoding_of_a_body_chooses_no_other_model(
    make_server: MakeServer, encoding: str
) -> None:
    """In the mode auto, the named model answers whatever encoding the JSON is written in."""
    server = await make_server(mode="auto")
    body = json.dumps({"model": "qwen", "messages": []}).encode(encoding)

    answer = await server.post(CHAT, content=body, headers={"content-type": JSON})

    assert (200, "qwen") == (answer.status_code, answer.headers["x-hotswap-model"])


@pytest.mark.parametrize(
    ("path", "content_type", "wanted"),
    [
        (EMBEDDINGS, None, JSON),
        (EMBEDDINGS, "application/x-www-form-urlencoded", JSON),
        (EMBEDDINGS, "text/plain", JSON),
        (EMBEDDINGS, "text/json", JSON),
        (AUDIO, None, "multipart/form-data"),
        (AUDIO, JSON, "multipart/form-data"),
    ],
)
async def test_body_of_another_kind_is_refused(
    server: Server, path: str, content_type: str | None, wanted: str
) -> None:
    """A body of another type is refused by its header, without looking for a model in it."""
    headers = {"content-type": content_type} if content_type else {}
    answer = await server.post(path, content=b'{"model": "qwen"}', headers=headers)

    error = answer.json()["error"]
    assert (415, "unsupported_media_type") == (answer.status_code, error["code"])
    assert error["message"].endswith(f"send the body with Content-Type: {wanted}")


@pytest.mark.parametrize("below", ["", "/api"])
@pytest.mark.parametrize("slash", ["", "/"])
async def test_form_is_taken_however_its_path_is_written(
    server: Server, below: str, slash: str
) -> None:
    """A form is read with a slash at the end of its path, and below a proxy's prefix."""
    headers = [(b"content-type", b"multipart/form-data; boundary=b")]
    given: dict[str, Any] = {"headers": headers, "root_path": below}

    answer = await server.request("POST", f"{below}{AUDIO}{slash}", FORM, **given).finish()

    assert 404 == answer.status
    assert b"model 'qwen'" in answer.body


@pytest.mark.parametrize("path", [CHAT, SWITCH])
async def test_compressed_body_is_refused(server: Server, path: str) -> None:
    """A compressed body is refused: vLLM cannot read it, and it names no model."""
    body = gzip.compress(b'{"model": "qwen"}')
    headers = {"content-type": JSON, "content-encoding": "gzip"}

    answer = await server.post(path, content=body, headers=headers)

    error = answer.json()["error"]
    assert (415, "unsupported_media_type") == (answer.status_code, error["code"])
    assert "Content-Encoding is 'gzip'" in error["message"]


async def test_large_body_gives_everybody_else_a_turn(make_server: MakeServer) -> None:
    """While a large body is scanned, other requests are answered, however large it is."""
    server = await make_server(limits=LimitsConfig(body_values=1 << 24))
    body = b'{"input": [' + b"[]," * (1 << 20) + b'1], "model": "nobody"}'
    large = asyncio.create_task(
        server.post(EMBEDDINGS, content=body, headers={"content-type": JSON})
    )
    answered = 0

    while not large.done():
        await asyncio.sleep(0)
        assert 200 == (await server.get("/health")).status_code
        answered += 1

    assert 404 == (await large).status_code
    assert answered > 5


async def test_a_body_of_too_many_values_is_refused(make_server: MakeServer) -> None:
    """A body of too many values is refused: vLLM would block all others while it parses it."""
    server = await make_server(limits=LimitsConfig(body_values=30_000))
    path = "/v1/completions"

    refused = await server.ask("llama", path=path, prompt=[[1, 2, 3]] * 10_000)
    taken = await server.ask("llama", path=path, prompt="[[1, 2, 3], " * 10_000)

    assert (413, "too_many_values") == (refused.status_code, code(refused))
    assert "limits.body_values" in refused.text
    assert 200 == taken.status_code


@pytest.mark.parametrize("unit", ['"m":1,', '"model":1,', '"x":1,'])
async def test_a_chat_does_not_wait_for_the_body_of_somebody_else(
    make_server: MakeServer, unit: str
) -> None:
    """A chat waits for at most one piece of another client's larger body."""
    server = await make_server(limits=LimitsConfig(body_values=1 << 24))
    body = ("{" + unit * (1 << 21) + '"model": "nobody"}').encode()
    large = asyncio.create_task(
        server.post(EMBEDDINGS, content=body, headers={"content-type": JSON})
    )
    assert 200 == (await server.get("/health")).status_code  # by now it is being scanned

    chat = await server.ask("llama", path=CHAT, more="x" * (20 << 10))

    assert 200 == chat.status_code
    assert not large.done()
    assert 404 == (await large).status_code


async def test_name_beyond_all_bounds_is_refused(server: Server) -> None:
    """A name beyond every limit is refused; it is neither repeated in a message nor ignored."""
    answer = await server.post(EMBEDDINGS, json={"model": "x" * (1 << 20)})

    assert (400, "model") == (answer.status_code, answer.json()["error"]["param"])
    assert len(answer.content) < 1000


async def test_form_reaches_its_application_in_pieces(server: Server) -> None:
    """A form reaches its application in pieces, so others get turns while it is parsed."""
    pieces = 0

    async def upload(request: Request) -> Response:
        nonlocal pieces
        async for chunk in request.stream():
            pieces += bool(chunk)
        return Response()

    add_route(server, AUDIO, upload)
    form = FORM.replace(b"qwen", b"llama") + b"x" * (1 << 20)
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = await server.post(AUDIO, content=form, headers=headers)

    assert 200 == answer.status_code
    assert pieces > (1 << 20) // (64 << 10)


async def test_request_without_a_body_goes_to_the_active_model(server: Server) -> None:
    """A GET names no model, and its body is not waited for."""

    async def load(request: Request) -> Response:
        return PlainTextResponse("3")

    server.host.engines["llama"].add_route(Route("/load", load))
    answer = await server.request("GET", "/load").finish()

    assert (200, b"3") == (answer.status, answer.body)


async def test_client_that_leaves_before_its_request_is_complete_is_forgotten(
    server: Server,
) -> None:
    """A client that leaves before its request is complete causes no lease and no response."""
    stream = server.request("POST", CHAT)
    stream.say({"type": "http.request", "body": b'{"mod', "more_body": True})
    stream.say({"type": "http.disconnect"})

    answer = await stream.finish()

    assert 0 == answer.status
    assert 0 == server.in_flight["llama"]


# --- tasks of models ------------------------------------------------------------------------

TASKS = {
    "llama": FakeSettings(tasks=("generate",)),
    "embed": FakeSettings(tasks=("embed",)),
    "classify": FakeSettings(tasks=("classify",)),
}
ROUTES = {"llama": CHAT, "embed": EMBEDDINGS, "classify": "/classify"}


@pytest.fixture
async def mixed(make_server: MakeServer) -> Server:
    """A server of three tasks; llama is active, classify is cold."""
    return await make_server(aliases=tuple(TASKS), load=("llama", "embed"), settings=TASKS)


@pytest.fixture
async def silent(make_server: MakeServer) -> Server:
    """The same, but classify's configuration does not state its task."""
    settings = TASKS | {"classify": replace(TASKS["classify"], reports_tasks=False)}
    return await make_server(aliases=tuple(TASKS), load=("llama", "embed"), settings=settings)


@pytest.mark.parametrize("alias", TASKS)
async def test_every_task_is_served_by_its_model(mixed: Server, alias: str) -> None:
    """One configuration serves three tasks, each by its model."""
    await mixed.switch(alias)

    response = await mixed.ask(alias, path=ROUTES[alias])

    assert (200, alias) == (response.status_code, response.json()["model"])


@pytest.mark.parametrize("alias", TASKS)
@pytest.mark.parametrize("path", ROUTES.values())
async def test_wrong_task_is_refused(mixed: Server, alias: str, path: str) -> None:
    """A route of another task gets 404 whichever model is active."""
    await mixed.switch("classify")
    await mixed.switch(alias)

    response = await mixed.ask(alias, path=path)

    expected = 200 if path == ROUTES[alias] else 404
    assert expected == response.status_code
    assert expected == 200 or "wrong_task" == code(response)


async def test_wrong_task_is_refused_with_the_models_that_can(mixed: Server) -> None:
    """The refusal of a task names the model, its tasks, and the aliases to use."""
    error = (await mixed.ask("embed", path=CHAT)).json()["error"]

    assert ("wrong_task", "model") == (error["code"], error["param"])
    assert error["message"] == (
        "model 'embed' does not support POST /v1/chat/completions (it serves embed); use llama"
    )


@pytest.mark.parametrize("mode", ["auto", "manual"])
@pytest.mark.parametrize("path", [CHAT, EMBEDDINGS, "/v1/responses"])
async def test_task_of_a_model_that_was_never_loaded_is_known(
    make_server: MakeServer, mode: str, path: str
) -> None:
    """A model's task is known before a load: a wrong request is refused and moves nothing."""
    server = await make_server(
        mode=mode, aliases=tuple(TASKS), load=("llama", "embed"), settings=TASKS
    )
    before = server.residencies

    response = await server.ask("classify", path=path)

    assert (404, "wrong_task") == (response.status_code, code(response))
    assert "model 'classify' does not support" in response.text
    assert "(it serves classify); use " in response.text
    assert ([], 0, before) == (
        server.host.operations,
        server.coordinator.snapshot().switches,
        server.residencies,
    )
    assert 0 == server.coordinator.snapshot().waiting


async def test_model_that_was_never_loaded_is_named_to_whoever_could_ask_it(mixed: Server) -> None:
    """A refusal names models that were never loaded if their configuration has the task."""
    error = (await mixed.ask("embed", path="/classify")).json()["error"]

    assert error["message"].endswith("(it serves embed); use classify")


async def test_websocket_of_another_task_loads_nothing(make_server: MakeServer) -> None:
    """A WebSocket of another task is refused in the handshake, and loads nothing."""
    server = await make_server(
        mode="auto", aliases=tuple(TASKS), load=("llama", "embed"), settings=TASKS
    )
    socket = server.websocket("/v1/realtime", "model=classify")
    await server.settled()

    status, error = socket.denial
    assert (404, "wrong_task") == (status, error["code"])
    assert [] == server.host.operations


async def test_models_of_which_nothing_is_known_yet_are_named_as_such(silent: Server) -> None:
    """Models whose configuration does not state their task are named as unknown."""
    error = (await silent.ask("embed", path=CHAT)).json()["error"]

    assert ("wrong_task", "model") == (error["code"], error["param"])
    assert error["message"] == (
        "model 'embed' does not support POST /v1/chat/completions (it serves embed); "
        "use llama; not known until first loaded: classify"
    )


async def test_wrong_task_is_refused_before_anything_is_waited_for(mixed: Server) -> None:
    """A wrong task is refused first, before a check for the active model or a wait for a switch."""
    mixed.host.hold("activate", "embed")
    switch = mixed.switch("embed")
    await mixed.settled()

    assert (404, "wrong_task") == await error_of(mixed.ask("embed", path=CHAT))
    assert (404, "wrong_task") == await error_of(mixed.ask(None, path=CHAT))
    assert 0 == mixed.coordinator.snapshot().waiting

    mixed.host.release("activate", "embed")
    await switch


async def test_request_without_a_model_for_another_task_is_refused(mixed: Server) -> None:
    """A request without `model` for a task that the active model lacks names those that have it."""
    response = await mixed.ask(None, path=EMBEDDINGS)

    assert (404, "wrong_task") == (response.status_code, code(response))
    assert "model 'llama' does not support" in response.text
    assert "use embed" in response.text


async def test_route_of_a_model_that_was_never_loaded_is_known_after_its_load(
    silent: Server,
) -> None:
    """A request that waits for a model's first load is refused if its routes then lack it."""
    silent.host.hold("load", "classify")
    switch = silent.switch("classify")
    await silent.settled()
    wrong, right = silent.ask("classify"), silent.ask("classify", path="/classify")
    await silent.settled()
    assert 2 == silent.coordinator.snapshot().waiting

    silent.host.release("load", "classify")
    await switch

    assert (404, "wrong_task") == await error_of(wrong)
    assert 200 == (await right).status_code
    assert 0 == silent.in_flight["classify"]
    ended = [event.result for event in silent.events.of(RequestEnded) if event.model == "classify"]
    assert ["refused", "served"] == sorted(ended)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/tokenizer_info"), ("POST", "/v1/audio/transcriptions")]
)
async def test_route_that_no_model_has_is_refused(mixed: Server, method: str, path: str) -> None:
    """A route that no model has gets OpenAI's 404 with that reason, not a framework's bare one."""
    await mixed.operate("classify", "load")
    answer = await mixed.request(method, path, b"").finish()

    assert (404, "wrong_task") == (answer.status, answer.error["code"])
    assert answer.error["message"].endswith("(it serves generate); no other model supports it")


# --- requests around a switch ---------------------------------------------------------------


async def test_request_for_the_source_is_refused_while_it_drains(server: Server) -> None:
    """While the source drains, its requests get 503 with a time to retry; running ones continue."""
    stream = await server.start_stream("llama")
    switch = server.switch("qwen")
    await server.settled()

    response = await server.ask("llama")

    assert (503, "model_switching") == (response.status_code, code(response))
    assert 1 <= int(response.headers["retry-after"])
    assert (await stream.finish()).is_whole
    assert 200 == (await switch).status_code


async def test_requests_for_the_target_are_served_in_order_of_arrival(server: Server) -> None:
    """Requests for the target wait for the switch, then are served in order by the new epoch."""
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()
    asked = [
        server.ask("qwen", name="first", path=EMBEDDINGS),
        server.ask(None, name="second", path=EMBEDDINGS),
        server.ask("qwen", name="third", path=EMBEDDINGS),
    ]
    await server.settled()
    assert [] == server.answered

    server.host.release("activate", "qwen")
    await switch

    assert [200, 200, 200] == [response.status_code for response in await asyncio.gather(*asked)]
    assert ["first", "second", "third"] == server.answered


async def test_stream_that_ends_in_time_is_whole(server: Server) -> None:
    """A switch waits for a running stream; not a word of it is lost."""
    stream = await server.start_stream("llama", words=20)
    switch = server.switch("qwen", drain_timeout=60)
    await server.settled()
    assert not switch.done()

    answer = await stream.finish()

    assert 20 + 1 == len(answer.events)
    assert answer.is_whole
    assert 0 == (await switch).json()["requests_cut"]


async def test_client_that_does_not_read_cannot_keep_its_model(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not read is aborted; if no error can be sent, its connection closes."""
    monkeypatch.setattr("vllm_hotswap.api.relay.LAST_SEND_S", 0.01)
    coming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    coming.put_nowait({"type": "http.request", "body": b'{"model": "llama", "stream": true}'})

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "headers": JSON_HEADERS,
        "query_string": b"",
    }
    stream = asyncio.create_task(server.app(scope, coming.get, send))  # type: ignore[arg-type]
    await server.settled()

    switch = await server.switch("qwen", 0)

    with pytest.raises(ResponseTruncated, match="still running"):
        await stream
    assert 1 == switch.json()["requests_cut"]
    assert 0 == server.in_flight["llama"]


@pytest.mark.parametrize("drain_timeout", [0, 0.01])
async def test_stream_that_is_cut_ends_with_an_explicit_error(
    server: Server, drain_timeout: float
) -> None:
    """After the deadline a stream ends with an SSE error event, no `[DONE]`, and a proper end."""
    stream = await server.start_stream("llama", words=20)

    switch = await server.switch("qwen", drain_timeout)

    answer = await stream.finish()
    error = json.loads(answer.events[-1].removeprefix("data: "))["error"]
    assert "drain_timeout" == error["code"]
    assert "'llama'" in error["message"]
    assert b"[DONE]" not in answer.body
    assert b'"finish_reason": "' not in answer.body
    assert answer.complete
    assert 1 == switch.json()["requests_cut"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_request_that_is_cut_before_its_first_byte_gets_503(
    server: Server, path: str
) -> None:
    """A request aborted before its first byte gets 503."""
    server.host.hold("step", "llama")
    call = server.ask("llama", path=path)
    await server.settled()

    await server.switch("qwen", 0)

    response = await call
    assert (503, "drain_timeout") == (response.status_code, code(response))
    assert "retry-after" in response.headers


async def test_engine_does_not_go_on_with_a_request_that_was_cut(server: Server) -> None:
    """An aborted request is aborted in the engine as well, streamed or not."""
    server.host.hold("step", "llama")
    call, reading = server.ask("llama"), asyncio.create_task(server.stream("llama").finish())
    await server.settled()

    await server.switch("qwen", 0)

    assert 2 == server.host.engines["llama"].steps.aborted
    assert (503, "drain_timeout") == await error_of(call)
    assert b"drain_timeout" in (await reading).body


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/messages", {"type": "error", "error": {"type": "service_unavailable_error"}}),
        ("/v1/responses", {"type": "error", "code": "drain_timeout"}),
    ],
)
async def test_cut_stream_speaks_the_dialect_of_its_route(
    server: Server, path: str, expected: dict[str, Any]
) -> None:
    """Anthropic's and the Responses API's aborted streams end with the `error` event they know."""

    async def endpoint(request: Request) -> Response:
        engine = server.host.engines["llama"]
        events = (f"event: word\ndata: {word}\n\n" async for word in engine.tokens(20))
        return StreamingResponse(events, media_type="text/event-stream")

    add_route(server, path, endpoint)
    stream = await server.start_stream("llama", path=path)

    await server.switch("qwen", 0)

    name, data = (await stream.finish()).events[-1].split("\n")
    error = json.loads(data.removeprefix("data: "))
    assert "event: error" == name
    assert expected["type"] == error["type"]
    assert "drain_timeout" in json.dumps(error) or "drain" in error["error"]["message"]


async def test_cut_answer_that_is_no_event_stream_is_broken_off(server: Server) -> None:
    """An aborted audio response has no place for an error: its connection closes before the end."""

    async def endpoint(request: Request) -> Response:
        engine = server.host.engines["llama"]
        return StreamingResponse(engine.tokens(20), media_type="audio/wav")

    add_route(server, "/pooling", endpoint)
    stream = await server.start_stream("llama", path="/pooling")

    await server.switch("qwen", 0)

    with pytest.raises(ResponseTruncated, match="still running 0 s after a switch to 'qwen'"):
        await stream.task
    assert not (await stream.finish()).complete


async def deaf(request: Request) -> Response:
    """An application that ignores the disconnect, and must be cancelled."""
    await asyncio.Event().wait()
    raise AssertionError


async def excusing(request: Request) -> Response:
    """An application that answers its cancellation, as some routes of vLLM do."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    return PlainTextResponse("Client disconnected", 400)


async def raising(request: Request) -> Response:
    """An application that raises another error on its cancellation."""
    try:
        await asyncio.Event().wait()
    finally:
        raise RuntimeError("No response returned.")


@pytest.mark.parametrize("endpoint", [deaf, excusing, raising])
async def test_application_cannot_hide_that_it_was_cut(
    server: Server,
    endpoint: Callable[[Request], Awaitable[Response]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However an application reacts to an abort, the client gets the reason, and the lease ends."""
    monkeypatch.setattr("vllm_hotswap.models.drain.CUT_GRACE_S", 0.01)
    add_route(server, "/pooling", endpoint)
    call = server.ask("llama", path="/pooling")
    await server.settled()

    await server.switch("qwen", 0)

    assert (503, "drain_timeout") == await error_of(call)
    assert 0 == server.in_flight["llama"]


async def test_answer_that_is_complete_is_not_touched(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete response is not changed if the application's work after it is aborted."""
    monkeypatch.setattr("vllm_hotswap.models.drain.CUT_GRACE_S", 0.01)

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("all", background=BackgroundTask(asyncio.Event().wait))

    add_route(server, "/pooling", endpoint)
    stream = await server.start_stream("llama", path="/pooling")

    await server.switch("qwen", 0)

    answer = await stream.finish()
    assert (200, b"all", True) == (answer.status, answer.body, answer.complete)


async def test_error_of_ours_after_the_first_byte_breaks_the_answer_off(server: Server) -> None:
    """Our error after the first byte closes the connection: a second response would be invalid."""

    async def words() -> AsyncIterator[str]:
        yield "first"
        raise EngineUnavailable("gone")

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(words())

    add_route(server, "/pooling", endpoint)
    stream = await server.start_stream("llama", path="/pooling")

    answer = await stream.finish()

    assert isinstance(stream.task.exception(), ExceptionGroup | EngineUnavailable)
    assert (200, b"first", False) == (answer.status, answer.body, answer.complete)


async def test_stream_is_cut_at_once_whoever_listened_before_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream is aborted at once, although vLLM's routes stop listening before it starts."""
    monkeypatch.setattr("vllm_hotswap.models.drain.CUT_GRACE_S", 1000)

    async def listen(request: Request) -> None:
        async with asyncio.TaskGroup() as middleware:
            middleware.create_task(request.receive())  # type: ignore[arg-type]

    async def endpoint(request: Request) -> Response:
        await request.body()
        listening = asyncio.create_task(listen(request))
        await asyncio.sleep(0.01)
        listening.cancel()
        tokens = server.host.engines["llama"].tokens(20)
        return StreamingResponse(tokens, media_type="text/event-stream")

    add_route(server, "/pooling", endpoint)
    server.host.hold("step", "llama")
    reading = asyncio.create_task(server.stream("llama", path="/pooling").finish())
    await asyncio.sleep(0.05)

    async with asyncio.timeout(5):
        await server.switch("qwen", 0)

    assert "drain_timeout" in (await reading).events[-1]


async def test_application_that_fails_by_itself_fails_as_ever(server: Server) -> None:
    """An application that fails has answered by itself; the HTTP server gets and logs the error."""

    async def endpoint(request: Request) -> Response:
        raise RuntimeError("bug")

    add_route(server, "/pooling", endpoint)

    with pytest.raises(RuntimeError, match="bug"):
        await server.ask("llama", path="/pooling")
    assert 0 == server.in_flight["llama"]


async def buggy_stream(request: Request) -> Response:
    """Fail in the middle of an event stream."""

    async def events() -> AsyncIterator[bytes]:
        yield b'data: "one"\n\n'
        raise RuntimeError("bug")

    return StreamingResponse(events(), media_type="text/event-stream")


async def buggy_body(request: Request) -> Response:
    """Fail in the middle of a response that has no room for an error."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        raise RuntimeError("bug")

    return StreamingResponse(pieces(), media_type="text/plain")


def mistaken(*_: object) -> None:
    """Raise an error of ours that no code handles."""
    raise ZeroDivisionError("unforeseen")


@pytest.mark.parametrize("place", ["media.check_model_body", "router.ClientChannel"])
async def test_unforeseen_error_is_answered_with_the_error_object(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """An unforeseen error is logged once, has no details, and ends any lease."""
    with monkeypatch.context() as patch:
        patch.setattr(f"vllm_hotswap.api.{place}", mistaken)
        response = await server.ask("llama")

    assert (500, "internal_error") == (response.status_code, code(response))
    assert "unforeseen" not in response.text
    assert 1 == caplog.text.count("event=request_failed")
    assert 1 == caplog.text.count("ZeroDivisionError: unforeseen")
    assert 0 == server.in_flight["llama"]
    assert 200 == (await server.ask("llama")).status_code


async def test_unforeseen_error_in_an_event_stream_is_its_last_event(server: Server) -> None:
    """An unforeseen error in an event stream is its last event, unlike a normal end."""
    add_route(server, "/pooling", buggy_stream)

    answer = await server.stream("llama", path="/pooling").finish()

    assert (200, True) == (answer.status, answer.complete)
    event = json.loads(answer.events[-1].removeprefix("data: "))
    assert "internal_error" == event["error"]["code"]
    assert 0 == server.in_flight["llama"]


async def refuses_and_raises(_: Request) -> Response:
    """Return a refusal that Starlette also raises, as with a handler of all errors."""
    return Refusing({"error": {"message": "a mistake", "code": 400}}, 400)


class Refusing(JSONResponse):
    """A response that raises once it has been sent."""

    async def __call__(self, *given: Any) -> None:
        await super().__call__(*given)
        raise RuntimeError("raised on")


async def test_a_refusal_that_is_raised_on_is_the_answer(server: Server) -> None:
    """A refusal that is also raised is the response, and is not reported as a server error."""
    add_route(server, "/pooling", refuses_and_raises)

    answer = await server.stream("llama", path="/pooling").finish()

    assert (400, True) == (answer.status, answer.complete)
    assert "a mistake" == answer.error["message"]
    assert 0 == server.in_flight["llama"]


async def test_unforeseen_error_in_any_other_answer_closes_the_connection(server: Server) -> None:
    """An unforeseen error in any other response closes its connection: no error fits in there."""
    add_route(server, "/pooling", buggy_body)

    answer = await server.stream("llama", path="/pooling").finish()

    assert (200, False) == (answer.status, answer.complete)
    assert 0 == server.in_flight["llama"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a\ud83d"},
        {"prompt": "a", "bad_words": ["\ud83d"]},
        {"prompt": "a", "request_id": "\ud83d"},
        {"messages": [{"role": "\ude00", "content": "a"}]},
        {"prompt": "x" * (1 << 20) + "\ud83d"},
    ],
)
async def test_half_of_a_surrogate_pair_is_refused(server: Server, body: dict[str, Any]) -> None:
    """Half of a surrogate pair in any text is refused before any work; the message shows it."""
    raw = json.dumps({"model": "llama", **body})  # which writes it as JavaScript does
    response = await server.post(CHAT, content=raw, headers={"content-type": JSON})

    assert (400, "invalid_request") == (response.status_code, code(response))
    assert (
        "half of a surrogate pair, which is not a character" in response.json()["error"]["message"]
    )


async def test_a_boundary_that_cannot_be_one_is_left_to_the_application(server: Server) -> None:
    """A form with an impossible boundary is left to the application; the router does not fail."""
    kind = {"content-type": f"multipart/form-data; boundary={'b' * 257}"}

    response = await server.post(AUDIO, content=b"--b--", headers=kind)

    assert response.status_code < 500
    assert 0 == server.in_flight["llama"]


async def test_held_request_of_a_full_queue_is_refused(make_server: MakeServer) -> None:
    """A request beyond a full queue gets 429 with a time to retry."""
    server = await make_server(max_waiting=0)
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()

    response = await server.ask("qwen")

    assert (429, "queue_full") == (response.status_code, code(response))
    assert 1 <= int(response.headers["retry-after"])
    server.host.release("activate", "qwen")
    await switch


async def test_request_that_waits_too_long_is_told(make_server: MakeServer) -> None:
    """A request that waits too long gets 504 after `wait_timeout`; the switch continues."""
    server = await make_server(wait_timeout=0.01)
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()

    assert (504, "wait_timeout") == await error_of(server.ask("qwen"))

    server.host.release("activate", "qwen")
    assert 200 == (await switch).status_code


async def test_failed_switch_is_told_to_everyone_who_waited(server: Server) -> None:
    """A failed switch gives its caller and held requests 503 with the cause; the source stays."""
    server.host.hold("load", "mistral")
    server.host.fail_next("load", "mistral")
    switch = server.switch("mistral")
    await server.settled()
    held = server.ask("mistral")
    await server.settled()

    server.host.release("load", "mistral")

    assert (503, "switch_failed") == await error_of(switch)
    assert (503, "switch_failed") == await error_of(held)
    assert "load of 'mistral' was made to fail; 'llama' is still active" in (await held).text
    assert WORDS.format("llama") == text(await server.ask("llama"))


async def test_first_switch_to_a_cold_model_serves_it(server: Server) -> None:
    """A switch to a cold model loads it and serves it."""
    await server.switch("mistral")

    assert WORDS.format("mistral") == text(await server.ask("mistral"))


async def test_engines_are_never_stepped_while_they_are_parked(server: Server) -> None:
    """With clients on both sides of several switches, a parked engine generates nothing."""
    early = [await server.start_stream("llama"), await server.start_stream(None)]
    to_qwen = server.switch("qwen")
    await server.settled()
    late = [server.stream("qwen"), server.stream(None)]
    await server.settled()

    assert [True, True] == [(await stream.finish()).is_whole for stream in early]
    await to_qwen
    to_mistral = server.switch("mistral")
    assert [True, True] == [(await stream.finish()).is_whole for stream in late]
    await to_mistral

    assert 0 == server.host.stepped_while_parked


# --- clients that leave ---------------------------------------------------------------------


async def test_client_that_leaves_its_stream_frees_the_model(server: Server) -> None:
    """When a client leaves its stream, the lease ends and the engine stops working on it."""
    server.host.hold("step", "llama")
    stream = server.stream("llama")
    reading = asyncio.create_task(stream.finish())
    await server.settled()
    assert 1 == server.in_flight["llama"]

    stream.disconnect()

    assert not (await reading).complete
    assert 0 == server.in_flight["llama"]
    assert 1 == server.host.engines["llama"].steps.aborted


async def test_client_that_leaves_before_the_answer_frees_the_model(server: Server) -> None:
    """When a client leaves before a response in one piece, the same is freed."""
    server.host.hold("step", "llama")
    stream = server.request("POST", CHAT, b'{"model": "llama"}')
    await server.settled()
    assert 1 == server.in_flight["llama"]

    stream.disconnect()
    await server.settled()

    assert 0 == server.in_flight["llama"]


async def test_client_that_leaves_lets_a_drain_end(server: Server) -> None:
    """A drain does not wait for a client that has left."""
    stream = await server.start_stream("llama", words=1000)
    switch = server.switch("qwen")
    await server.settled()

    stream.disconnect()

    assert 200 == (await switch).status_code


async def test_request_that_is_cancelled_frees_the_model(server: Server) -> None:
    """A request cancelled by the HTTP server leaves no lease."""
    stream = await server.start_stream("llama")

    stream.task.cancel()
    await server.settled()

    assert stream.task.cancelled()
    assert 0 == server.in_flight["llama"]


async def test_held_request_whose_client_leaves_is_given_up(make_server: MakeServer) -> None:
    """A held request whose client leaves keeps no place in the queue, and no model works for it."""
    server = await make_server(max_waiting=1)
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()
    gone = server.stream("qwen")
    await server.settled()
    assert 1 == server.coordinator.snapshot().waiting

    gone.disconnect()
    await gone.task
    held = server.ask("qwen")
    await server.settled()
    server.host.release("activate", "qwen")

    assert 200 == (await switch).status_code
    assert 200 == (await held).status_code
    assert 1 == server.host.engines["qwen"].steps.served


async def test_client_that_leaves_in_the_turn_of_its_admission_frees_the_model(
    server: Server,
) -> None:
    """A client that leaves in the turn of its admission leaves nothing, whichever comes first."""
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()
    held = server.stream("qwen")
    await server.settled()

    server.host.release("activate", "qwen")
    held.disconnect()
    await switch
    await asyncio.wait([held.task])

    assert 0 == server.in_flight["qwen"]
    assert 0 == server.coordinator.snapshot().waiting


async def test_held_request_that_is_cancelled_is_cancelled(server: Server) -> None:
    """A held request that the HTTP server cancels is cancelled, not treated as a disconnect."""
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()
    held = server.stream("qwen")
    await server.settled()

    held.task.cancel()
    await server.settled()

    assert held.task.cancelled()
    assert 0 == server.coordinator.snapshot().waiting
    server.host.release("activate", "qwen")
    await switch


async def test_request_that_is_admitted_at_once_makes_no_task(server: Server) -> None:
    """A request that is admitted at once makes no task: only waiting ones watch their client."""
    made: list[str] = []

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> asyncio.Task[Any]:
        made.append(coro.__qualname__)
        return asyncio.Task(coro, loop=loop, **kwargs)

    asyncio.get_running_loop().set_task_factory(factory)
    answer = await server.stream("llama").finish()

    assert answer.is_whole
    assert [] == [name for name in made if name.startswith("DisconnectWatcher")]


# --- deaths ---------------------------------------------------------------------------------


async def test_death_of_the_host_ends_every_open_request_explicitly(server: Server) -> None:
    """When the host dies, streams get an error event and others 503; later ones a time to retry."""
    stream = await server.start_stream("llama", words=1000)
    server.host.hold("step", "llama")
    server.host.hold("restart", "")
    call = server.ask("llama")
    await server.settled()

    server.host.kill("the engine host was killed by signal 9")

    assert (503, "engine_unavailable") == await error_of(call)
    answer = await stream.finish()
    assert "engine_unavailable" in answer.events[-1]
    assert b"[DONE]" not in answer.body
    later = await server.ask("llama")
    assert (503, "engine_unavailable") == (later.status_code, code(later))
    assert "retry-after" in later.headers


async def test_death_of_the_host_fails_held_requests_explicitly(server: Server) -> None:
    """When the host dies, held requests fail: none waits for a switch that cannot end."""
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()
    held = server.ask("qwen")
    await server.settled()

    server.host.kill("the engine host was killed by signal 9")

    assert 503 == (await held).status_code
    assert 503 == (await switch).status_code
    assert "killed by signal 9" in (await held).text


async def test_death_of_one_engine_leaves_the_others_serving(server: Server) -> None:
    """When an engine dies its requests fail explicitly; another model can be switched to."""
    stream = await server.start_stream("llama", words=1000)

    server.host.kill_engine("llama")

    assert "engine_unavailable" in (await stream.finish()).events[-1]
    assert WORDS.format("llama") == text(await server.ask("llama"))
    assert 200 == (await server.switch("qwen")).status_code
    assert WORDS.format("qwen") == text(await server.ask("qwen"))


async def test_shutdown_ends_requests_explicitly(server: Server) -> None:
    """A shutdown ends running and held requests, and the switch, with the reason."""
    server.host.hold("load", "mistral")
    switch = server.switch("mistral")
    await server.settled()
    held = server.ask("mistral")
    await server.settled()

    await server.coordinator.shut_down(0)

    for call in (switch, held, server.ask("llama")):
        assert 503 == (await call).status_code
        assert "the server is shutting down" in (await call).text


async def test_shutdown_ends_a_stream_with_an_error_event(server: Server) -> None:
    """A shutdown ends a running stream with an error event."""
    stream = await server.start_stream("llama", words=1000)

    await server.coordinator.shut_down(0)

    answer = await stream.finish()
    assert "the server is shutting down" in answer.events[-1]
    assert answer.complete


# --- slow clients ---------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [True, False])
def test_client_that_takes_nothing_is_let_go(streamed: bool) -> None:
    """A client that reads nothing is disconnected after twice `client_timeout` plus an abort."""
    with contextlib.closing(World(Shape(client_timeout=20))) as world:
        ask = world.ask("llama", words=3, streamed=streamed)
        world.let_pass(2)
        ask.stop_reading()

        world.let_pass(2 * 20 + 2 * CUT_GRACE_S)

        assert not world.leases
        assert ask.broken
        [told] = world.all_of(ClientEvicted)
        assert "llama" == told.model


def test_client_that_takes_its_time_is_not_let_go() -> None:
    """A client that reads something now and then is not disconnected."""
    with contextlib.closing(World(Shape(client_timeout=20))) as world:
        ask = world.ask("llama", words=5)
        for _ in range(8):
            ask.stop_reading()
            world.let_pass(15)
            ask.go_on_reading()
            world.settle()

        world.let_pass(10)

        assert "answered" == ask.outcome


def test_stream_that_is_parked_again_gets_as_many_comments_as_before() -> None:
    """A parked stream gets a comment at once and every ten seconds, however often it is parked."""
    with contextlib.closing(World(Shape())) as world:
        ask = world.ask("llama", words=20)
        for alias in ("qwen", "llama", "qwen"):
            world.let_pass(2)
            world.switch(alias, 0, "park")
            world.let_pass(2)
        before = ask.answer.count(PARKED_COMMENT)

        world.let_pass(30)

        assert 3 == ask.answer.count(PARKED_COMMENT) - before
