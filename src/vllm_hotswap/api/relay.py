"""The messages between one request's client and the application that answers it.

`DisconnectWatcher` listens to the client while the request is held. `ClientChannel` is what the
application receives from, `ResponseRelay` what it sends to. Together they ensure that a response
which is cut says so, over HTTP and over WebSockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from vllm_hotswap.api import errors as openai
from vllm_hotswap.api.media import FORM_PIECE_BYTES, FORMS, media_type
from vllm_hotswap.api.refusals import hold_back, note_refusal, note_served
from vllm_hotswap.errors import HotswapError
from vllm_hotswap.models import PER_TURN, Lease, give_back, request_of

_AS_IT_IS = "".join(map(chr, range(0x21, 0x7F))).replace("%", "")
"""Characters of a header's value that stand for themselves."""

LAST_SEND_S = 3.0
"""Seconds that a client gets to read why its response was cut; then its connection is dropped."""

PARKED_COMMENT = b": parked\n\n"
COMMENT_S = 10.0
"""Seconds between comments in the event stream of a request that waits or is parked."""


CLIENT_LEFT = 499
"""The status that a server notes for a client that left before its response. Source: nginx."""

REFUSAL_BYTES = 8 << 10
"""The longest body of an application's refusal that is set aside; a longer one is sent at once."""


class ResponseTruncated(Exception):
    """A response was cut after its first byte, and cannot say so itself.

    It is not an event stream, or its client does not read. When this leaves the application, the
    HTTP server closes the connection before the response is complete. That is the only explicit
    error left.
    """


