"""What outlives its request: responses that a frontend keeps, and those that it still works on.

The Responses API names a response by its id alone, so whoever keeps it is asked, active or not. A
response that was begun in the background is accepted work: its request keeps its lease until the
work has ended, and where a drain ends it, the response says so from then on.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable

from vllm_hotswap import model_field
from vllm_hotswap.engines.base import Responses
from vllm_hotswap.errors import InvalidRequest, ResponseEnded, UnknownResponse, one_line
from vllm_hotswap.exchange import Answer
from vllm_hotswap.log_lines import value_text
from vllm_hotswap.quiet import log_of_clients
from vllm_hotswap.registry import Lease, Model, Registry
from vllm_hotswap.rights import EVERYBODY, Account

PATH = "/v1/responses"
STREAM_GRACE_S = 1.0
"""Seconds in which the stream of a response whose work has ended should end by itself."""

_READ = re.compile(r"/v1/responses/([^/]+)/?")
_CANCEL = re.compile(r"/v1/responses/([^/]+)/cancel/?")


def named_response(method: str, path: str) -> str | None:
    """The id of the response that a request is about, where that is all that it says."""
    pattern = {"GET": _READ, "POST": _CANCEL}.get(method)
    match = pattern.fullmatch(path) if pattern is not None else None
    return match.group(1) if match else None


def owner_of(registry: Registry, response_id: str, alias: str | None, most: int) -> Model:
    """The model that keeps a response; only `alias` is asked, if it is given.

    `most`: responses are kept, for the message.

    Raises:
        UnknownModel: there is no such alias.
        UnknownResponse: nobody keeps it.
    """
    asked = registry if alias is None else [registry.resolve(alias)]
    owner = _keeper(asked, response_id)
    if owner is None:
        raise UnknownResponse(response_id, alias, most)
    return owner


def alias_that_goes_on(registry: Registry, previous: str | None, alias: str | None) -> str | None:
    """The model of a request that may go on from an earlier response, whose model it must be.

    Args:
        registry: the models.
        previous: `previous_response_id` of the request, if it has one.
        alias: the model that it names, if any.

    Raises:
        InvalidRequest: the response is another model's.
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
    """Whose each kept response is: of a group of keys, of a key in none, or of the admins.

    To everybody else it does not exist. Where no keys are asked for, everybody is one owner.
    The mutable state is the owner of each response, in the order in which they were begun.
    """

    def __init__(self, registry: Registry, most: int) -> None:
        self._registry, self._most = registry, most
        self._names: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._names)

    def check(self, response_id: str, account: Account, alias: str | None) -> None:
        """See that a response may be read, gone on from, or cancelled. Raises `UnknownResponse`."""
        if not self._is_of(response_id, account):
            raise UnknownResponse(response_id, alias, self._most)

    def check_new(self, response_id: str, account: Account) -> None:
        """See that a response may get this id, which its client has chosen.

        Raises:
            InvalidRequest: somebody else's has it, which would be overwritten.
        """
        if response_id in self._names and not self._is_of(response_id, account):
            raise InvalidRequest(
                f"request_id {response_id!r} is in use; send another one, or none", "request_id"
            )

    def note(self, response_id: str, account: Account) -> None:
        """A response is the account's from now on; the oldest give way where there are too many."""
        self._names.setdefault(response_id, account.name)
        for oldest in list(self._names)[: max(0, len(self._names) - self._most)]:
            keeper = _keeper(self._registry, oldest)
            kept = keeper.engine.responses if keeper is not None else None
            if kept is None or oldest not in kept.running:
                del self._names[oldest]
                if kept is not None:
                    kept.forget(oldest)

    def let_go(self, response_id: str, responses: Responses) -> None:
        """Its request is over: there is nothing to be owned, unless it is kept."""
        if response_id not in responses and response_id not in responses.running:
            self._names.pop(response_id, None)

    def _is_of(self, response_id: str, account: Account) -> bool:
        return self._names.get(response_id, EVERYBODY.name) == account.name


class Following:
    """One request of the Responses API that follows the work on a response, and may outlive it."""

    def __init__(
        self,
        responses: Responses,
        lease: Lease,
        answer: Answer,
        noted: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._responses = responses
        self._noted = noted
        """Told the id of the response that the answer names."""
        self._lease = lease
        self._answer = answer
        self.response_id = ""
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        """The work, while nobody has been told of its end."""
        self._is_over = False

    def begin_with_answer(self) -> None:
        """Follow the response that the answer will name, if that is worked on in the background."""
        self._answer.on_body = self._answered

    def begin(self, response_id: str) -> None:
        """Follow a response that is kept."""
        self.response_id = response_id
        self._task = self._responses.running.get(response_id)
        if self._task is not None:
            self._task.add_done_callback(self._has_ended)
        else:
            self._has_ended(None)

    async def outlast(self) -> None:
        """Return when the work has ended, or has been ended because the lease was cut."""
        if self._lease.work is not None and not self._lease.work.done():
            await asyncio.wait([self._lease.work])

    def stop(self) -> None:
        """The answer has been given. Whoever has begun the work has outlasted it by now."""
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None and not self._task.done():
            self._task.remove_done_callback(self._has_ended)

    def _answered(self, body: bytes) -> None:
        running = self._responses.running
        response_id = answered_id(body, self._answer.is_event_stream)
        if response_id is None:
            return
        self.response_id = response_id
        self._noted(response_id)
        if response_id in running:
            self._lease.work = running[response_id]
            self.begin(response_id)

    def _has_ended(self, task: asyncio.Task[object] | None) -> None:
        self._responses.settle(self.response_id, self._why(task))
        if not self._is_over:
            self._look_at_stream_later()

    def _look_at_stream_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(STREAM_GRACE_S, self._look_at_stream)

    def _look_at_stream(self) -> None:
        """End a stream that will not end by itself.

        vLLM's waits for `response.completed`, which a response that has failed, or was cancelled,
        never gets. A client that is slow still gets all that there is.
        """
        if self._answer.is_sending:
            self._look_at_stream_later()
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


def answered_id(body: bytes, is_event_stream: bool) -> str | None:
    """The id of the response whose answer begins with `body`."""
    if not is_event_stream:
        return model_field.from_json(body, "id")
    try:
        event = json.loads(body.partition(b"data: ")[2].partition(b"\n")[0])
        return str(event["response"]["id"])
    except (ValueError, TypeError, KeyError):
        return None
