"""Spreads the many engine requests of one large request, so that others run between two of them.

The tasks that vLLM makes for a large request are paced (`models.pace`). This module does the rest:

- long loops in one task yield to the event loop where they await something anyway, or afterwards;
- the wait for many answers at once, for which vLLM looks at all of them each time;
- the items of `/generative_scoring`, which vLLM tokenises on the event loop;
- the outputs of steps, of which some are processed before other tasks run.

Relies on:

- of the serving objects in the application's state: their coroutine functions `create_*`, which
  make an answer that is then written at once; `_get_trace_headers`, which handlers of several
  prompts await for each of them; `io_processor` and `io_processors`, whose `render_async` is a
  function that returns a future; `json_response_cls`, with which those of pooling models write an
  answer on a thread;
- `merge_async_iterators`, which modules of vLLM's entrypoints have as a global;
- `OutputProcessor.add_request` and its `parent_requests`, for the answers of `n`, all of which
  `AsyncLLM` registers before it sends the first one; `AsyncLLM.abort`, which also aborts those of
  `ParentRequest.child_requests`;
- `output_socket` of the core client's `resources`, from which the task that
  `_ensure_output_queue_task` starts reads;
- `serving_generative_scoring` in the application's state: its `_build_prompts`, a coroutine that
  waits for nothing, whose first argument has `items`, and a `query` that it takes as tokens, or
  tokenises with the second argument's `encode` and `add_special_tokens`; it returns two lists with
  a member for each item; its `renderer._executor`, on whose threads vLLM tokenises everything else;
- `VLLM_V1_OUTPUT_PROC_CHUNK_SIZE`, which `AsyncLLM._run_output_handler` reads. That function starts
  the task that processes all outputs, with the `engine_core` and `output_processor` of that moment.
  It does nothing when it is called again, as `AsyncLLM` does with each request.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextvars import Context, ContextVar
from functools import partial
from typing import Any

from starlette.responses import JSONResponse

from vllm_hotswap.models import OUTPUTS, Lease, Pace, current_lease, give_back, merged

READ_BYTES = 16 << 10
"""Bytes of outputs that are read before the event loop runs other tasks."""

ITEMS = 16
"""Items of a request that are tokenised before another request's text can be."""


_unregistered: ContextVar[dict[str, Callable[[], None]] | None] = ContextVar(
    "unregistered", default=None
)
"""The answers of the running task's request that are not registered yet, by engine request id."""


def spread(client: Any, app: Any, pace: Pace) -> None:
    """Spread the work of a frontend; once, when it is made, and its engine core is stamped."""
    os.environ.setdefault("VLLM_V1_OUTPUT_PROC_CHUNK_SIZE", str(OUTPUTS))
    _merge_evenly()
    _register_when_sent(client)
    client.abort = _few_at_once(client.abort, client.output_processor.parent_requests)
    state = getattr(app.state, "_state", {})
    for serving in {id(one): one for one in state.values()}.values():
        if hasattr(serving, "_get_trace_headers"):
            serving._get_trace_headers = _paced(serving._get_trace_headers, pace)
        for name, create in _creators(serving):
            setattr(serving, name, _before_writing(create))
        if getattr(serving, "json_response_cls", None) is JSONResponse:
            serving.json_response_cls = JsonInPieces
        for inputs in _input_processors(serving):
            inputs.render_async = Feeder(inputs.render_async, pace)
    _look_at_outputs(client)
    scoring = state.get("serving_generative_scoring")
    if scoring is not None and hasattr(scoring, "_build_prompts"):
        scoring._build_prompts = _in_pieces(scoring._build_prompts, scoring.renderer._executor)


def _look_at_outputs(client: Any) -> None:
    """Start the task that processes the outputs of all requests, in the context of none.

    vLLM starts it with the first request. If that belonged to a large request, the task would take
    places for its whole life, and all other answers would wait behind large requests.
    """
    Context().run(client._run_output_handler)


