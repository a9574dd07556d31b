"""The Responses API of a fake engine: answered at once, as a stream, or in the background.

Like vLLM with `VLLM_ENABLE_RESPONSES_API_STORE=1` it keeps every response, and like vLLM it has a
stream of events wait for `response.completed` for as long as it takes, and leaves it to others to
say that a response whose work ended with an error is not `queued` any more.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Tokens = Callable[[int], AsyncIterator[str]]
"""The words of an answer, as the engine makes them."""


class FakeResponses:
    """The responses that one fake engine keeps."""

    def __init__(self, alias: str, tokens: Tokens, count: Callable[[int | None], int]) -> None:
        """`count` tells how many words there are, at most so many if a request says so."""
        self._alias = alias
        self._tokens = tokens
        self._count = count
        self._numbers = itertools.count(1)
        self._kept: dict[str, dict[str, Any]] = {}
        self._events: dict[str, list[str]] = {}
        self._changed = asyncio.Condition()
        self.running: dict[str, asyncio.Task[Any]] = {}
        self.routes = [
            Route("/v1/responses", self._create, methods=["POST"]),
            Route("/v1/responses/{response_id}", self._retrieve),
            Route("/v1/responses/{response_id}/cancel", self._cancel, methods=["POST"]),
        ]

    def __contains__(self, response_id: object, /) -> bool:
        return response_id in self._kept

    def settle(self, response_id: str, why: str) -> None:
        response = self._kept[response_id]
        if response["status"] == "queued":
            response["status"] = "failed"
            response["error"] = {"code": "server_error", "message": why}

    def forget(self, response_id: str) -> None:
        self._kept.pop(response_id, None)
        self._events.pop(response_id, None)

    async def _create(self, request: Request) -> Response:
        body = await json_of(request)
        if not isinstance(body, dict):
            return refused("the body is not a JSON object")
        most = body.get("max_output_tokens")
        if most is not None and not (isinstance(most, int) and most > 0):
            return refused("max_output_tokens must be a whole number of at least 1")
        previous = body.get("previous_response_id")
        if previous is not None and previous not in self._kept:
            return _not_found(previous)
        response_id = body.get("request_id") or f"resp_{self._alias}_{next(self._numbers)}"
        response = _new_response(response_id, self._alias)
        self._events[response_id] = []
        work = asyncio.create_task(self._work(response, self._count(most)))
        if body.get("background"):
            self._kept[response_id], self.running[response_id] = response, work
            work.add_done_callback(lambda _: self.running.pop(response_id))
            return self._stream(response_id) if body.get("stream") else JSONResponse(response)
        if body.get("stream"):
            return self._stream(response_id, own_work=work)
        await work
        return JSONResponse(response)

    async def _work(self, response: dict[str, Any], max_tokens: int) -> None:
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": []}
        item = {
            "id": f"msg_{response['id']}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [part],
        }
        where = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        await self._emit(response, "response.created", response=response)
        response["output"].append(item)
        await self._emit(response, "response.output_item.added", output_index=0, item=item)
        await self._emit(response, "response.content_part.added", **where, part=part)
        async for word in self._tokens(max_tokens):
            delta = f" {word}" if part["text"] else word
            part["text"] += delta
            response["usage"]["output_tokens"] += 1
            response["usage"]["total_tokens"] += 1
            await self._emit(response, "response.output_text.delta", **where, delta=delta)
        await self._emit(response, "response.output_text.done", **where, text=part["text"])
        await self._emit(response, "response.content_part.done", **where, part=part)
        response["status"] = item["status"] = "completed"
        await self._emit(response, "response.output_item.done", output_index=0, item=item)
        self._kept[response["id"]] = response
        await self._emit(response, "response.completed", response=response)

    async def _emit(self, response: dict[str, Any], kind: str, /, **fields: Any) -> None:
        events = self._events[response["id"]]
        data = json.dumps({"type": kind, "sequence_number": len(events), **fields})
        async with self._changed:
            events.append(f"event: {kind}\ndata: {data}\n\n")
            self._changed.notify_all()

    def _stream(self, response_id: str, own_work: asyncio.Task[None] | None = None) -> Response:
        events = self._all_events(response_id, own_work)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _all_events(
        self, response_id: str, own_work: asyncio.Task[None] | None
    ) -> AsyncIterator[str]:
        """To the last one; work that is nobody else's ends with its reader."""
        events, number = self._events[response_id], 0
        try:
            while not (number and events[number - 1].startswith("event: response.completed")):
                async with self._changed:
                    while len(events) == number:
                        await self._changed.wait()
                yield events[number]
                number += 1
        finally:
            if own_work is not None:
                own_work.cancel()

    async def _retrieve(self, request: Request) -> Response:
        response_id = request.path_params["response_id"]
        if response_id not in self._kept:
            return _not_found(response_id)
        if request.query_params.get("stream") == "true":
            return self._stream(response_id)
        return JSONResponse(self._kept[response_id])

    async def _cancel(self, request: Request) -> Response:
        response = self._kept[request.path_params["response_id"]]
        response["status"] = "cancelled"
        if work := self.running.get(response["id"]):
            work.cancel()
            await asyncio.wait([work])
        return JSONResponse(response)


def _new_response(response_id: str, alias: str) -> dict[str, Any]:
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": alias,
        "status": "queued",
        "output": [],
        "error": None,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": 1,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 1,
        },
    }


def _not_found(response_id: str) -> Response:
    return refused(f"Response with id '{response_id}' not found.", status=404)


async def json_of(request: Request) -> Any:
    """The body; None where it is not JSON, or too deep to be read."""
    try:
        return await request.json()
    except (ValueError, RecursionError):  # as vLLM's framework answers both
        return None


def refused(message: str, param: str | None = None, status: int = 400) -> Response:
    """An error as vLLM answers it."""
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    error = {"message": message, "type": kind, "param": param, "code": status}
    return JSONResponse({"error": error}, status)
