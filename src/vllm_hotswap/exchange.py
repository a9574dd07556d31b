"""One request's exchange of messages with its client, around the application that answers it.

`Waiting` listens while the request is held, `Client` is what the application hears, `Answer`
watches what it says. Together they make sure that an answer which is cut says so, over HTTP and
over websockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from vllm_hotswap import openai
from vllm_hotswap.errors import HotswapError
from vllm_hotswap.media import FORM_PIECE_BYTES, FORMS, media_type
from vllm_hotswap.model_routes import request_of
from vllm_hotswap.pace import PER_TURN, give_back
from vllm_hotswap.refusals import hold_back, let_in, note_refusal
from vllm_hotswap.registry import Lease

_AS_IT_IS = "".join(map(chr, range(0x21, 0x7F))).replace("%", "")
"""Characters of a header's value that stand for themselves."""

LAST_SEND_S = 3.0
"""Seconds that a client gets to take in how its answer was cut; then its connection is dropped."""

PARKED_COMMENT = b": parked\n\n"
COMMENT_S = 10.0
"""How often the event stream of a request that waits or is parked says that it is still there."""


CLIENT_LEFT = 499
"""The status that a server notes for a client that has not waited. Source: nginx."""

REFUSAL_BYTES = 8 << 10
"""Of the body of an application's refusal that is set aside; a longer one is passed on at once."""


class AnswerCut(Exception):
    """An answer was cut after its first byte, and there is no way to say so in it.

    It is no event stream, or its client does not read. Raised out of the application, this makes
    the HTTP server close the connection before the answer is complete, which is the only explicit
    error that is left to give.
    """


class Waiting:
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


class Client:
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
        answer: Answer,
    ) -> None:
        self._disconnect = f"{scope['type']}.disconnect"
        self._receive = receive
        self._body = [] if body is None else list(_pieces(scope, body))[::-1]
        self._heard = heard
        self._lease = lease
        self._answer = answer
        self._listening: asyncio.Task[object] | None = None
        self._interrupted = False

    async def __call__(self) -> Message:
        if self._body:
            piece = self._body.pop()
            if self._body:
                await asyncio.sleep(0)  # the application parses each piece on the event loop
            return {"type": "http.request", "body": piece, "more_body": bool(self._body)}
        if self._heard:
            return self._heard.pop(0)
        if self._lease.cut is None:
            try:
                return await self._listen()
            except asyncio.CancelledError:
                if not self._interrupted or uncancel() > 0:
                    raise
        return {"type": self._disconnect, "code": 1013}

    async def _listen(self) -> Message:
        """Wait for the client; `_interrupt` ends the wait. No task of its own: a hot path.

        Who listens next may begin before who listened last has noticed that it is to stop.
        """
        self._listening = task = asyncio.current_task()
        self._lease.on_cut = self._interrupt
        try:
            message = await self._receive()
        finally:
            if self._listening is task:
                self._listening = None
        if message["type"] == self._disconnect and not self._answer.complete:
            self._lease.client_left = True
        return message

    def _interrupt(self) -> None:
        if self._listening is not None:
            self._interrupted = True
            self._listening.cancel()


def _pieces(scope: Scope, body: bytes) -> Iterator[bytes]:
    """A form in pieces, as its parser takes it; anything else whole, as it is parsed."""
    is_form = media_type(Headers(scope=scope)) in FORMS
    size = FORM_PIECE_BYTES if is_form else len(body)
    for start in range(0, len(body) or 1, size or 1):
        yield body[start : start + size]


