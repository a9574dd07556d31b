"""The router: from a request to the application of the model that it names.

Pure ASGI. The body is read whole (vLLM would read it whole, too), `model` is found in it, a lease
is taken, and the body is replayed to that model's application. The lease ends when the
application has sent the last byte of its answer, or when the client has gone.
"""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Scope, Send

from vllm_hotswap import model_field, openai
from vllm_hotswap.coordinator import Coordinator
from vllm_hotswap.errors import HotswapError, InvalidRequest
from vllm_hotswap.registry import Cut, Lease

BODY_METHODS = frozenset(["POST", "PUT", "PATCH", "DELETE"])

LAST_SEND_S = 3.0
"""Seconds that a client gets to take in how its answer was cut; then its connection is dropped."""


class ClientGone(Exception):
    """The client left before its request was complete or admitted."""


class AnswerCut(Exception):
    """An answer was cut after its first byte, and there is no way to say so in it.

    It is no event stream, or its client does not read. Raised out of the application, this makes
    the HTTP server close the connection before the answer is complete, which is the only explicit
    error that is left to give.
    """


class Router:
    """An ASGI application that hands each request, whole, to its model's application."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._route(scope, receive, send, model_field.from_query(scope["query_string"]))
            return
        try:
            body = await _read_body(receive) if scope["method"] in BODY_METHODS else b""
            alias = _find_model(scope, body)
        except ClientGone:
            return
        except HotswapError as error:
            await openai.error_response(error)(scope, receive, send)
            return
        await self._route(scope, receive, send, alias, body)

    async def _route(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        alias: str | None,
        body: bytes | None = None,
    ) -> None:
        answer = _Answer(scope, receive, send)
        waiting = _Waiting(scope, receive)
        try:
            async with self._coordinator.lease(alias) as lease:
                await waiting.end()
                answer.lease = lease
                client = _Client(scope, receive, body, waiting.heard, lease, answer)
                await self._answer(lease, scope, client, answer)
        except asyncio.CancelledError:
            if not waiting.client_left or _uncancel() > 0:
                raise
        except HotswapError as error:
            await waiting.end()
            if answer.started:
                raise
            await answer.refuse(error)
        finally:
            waiting.stop()

    async def _answer(self, lease: Lease, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """Run the model's application; if it is cut meanwhile, tell the client."""
        app = self._coordinator.registry.resolve(lease.alias).engine.app
        try:
            await app(scope, receive, answer.send)
        except (Exception, asyncio.CancelledError):
            # Cancelled, an application may raise something else, or nothing.
            if lease.cut is None:
                raise
        if lease.cut is not None:
            _uncancel()
            if not answer.complete:
                await answer.cut(lease.cut)


class _Waiting:
    """Listens to a client while its request is held, and gives the request up when it leaves.

    A request that is admitted at once is over before its task first gives way, and so before
    anything is begun here: no task is made for it.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._disconnect = f"{scope['type']}.disconnect"
        self._receive = receive
        self._request = asyncio.current_task()
        self._listening: asyncio.Task[None] | None = None
        self._begin = asyncio.get_running_loop().call_soon(self._held)
        self.heard: list[Message] = []
        """What the client said meanwhile; the application is to hear it."""
        self.client_left = False

    async def end(self) -> None:
        """Listen no more: from now on nobody else receives, and the request is not given up."""
        self.stop()
        if self._listening is not None:
            await asyncio.gather(self._listening, return_exceptions=True)

    def stop(self) -> None:
        self._begin.cancel()
        if self._listening is not None:
            self._listening.cancel()

    def _held(self) -> None:
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while (message := await self._receive())["type"] != self._disconnect:
            self.heard.append(message)
        self.client_left = True
        if self._request is not None:
            self._request.cancel()


class _Client:
    """What an application hears of its client: what was read already, then its leaving.

    An application whose lease is cut hears that the client has left. vLLM listens for that and ends
    the request in its engine; cancelling the task instead would leave the request running there.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        body: bytes | None,
        heard: list[Message],
        lease: Lease,
        answer: _Answer,
    ) -> None:
        self._disconnect = f"{scope['type']}.disconnect"
        self._receive = receive
        self._body = body
        self._heard = heard
        self._lease = lease
        self._answer = answer
        self._listening: asyncio.Task[object] | None = None
        self._interrupted = False

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self._heard:
            return self._heard.pop(0)
        if self._lease.cut is None:
            try:
                return await self._listen()
            except asyncio.CancelledError:
                if not self._interrupted or _uncancel() > 0:
                    raise
        return {"type": self._disconnect, "code": 1013}

    async def _listen(self) -> Message:
        """Wait for the client; `_interrupt` ends the wait. No task of its own: a hot path."""
        self._listening = asyncio.current_task()
        self._lease.on_cut = self._interrupt
        try:
            message = await self._receive()
        finally:
            self._listening = None
        if message["type"] == self._disconnect and not self._answer.complete:
            self._lease.client_left = True
        return message

    def _interrupt(self) -> None:
        if self._listening is not None:
            self._interrupted = True
            self._listening.cancel()


class _Answer:
    """Watches an answer go by, so that a cut can be told to the client in the right form."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self.lease: Lease | None = None
        self.started = False
        self.complete = False
        self._is_event_stream = False

    async def send(self, message: Message) -> None:
        if self.lease is not None and self.lease.cut is not None:
            return  # what an application says after it was cut is not the answer
        if message["type"] == "http.response.start":
            self.started = True
            self._is_event_stream = _content_type(message).startswith(b"text/event-stream")
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
        await self._send(message)

    async def cut(self, cause: Cut) -> None:
        """End the answer with an explicit error, whatever of it has been sent.

        A client that does not read must not keep its lease, for which a drain waits.
        """
        try:
            async with asyncio.timeout(LAST_SEND_S):
                await self._say(cause)
        except TimeoutError:
            raise AnswerCut(cause.message) from None

    async def _say(self, cause: Cut) -> None:
        if not self.started:
            await self.refuse(cause)
        elif self._is_event_stream:
            event = openai.error_event(cause, self._scope["path"])
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            raise AnswerCut(cause.message)

    async def refuse(self, error: HotswapError) -> None:
        if self._scope["type"] == "websocket":
            # 1013: try again later. https://www.iana.org/assignments/websocket
            await self._send({"type": "websocket.close", "code": 1013, "reason": error.message})
        else:
            await openai.error_response(error)(self._scope, self._receive, self._send)


async def _read_body(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks) if len(chunks) > 1 else chunks[0]


def _find_model(scope: Scope, body: bytes) -> str | None:
    """The alias that a request names, None if it names none."""
    content_type = next((v for k, v in scope["headers"] if k == b"content-type"), b"")
    if content_type.lower().startswith(
        (b"multipart/form-data", b"application/x-www-form-urlencoded")
    ):
        alias = model_field.from_form(body, content_type.decode("latin-1"))
    else:
        alias = model_field.from_json(body) if body else None
    if alias is None:
        alias = model_field.from_query(scope["query_string"])
    if alias == "":
        raise InvalidRequest("model is empty; name a configured alias or leave it out", "model")
    return alias


def _content_type(start: Message) -> bytes:
    for name, value in start.get("headers", ()):
        if name.lower() == b"content-type":
            return bytes(value)
    return b""


def _uncancel() -> int:
    """Take back one cancellation of the current task; how many are left."""
    task = asyncio.current_task()
    assert task is not None
    return task.uncancel()
