"""Grammars are checked off the event loop, compiled in fair turns, and only while needed."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.faults import wait_until
from tests.helpers.scripted_helper import SCRIPTED
from tests.helpers.support import lease as lease_of
from vllm_hotswap.errors import EngineUnavailable, GrammarTimeout
from vllm_hotswap.host import grammars
from vllm_hotswap.host.grammars import (
    ACCOUNT,
    SLOW,
    Checks,
    check_aside,
    forget_compiled,
    give_up,
    has_grammar,
    sign,
    take_turns,
)
from vllm_hotswap.models.registry import Lease, current_lease
from vllm_hotswap.system.helpers import Bounds, Errand, Helpers
from vllm_hotswap.tasks.fair_pool import LONG_S, FairPool

SOON_S = 30.0


@dataclass(eq=False)
class Params:
    """Sampling parameters; `structured_outputs` is the grammar, and wrong if it is empty."""

    structured_outputs: str | None = None
    temperature: float = 1.0
    extra_args: dict[str, Any] | None = None


class InputProcessor:
    """Checks parameters in vLLM's order, and notes the thread that checks a grammar."""

    def __init__(self) -> None:
        self.structured_outputs_config: object | None = object()
        self.threads: list[threading.Thread] = []

    def _validate_params(self, params: Params, tasks: tuple[str, ...]) -> bool:
        assert tasks == ("generate",)
        if params.temperature < 0:
            raise ValueError("temperature must be at least 0")
        if self.structured_outputs_config is not None and params.structured_outputs is not None:
            self.threads.append(threading.current_thread())
            if not params.structured_outputs:
                raise ValueError("no grammar")
        return True

    def process_inputs(self, params: Params, tasks: tuple[str, ...]) -> tuple[Params, bool]:
        return params, self._validate_params(params, tasks)


class Client:
    """A client that adds requests as an `AsyncLLM` does."""

    def __init__(self) -> None:
        self.input_processor = InputProcessor()

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    async def add_request(
        self, request_id: str, prompt: str, params: Params, *, priority: int = 0
    ) -> Any:
        tasks = await self.get_supported_tasks()
        request: Any = SimpleNamespace(sampling_params=Params("g"))
        sign(request, "")
        self.was_slow = SLOW in request.sampling_params.extra_args
        return request_id, prompt, priority, self.input_processor.process_inputs(params, tasks)


@pytest.fixture
def pool() -> Iterator[FairPool]:
    pool = FairPool(1, "checks")
    yield pool
    pool.shutdown()


@pytest.fixture
def client(pool: FairPool) -> Any:
    client: Any = Client()
    check_aside(client, Checks(pool))
    return client


async def test_a_grammar_is_checked_once_and_not_on_the_event_loop(client: Any) -> None:
    """A grammar is checked once, off the event loop, and the request's result is the same."""
    params = Params("root ::= a")
    added = await client.add_request("one", "prompt", params, priority=3)

    assert ("one", "prompt", 3, (params, True)) == added
    assert 1 == len(client.input_processor.threads)
    assert threading.main_thread() not in client.input_processor.threads


async def test_other_parameters_are_checked_as_they_were(client: Any) -> None:
    """Other parameters are checked at once; an unchecked grammar is not skipped."""
    params = Params()
    assert ("one", "p", 0, (params, True)) == await client.add_request("one", "p", params)
    assert [] == client.input_processor.threads

    with pytest.raises(ValueError, match="no grammar"):
        client.input_processor.process_inputs(Params(""), ("generate",))


@pytest.mark.parametrize(
    ("params", "why"),
    [(Params(""), "no grammar"), (Params("", temperature=-1), "temperature must be")],
)
async def test_what_is_wrong_is_told_in_the_same_words(
    client: Any, params: Params, why: str
) -> None:
    """Of several mistakes, the one that vLLM finds first is reported, in the same words."""
    with pytest.raises(ValueError, match=why):
        await client.add_request("one", "prompt", params)


async def test_checks_are_shared_between_accounts(client: Any, pool: FairPool) -> None:
    """Checks are shared: those of one account do not all come before another's."""
    asked_for: list[str] = []
    submit = pool.submit_for

    def noting(caller: str, *work: Any) -> Future[Any]:
        asked_for.append(caller)
        return submit(caller, *work)

    pool.submit_for = noting  # type: ignore[method-assign]
    await client.add_request("one", "prompt", Params("a"))
    current_lease.set(lease_of("llama", 1, account="group a"))
    await client.add_request("two", "prompt", Params("a"))

    assert ["", "group a"] == asked_for


