"""The router: from a request to the application of the model that it names.

Pure ASGI. The router reads the body whole (vLLM would, too), finds `model` in it, takes a lease,
and replays the body to that model's application. The lease ends when the application has sent the
last byte of its response and has no work left for it, or when the client has gone. A request does
not wait for a model that has no such route. Requests that name a kept response go to the model
that keeps it, without a lease: they need no engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.utils import ClientDisconnected

from vllm_hotswap.access import Access, Account, Sharing
from vllm_hotswap.api import asked, media, model_name as model_field, responses
from vllm_hotswap.api.bodies import Bodies, ClientGone, HeldBody, text_bytes
from vllm_hotswap.api.model_name import NO_FIELDS, Fields
from vllm_hotswap.api.rates import Rates
from vllm_hotswap.api.relay import (
    ClientChannel,
    DisconnectWatcher,
    ResponseRelay,
    ResponseTruncated,
    uncancel,
)
from vllm_hotswap.api.responses import Owners, ResponseFollower
from vllm_hotswap.config import LimitsConfig
from vllm_hotswap.errors import (
    ClientStalled,
    HotswapError,
    InternalError,
    InvalidRequest,
    TooManyValues,
    WrongTask,
)
from vllm_hotswap.models import WEBSOCKET, Lease, Model, current_lease, drain, request_of
from vllm_hotswap.scheduling import RequestTerms
from vllm_hotswap.states import RequestStep
from vllm_hotswap.switching import Coordinator
from vllm_hotswap.system import Bounds, log_of_clients
from vllm_hotswap.tasks import Turns, at_once
from vllm_hotswap.text import MAX_TEXT_BYTES, HalfSurrogate, TooLong, json_scan, surrogates

BODY_METHODS = frozenset(["POST", "PUT", "PATCH", "DELETE"])

STREAMS_STARTED_EARLY = frozenset(["/v1/chat/completions", "/v1/completions"])
"""Routes whose event streams may start before their model has a frontend."""


class PreviewRejected(Exception):
    """A request is refused with a response that a model's preview has written."""

    def __init__(self, answer: Response) -> None:
        super().__init__(answer.status_code)
        self.answer = answer


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """A request whose model is known: its name is looked up once, when its body has been read."""

    model: Model
    name: str | None
    """The name of the model in the request; None: it goes to the active one."""
    body: bytes | None
    """None: it is a WebSocket."""
    terms: RequestTerms
    is_stream: bool
    requests: int
    """How many engine requests it may become."""
    account: Account
    request_id: str | None
    """The id that the client wants for its response."""