class Answer:
    """Watches an answer go by, so that a cut can be told to the client in the right form.

    A refusal of the application's is set aside, and told by `give_refusal` when its lease is over:
    until then the answer may be complete without having started.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self.lease: Lease | None = None
        self.on_body: Callable[[bytes], None] | None = None
        """Called once, with the first piece of the body, before it is sent."""
        self.started = False
        self.complete = False
        self._sending = 0
        self._sending_since_s = self._kept_waiting_s = 0.0
        self.sent = 0
        """Messages that were sent: what does not grow while one is being sent has stalled."""
        self.is_event_stream = False
        self.is_ahead = False
        """Whether it has begun, and its application has not."""
        self._instead: bytearray | None = None
        """What the application says instead of the event stream that has begun."""
        self._is_between_events = True
        self._refusal: list[Message] = []
        """The application's refusal, set aside: it may have to wait, and its lease must not."""
        self._refusal_bytes = 0
        self._refused_with: HotswapError | None = None
        """The server's own, in place of an answer."""
        self._commenting: asyncio.Task[None] | None = None

    def follow(self, lease: Lease) -> None:
        """Answer for this lease from now on."""
        self.lease = lease
        lease.kept_waiting_s = self.kept_waiting_s
        lease.on_park = self._parked
        lease.on_wait = self._waits
        lease.on_admit = self._admitted

    async def begin_event_stream(self) -> None:
        """Begin the answer before its application does.

        If the application answers with something else, an error, that becomes the last event.
        """
        start: Message = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
        }
        if await self._may_say(start):
            await self._tell(start)
        self.is_ahead = True

    async def send(self, message: Message) -> None:
        """What the application says."""
        if not await self._may_say(message):
            return
        if self._refusal or self._is_refusal(message):
            await self._set_aside(message)
            return
        self._note(message)
        rest = self._go_on_with(message) if self.is_ahead else message
        if rest is not None:
            await self._tell(rest)

    async def _may_say(self, message: Message) -> bool:
        """Wait until the answer may go on; False if it has been cut."""
        if self.sent % PER_TURN == PER_TURN - 1:
            await give_back()  # a large call may have many events ready, in one task
        if self.lease is not None:
            if self.lease.gate is not None:
                await asyncio.wait([self.lease.gate])
            if self.lease.cut is not None:
                return False  # what an application says after it was cut is not the answer
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                self.lease.status = message["status"]
        self._speak()
        return True

    def _note(self, start: Message) -> None:
        """Note for the client whether it is served, or refused within a stream that has begun."""
        if start["type"] == "websocket.accept":
            let_in(self._scope)
        elif start["type"] == "http.response.start" and not self._has_left:
            if start["status"] < 300:
                let_in(self._scope)
            elif 400 <= start["status"] < CLIENT_LEFT:
                note_refusal(self._scope)

    @property
    def _has_left(self) -> bool:
        return self.lease is not None and self.lease.client_left

    def _is_refusal(self, message: Message) -> bool:
        """Whether it begins an answer that tells of a mistake of the client's."""
        if message["type"] != "http.response.start" or self.is_ahead or self.lease is None:
            return False
        return 400 <= message["status"] < CLIENT_LEFT and not self._has_left

    async def _set_aside(self, message: Message) -> None:
        self._refusal.append(message)
        self._refusal_bytes += len(message.get("body", b""))
        if self._refusal_bytes > REFUSAL_BYTES:
            note_refusal(self._scope)
            await self._tell_refusal()
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            assert self.lease is not None
            self.complete = self.lease.is_answered = True

    async def _tell_refusal(self) -> None:
        messages, self._refusal = self._refusal, []
        for message in messages:
            await self._tell(message)

    async def give_refusal(self) -> None:
        """Tell what the request is refused with, if it is, when it is the client's turn.

        To be called once the lease has ended.
        """
        if self._refused_with is not None:
            error, self._refused_with = self._refused_with, None
            await self.refuse(error)
        elif self._refusal:
            self.on_body = None
            await hold_back(self._scope)
            await self._tell_refusal()

    async def _tell(self, message: Message) -> None:
        match message["type"]:
            case "http.response.start":
                message = self._with_headers(message)
                self.is_event_stream = _content_type(message).startswith(b"text/event-stream")
            case "http.response.body":
                self._look_at(message)
            case "websocket.accept" | "websocket.http.response.start":
                self.started = True
            case "websocket.close":
                self.started = self.complete = True
        await self._pass_on(message)
        if message["type"] == "http.response.start":
            self.started = True  # not before: a cut must not send a body without it
        if self.complete and self.lease is not None:
            self.lease.is_answered = True

    def _go_on_with(self, message: Message) -> Message | None:
        """What is left to be sent of it, after the answer has begun without the application."""
        if message["type"] == "http.response.start":
            if _content_type(message).startswith(b"text/event-stream"):
                self.is_ahead = False
            else:
                self._instead = bytearray()
            return None
        assert self._instead is not None
        self._instead += message.get("body", b"")
        if message.get("more_body", False):
            return None
        return {"type": "http.response.body", "body": openai.answer_event(bytes(self._instead))}

    def _speak(self) -> None:
        """No comment is needed while the application speaks, unless it is parked."""
        if self.lease is None or not self.lease.is_frozen:
            self.close()

    async def _pass_on(self, message: Message) -> None:
        now_s = asyncio.get_running_loop().time
        if not self._sending:
            self._sending_since_s = now_s()
        self._sending += 1
        try:
            await self._send(message)
        finally:
            self._sending -= 1
            self.sent += 1
            if not self._sending:
                self._kept_waiting_s += now_s() - self._sending_since_s

    def kept_waiting_s(self) -> float:
        """Seconds, so far, in which the client was to take something in, and had not yet."""
        if not self._sending:
            return self._kept_waiting_s
        return self._kept_waiting_s + asyncio.get_running_loop().time() - self._sending_since_s

    @property
    def is_sending(self) -> bool:
        """Whether the application or a comment waits for the client to take something in."""
        return self._sending > 0

    def _with_headers(self, start: Message) -> Message:
        """What became of the request so far, for whoever wants to know."""
        if self.lease is None:
            return start
        return {**start, "headers": [*start.get("headers", ()), *_headers(self.lease)]}

    def _parked(self) -> None:
        self._begin_to_comment(PARKED_COMMENT)

    def _waits(self) -> None:
        assert self.lease is not None
        self._begin_to_comment(f": waiting for {self.lease.alias}\n\n".encode())

    def _admitted(self) -> None:
        """If it had to wait, its headers have been sent before there was anything to tell."""
        if self._commenting is not None and self.lease is not None:
            told = " ".join(f"{name}={value}" for name, value in _turn(self.lease).items())
            self._begin_to_comment(f": served {told}\n\n".encode(), is_last=True)

    def _begin_to_comment(self, comment: bytes, is_last: bool = False) -> None:
        self.close()  # there may be an older one
        self._commenting = asyncio.create_task(self._comment(comment, is_last))

    async def _comment(self, comment: bytes, is_last: bool) -> None:
        """Keep an event stream open while its request is frozen: proxies and clients time out."""
        message = {"type": "http.response.body", "body": comment, "more_body": True}
        while self.lease is not None and (is_last or self.lease.is_frozen):
            can_comment = self.started and self.is_event_stream and self._is_between_events
            if can_comment and not (self.is_sending or self.complete):
                await self._pass_on(message)
            if is_last:
                return
            await asyncio.sleep(COMMENT_S)

    def close(self) -> None:
        """Comment no more."""
        if self._commenting is not None:
            self._commenting.cancel()
            self._commenting = None

    def _look_at(self, body: Message) -> None:
        self.complete = not body.get("more_body", False)
        if self.is_event_stream and (text := body.get("body")):
            self._is_between_events = text.endswith(b"\n\n")
        if self.on_body is not None and body.get("body"):
            on_body, self.on_body = self.on_body, None
            on_body(body["body"])

    @property
    def can_tell(self) -> bool:
        """Whether there is still a place in the answer where an error can be told."""
        can_go_on = self.is_event_stream or self._scope["type"] == "websocket"
        return not self.complete and (can_go_on or not self.started)

    async def cut(self, cause: HotswapError) -> None:
        """End the answer with an explicit error, whatever of it has been sent.

        A client that does not read must not keep its lease, for which a drain waits. Where nothing
        has been sent, a refusal is told by `give_refusal`.
        """
        self.close()
        self._refusal.clear()
        if not self.started and cause.status < 500:
            self._refused_with = cause
            return
        try:
            async with asyncio.timeout(LAST_SEND_S):
                await self._say(cause)
        except TimeoutError:
            raise AnswerCut(cause.message) from None

    async def _say(self, cause: HotswapError) -> None:
        if not self.started:
            await openai.tell(cause, self._scope, self._receive, self._send)
        elif self._scope["type"] == "websocket":
            await self._send(openai.close_message(cause))
        elif self.is_event_stream:
            event = openai.error_event(cause, request_of(self._scope)[1])
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            raise AnswerCut(cause.message)

    async def refuse(self, error: HotswapError) -> None:
        """The whole answer."""
        self._refusal.clear()
        await openai.refuse(error, self._scope, self._receive, self._send)


