"""Checks grammars beside the event loop, compiles them fairly, drops what no request needs.

vLLM checks the grammar of a request on the event loop of the API process, and compiles it on
threads of its engine, first come, first served. Here both are done on threads that accounts share
fairly. A grammar that is not plain is rehearsed in a process before its engine gets it. That
process is killed when its request no longer waits. A grammar that is slow to compile has threads of
the lowest priority in its engine, beside those of the others. Account and slowness go to the engine
in `extra_args` of the sampling parameters, and are removed there before vLLM, its connectors or its
processors see them.

Relies on: `AsyncLLM.add_request` and its first parameters, `AsyncLLM.get_supported_tasks`,
`AsyncLLM.input_processor`, whose `process_inputs` calls `_validate_params` on the instance and
passes its `structured_outputs_config` on, which may be None; `SamplingParams.structured_outputs`
and `extra_args`; `AsyncLLM.vllm_config`; `XgrammarBackend.compiler` and its `clear_cache`;
`StructuredOutputManager.executor`, whose `submit` gets a function and the
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

from vllm_hotswap.errors import EngineUnavailable, GrammarTimeout, GrammarTooCostly
from vllm_hotswap.host.grammar_rehearsals import Rehearsals, digest_of
from vllm_hotswap.host.plain_grammars import is_plain
from vllm_hotswap.models import current_lease, drain
from vllm_hotswap.system import (
    Bounds,
    Errand,
    HelperEnd,
    HelperFailed,
    Helpers,
    HelperStopped,
    OutOfBounds,
)
from vllm_hotswap.tasks import FairPool, Overdue

ACCOUNT = "hotswap_account"
"""The key of the account among the `extra_args`; a client's own value under it is replaced."""

SLOW = "hotswap_slow_grammar"
"""The key among the `extra_args` that marks a grammar that takes long to compile."""

LONG_REHEARSAL_S = 120.0
"""A rehearsal that takes longer is overdue: some of its parts do not run in a helper."""

LOOK_S = 1.0
"""How often a request that waits for a check makes sure that no check holds up the others."""

_checked: ContextVar[Any] = ContextVar("checked", default=None)
"""The sampling parameters whose grammar has been checked, in the task that waited for the check."""


def has_grammar(request: Any) -> bool:
    """Whether an `EngineCoreRequest`, or the parameters of one, has a grammar to compile."""
    params = getattr(request, "sampling_params", request)
    return getattr(params, "structured_outputs", None) is not None


_is_slow: ContextVar[bool] = ContextVar("is_slow", default=False)
"""Whether the grammar of these parameters takes long to compile."""


def sign(request: Any, account: str) -> None:
    """Note in an `EngineCoreRequest` the account of its grammar, and whether it compiles slowly."""
    params = request.sampling_params
    own = {key: value for key, value in (params.extra_args or {}).items() if key != SLOW}
    params.extra_args = own | {ACCOUNT: account} | ({SLOW: True} if _is_slow.get() else {})


class Checks:
    """Checks the grammars of one model: plain ones in place, others in processes.

    It has no state of its own: that is in the pools and the rehearsals.
    """

    def __init__(
        self, pool: FairPool, rehearsing: FairPool | None = None, helpers: Helpers | None = None
    ) -> None:
        """With `pool` alone, check all grammars in place."""
        self._pool, self._rehearsing, self._helpers = pool, rehearsing, helpers or Helpers()
        self._rehearsals: Rehearsals | None = None

    def begin(self, client: Any) -> None:
        """Prepare rehearsals for the grammars of an `AsyncLLM`."""
        if self._rehearsing is not None:
            self._rehearsals = Rehearsals(
                client.vllm_config, lambda: client.input_processor.tokenizer
            )

    def shutdown(self) -> None:
        for pool in (self._pool, self._rehearsing):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, check: Callable[..., Any], params: Any, tasks: Any) -> bool:
        """Wait for a check, as long as the request may, and as its client waits.

        Returns: whether the grammar takes long to compile.

        The request is aborted with an error of its own if its time is over, if its grammar goes
        beyond its bounds, or if an earlier check keeps this one from starting. Work for it in a
        helper is killed then.
        """
        lease = current_lease.get()
        account = lease.account if lease else ""
        bounds = lease.grammar_bounds if lease else Bounds()
        timeout_s = lease.grammar_timeout_s if lease else None
        try:
            return await self._run(account, bounds, timeout_s, check, params, tasks)
        except Overdue as overdue:
            cut: GrammarTimeout | GrammarTooCostly = GrammarTimeout(overdue.after_s, is_behind=True)
        except (_TooLate, HelperStopped):
            cut = GrammarTimeout(timeout_s or 0.0)
        except (OutOfBounds, HelperFailed) as error:
            cut = _costly(error, bounds)
        if lease is not None:
            drain.end([lease], cut)
        raise EngineUnavailable(cut.message)

    async def _run(
        self,
        account: str,
        bounds: Bounds,
        timeout_s: float | None,
        check: Callable[..., Any],
        params: Any,
        tasks: Any,
    ) -> bool:
        """Raises `_TooLate`, `Overdue`, `HelperEnd` and what the check raises."""
        rehearsals, outputs = self._rehearsals, params.structured_outputs
        if rehearsals is None or self._rehearsing is None or is_plain(outputs):
            await _result(self._pool, account, timeout_s, None, check, params, tasks)
            return False
        digest = digest_of(outputs)
        if (is_slow := rehearsals.is_known_slow(digest)) is not None:
            await _result(self._pool, account, timeout_s, None, check, params, tasks)
            return is_slow
        errand = Errand(self._helpers, bounds)

        def rehearse() -> bool | HelperEnd:
            try:
                return rehearsals.run(lambda: check(params, tasks), params, digest, errand)
            except HelperEnd as end:
                return end  # a future cannot carry every other `BaseException`
            finally:
                errand.stop()

        done = await _result(self._rehearsing, account, timeout_s, errand, rehearse)
        if isinstance(done, HelperEnd):
            raise done
        return bool(done)