class Slow:
    """A client whose checks wait until they are released, and the clock of its pool."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pool = FairPool(1, spare=1, clock=lambda: self.now_s)
        self.client: Any = Client()
        self.began, self.gate = threading.Event(), threading.Event()
        self.checked: list[str] = []
        processor: Any = self.client.input_processor
        processor._validate_params = self._check
        check_aside(self.client, Checks(self.pool))

    def _check(self, params: Params, tasks: tuple[str, ...]) -> bool:
        self.checked.append(str(params.structured_outputs))
        if params.structured_outputs == "endless":
            self.began.set()
            assert self.gate.wait(SOON_S)
        return bool(tasks)

    def ask(self, grammar: str, account: str, timeout_s: float | None) -> tuple[Lease, Any]:
        """Return the lease of a request, and its task."""
        lease = lease_of("llama", 1, account=account, grammar_timeout_s=timeout_s)

        async def add() -> None:
            current_lease.set(lease)
            await self.client.add_request("r", "prompt", Params(grammar))

        return lease, asyncio.create_task(add())

    async def hold(self, account: str, timeout_s: float | None = None) -> tuple[Lease, Any]:
        held = self.ask("endless", account, timeout_s)
        assert await asyncio.to_thread(self.began.wait, SOON_S)
        return held


@pytest.fixture
async def slow(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Slow]:
    monkeypatch.setattr(grammars, "LOOK_S", 0.01)
    slow = Slow()
    yield slow
    slow.gate.set()
    slow.pool.shutdown()


async def test_a_check_that_takes_too_long_ends_its_request(slow: Slow) -> None:
    """A too long check gets a slow compilation's error; checks not yet started are dropped."""
    first, endless = await slow.hold("a", 0.05)
    second, queued = slow.ask("other", "b", 0.05)
    for task in (endless, queued):
        with pytest.raises(EngineUnavailable, match="grammar_timeout"):
            await task

    assert isinstance(first.cut, GrammarTimeout)
    assert isinstance(second.cut, GrammarTimeout)
    slow.gate.set()
    slow.pool.shutdown()
    assert ["endless"] == slow.checked


async def test_a_check_that_nobody_waits_for_is_not_begun(slow: Slow) -> None:
    """A check whose client has left the queue never starts."""
    await slow.hold("a")
    _, queued = slow.ask("other", "b", None)
    await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    slow.gate.set()
    slow.pool.shutdown()

    assert ["endless"] == slow.checked


async def test_others_are_checked_while_one_is_overdue(slow: Slow) -> None:
    """While a check is overdue others continue; those of its account are refused."""
    _, endless = await slow.hold("a")
    mine, queued = slow.ask("mine", "a", None)
    other, passing = slow.ask("other", "b", None)
    await asyncio.sleep(0.05)
    assert not passing.done()
    slow.now_s = LONG_S + 1

    with pytest.raises(EngineUnavailable, match="an earlier check has been running"):
        await queued
    await passing
    assert isinstance(mine.cut, GrammarTimeout)
    assert (504, "grammar_timeout") == (mine.cut.status, mine.cut.code)
    assert other.cut is None

    slow.gate.set()
    await endless
    await slow.ask("mine", "a", None)[1]


@dataclass
class Asked:
    """A grammar in vLLM's form. `regex` is Python code that a helper runs as its rehearsal."""

    regex: str | None = None
    choice: list[str] | None = None
    json: str | None = None
    json_object: bool | None = None


class Rehearsing:
    """A client whose grammars are rehearsed in helpers that run given code."""

    def __init__(self, helpers: Helpers) -> None:
        self.helpers = helpers
        self.client: Any = Client()
        self.client.vllm_config = None
        self.client.input_processor.tokenizer = None
        self.pools = FairPool(1, "checks"), FairPool(1, "rehearsals")
        check_aside(self.client, Checks(*self.pools, helpers))

    def ask(self, regex: str, account: str = "", **lease: Any) -> tuple[Lease, Any]:
        return self.ask_for(Asked(regex), account, **lease)

    def ask_for(self, asked: Asked, account: str = "", **own: Any) -> tuple[Lease, Any]:
        """Return the lease of a request, and its task, which says whether its grammar is slow."""
        lease = lease_of("llama", 1, account=account, **own)

        async def add() -> Any:
            current_lease.set(lease)
            params: Any = Params()
            params.structured_outputs = asked
            await self.client.add_request("r", "prompt", params)
            return self.client.was_slow

        return lease, asyncio.create_task(add())