class Router:
    """An ASGI application that hands each request, whole, to its model's application."""

    def __init__(
        self,
        coordinator: Coordinator,
        access: Access,
        rates: Rates,
        limits: LimitsConfig | None = None,
        prefix_cache: Sharing | None = None,
    ) -> None:
        self._coordinator = coordinator
        self._access = access
        self._rates = rates
        self._registry = coordinator.registry
        self._limits = limits or LimitsConfig()
        self._grammar_bounds = Bounds(self._limits.grammar_memory, self._limits.grammar_seconds)
        self._prefix_cache = prefix_cache
        self.bodies = Bodies(self._limits)
        self.owners = Owners(self._registry, self._limits.kept_responses)
        self._answers: set[ResponseRelay] = set()
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = ResponseRelay(scope, receive, send)
        self._answers.add(answer)
        account = self._access.account(Headers(scope=scope))
        try:
            with self.bodies.hold(account) as held:
                refusal = await self._take(scope, receive, answer, held, account)
            if refusal is not None:  # after its body was released: it may have to wait
                await answer.refuse(refusal)
            await answer.send_refusal()
        except ClientGone:
            pass
        except ClientDisconnected:
            raise  # uvicorn's, of a websocket, which uvicorn handles
        except Exception as error:
            if isinstance(error, ResponseTruncated) or not answer.can_report:
                await answer.send_refusal()
                raise  # the HTTP server logs it, and closes the connection
            log_of_clients.exception("event=request_failed code=internal_error")
            await answer.cut(InternalError())
        finally:
            self._answers.discard(answer)
            answer.close()
            if (lease := answer.lease) is not None:
                self._rates.spend(account, lease.prompt_tokens + lease.output_tokens)

    async def _take(
        self,
        scope: Scope,
        receive: Receive,
        answer: ResponseRelay,
        held: HeldBody,
        account: Account,
    ) -> HotswapError | None:
        """Serve the request. Return what to refuse it with, if nothing was sent."""
        method, path = request_of(scope)
        try:
            headers = Headers(scope=scope)
            body = await held.read(receive, headers) if method in BODY_METHODS else b""
            fields = await self._fields(scope, path, body)
            held.weigh(await self._weight(path, body), fields.values)
            name, kept, request = _model_of(scope, fields), None, None
            if response_id := responses.response_id_in_path(method, path):
                self.owners.check(response_id, account, name)
                most = self._limits.kept_responses
                kept = responses.owner_of(self._registry, response_id, name, most), response_id
            else:
                request = self._routed(scope, body, fields, name, account)
                self._rates.take(account)  # last: what is refused above does not count
        except HotswapError as error:
            return error
        del fields  # only the body itself is kept for long
        if kept is not None:
            await self._serve_kept_response(*kept, scope, receive, body, answer)
            return None
        assert request is not None
        refusal = await self._route(scope, receive, answer, request)
        if answer.lease is None or (answer.lease.cut and answer.lease.admitted_s is None):
            self._rates.give_back(account)  # the server was full, or the model never became active
        return refusal

    def _routed(
        self, scope: Scope, body: bytes, fields: Fields, name: str | None, account: Account
    ) -> RoutedRequest:
        """Find the request's model, and check all that can be checked before it is held.

        Raises:
            HotswapError: the request is refused.
        """
        method, path = request_of(scope)
        if path == responses.PATH:
            self._check_owner(fields, account, name)
            previous = fields.previous_response_id
            name = responses.alias_of_previous_response(self._registry, previous, name)
        model = self._coordinator.resolve_target(name)
        # The model that was active last may not be the one that is active next.
        if name is not None or model.alias in (self._coordinator.target, self._coordinator.active):
            self._check_route(model, method, path)
        terms = self._terms(scope, model)
        requests = asked.requests_of(path, fields.members, self._limits)
        asked.check_grammar(fields.members, self._limits, model.engine.are_tools_strict)
        return RoutedRequest(
            model,
            name,
            None if method == WEBSOCKET else body,
            replace(terms, charge=partial(self._rates.switch, account)),
            fields.stream,
            requests,
            account,
            fields.request_id,
        )

    async def _fields(self, scope: Scope, path: str, body: bytes) -> Fields:
        """Return what the router has to know of a body.

        Raises:
            UnsupportedMediaType: the route does not accept its media type.
            InvalidRequest: a name in it is beyond all bounds, or a text is not Unicode.
            TooManyValues: parsing it would keep all other requests waiting.
        """
        if not body:
            return NO_FIELDS
        headers = Headers(scope=scope)
        media.check_model_body(headers, path)
        is_form = path in media.FORM_PATHS
        kind = headers["content-type"]
        most_values = self._limits.body_values
        work = (
            model_field.form_fields(body, kind)
            if is_form
            else model_field.json_fields(body, most_values, asked.keys_of(path))
        )
        try:
            if len(body) <= model_field.SMALL_BYTES:
                return at_once(work)
            return await self._turns.run(work)
        except json_scan.TooManyValues:
            raise TooManyValues(most_values) from None
        except HalfSurrogate as error:
            raise InvalidRequest(surrogates.message_of(str(error))) from None
        except TooLong as error:
            raise InvalidRequest(
                f"{error} is longer than {MAX_TEXT_BYTES} bytes; names must be shorter", str(error)
            ) from None

    async def _weight(self, path: str, body: bytes) -> int:
        """Return the bytes of a body and of its texts. Forms have no texts."""
        if path in media.FORM_PATHS:
            return len(body)
        if len(body) <= model_field.SMALL_BYTES:
            return at_once(text_bytes(body))
        return await self._turns.run(text_bytes(body))

    async def disconnect_stalled_clients(self) -> None:
        """Until cancelled, end requests whose clients have stopped reading."""
        timeout_s = self._limits.client_timeout
        before: dict[ResponseRelay, int] = {}
        while True:
            await asyncio.sleep(timeout_s)
            sending = {answer: answer.sent for answer in self._answers if answer.is_sending}
            for answer, sent in sending.items():
                if before.get(answer) == sent and answer.lease is not None:
                    # The application may not listen for a disconnect, so it is cancelled later.
                    drain.end([answer.lease], ClientStalled(timeout_s))
            before = sending

    async def _serve_kept_response(
        self,
        owner: Model,
        response_id: str,
        scope: Scope,
        receive: Receive,
        body: bytes,
        answer: ResponseRelay,
    ) -> None:
        """Serve a kept response from its frontend, whether or not the engine is active."""
        keeper = owner.engine.responses
        assert keeper is not None
        lease = Lease(owner, self._coordinator.epoch, asyncio.current_task())
        answer.attach(lease)
        client = ClientChannel(scope, receive, body, [], lease, answer)
        following = ResponseFollower(keeper, lease, answer)
        following.begin(response_id)
        try:
            await self._answer(lease, scope, client, answer)
        finally:
            lease.step(RequestStep.END)
            following.stop()

    async def _route(
        self,
        scope: Scope,
        receive: Receive,
        answer: ResponseRelay,
        request: RoutedRequest,
    ) -> HotswapError | None:
        """Serve the request with its model. Return what to refuse it with, if nothing was sent."""
        waiting = DisconnectWatcher(scope, receive)
        try:
            preview = None
            is_redirected = scope["path"].endswith("/")  # by the application
            body, model, account = request.body, request.model, request.account
            if body and scope["method"] == "POST" and not is_redirected:
                preview = partial(self._preview, scope, body, answer, request.is_stream)
            with self._coordinator.reserve(model, request.requests):
                async with self._coordinator.lease(
                    model, request.name, request.terms, preview
                ) as lease:
                    await waiting.end()  # first: two tasks must not receive from the client at once
                    lease.calls = request.requests
                    lease.cache_salt = self._access.cache_salt(account, self._prefix_cache)
                    lease.account = account.name
                    if account.is_bounded:
                        lease.engine_share = self._limits.engine_share
                    lease.grammar_timeout_s = self._limits.grammar_timeout
                    lease.grammar_bounds = self._grammar_bounds
                    lease.is_connection = scope["type"] == "websocket"
                    answer.attach(lease)
                    client = ClientChannel(scope, receive, body, waiting.heard, lease, answer)
                    with _noting_errors(lease):
                        await self._serve(lease, scope, client, answer, request)
        except PreviewRejected as refusal:
            await waiting.end()
            await refusal.answer(scope, receive, answer.send)
        except asyncio.CancelledError:
            cut = answer.lease.cut if answer.lease is not None else None
            if not waiting.client_left and cut is not None and not answer.complete:
                uncancel()  # the task missed the cut: it was sending to a client that does not read
                await answer.cut(cut)
            elif not waiting.client_left or uncancel() > 0:
                raise  # not by `waiting` alone, which cancels the task when its client leaves
        except HotswapError as error:
            await waiting.end()
            if answer.is_ahead and not answer.complete:
                await answer.cut(error)
            elif answer.started or answer.complete:
                raise
            else:
                return error
        finally:
            waiting.stop()
        return None

    async def _preview(
        self, scope: Scope, body: bytes, answer: ResponseRelay, is_stream: bool, lease: Lease
    ) -> None:
        """Preview a request whose model has to be loaded before there is a frontend for it.

        An event stream without a known error starts at once: clients and proxies would not wait
        for so long without a byte.

        Raises:
            PreviewRejected: its error shows without loading anything.
        """
        answer.attach(lease)
        _, path = request_of(scope)
        content_type = Headers(scope=scope).get("content-type", "")
        previewed = await lease.model.engine.preview(path, content_type, body)
        if previewed.refusal is not None and lease.cut is None:
            lease.status = previewed.refusal.status_code
            raise PreviewRejected(previewed.refusal)
        if previewed.is_accepted and path in STREAMS_STARTED_EARLY and is_stream:
            await answer.begin_event_stream()

    async def _serve(
        self,
        lease: Lease,
        scope: Scope,
        client: Receive,
        answer: ResponseRelay,
        request: RoutedRequest,
    ) -> None:
        """Let the model answer, and keep it until all work that it has accepted is done."""
        method, path = request_of(scope)
        self._check_route(lease.model, method, path)  # again: its frontend may be new
        keeper = lease.model.engine.responses
        if keeper is None or path != responses.PATH:
            await self._answer(lease, scope, client, answer)
            return
        following = ResponseFollower(
            keeper, lease, answer, lambda found: self.owners.note(found, request.account)
        )
        following.follow_named_response()
        if request.request_id:
            self.owners.check_new(request.request_id, request.account)
            self.owners.note(request.request_id, request.account)
        try:
            await self._answer(lease, scope, client, answer)
            await following.wait_until_done()
        finally:
            following.stop()
            for name in filter(None, (request.request_id, following.response_id)):
                self.owners.forget(name, keeper)

    async def _answer(
        self, lease: Lease, scope: Scope, receive: Receive, answer: ResponseRelay
    ) -> None:
        """Run the model's application; if its lease is cut, tell the client."""
        app = lease.model.engine.app
        current_lease.set(lease)
        try:
            await app(scope, receive, answer.send)
        except (Exception, asyncio.CancelledError):
            # An application that is cancelled may raise something else, or nothing.
            if lease.cut is None:
                raise
        if lease.cut is not None:
            uncancel()
            if not answer.complete:
                await answer.cut(lease.cut)

    def _check_owner(self, fields: Fields, account: Account, alias: str | None) -> None:
        """Check that a new response neither continues nor replaces another owner's.

        Raises:
            UnknownResponse: it continues one.
            InvalidRequest: it has the id of one.
        """
        if fields.previous_response_id:
            self.owners.check(fields.previous_response_id, account, alias)
        if fields.request_id:
            self.owners.check_new(fields.request_id, account)

    def _terms(self, scope: Scope, model: Model) -> RequestTerms:
        """Return what the request may ask for. Raises `InvalidRequest` for an invalid header."""
        own = RequestTerms(model.settings.priority, self._coordinator.max_wait_s(model))
        return self._access.terms(Headers(scope=scope), model.alias, own)

    def _check_route(self, model: Model, method: str, path: str) -> None:
        """Refuse a request if its model is known, loaded or not, to have no route for it.

        Raises:
            WrongTask: the model has none.
        """
        routes = model.engine.routes or model.engine.foreseen
        if routes is not None and not routes.serve(method, path):
            raise self._wrong_task(model.alias, routes.tasks, method, path)

    def _wrong_task(self, alias: str, tasks: Sequence[str], method: str, path: str) -> HotswapError:
        others: list[str] = []
        unknown: list[str] = []
        for model in self._registry:
            routes, foreseen = model.engine.routes, model.engine.foreseen
            if routes is not None:
                others += [model.alias] if routes.serve(method, path) else []
            elif foreseen is None or foreseen.serve(method, path):
                is_sure = foreseen is not None and path in foreseen.present
                (others if is_sure else unknown).append(model.alias)
        return WrongTask(alias, tasks, f"{method} {path}", others, unknown)


@contextmanager
def _noting_errors(lease: Lease) -> Iterator[None]:
    """Note an error's status in the lease: the error is answered only when the lease is over."""
    try:
        yield
    except Exception as error:
        lease.status = error.status if isinstance(error, HotswapError) else 500
        raise


def _model_of(scope: Scope, fields: Fields) -> str | None:
    """Return the alias that a request names, None if it names none."""
    alias = fields.model
    if alias is None:
        alias = model_field.from_query(scope["query_string"])
    if alias == "":
        raise InvalidRequest("model is empty; name a configured alias or leave it out", "model")
    return alias
