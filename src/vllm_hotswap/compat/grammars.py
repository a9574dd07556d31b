"""Grammars: checked beside the event loop, compiled in fair turns, and not at all for nobody.

vLLM checks the grammar of a request on the event loop of the API process, and compiles it on
threads of its engine, first come, first served. Here both are done on threads that accounts share
in turns. The account goes to the engine in `extra_args` of the sampling parameters, and is taken
out there before vLLM, its connectors or its processors see them.

Relies on: `AsyncLLM.add_request` and its first parameters, `AsyncLLM.get_supported_tasks`,
`AsyncLLM.input_processor`, whose `process_inputs` calls `_validate_params` on the instance and
passes its `structured_outputs_config` on, which may be None; `SamplingParams.structured_outputs`
and `extra_args`; `StructuredOutputManager.executor`, whose `submit` gets a function and the
`Request`; `Scheduler.requests`, `Request.structured_output_request`, whose `_grammar` is the future
of a compilation until the scheduler has looked at it. Checked on vLLM 0.32.0.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any

from vllm_hotswap import drain
from vllm_hotswap.errors import EngineUnavailable, GrammarTimeout
from vllm_hotswap.fair_pool import LONG_S, FairPool, Overdue
from vllm_hotswap.registry import Lease, current_lease

ACCOUNT = "hotswap_account"
"""The key of the account among the `extra_args`; what a client sends under it does not count."""

LOOK_S = 1.0
"""So often does whoever waits for a check see to it that none holds up the others."""

_checked: ContextVar[Any] = ContextVar("checked", default=None)
"""The sampling parameters whose grammar has been checked, in the task that has waited for that."""


def has_grammar(request: Any) -> bool:
    """Whether an `EngineCoreRequest`, or the parameters of one, has a grammar to compile."""
    params = getattr(request, "sampling_params", request)
    return getattr(params, "structured_outputs", None) is not None


def sign(request: Any, account: str) -> None:
    """Say, in an `EngineCoreRequest` with a grammar, for whom that is compiled."""
    params = request.sampling_params
    params.extra_args = {**(params.extra_args or {}), ACCOUNT: account}


def check_aside(client: Any, pool: FairPool) -> None:
    """Have the grammars of an `AsyncLLM`'s requests checked on the threads of a pool.

    vLLM's whole check of the parameters runs there, so the same errors are raised, in the same
    order; then it runs once more on the event loop, where it leaves the grammar out.
    """
    processor = client.input_processor
    check = processor._validate_params
    without_grammars = copy.copy(processor)
    without_grammars.structured_outputs_config = None
    add = client.add_request

    def check_the_rest(params: Any, tasks: Any) -> Any:
        if _checked.get() is params:
            return type(processor)._validate_params(without_grammars, params, tasks)
        return check(params, tasks)

    async def add_checked(request_id: str, prompt: Any, params: Any, *args: Any, **kw: Any) -> Any:
        if not has_grammar(params):
            return await add(request_id, prompt, params, *args, **kw)
        tasks = await client.get_supported_tasks()
        await _done(pool, current_lease.get(), check, params, tasks)
        token = _checked.set(params)
        try:
            return await add(request_id, prompt, params, *args, **kw)
        finally:
            _checked.reset(token)

    processor._validate_params = check_the_rest
    client.add_request = add_checked


class _TooLate(Exception):
    """A check was not done in time."""


async def _done(pool: FairPool, lease: Lease | None, *check: Any) -> None:
    """Wait for a check, for as long as the request may, and as its client does.

    A check that has begun goes on. The request is ended with `GrammarTimeout` if it may wait no
    longer, or if an earlier check has taken so long that this one is not begun.
    """
    timeout_s = lease.grammar_timeout_s if lease else None
    try:
        await _result(pool, lease.account if lease else "", timeout_s, *check)
        return
    except Overdue:
        late = GrammarTimeout(LONG_S, is_behind=True)
    except _TooLate:
        late = GrammarTimeout(timeout_s or 0.0)
    if lease is not None:
        drain.end([lease], late)
    raise EngineUnavailable(late.message)


async def _result(pool: FairPool, account: str, timeout_s: float | None, *check: Any) -> Any:
    """Raises `_TooLate`, `Overdue`, and what the check raises."""
    job = pool.submit_for(account, *check)
    checking = asyncio.wrap_future(job)
    loop = asyncio.get_running_loop()
    ends_s = math.inf if timeout_s is None else loop.time() + timeout_s
    try:
        while not checking.done():
            if (left_s := ends_s - loop.time()) <= 0:
                raise _TooLate
            await asyncio.wait([checking], timeout=min(left_s, LOOK_S))
            pool.look()
        return checking.result()
    finally:
        job.cancel()  # unless it has begun
        checking.cancel()  # nobody wants its result any more


class Compilations:
    """In the place of an engine's thread pool for compilations: accounts take turns."""

    def __init__(self, pool: FairPool) -> None:
        self._pool = pool

    def submit(self, compile_for: Callable[[Any], Any], request: Any) -> Future[Any]:
        """As vLLM submits them: a function, and the `Request` whose grammar it is to compile."""
        account = (request.sampling_params.extra_args or {}).pop(ACCOUNT, "")
        return self._pool.submit_for(account, compile_for, request)

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures)


def take_turns(manager: Any) -> None:
    """Give a `StructuredOutputManager`, before its first request, threads that are shared."""
    executor = getattr(manager, "executor", None)  # without a tokenizer there are no grammars
    if executor is not None:
        manager.executor = Compilations(FairPool(executor._max_workers, "grammars"))
        executor.shutdown(wait=False)


def give_up(scheduler: Any, request_ids: Iterable[str]) -> int:
    """Take compilations off their queue; how many. One that runs cannot be stopped."""
    found = (scheduler.requests.get(request_id) for request_id in request_ids)
    asked = (getattr(request, "structured_output_request", None) for request in found)
    grammars = [getattr(one, "_grammar", None) for one in asked]
    return sum(isinstance(grammar, Future) and grammar.cancel() for grammar in grammars)