class ScriptedRehearsals:
    """Replaces the rehearsals that need vLLM."""

    def __init__(self, *_: Any) -> None:
        self.known: dict[bytes, bool] = {}

    def is_known_slow(self, digest: bytes) -> bool | None:
        return self.known.get(digest)

    def run(self, check: Any, params: Any, digest: bytes, errand: Errand) -> bool:
        check()
        errand.do(params.structured_outputs.regex)
        self.known[digest] = "slow" in params.structured_outputs.regex
        return self.known[digest]


@pytest.fixture
async def rehearsing(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rehearsing]:
    monkeypatch.setattr(grammars, "LOOK_S", 0.01)
    monkeypatch.setattr(grammars, "Rehearsals", ScriptedRehearsals)
    monkeypatch.setattr(grammars, "digest_of", lambda asked: str(asked.regex).encode())
    helpers = Helpers(SCRIPTED)
    rehearsing = Rehearsing(helpers)
    yield rehearsing
    helpers.close()
    for pool in rehearsing.pools:
        await asyncio.to_thread(pool.shutdown)


async def until(condition: Any) -> None:
    """Wait on the event loop."""
    await asyncio.to_thread(wait_until, condition)


ENDLESS = "while True: pass"


async def test_a_plain_grammar_needs_no_process(rehearsing: Rehearsing) -> None:
    """A plain grammar needs no process; another one does, until its engine compiled it once."""
    await rehearsing.ask_for(Asked(choice=["yes", "no"]))[1]
    assert [] == rehearsing.helpers.pids
    assert not await rehearsing.ask("pass")[1]
    [pid] = rehearsing.helpers.pids
    rehearsing.helpers.close()
    assert not await rehearsing.ask("pass")[1]
    assert [] == rehearsing.helpers.pids
    assert pid