def _merge_evenly() -> None:
    """Replace vLLM's way of waiting for many answers by ours."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.entrypoints.") and "merge_async_iterators" in vars(module):
            vars(module)["merge_async_iterators"] = merged


def _register_when_sent(client: Any) -> None:
    """Register each of the answers of `n` just before it is sent, which is paced."""
    add, core, processor = client.add_request, client.engine_core, client.output_processor
    send, register = core.add_request_async, processor.add_request

    async def add_request(*args: Any, **kwargs: Any) -> Any:
        token = _unregistered.set({})
        try:
            return await add(*args, **kwargs)
        finally:
            _unregistered.reset(token)

    def register_later(
        request: Any, prompt: Any, parent: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if parent is None or (later := _unregistered.get()) is None:
            register(request, prompt, parent, *args, **kwargs)
        else:
            processor.parent_requests[parent.request_id] = parent  # an abort looks there
            later[request.request_id] = partial(register, request, prompt, parent, *args, **kwargs)

    async def send_registered(request: Any) -> None:
        if (later := _unregistered.get()) and (now := later.pop(request.request_id, None)):
            now()
        await send(request)

    client.add_request = add_request
    processor.add_request = register_later
    core.add_request_async = send_registered


class JsonInPieces(JSONResponse):
    """Writes the same bytes, but a long list not in one call, for which all threads would wait."""

    def render(self, content: Any) -> bytes:
        if not isinstance(content, dict):
            return super().render(content)
        members = (f"{_json(str(key))}:{_listed(value)}" for key, value in content.items())
        return f"{{{','.join(members)}}}".encode()


_json = partial(json.dumps, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
"""JSON as starlette's response writes it."""


def _listed(value: Any) -> str:
    return f"[{','.join(map(_json, value))}]" if isinstance(value, list) else _json(value)


class OutputSocket:
    """An engine's outputs; after many bytes of them, the event loop runs other tasks.

    Outputs that have arrived already are read without letting other tasks run, and reading takes
    time.
    """

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._read_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    async def recv_multipart(self, *args: Any, **kwargs: Any) -> Any:
        if self._read_bytes > READ_BYTES:
            self._read_bytes = 0
            await asyncio.sleep(0)
        frames = await self._socket.recv_multipart(*args, **kwargs)
        self._read_bytes += sum(map(len, frames))
        return frames


def read_in_turns(core: Any) -> None:
    """Start to read what an engine core sends, before vLLM's client of it does so by itself."""
    resources = core.resources
    socket = resources.output_socket
    resources.output_socket = OutputSocket(socket)
    try:
        Context().run(core._ensure_output_queue_task)  # the task belongs to no request
    finally:
        resources.output_socket = socket  # the code that closes it looks at its type


def _input_processors(serving: Any) -> Iterator[Any]:
    """Yield what prepares the inputs of pooling models: one of a handler, or one of each task."""
    found = [getattr(serving, "io_processor", None)]
    found += (getattr(serving, "io_processors", None) or {}).values()
    yield from (inputs for inputs in found if hasattr(inputs, "render_async"))


class Feeder:
    """Gives work to threads.

    Work of a large request is promised at once, but given a few pieces at a time. The mutable state
    is what each large request has still to give.
    """

    def __init__(self, submit: Callable[..., asyncio.Future[Any]], pace: Pace) -> None:
        self._submit = submit
        self._pace = pace
        self._left: dict[Lease, deque[tuple[asyncio.Future[Any], tuple[Any, ...]]]] = {}
        self._feeding: set[asyncio.Task[None]] = set()

    def __call__(self, *args: Any) -> asyncio.Future[Any]:
        lease = current_lease.get()
        if lease is None or lease.calls == 1:
            return self._submit(*args)
        if lease not in self._left:
            self._left[lease] = deque()
            self._feeding.add(task := asyncio.create_task(self._feed(lease)))
            task.add_done_callback(self._feeding.discard)
        promise = asyncio.get_running_loop().create_future()
        self._left[lease].append((promise, args))
        return promise

    async def _feed(self, lease: Lease) -> None:
        left = self._left[lease]
        try:
            while left:
                promise, args = left[0]
                if not promise.done():  # else nothing waits for it
                    await self._pace.wait()
                    _keep(promise, self._submit(*args))
                # Not before the wait: a promise that has left the queue is not cancelled below.
                left.popleft()
        except Exception as error:  # noqa: BLE001  # for those that wait: the threads are gone
            for promise, _ in left:
                if not promise.done():
                    promise.set_exception(error)
        finally:
            del self._left[lease]
            for promise, _ in left:
                promise.cancel()  # unless it is done


