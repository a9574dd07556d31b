"""Every error that this package raises, named after what the caller can do.

::

    HotswapError
    ├── InternalError            500  internal server error; see the server log
    ├── ConfigError              the configuration cannot work; fix the named key or file
    ├── UnknownModel             404  ask for one of the configured aliases
    ├── ModelNotActive           404  switch first, or ask for the active alias
    ├── UnknownAdapter           404  ask for one of the model's adapters
    ├── AdapterRefused           400  the adapter cannot be used; repair it
    ├── AdapterUnavailable       503  the adapter could not be loaded; its model can be asked
    ├── AdaptersNotAllowed       403  the operator has named no folder for adapters
    ├── NameTaken                409  a model or an adapter has the name; choose another
    ├── ModelSwitching           503  the model is being drained; retry after the switch
    ├── SwitchInProgress         409  another target is under way; retry after it
    ├── SwitchFailed             503  the target could not be brought up; the cause is named
    ├── LoadFailed               503  the model could not be moved; repair it and try again
    ├── NoRoom                   409  the memory budget does not hold it; free or unpin a model
    ├── ModelInUse               409  the model is active, pinned or busy; the message has a way out
    ├── ModelLeased              409  another model is held for a job; its lease is named
    ├── UnknownLease             404  no job lease has that id
    ├── SwitchNotAllowed         403  the server was not started with switching open
    ├── CrossOriginRefused       403  a web page of another origin asks; allow its origin
    ├── HostRefused              403  the name of the host is not this machine's; allow it
    ├── Unauthorized             401  send a valid key
    ├── InvalidRequest           400  the body or a parameter is wrong
    ├── UnknownRoute             404  there is no such route; see the list of routes
    ├── MethodNotAllowed         405  the path takes other methods; they are named
    ├── WrongTask                404  the model has no such route; use a model that has it
    ├── UnknownResponse          404  no model keeps a response with that id
    ├── ResponseEnded            409  the response has no more events; ask how it ended
    ├── QueueFull                429  too many requests wait or run; retry later
    ├── RateLimited              429  the key has used up what it may do in a minute; retry later
    ├── SwitchRateLimited        429  too many switches in a short time; retry later
    ├── BodyTooLarge             413  the body is longer than the server accepts
    ├── TooManyValues            413  the body has more values than the server accepts
    ├── CallTooLarge             413  the call needs too many engine requests; split it
    ├── GrammarTooLarge          413  a schema or a grammar has too much in it; simplify it
    ├── GrammarTooCostly         413  compiling the grammar takes too much; simplify it
    ├── UnsupportedMediaType     415  send the body with the header that is named
    ├── BodyTimeout              408  the body did not arrive in time
    ├── MalformedRequest         400  the data is not an HTTP request; check the client
    ├── ChunksTooSmall           400  a body in many small chunks; send larger ones
    ├── UpgradeWithBody          400  a body and another protocol at once; leave one of them out
    ├── HeadTooLarge             431  send fewer or shorter header fields
    ├── UrlTooLong               414  send a shorter URL
    ├── HeadTimeout              408  the head of the request did not arrive in time
    ├── TooManyConnections       503  every connection is in use; retry later
    ├── WaitTimeout              504  the switch took longer than a request may wait
    ├── GrammarTimeout           504  the grammar was not compiled in time; simplify it, or retry
    ├── DrainRefused             409  requests still run; wait for them, or park or abort them
    ├── DrainCut                 503  the request was still running at the drain deadline
    ├── ParkedEnded              503  the request was parked and cannot be resumed; repeat it
    ├── ClientStalled            503  the client stopped reading its response
    ├── WrongStamp               500  an output was not of the request's model and epoch
    ├── VerifyFailed             503  the canary of a model differs from that of its first load
    ├── NotReady                 503  nothing can be served now; the reason is named
    └── EngineUnavailable        503  the engine or its host died

Domain code raises these; `api.errors.error_response` turns them into HTTP in one place.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_hotswap.hints import did_you_mean

MAX_SHOWN = 100
"""Characters of a client's text that a message repeats at most."""


