"""Grammars are checked beside the event loop, compiled in fair turns, and not for nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_hotswap.compat import grammars
from vllm_hotswap.compat.grammars import (
    ACCOUNT,
    check_aside,
    give_up,
    has_grammar,
    sign,
    take_turns,
)
from vllm_hotswap.errors import EngineUnavailable, GrammarTimeout
from vllm_hotswap.fair_pool import LONG_S, FairPool
from vllm_hotswap.registry import Lease, current_lease

SOON_S = 30.0


@dataclass(eq=False)
class Params:
    """Sampling parameters; `structured_outputs` is the grammar, and wrong if it is empty."""

    structured_outputs: str | None = None
    temperature: float = 1.0
    extra_args: dict[str, Any] | None = None


class InputProcessor:
    """Checks parameters in vLLM's order, and notes on which thread it checks a grammar."""

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
    """As an `AsyncLLM` adds a request."""

    def __init__(self) -> None:
        self.input_processor = InputProcessor()

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    async def add_request(
        self, request_id: str, prompt: str, params: Params, *, priority: int = 0
    ) -> Any:
        tasks = await self.get_supported_tasks()
        return request_id, prompt, priority, self.input_processor.process_inputs(params, tasks)


@pytest.fixture
def pool() -> Iterator[FairPool]:
    pool = FairPool(1, "checks")
    yield pool
    pool.shutdown()


@pytest.fixture
def client(pool: FairPool) -> Any:
    client: Any = Client()
    check_aside(client, pool)
    return client


async def test_a_grammar_is_checked_once_and_not_on_the_event_loop(client: Any) -> None:
    """What comes of the request is the same."""
    params = Params("root ::= a")
    added = await client.add_request("one", "prompt", params, priority=3)

    assert ("one", "prompt", 3, (params, True)) == added
    assert 1 == len(client.input_processor.threads)
    assert threading.main_thread() not in client.input_processor.threads


async def test_other_parameters_are_checked_as_they_were(client: Any) -> None:
    """At once; and a grammar that nobody has checked aside is not passed over."""
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
    """And of several mistakes the one that vLLM finds first."""
    with pytest.raises(ValueError, match=why):
        await client.add_request("one", "prompt", params)


async def test_checks_are_shared_between_accounts(client: Any, pool: FairPool) -> None:
    """One account's are not all before another's."""
    asked_for: list[str] = []
    submit = pool.submit_for

    def noting(caller: str, *work: Any) -> Future[Any]:
        asked_for.append(caller)
        return submit(caller, *work)

    pool.submit_for = noting  # type: ignore[method-assign]
    await client.add_request("one", "prompt", Params("a"))
    current_lease.set(Lease("llama", 1, None, account="group a"))
    await client.add_request("two", "prompt", Params("a"))

    assert ["", "group a"] == asked_for


class Slow:
    """A client whose checks go on until they are let, and the clock of its pool."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pool = FairPool(1, spare=1, clock=lambda: self.now_s)
        self.client: Any = Client()
        self.began, self.gate = threading.Event(), threading.Event()
        self.checked: list[str] = []
        processor: Any = self.client.input_processor
        processor._validate_params = self._check
        check_aside(self.client, self.pool)

    def _check(self, params: Params, tasks: tuple[str, ...]) -> bool:
        self.checked.append(str(params.structured_outputs))
        if params.structured_outputs == "endless":
            self.began.set()
            assert self.gate.wait(SOON_S)
        return bool(tasks)

    def ask(self, grammar: str, account: str, timeout_s: float | None) -> tuple[Lease, Any]:
        """The lease of a request, and what becomes of it."""
        lease = Lease("llama", 1, None, account=account, grammar_timeout_s=timeout_s)

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
    """With the error that a compilation would have had; what has not begun is not done."""
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
    """Its client has left while it was in the queue."""
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
    """Those of its own account are refused, and nobody is left in a queue."""
    _, endless = await slow.hold("a")
    mine, queued = slow.ask("mine", "a", None)
    other, passing = slow.ask("other", "b", None)
    await asyncio.sleep(0.05)
    assert not passing.done()
    slow.now_s = LONG_S + 1

    with pytest.raises(EngineUnavailable, match="an earlier one goes on"):
        await queued
    await passing
    assert isinstance(mine.cut, GrammarTimeout)
    assert (504, "grammar_timeout") == (mine.cut.status, mine.cut.code)
    assert other.cut is None

    slow.gate.set()
    await endless
    await slow.ask("mine", "a", None)[1]


@dataclass
class Engine:
    """vLLM's manager of structured outputs, as far as it submits compilations."""

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
    """Of the account that has asked for a hundred before."""
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
    """What a client sends under its name does not count, and its other arguments stay."""
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
    """And nothing to share."""
    manager = SimpleNamespace()
    take_turns(manager)
    assert not vars(manager)


def test_requests_have_a_grammar_or_not() -> None:
    """Requests for pooling have no sampling parameters at all."""
    assert has_grammar(SimpleNamespace(sampling_params=Params("a")))
    assert not has_grammar(SimpleNamespace(sampling_params=Params()))
    assert not has_grammar(SimpleNamespace(sampling_params=None))
    assert has_grammar(Params("a"))


def test_compilation_that_nobody_waits_for_is_taken_off_the_queue() -> None:
    """What runs goes on; requests without a grammar, and unknown ones, are passed over."""
    begun, queued, ready = Future[object](), Future[object](), object()
    begun.set_running_or_notify_cancel()
    grammars: dict[str, Any] = {"a": begun, "b": queued, "c": ready}
    requests = {
        name: SimpleNamespace(structured_output_request=SimpleNamespace(_grammar=grammar))
        for name, grammar in grammars.items()
    } | {"d": SimpleNamespace(structured_output_request=None)}

    assert 1 == give_up(SimpleNamespace(requests=requests), ["a", "b", "c", "d", "gone"])
    assert (False, True) == (begun.cancelled(), queued.cancelled())