class DisconnectWatcher:
    """Listens to a client while its request is held, and cancels the request if the client leaves.

    A request that is admitted at once stops this before its task first yields to the event loop.
    So no listening task is made for it.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._disconnect = f"{scope['type']}.disconnect"
        self._receive = receive
        self._request = asyncio.current_task()
        self._listening: asyncio.Task[None] | None = None
        self._begin = asyncio.get_running_loop().call_soon(self._start_listening)
        self.heard: list[Message] = []
        """Messages that came during the wait; the application must get them."""
        self.client_left = False

    async def end(self) -> None:
        """Stop listening. From then on nothing receives here, and a leaving client cancels nothing.

        It waits for the listening task: two receivers at once could each take the other's message.
        """
        self.stop()
        if self._listening is not None:
            await asyncio.gather(self._listening, return_exceptions=True)

    def stop(self) -> None:
        self._begin.cancel()
        if self._listening is not None:
            self._listening.cancel()

    def _start_listening(self) -> None:
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while (message := await self._receive())["type"] != self._disconnect:
            self.heard.append(message)
        self.client_left = True
        if self._request is not None:
            self._request.cancel()


class ClientChannel:
    """The application's `receive`: first what was read already, then the client's disconnect.

    An application whose lease is cut gets a disconnect. vLLM listens for that and aborts the
    request in its engine. Cancelling the task instead would leave the request running there.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        body: bytes | None,
        heard: list[Message],
        lease: Lease,
        answer: ResponseRelay,
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
                # `_interrupt` cancels this task only to end the wait, so its cancellation is taken
                # back. Any other one must go through.
                if not self._interrupted or uncancel() > 0:
                    raise
        return {"type": self._disconnect, "code": 1013}

    async def _listen(self) -> Message:
        """Wait for the client; `_interrupt` ends the wait. Makes no task: this is a hot path.

        The next listener may start before the last one has noticed its cancellation. So a listener
        clears `_listening` only if that is still its own task.
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
    """Yield a form in pieces, for its parser; yield anything else whole, as it is parsed whole."""
    is_form = media_type(Headers(scope=scope)) in FORMS
    size = FORM_PIECE_BYTES if is_form else len(body)
    for start in range(0, len(body) or 1, size or 1):
        yield body[start : start + size]


class ResponseRelay:
    """Relays a response and tracks its state, so that a cut can be reported in the right form.

    A refusal by the application is set aside, and sent by `send_refusal` when its lease is over.
    Until then the response may be complete without having started.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self.lease: Lease | None = None
        self.on_body: Callable[[bytes], None] | None = None
        """Called once, with the first piece of the body, before that is sent."""
        self.started = False
        self.complete = False
        self._sending = 0
        self._sending_since_s = self._kept_waiting_s = 0.0
        self.sent = 0
        """Messages sent so far. If it does not grow while one is being sent, the client stalls."""
        self.is_event_stream = False
        self.is_ahead = False
        """Whether the response has started before its application started one."""
        self._instead: bytearray | None = None
        """The body that the application sends instead of the event stream that has started."""
        self._is_between_events = True
        self._refusal: list[Message] = []
        """The application's refusal, set aside: it may have to wait, but its lease must not."""
        self._refusal_bytes = 0
        self._refused_with: HotswapError | None = None
        """The server's own refusal, in place of a response."""
        self._commenting: asyncio.Task[None] | None = None

    def attach(self, lease: Lease) -> None:
        """Follow this lease from now on."""
        self.lease = lease
        lease.kept_waiting_s = self.kept_waiting_s
        lease.on_park = self._on_park
        lease.on_wait = self._on_wait
        lease.on_admit = self._on_admit

    async def begin_event_stream(self) -> None:
        """Start the response before its application does.

        If the application answers with something else, an error, that becomes the last event.
        """
        start: Message = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
        }
        if await self._may_continue(start):
            await self._forward(start)
        self.is_ahead = True

    async def send(self, message: Message) -> None:
        """Relay a message of the application: this is its `send`."""
        if not await self._may_continue(message):
            return
        if self._refusal or self._is_refusal(message):
            await self._set_aside(message)
            return
        self._note(message)
        rest = self._buffer_error(message) if self.is_ahead else message
        if rest is not None:
            await self._forward(rest)

    async def _may_continue(self, message: Message) -> bool:
        """Wait until the response may continue; return False if it has been cut."""
        if self.sent % PER_TURN == PER_TURN - 1:
            await give_back()  # a large request may have many events ready, in one task
        if self.lease is not None:
            # The gate first, then the cut. vLLM answers an aborted request as if it had ended by
            # itself, with `finish_reason: "abort"` and status 200. A cut opens the gate, so a check
            # before it would pass that on as the response: the client would take it for whole.
            # The same holds for output of an engine that fails its verification.
            if self.lease.gate is not None:
                await asyncio.wait([self.lease.gate])
            if self.lease.cut is not None:
                return False  # what an application sends after a cut is not the response
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                self.lease.status = message["status"]
        self._stop_comments()
        return True

    def _note(self, start: Message) -> None:
        """Note whether the client is served, or refused within a stream that has started."""
        if start["type"] == "websocket.accept":
            note_served(self._scope)
        elif start["type"] == "http.response.start" and not self._has_client_left:
            if start["status"] < 300:
                note_served(self._scope)
            elif 400 <= start["status"] < CLIENT_LEFT:
                note_refusal(self._scope)

    @property
    def _has_client_left(self) -> bool:
        return self.lease is not None and self.lease.client_left

    def _is_refusal(self, message: Message) -> bool:
        """Whether it starts a response that reports a mistake of the client."""
        if message["type"] != "http.response.start" or self.is_ahead or self.lease is None:
            return False
        return 400 <= message["status"] < CLIENT_LEFT and not self._has_client_left

    async def _set_aside(self, message: Message) -> None:
        self._refusal.append(message)
        self._refusal_bytes += len(message.get("body", b""))
        if self._refusal_bytes > REFUSAL_BYTES:
            note_refusal(self._scope)
            await self._forward_refusal()
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            assert self.lease is not None
            self.complete = self.lease.is_answered = True

    async def _forward_refusal(self) -> None:
        messages, self._refusal = self._refusal, []
        for message in messages:
            await self._forward(message)

    async def send_refusal(self) -> None:
        """Send the refusal, if there is one, after the wait that refused requests have.

        Call it once the lease has ended.
        """
        if self._refused_with is not None:
            error, self._refused_with = self._refused_with, None
            await self.refuse(error)
        elif self._refusal:
            self.on_body = None
            await hold_back(self._scope)
            await self._forward_refusal()

    async def _forward(self, message: Message) -> None:
        match message["type"]:
            case "http.response.start":
                message = self._with_headers(message)
                self.is_event_stream = _content_type(message).startswith(b"text/event-stream")
            case "http.response.body":
                self._track(message)
            case "websocket.accept" | "websocket.http.response.start":
                self.started = True
            case "websocket.close":
                self.started = self.complete = True
        await self._pass_on(message)
        if message["type"] == "http.response.start":
            self.started = True  # not before: a cut must not send a body without it
        if self.complete and self.lease is not None:
            self.lease.is_answered = True

    def _buffer_error(self, message: Message) -> Message | None:
        """Return what is left to send of a message, where the response started ahead of it."""
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

    def _stop_comments(self) -> None:
        """Stop comments while the application sends, unless its request is frozen."""
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
        """Return for how many seconds, so far, something has waited for the client to read it."""
        if not self._sending:
            return self._kept_waiting_s
        return self._kept_waiting_s + asyncio.get_running_loop().time() - self._sending_since_s

    @property
    def is_sending(self) -> bool:
        """Whether the application or a comment waits for the client to read."""
        return self._sending > 0

    def _with_headers(self, start: Message) -> Message:
        """Return the start with headers that tell what became of the request so far."""
        if self.lease is None:
            return start
        return {**start, "headers": [*start.get("headers", ()), *_headers(self.lease)]}

    def _on_park(self) -> None:
        self._start_comments(PARKED_COMMENT)

    def _on_wait(self) -> None:
        assert self.lease is not None
        self._start_comments(f": waiting for {self.lease.alias}\n\n".encode())

    def _on_admit(self) -> None:
        """Report its turn in a comment, if it had to wait: its headers were sent before that."""
        if self._commenting is not None and self.lease is not None:
            report = " ".join(f"{name}={value}" for name, value in _turn(self.lease).items())
            self._start_comments(f": served {report}\n\n".encode(), is_last=True)

    def _start_comments(self, comment: bytes, is_last: bool = False) -> None:
        self.close()  # there may be an older one
        self._commenting = asyncio.create_task(self._comment(comment, is_last))

    async def _comment(self, comment: bytes, is_last: bool) -> None:
        """Comment in the event stream of a frozen request, as proxies and clients time out."""
        message = {"type": "http.response.body", "body": comment, "more_body": True}
        while self.lease is not None and (is_last or self.lease.is_frozen):
            can_comment = self.started and self.is_event_stream and self._is_between_events
            if can_comment and not (self.is_sending or self.complete):
                await self._pass_on(message)
            if is_last:
                return
            await asyncio.sleep(COMMENT_S)

    def close(self) -> None:
        """Stop comments."""
        if self._commenting is not None:
            self._commenting.cancel()
            self._commenting = None

    def _track(self, body: Message) -> None:
        self.complete = not body.get("more_body", False)
        if self.is_event_stream and (text := body.get("body")):
            self._is_between_events = text.endswith(b"\n\n")
        if self.on_body is not None and body.get("body"):
            on_body, self.on_body = self.on_body, None
            on_body(body["body"])

    @property
    def can_report(self) -> bool:
        """Whether the response can still report an error."""
        can_go_on = self.is_event_stream or self._scope["type"] == "websocket"
        return not self.complete and (can_go_on or not self.started)

    async def cut(self, cause: HotswapError) -> None:
        """End the response with an explicit error, however much of it has been sent.

        A client that does not read must not keep its lease, for which a drain waits. Where nothing
        has been sent, `send_refusal` sends a refusal.
        """
        self.close()
        self._refusal.clear()
        if not self.started and cause.status < 500:
            self._refused_with = cause
            return
        try:
            async with asyncio.timeout(LAST_SEND_S):
                await self._send_error(cause)
        except TimeoutError:
            raise ResponseTruncated(cause.message) from None

    async def _send_error(self, cause: HotswapError) -> None:
        if not self.started:
            await openai.send_error(cause, self._scope, self._receive, self._send)
        elif self._scope["type"] == "websocket":
            await self._send(openai.close_message(cause))
        elif self.is_event_stream:
            event = openai.error_event(cause, request_of(self._scope)[1])
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            raise ResponseTruncated(cause.message)

    async def refuse(self, error: HotswapError) -> None:
        """Send an error as the whole response."""
        self._refusal.clear()
        await openai.refuse(error, self._scope, self._receive, self._send)


def _turn(lease: Lease) -> dict[str, str]:
    """Return how the request got its turn."""
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
    """Return a text as a header's value: all but visible ASCII is percent-encoded, as in a URL.

    Percent signs and spaces are encoded, too, so that `urllib.parse.unquote` gives the text back.
    Source: RFC 9110, section 5.5 (what a value may be); RFC 3986, section 2.1 (percent-encoding).
    """
    return quote(text, safe=_AS_IT_IS).encode()


def _content_type(start: Message) -> bytes:
    for name, value in start.get("headers", ()):
        if name.lower() == b"content-type":
            return bytes(value)
    return b""


def uncancel() -> int:
    """Take back one cancellation of the current task; return how many are left."""
    task = asyncio.current_task()
    assert task is not None
    return task.uncancel()