class HotswapError(Exception):
    """Base of all errors of this package.

    Class attributes give the HTTP form: `status`, OpenAI `type` and `code`.
    `retry_after_s`, where set, becomes the `Retry-After` header (seconds), and `allow` the
    `Allow` header.
    """

    status = 500
    type = "internal_error"
    code = "internal_error"
    param: str | None = None
    retry_after_s: int | None = None
    allow: str | None = None

    def __init__(self, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class InternalError(HotswapError):
    """A mistake of the server itself. Clients get no details; the log has them all."""

    def __init__(self) -> None:
        super().__init__("internal server error; see the server log")


class ConfigError(HotswapError):
    """The configuration cannot work. The message names the file or key and the next step."""

    code = "invalid_configuration"


@dataclass(frozen=True, slots=True)
class Mistake:
    """Something in the YAML file that cannot work."""

    line: int
    """Its line in the file, from 1; 0 where that is not known."""
    message: str


class ConfigMistakes(ConfigError):
    """All mistakes of one file, in the order of its lines. The message has one line for each."""

    def __init__(self, mistakes: Iterable[Mistake]) -> None:
        found = dict.fromkeys(mistakes)  # one in `defaults` is found again in each model
        self.mistakes = sorted(found, key=lambda mistake: mistake.line)
        lines = [" ".join(mistake.message.split()) for mistake in self.mistakes]
        super().__init__("\n".join(lines))


def mistakes_of(error: ConfigError, line: int = 0) -> Sequence[Mistake]:
    """Return the mistakes of an error; `line` is for an error that has no line of its own."""
    if isinstance(error, ConfigMistakes):
        return error.mistakes
    return [Mistake(line, error.message)]


class UnknownModel(HotswapError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"
    param = "model"

    def __init__(self, alias: str, configured: Iterable[str]) -> None:
        names = list(configured)
        super().__init__(
            f"model {alias!r} is not configured; configured: {', '.join(names)}"
            f"{did_you_mean(alias, names)}"
        )


class ModelNotActive(HotswapError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_active"
    param = "model"

    def __init__(self, alias: str, active: str | None, asked: str | None = None) -> None:
        now = f"the active model is {active!r}" if active else "no model is active"
        of = f" (asked for as {asked!r})" if asked not in (None, alias) else ""
        super().__init__(
            f"model {alias!r}{of} is configured but not active; {now}; "
            f'an admin can switch with POST /v1/models/switch {{"model": "{alias}"}}'
        )


class UnknownAdapter(HotswapError):
    status = 404
    type = "invalid_request_error"
    code = "adapter_not_found"

    def __init__(self, alias: str | None, name: str, adapters: Iterable[str]) -> None:
        fact = f"model {alias!r} has no adapter" if alias else "no model has an adapter"
        known = ", ".join(adapters) or "none"
        super().__init__(f"{fact} {name!r}; adapters: {known}")


class AdapterRefused(HotswapError):
    """The adapter cannot be served, and nothing has changed. The message has the reason."""

    status = 400
    type = "invalid_request_error"
    code = "adapter_refused"


class AdapterUnavailable(HotswapError):
    status = 503
    type = "service_unavailable_error"
    code = "adapter_unavailable"
    param = "model"

    def __init__(self, alias: str, failure: str) -> None:
        super().__init__(f"{failure}; its model {alias!r} is served without it")


class AdaptersNotAllowed(HotswapError):
    status = 403
    type = "permission_error"
    code = "adapters_not_allowed"


class NameTaken(HotswapError):
    status = 409
    type = "conflict_error"
    code = "name_taken"


class ModelSwitching(HotswapError):
    status = 503
    type = "service_unavailable_error"
    code = "model_switching"

    def __init__(self, source: str, target: str, retry_after_s: int) -> None:
        super().__init__(
            f"model {source!r} is being drained for a switch to {target!r}; "
            f"retry after the switch, or use {target!r}",
            retry_after_s=retry_after_s,
        )


class SwitchInProgress(HotswapError):
    status = 409
    type = "conflict_error"
    code = "switch_in_progress"

    def __init__(self, target: str, requested: str, operation_id: str) -> None:
        super().__init__(
            f"a switch to {target!r} is in progress (operation {operation_id}), "
            f"so {requested!r} cannot be activated now; retry after it",
            retry_after_s=1,
        )


class SwitchFailed(HotswapError):
    status = 503
    type = "service_unavailable_error"
    code = "switch_failed"

    def __init__(
        self,
        target: str,
        phase: str,
        cause: BaseException,
        serving: str | None,
        retry_after_s: int | None = None,
    ) -> None:
        then = f"{serving!r} is still active" if serving else "no model is active"
        super().__init__(
            f"switch to {target!r} failed in phase {phase}: {one_line(cause)}; {then}",
            retry_after_s=retry_after_s,
        )


class LoadFailed(HotswapError):
    """A model could not be loaded, woken or put to sleep; the cause is in the message."""

    status = 503
    type = "service_unavailable_error"
    code = "load_failed"

    def __init__(self, alias: str, operation: str, cause: BaseException) -> None:
        super().__init__(
            f"{operation} of model {alias!r} failed: {one_line(cause)}; fix the cause and retry"
        )


class NoRoom(HotswapError):
    """No allowed eviction makes room in the memory budget. The message has the arithmetic."""

    status = 409
    type = "conflict_error"
    code = "no_room"


class ModelInUse(HotswapError):
    """The operation would take memory from a model that has to keep it."""

    status = 409
    type = "conflict_error"
    code = "model_in_use"

    def __init__(self, alias: str, operation: str, why: str) -> None:
        super().__init__(f"{operation} of model {alias!r} is refused: {why}")


class ModelLeased(HotswapError):
    """A job holds another model, so this one can be neither switched to nor held."""

    status = 409
    type = "conflict_error"
    code = "model_leased"

    def __init__(
        self, asked: str, held: str, owner: str, lease_id: str, expires_in_s: float
    ) -> None:
        super().__init__(
            f"model {held!r} is leased to a job of {owner!r} for another {expires_in_s:.0f} s, "
            f"so {asked!r} cannot become active; wait, or end the lease with DELETE "
            f"/admin/leases/{lease_id}",
            retry_after_s=max(1, round(expires_in_s + 0.5)),
        )


class UnknownLease(HotswapError):
    status = 404
    type = "invalid_request_error"
    code = "lease_not_found"

    def __init__(self, lease_id: str) -> None:
        super().__init__(
            f"job lease {lease_id!r} does not exist, or has ended; GET /admin/leases lists them"
        )


class SwitchNotAllowed(HotswapError):
    status = 403
    type = "permission_error"
    code = "switch_not_allowed"


class CrossOriginRefused(HotswapError):
    """A web page of another origin tries to change something."""

    status = 403
    type = "permission_error"
    code = "cross_origin_refused"

    def __init__(self, origin: str | None) -> None:
        who = f"a web page of {origin!r}" if origin else "a web page of another site"
        allowed = json.dumps([origin or "ORIGIN"])
        super().__init__(
            f"{who} may not use this route; to allow it, start the server with "
            f"--allowed-origins {shlex.quote(allowed)}"
        )


class HostRefused(HotswapError):
    """The request names a host that is not this machine, as after DNS rebinding."""

    status = 403
    type = "permission_error"
    code = "host_refused"

    def __init__(self, host: str) -> None:
        super().__init__(
            "a server on loopback without keys answers only to this machine's names, not to "
            f"{host!r}; start it with --allowed-hosts {shlex.quote(host)}"
        )


class Unauthorized(HotswapError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class InvalidRequest(HotswapError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownRoute(HotswapError):
    status = 404
    type = "invalid_request_error"
    code = "unknown_route"

    def __init__(self, method: str, path: str) -> None:
        super().__init__(
            f"unknown route: {method} {path}; GET /admin/openapi.json lists the server's routes, "
            "GET /openapi.json those of a model"
        )


class MethodNotAllowed(HotswapError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, method: str, path: str, allowed: Iterable[str]) -> None:
        self.allow = ", ".join(sorted(allowed))
        super().__init__(f"{method} is not allowed on {path}; allowed: {self.allow}")


class WrongTask(HotswapError):
    """The model is configured, but not for this task: an embedding model is asked to chat, say.

    `others` are the aliases of models known to serve the route. The models in `unknown` have never
    been loaded.
    """

    status = 404
    type = "invalid_request_error"
    code = "wrong_task"
    param = "model"

    def __init__(
        self,
        alias: str,
        tasks: Iterable[str],
        route: str,
        others: Sequence[str],
        unknown: Sequence[str],
    ) -> None:
        serves = ", ".join(tasks) or "other routes"
        ask = f"use {' or '.join(others)}" if others else "no other model supports it"
        if unknown:
            ask += f"; not known until first loaded: {', '.join(unknown)}"
        super().__init__(f"model {alias!r} does not support {route} (it serves {serves}); {ask}")


class UnknownResponse(HotswapError):
    status = 404
    type = "invalid_request_error"
    code = "response_not_found"
    param = "response_id"

    def __init__(self, response_id: str, alias: str | None, most: int) -> None:
        who = "no model keeps" if alias is None else f"model {alias!r} does not keep"
        super().__init__(
            f"{who} a response with the id {response_id!r}; a server that was started with "
            f"VLLM_ENABLE_RESPONSES_API_STORE=1 keeps the latest {most} responses "
            "(limits.kept_responses), and none after a restart"
        )


class ResponseEnded(HotswapError):
    """Ends the event stream of a response that has no more events and would not end by itself."""

    status = 409
    type = "conflict_error"
    code = "response_ended"

    def __init__(self, response_id: str) -> None:
        super().__init__(
            f"response {response_id!r} has ended; no further events will follow; "
            f"GET /v1/responses/{response_id} shows how it ended"
        )


class QueueFull(HotswapError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class WaitTimeout(HotswapError):
    status = 504
    type = "timeout_error"
    code = "wait_timeout"


class GrammarTimeout(HotswapError):
    """A request whose grammar has to be compiled had no first token in time."""

    status = 504
    type = "timeout_error"
    code = "grammar_timeout"

    def __init__(self, timeout_s: float, *, is_behind: bool = False) -> None:
        """`is_behind`: the grammar was not checked; an earlier check takes over `timeout_s`."""
        fact = (
            "the grammar cannot be checked now: an earlier check has been running for more than "
            f"{timeout_s:g} s"
            if is_behind
            else f"no token was generated within {timeout_s:g} s (limits.grammar_timeout) for a "
            "request whose grammar had to be checked and compiled first"
        )
        step = "retry later" if is_behind else "simplify it, or retry later"
        super().__init__(f"{fact}; {step}", retry_after_s=1)


class DrainCut(HotswapError):
    status = 503
    type = "service_unavailable_error"
    code = "drain_timeout"

    def __init__(self, source: str, target: str, drain_timeout_s: float) -> None:
        super().__init__(
            f"the request to {source!r} was aborted: it was still running {drain_timeout_s:g} s "
            f"after a switch to {target!r} began to drain; retry when {source!r} is active",
            retry_after_s=1,
        )


class DrainRefused(HotswapError):
    status = 409
    type = "conflict_error"
    code = "drain_refused"

    def __init__(self, source: str, target: str, running: int, drain_timeout_s: float) -> None:
        super().__init__(
            f"switch to {target!r} refused: {running} requests to {source!r} were still running "
            f"after {drain_timeout_s:g} s (on_drain_timeout: refuse); {source!r} is still "
            "active; retry later, or switch with on_drain_timeout park or abort",
            retry_after_s=1,
        )


class ParkedEnded(HotswapError):
    """A parked request cannot be resumed; `why` says what happened in the meantime."""

    status = 503
    type = "service_unavailable_error"
    code = "parked_request_ended"

    def __init__(self, alias: str, why: str) -> None:
        super().__init__(
            f"the parked request to {alias!r} cannot be resumed: {why}; retry when {alias!r} is "
            "active",
            retry_after_s=1,
        )


class ClientStalled(HotswapError):
    status = 503
    type = "service_unavailable_error"
    code = "client_stalled"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"the client stopped reading for {timeout_s:g} s (limits.client_timeout); "
            "read the response as it arrives"
        )


class SlowReader(ClientStalled):
    """A switch would have to wait for a client, not for the engine."""

    def __init__(self, target: str) -> None:
        super(ClientStalled, self).__init__(
            f"the response was read too slowly: a switch to {target!r} waited for it past its "
            "drain deadline; read the response as it arrives"
        )


class WrongStamp(HotswapError):
    """An output came from another model or epoch than the request's; it was not delivered."""

    status = 500
    type = "internal_error"
    code = "wrong_stamp"

    def __init__(self, alias: str, stamp: str) -> None:
        self.stamp = stamp
        super().__init__(
            f"an output for a request to {alias!r} was stamped {stamp!r} and was not delivered; "
            "retry the request"
        )


class VerifyFailed(HotswapError):
    status = 503
    type = "service_unavailable_error"
    code = "verify_failed"

    def __init__(self, alias: str, why: str) -> None:
        super().__init__(f"verification of model {alias!r} failed: {why}")


class SwitchRateLimited(HotswapError):
    status = 429
    type = "rate_limit_error"
    code = "switch_rate_limited"


class RateLimited(HotswapError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(
        self, what: str, per_minute: int, retry_after_s: int, has_key: bool = True
    ) -> None:
        who = "this key" if has_key else "callers without a key together"
        does = {"requests": "make", "switches": "trigger"}.get(what, "use")
        super().__init__(
            f"{who} may {does} {per_minute} {what} per minute "
            f"({what}_per_minute, in limits or in rights); retry in {retry_after_s} s",
            retry_after_s=retry_after_s,
        )


class BodyTooLarge(HotswapError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"

    def __init__(self, limit_bytes: int, whose: str = "limits.body_bytes") -> None:
        super().__init__(f"the body is longer than {limit_bytes} bytes ({whose}); send less")


class TooManyValues(HotswapError):
    status = 413
    type = "invalid_request_error"
    code = "too_many_values"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"the body has more than {limit} JSON values (limits.body_values); "
            "send several requests, or raise the limit"
        )


class CallTooLarge(HotswapError):
    status = 413
    type = "invalid_request_error"
    code = "call_too_large"

    def __init__(self, limit: int, setting: str) -> None:
        super().__init__(
            f"this request needs more than {limit} engine requests (prompts or items, times n); "
            f"split it ({setting})"
        )


class GrammarTooLarge(HotswapError):
    status = 413
    type = "invalid_request_error"
    code = "grammar_too_large"

    def __init__(self, most: str, param: str) -> None:
        super().__init__(
            f"the schemas, choices and grammars of the request have more than {most}; "
            "simplify them, or raise the limit"
        )
        self.param = param


class GrammarTooCostly(HotswapError):
    """The process that tried the grammar was stopped for what it used, or died of it."""

    status = 413
    type = "invalid_request_error"
    code = "grammar_too_costly"

    def __init__(self, fact: str) -> None:
        super().__init__(f"the grammar of the request {fact}; simplify it")


class UnsupportedMediaType(HotswapError):
    """The body is not in a form that the route accepts.

    `wanted` is the `Content-Type` to send. None: the body must have no `Content-Encoding`.
    """

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"

    def __init__(self, sent: str, fact: str, wanted: str | None = None) -> None:
        field = "Content-Encoding" if wanted is None else "Content-Type"
        shown = repr(sent[:MAX_SHOWN]) if sent else "missing"
        step = "without that header" if wanted is None else f"with Content-Type: {wanted}"
        super().__init__(f"{fact}, and {field} is {shown}; send the body {step}")


class BodyTimeout(HotswapError):
    status = 408
    type = "timeout_error"
    code = "body_timeout"

    def __init__(self, timeout_s: float, rate: float, pace_s: float) -> None:
        super().__init__(
            f"the body did not arrive within {timeout_s:g} s (limits.body_timeout), or arrived "
            f"slower than {rate:g} bytes per second for {pace_s:g} s (limits.body_rate); send it "
            "faster"
        )


class MalformedRequest(HotswapError):
    status = 400
    type = "invalid_request_error"
    code = "malformed_request"

    def __init__(self) -> None:
        super().__init__("the data received is not a valid HTTP/1.1 request; check the client")


class ChunksTooSmall(HotswapError):
    status = 400
    type = "invalid_request_error"
    code = "chunks_too_small"

    def __init__(self, chunks: int, size: int) -> None:
        super().__init__(
            f"{chunks} chunks of the body hold only {size} bytes in total; send larger chunks"
        )


class UpgradeWithBody(HotswapError):
    status = 400
    type = "invalid_request_error"
    code = "upgrade_with_body"

    def __init__(self) -> None:
        super().__init__(
            "this request has a body and asks for another protocol (Connection: upgrade); send it "
            "without that header, as plain HTTP/1.1"
        )


class HeadTooLarge(HotswapError):
    """The request has too much of something: `what` is the limit, with its setting."""

    status = 431
    type = "invalid_request_error"
    code = "head_too_large"

    def __init__(self, what: str) -> None:
        super().__init__(f"the request has more than {what}; send less")


class UrlTooLong(HotswapError):
    status = 414
    type = "invalid_request_error"
    code = "url_too_long"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"the URL is longer than {limit_bytes} bytes (limits.url_bytes); send a shorter one"
        )


class HeadTimeout(HotswapError):
    status = 408
    type = "timeout_error"
    code = "head_timeout"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"the head of the request did not arrive within {timeout_s:g} s "
            "(limits.head_timeout); send it in one piece"
        )


class TooManyConnections(HotswapError):
    status = 503
    type = "service_unavailable_error"
    code = "too_many_connections"
    retry_after_s = 1

    def __init__(self) -> None:
        super().__init__(
            "all connections available to this client are in use (limits.connections, "
            "limits.connections_per_address); close some, or retry later"
        )


class NotReady(HotswapError):
    """Nothing can be served now. The message has the state and the reason."""

    status = 503
    type = "service_unavailable_error"
    code = "not_ready"
    retry_after_s = 1


class EngineUnavailable(HotswapError):
    status = 503
    type = "service_unavailable_error"
    code = "engine_unavailable"
    retry_after_s = 5


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, or its type where it has no message.

    Several mistakes of a file keep one line each.
    """
    if isinstance(error, ConfigMistakes):
        return error.message
    return " ".join(str(error).split()) or type(error).__name__


def forget_frames(error: BaseException) -> None:
    """Remove the tracebacks of an error and of the errors that led to it.

    Their frames would keep all local variables alive for as long as the error is kept.
    """
    left, seen = [error], set()
    while left:
        each = left.pop()
        seen.add(id(each))
        each.__traceback__ = None
        before = (each.__cause__, each.__context__)
        left += [one for one in before if one is not None and id(one) not in seen]