def _keep(promise: asyncio.Future[Any], work: asyncio.Future[Any]) -> None:
    """Make a promise end as the work does, and cancel the work with the promise."""

    def done(_: asyncio.Future[Any]) -> None:
        if promise.done():
            if not work.cancelled():
                work.exception()  # else asyncio logs it as never retrieved
        elif work.cancelled():
            promise.cancel()
        elif (error := work.exception()) is not None:
            promise.set_exception(error)
        else:
            promise.set_result(work.result())

    work.add_done_callback(done)
    promise.add_done_callback(lambda _: work.cancel())


def _few_at_once(
    abort: Callable[..., Awaitable[None]], parents: Mapping[str, Any]
) -> Callable[..., Awaitable[None]]:
    """Return vLLM's `abort`, for a few requests at a time; the answers of `n` count as requests.

    More than a few are aborted in a task of their own: the caller is often cancelled, and anyio's
    scopes, in which starlette streams, cancel it again whenever the loop runs.
    """
    aborting: set[asyncio.Task[None]] = set()

    async def abort_all(ids: list[str], internal: bool) -> None:
        for start in range(0, len(ids), OUTPUTS):
            if start:
                await asyncio.sleep(0)
            await abort(ids[start : start + OUTPUTS], internal=internal)

    async def abort_few(request_id: str | Iterable[str], internal: bool = False) -> None:
        ids = [request_id] if isinstance(request_id, str) else [*request_id]
        found = [parents.get(one) for one in ids] if internal else []
        ids[:0] = [child for parent in found if parent for child in parent.child_requests]
        if len(ids) <= OUTPUTS:
            await abort_all(ids, internal)
            return
        aborting.add(task := asyncio.create_task(abort_all(ids, internal)))
        task.add_done_callback(aborting.discard)
        await asyncio.shield(task)

    return abort_few


def _creators(serving: Any) -> Iterator[tuple[str, Callable[..., Awaitable[Any]]]]:
    for name in dir(type(serving)):
        if name.startswith("create_"):
            create = getattr(serving, name)
            if inspect.iscoroutinefunction(create):
                yield name, create


def _before_writing(create: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def create_and_give_back(*args: Any, **kwargs: Any) -> Any:
        answer = await create(*args, **kwargs)
        await give_back()
        return answer

    return create_and_give_back


def _paced(work: Callable[..., Awaitable[Any]], pace: Pace) -> Callable[..., Awaitable[Any]]:
    async def work_in_turn(*args: Any, **kwargs: Any) -> Any:
        await pace.wait()
        return await work(*args, **kwargs)

    return work_in_turn


def _in_pieces(
    build: Callable[..., Coroutine[Any, Any, Any]], executor: Any
) -> Callable[..., Awaitable[Any]]:
    """Return `build`, which must wait for nothing, run off the event loop, some items at a time.

    The query, which may be long, is tokenised once, as vLLM does it.
    """

    def encoded(request: Any, tokenizer: Any) -> list[int]:
        ids: list[int] = tokenizer.encode(
            request.query, add_special_tokens=request.add_special_tokens
        )
        return ids

    async def build_in_pieces(
        request: Any, tokenizer: Any, *args: Any
    ) -> tuple[list[Any], list[Any]]:
        loop = asyncio.get_running_loop()
        prompts: list[Any] = []
        counts: list[Any] = []
        query = request.query
        if isinstance(query, str):
            query = await loop.run_in_executor(executor, encoded, request, tokenizer)
        for start in range(0, len(request.items), ITEMS):
            items = request.items[start : start + ITEMS]
            piece = request.model_copy(update={"query": query, "items": items})
            made = await loop.run_in_executor(executor, _run, build(piece, tokenizer, *args))
            prompts += made[0]
            counts += made[1]
        return prompts, counts

    return build_in_pieces


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("in this vLLM, tokenising items awaits something")