def _turn(lease: Lease) -> dict[str, str]:
    """How the request came to have its turn."""
    return {
        "waited": f"{lease.waited_s:.3f}",
        "switched": str(lease.switched),
        "epoch": str(lease.epoch),
    }


def _headers(lease: Lease) -> list[tuple[bytes, bytes]]:
    turn = _turn(lease) if lease.admitted_s is not None else {}
    values = {"model": lease.alias, **turn}
    if lease.terms.priority is not None:
        values["priority"] = str(lease.terms.priority)
    return [(f"x-hotswap-{name}".encode(), in_header(text)) for name, text in values.items()]


def in_header(text: str) -> bytes:
    """A text as the value of a header: what is no visible ASCII is percent-encoded, as in a URL.

    So are percent signs and spaces, so that `urllib.parse.unquote` gives the text back.
    Source: RFC 9110, section 5.5 (what a value may be); RFC 3986, section 2.1 (percent-encoding).
    """
    return quote(text, safe=_AS_IT_IS).encode()


def _content_type(start: Message) -> bytes:
    for name, value in start.get("headers", ()):
        if name.lower() == b"content-type":
            return bytes(value)
    return b""


def uncancel() -> int:
    """Take back one cancellation of the current task; how many are left."""
    task = asyncio.current_task()
    assert task is not None
    return task.uncancel()