async def test_a_rehearsal_is_killed_when_its_client_leaves(rehearsing: Rehearsing) -> None:
    """A rehearsal is killed when its client leaves; the account's next one starts at once."""
    _, endless = rehearsing.ask(ENDLESS)
    await until(lambda: rehearsing.helpers.pids)
    [pid] = rehearsing.helpers.pids
    endless.cancel()
    with pytest.raises(asyncio.CancelledError):
        await endless

    await rehearsing.ask("pass")[1]
    assert pid not in rehearsing.helpers.pids
    await until(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.parametrize(
    ("work", "own", "code"),
    [
        (ENDLESS, {"grammar_timeout_s": 0.3}, "grammar_timeout"),
        (ENDLESS, {"grammar_bounds": Bounds(64 << 20, 0.2)}, "grammar_too_costly"),
        ("bytearray(1 << 30)", {"grammar_bounds": Bounds(64 << 20, 60)}, "grammar_too_costly"),
        ("import os; os.abort()", {}, "grammar_too_costly"),
    ],
)
async def test_a_rehearsal_beyond_its_bounds_ends_its_request_alone(
    rehearsing: Rehearsing, work: str, own: dict[str, Any], code: str
) -> None:
    """A rehearsal beyond its time or memory, or a crash, ends only its request, with its error."""
    lease, task = rehearsing.ask(work, **own)
    with pytest.raises(EngineUnavailable):
        await task
    assert lease.cut is not None
    assert code == lease.cut.code

    await rehearsing.ask("pass")[1]


async def test_accounts_take_turns_in_rehearsals(rehearsing: Rehearsing) -> None:
    """Another account's first rehearsal comes after the one that is running."""
    done: list[str] = []

    async def ask(account: str, number: int) -> None:
        await rehearsing.ask(f"import time; time.sleep(0.2)  # {account}{number}", account)[1]
        done.append(account)

    asked = [asyncio.create_task(ask("a", number)) for number in range(4)]
    await until(lambda: rehearsing.helpers.pids)
    await asyncio.gather(*asked, ask("b", 0))

    assert "b" in done[:2]


async def test_what_is_slow_to_compile_is_told_to_the_engine(rehearsing: Rehearsing) -> None:
    """The engine is told of a slow grammar, also without a rehearsal; clients cannot do so."""
    assert await rehearsing.ask("pass  # slow")[1]
    assert await rehearsing.ask("pass  # slow")[1]
    request: Any = SimpleNamespace(sampling_params=Params("g", extra_args={SLOW: True}))
    sign(request, "group a")
    assert {ACCOUNT: "group a"} == request.sampling_params.extra_args


@dataclass
class Engine:
    """vLLM's manager of structured outputs, reduced to submitting compilations."""

    executor: Any = field(default_factory=lambda: ThreadPoolExecutor(1))
    compiled: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    began: threading.Event = field(default_factory=threading.Event)

    def init(self, name: str, account: str, **own: Any) -> tuple[Any, Future[str]]:
        request = SimpleNamespace(name=name, sampling_params=Params("g", extra_args=own or None))
        sign(request, account)
        return request, self.executor.submit(self._create_grammar, request)

    def _create_grammar(self, request: Any) -> str:
        self.began.set()
        assert self.gate.wait(SOON_S)
        self.compiled.append(request.name)
        return str(request.name)


def test_another_accounts_first_grammar_waits_for_one_compilation() -> None:
    """Another account's first grammar waits for one compilation, not for a hundred."""
    engine = Engine()
    take_turns(engine)
    grammars = [engine.init("a0", "group a")[1]]
    assert engine.began.wait(SOON_S)
    grammars += [engine.init(f"a{n}", "group a")[1] for n in range(1, 100)]
    grammars += [engine.init("b0", "group b")[1]]
    engine.gate.set()

    assert ["b0", "a99"] == [grammars[-1].result(SOON_S), grammars[-2].result(SOON_S)]
    assert ["a0", "b0", "a1"] == engine.compiled[:3]
    engine.executor.shutdown(wait=True, cancel_futures=True)


def test_nothing_but_the_pool_sees_the_account() -> None:
    """A client's argument of the same name is ignored, and its other arguments stay."""
    engine = Engine()
    take_turns(engine)
    engine.gate.set()
    own = {"a": 1, ACCOUNT: "somebody else"}
    sent = dict(own)
    request, grammar = engine.init("a", "group a", **own)

    assert "a" == grammar.result(SOON_S)
    assert ({"a": 1}, sent) == (request.sampling_params.extra_args, own)
    engine.executor.shutdown()


def test_an_engine_without_a_tokenizer_has_no_grammars() -> None:
    """An engine without a tokenizer has no grammars, and nothing to share."""
    manager = SimpleNamespace()
    take_turns(manager)
    assert not vars(manager)


def test_a_slow_grammar_holds_up_no_other() -> None:
    """A slow grammar delays no other: its thread is separate, with the lowest priority."""
    engine = Engine()
    take_turns(engine)
    priorities: list[int] = []

    def compile_slowly(_: Any) -> None:
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        assert engine.gate.wait(SOON_S)

    def compile_quickly(_: Any) -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    request = SimpleNamespace(sampling_params=Params("g", extra_args={SLOW: True, "a": 1}))
    slow = engine.executor.submit(compile_slowly, request)
    other = SimpleNamespace(sampling_params=Params("g"))
    quick = engine.executor.submit(compile_quickly, other)

    assert os.getpriority(os.PRIO_PROCESS, 0) == quick.result(SOON_S)
    assert not slow.done()
    engine.gate.set()
    slow.result(SOON_S)
    assert [19] == priorities
    assert {"a": 1} == request.sampling_params.extra_args
    engine.executor.shutdown()


def test_a_sleeping_engine_keeps_no_compiled_grammars() -> None:
    """An engine without grammars has nothing to release."""
    cleared: list[bool] = []
    compiler = SimpleNamespace(clear_cache=lambda: cleared.append(True))
    forget_compiled(SimpleNamespace(backend=SimpleNamespace(compiler=compiler)))
    forget_compiled(SimpleNamespace(backend=None))
    forget_compiled(SimpleNamespace(backend=SimpleNamespace()))

    assert [True] == cleared


def test_requests_have_a_grammar_or_not() -> None:
    """Requests have a grammar or not; those for pooling have no sampling parameters at all."""
    assert has_grammar(SimpleNamespace(sampling_params=Params("a")))
    assert not has_grammar(SimpleNamespace(sampling_params=Params()))
    assert not has_grammar(SimpleNamespace(sampling_params=None))
    assert has_grammar(Params("a"))


def test_compilation_that_nobody_waits_for_is_taken_off_the_queue() -> None:
    """A dropped compilation leaves the queue; running ones, and other requests, are unaffected."""
    begun, queued, ready = Future[object](), Future[object](), object()
    begun.set_running_or_notify_cancel()
    grammars: dict[str, Any] = {"a": begun, "b": queued, "c": ready}
    requests = {
        name: SimpleNamespace(structured_output_request=SimpleNamespace(_grammar=grammar))
        for name, grammar in grammars.items()
    } | {"d": SimpleNamespace(structured_output_request=None)}

    assert 1 == give_up(SimpleNamespace(requests=requests), ["a", "b", "c", "d", "gone"])
    assert (False, True) == (begun.cancelled(), queued.cancelled())
