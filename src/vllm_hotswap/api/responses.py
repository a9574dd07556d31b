"""Responses that outlive their request: kept ones, and those that are still being worked on.

The Responses API names a response by its id alone. So the model that keeps it is asked, active or
not. A response that was started in the background is accepted work: its request keeps its lease
until the work has ended. If a drain ends the work, the response says so from then on.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable

from vllm_hotswap.access import EVERYBODY, Account
from vllm_hotswap.api import model_name as model_field
from vllm_hotswap.api.relay import ResponseRelay
from vllm_hotswap.errors import InvalidRequest, ResponseEnded, UnknownResponse, one_line
from vllm_hotswap.models import Lease, Model, Registry, Responses
from vllm_hotswap.system import log_of_clients, value_text

PATH = "/v1/responses"
STREAM_GRACE_S = 1.0
"""Seconds in which the stream of a response should end by itself, once its work has ended."""

_READ = re.compile(r"/v1/responses/([^/]+)/?")
_CANCEL = re.compile(r"/v1/responses/([^/]+)/cancel/?")


def response_id_in_path(method: str, path: str) -> str | None:
    """Return the id of the response that a request names, if it names nothing else."""
    pattern = {"GET": _READ, "POST": _CANCEL}.get(method)
    match = pattern.fullmatch(path) if pattern is not None else None
    return match.group(1) if match else None


def owner_of(registry: Registry, response_id: str, alias: str | None, most: int) -> Model:
    """Return the model that keeps a response; only `alias` is asked, if it is given.

    `most` is the number of responses that are kept, for the message.

    Raises:
        UnknownModel: there is no such alias.
        UnknownResponse: no model keeps it.
    """
    asked = registry if alias is None else [registry.resolve(alias)]
    owner = _keeper(asked, response_id)
    if owner is None:
        raise UnknownResponse(response_id, alias, most)
    return owner


def alias_of_previous_response(
    registry: Registry, previous: str | None, alias: str | None
) -> str | None:
    """Return the model for a request that may continue an earlier response, which fixes its model.

    Args:
        registry: the models.
        previous: `previous_response_id` of the request, if it has one.
        alias: the model that it names, if any.

    Raises:
        InvalidRequest: the response belongs to another model.
    """
    owner = _keeper(registry, previous) if previous else None
    if owner is None or (alias is not None and registry.resolve(alias) is owner):
        return alias
    if alias is None:
        return owner.alias
    raise InvalidRequest(
        f"previous_response_id {previous!r} belongs to model {owner.alias!r}, but the request is "
        f"to {alias!r}; use {owner.alias!r}, or send the earlier messages as input",
        "previous_response_id",
    )


def _keeper(models: Registry | list[Model], response_id: str) -> Model | None:
    return next((m for m in models if response_id in (m.engine.responses or ())), None)


class Owners:
    """The owner of each kept response: a group of keys, a key without a group, or the admins.

    For other callers it does not exist. Where no keys are required, all callers are one owner.
    The mutable state is the owner of each response, in the order in which they were started.
    """

    def __init__(self, registry: Registry, most: int) -> None:
        self._registry, self._most = registry, most
        self._names: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._names)

    def check(self, response_id: str, account: Account, alias: str | None) -> None:
        """Check that a caller may read, continue or cancel a response. Raises `UnknownResponse`."""
        if not self._is_owned_by(response_id, account):
            raise UnknownResponse(response_id, alias, self._most)

    def check_new(self, response_id: str, account: Account) -> None:
        """Check that a response may get this id, which its client has chosen.

        Raises:
            InvalidRequest: another owner's response has it, and would be overwritten.
        """
        if response_id in self._names and not self._is_owned_by(response_id, account):
            raise InvalidRequest(
                f"request_id {response_id!r} is in use; send another one, or none", "request_id"
            )

    def note(self, response_id: str, account: Account) -> None:
        """Make the account the owner of a response; beyond the limit, the oldest are dropped."""
        self._names.setdefault(response_id, account.name)
        for oldest in list(self._names)[: max(0, len(self._names) - self._most)]:
            keeper = _keeper(self._registry, oldest)
            kept = keeper.engine.responses if keeper is not None else None
            if kept is None or oldest not in kept.running:
                del self._names[oldest]
                if kept is not None:
                    kept.forget(oldest)

    def forget(self, response_id: str, responses: Responses) -> None:
        """Forget the owner once the request is over, unless the response is kept."""
        if response_id not in responses and response_id not in responses.running:
            self._names.pop(response_id, None)

    def _is_owned_by(self, response_id: str, account: Account) -> bool:
        return self._names.get(response_id, EVERYBODY.name) == account.name


class ResponseFollower:
    """A request of the Responses API that follows the work on a response, and may outlive it."""

    def __init__(
        self,
        responses: Responses,
        lease: Lease,
        answer: ResponseRelay,
        on_named: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._responses = responses
        self._on_named = on_named
        """Called with the id of the response, once the body names it."""
        self._lease = lease
        self._answer = answer
        self.response_id = ""
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        """The work, whose end calls `_on_work_done`."""
        self._is_over = False

    def follow_named_response(self) -> None:
        """Follow the response that the body will name, if it is worked on in the background."""
        self._answer.on_body = self._on_first_body

    def begin(self, response_id: str) -> None:
        """Follow a kept response."""
        self.response_id = response_id
        self._task = self._responses.running.get(response_id)
        if self._task is not None:
            self._task.add_done_callback(self._on_work_done)
        else:
            self._on_work_done(None)

    async def wait_until_done(self) -> None:
        """Return when the work has ended, by itself or because the lease was cut."""
        if self._lease.work is not None and not self._lease.work.done():
            await asyncio.wait([self._lease.work])

    def stop(self) -> None:
        """Stop following, after the response. Work that this request has started is over then."""
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None and not self._task.done():
            self._task.remove_done_callback(self._on_work_done)

    def _on_first_body(self, body: bytes) -> None:
        running = self._responses.running
        response_id = response_id_in_body(body, self._answer.is_event_stream)
        if response_id is None:
            return
        self.response_id = response_id
        self._on_named(response_id)
        if response_id in running:
            self._lease.work = running[response_id]
            self.begin(response_id)

    def _on_work_done(self, task: asyncio.Task[object] | None) -> None:
        self._responses.settle(self.response_id, self._why(task))
        if not self._is_over:
            self._check_stream_later()

    def _check_stream_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(STREAM_GRACE_S, self._check_stream)

    def _check_stream(self) -> None:
        """End a stream that would not end by itself.

        vLLM's stream waits for `response.completed`, which a failed or cancelled response never
        gets. A slow client still gets everything that there is.
        """
        if self._answer.is_sending:
            self._check_stream_later()
        elif not self._answer.complete:
            self._lease.end(ResponseEnded(self.response_id))

    def _why(self, task: asyncio.Task[object] | None) -> str:
        if self._lease.cut is not None:
            return self._lease.cut.message
        error = None if task is None or task.cancelled() else task.exception()
        if error is not None:
            alias, cause = value_text(self._lease.alias), one_line(error)
            log_of_clients.warning("event=background_failed model=%s cause=%r", alias, cause)
        return "processing failed; see the server log"


def response_id_in_body(body: bytes, is_event_stream: bool) -> str | None:
    """Return the id of the response whose body begins with `body`."""
    if not is_event_stream:
        return model_field.from_json(body, "id")
    try:
        event = json.loads(body.partition(b"data: ")[2].partition(b"\n")[0])
        return str(event["response"]["id"])
    except (ValueError, TypeError, KeyError):
        return None