def _costly(error: HelperEnd, bounds: Bounds) -> GrammarTooCostly:
    if isinstance(error, OutOfBounds) and error.of == "memory":
        return GrammarTooCostly(
            f"takes more than {bounds.memory_bytes >> 20} MiB (limits.grammar_memory)"
        )
    if isinstance(error, OutOfBounds):
        return GrammarTooCostly(
            f"takes more than {bounds.cpu_s:g} s of a processor (limits.grammar_seconds)"
        )
    return GrammarTooCostly(f"ends the process that compiles it ({error})")


def check_aside(client: Any, checks: Checks) -> None:
    """Check the grammars of an `AsyncLLM`'s requests beside the event loop.

    vLLM's whole check of the parameters runs there, so the same errors are raised, in the same
    order. Then it runs once more on the event loop, without the grammar.
    """
    checks.begin(client)
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
        token, slow = _checked.set(params), _is_slow.set(await checks.run(check, params, tasks))
        try:
            return await add(request_id, prompt, params, *args, **kw)
        finally:
            _checked.reset(token)
            _is_slow.reset(slow)

    processor._validate_params = check_the_rest
    client.add_request = add_checked


class _TooLate(Exception):
    """A check did not finish in time."""


async def _result(
    pool: FairPool, account: str, timeout_s: float | None, errand: Errand | None, *check: Any
) -> Any:
    """Wait for the result of a check. When the wait ends, stop its errand, if it has one.

    Raises `_TooLate`, `Overdue`, and what the check raises.
    """
    job = pool.submit_for(account, *check)
    checking = asyncio.wrap_future(job)
    loop = asyncio.get_running_loop()
    ends_s = math.inf if timeout_s is None else loop.time() + timeout_s
    try:
        while not checking.done():
            if (left_s := ends_s - loop.time()) <= 0:
                raise _TooLate
            await asyncio.wait([checking], timeout=min(left_s, LOOK_S))
            pool.check_overdue()
        return checking.result()
    finally:
        job.cancel()  # unless it has started
        if errand is not None:
            errand.stop()
        checking.cancel()  # its result is no longer needed


class Compilations:
    """Replaces an engine's thread pool for compilations; accounts share it fairly.

    Slow grammars have threads of their own, with the lowest priority: other grammars do not wait
    for them, and steps of the engine have the processors when they need them.
    """

    def __init__(self, threads: int) -> None:
        self._quick = FairPool(threads, "grammars")
        self._slow = FairPool(threads, "slow grammars", is_last=True)

    def submit(self, compile_for: Callable[[Any], Any], request: Any) -> Future[Any]:
        """Submit as vLLM does: a function, and the `Request` whose grammar it is to compile."""
        said = request.sampling_params.extra_args or {}
        account, is_slow = said.pop(ACCOUNT, ""), said.pop(SLOW, False)
        pool = self._slow if is_slow else self._quick
        return pool.submit_for(account, compile_for, request)

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        for pool in (self._quick, self._slow):
            pool.shutdown(wait, cancel_futures)


def take_turns(manager: Any) -> None:
    """Make a `StructuredOutputManager`, before its first request, use `Compilations`."""
    executor = getattr(manager, "executor", None)  # without a tokenizer there are no grammars
    if executor is not None:
        manager.executor = Compilations(executor._max_workers)
        executor.shutdown(wait=False)


def forget_compiled(manager: Any) -> None:
    """Drop the compiled grammars that a `StructuredOutputManager` keeps.

    Requests keep their own.
    """
    compiler = getattr(getattr(manager, "backend", None), "compiler", None)
    if compiler is not None and hasattr(compiler, "clear_cache"):
        compiler.clear_cache()


def give_up(scheduler: Any, request_ids: Iterable[str]) -> int:
    """Remove compilations from their queue; return how many. One that runs continues."""
    found = (scheduler.requests.get(request_id) for request_id in request_ids)
    asked = (getattr(request, "structured_output_request", None) for request in found)
    grammars = [getattr(one, "_grammar", None) for one in asked]
    return sum(isinstance(grammar, Future) and grammar.cancel() for grammar in grammars)
