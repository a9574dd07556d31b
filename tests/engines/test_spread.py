"""What vLLM does for a large call in one task leaves the event loop to others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from starlette.datastructures import State
from starlette.responses import JSONResponse

from tests.helpers.support import lease as lease_of
from vllm_hotswap.engines.spread import ITEMS, READ_BYTES, JsonInPieces, read_in_turns, spread
from vllm_hotswap.models.pace import OUTPUTS, PER_TURN, Pace, pace_tasks
from vllm_hotswap.models.registry import current_lease


@pytest.fixture
async def pace() -> AsyncIterator[Pace]:
    yield pace_tasks()
    asyncio.get_running_loop().set_task_factory(None)


class Client:
    """A stand-in for `AsyncLLM` that registers all answers of a call, then sends all."""

    def __init__(self) -> None:
        self.engine_core = Core()
        self.output_processor = OutputProcessor()
        self.aborted: list[tuple[list[str], bool]] = []
        self.output_handler: asyncio.Task[None] | None = None

    def _run_output_handler(self) -> None:
        if self.output_handler is None:
            self.output_handler = asyncio.create_task(self.engine_core.look())

    async def abort(self, request_id: list[str], internal: bool = False) -> None:
        self.aborted.append((request_id, internal))

    async def add_request(self, request_id: str, answers: int = 1) -> None:
        self._run_output_handler()
        parent = SimpleNamespace(request_id=request_id) if answers > 1 else None
        requests = [SimpleNamespace(request_id=f"{n}_{request_id}") for n in range(answers)]
        for request in requests:
            self.output_processor.add_request(request, "prompt", parent, 0)
        for request in requests:
            await self.engine_core.add_request_async(request)


class Core:
    """Note what was sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.looked = 0

    async def look(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.looked += 1

    async def add_request_async(self, request: Any) -> None:
        await asyncio.sleep(0)
        self.sent.append(request.request_id)


class OutputProcessor:
    """Note what was registered."""

    def __init__(self) -> None:
        self.parent_requests: dict[str, Any] = {}
        self.registered: list[str] = []

    def add_request(self, request: Any, prompt: str, parent: Any, index: int) -> None:
        assert (prompt, index) == ("prompt", 0)
        self.registered.append(request.request_id)


async def test_outputs_are_looked_at_in_every_turn(pace: Pace) -> None:
    """Outputs are read in every turn, without waiting for large calls that fill all places."""
    client = Client()
    current_lease.set(lease_of("llama", 1, calls=100))
    spread(client, application(), pace)
    assert client.output_handler is not None
    await client.add_request("first")

    async def work() -> None:
        await asyncio.sleep(0)

    tasks = [asyncio.create_task(work()) for _ in range(100)]
    before, turns = client.engine_core.looked, 0
    current_lease.set(None)
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        turns += 1

    assert turns > 2
    assert client.engine_core.looked - before >= turns - 1


def application(**serving: Any) -> Any:
    return SimpleNamespace(state=State(serving))


class Serving:
    """A handler that awaits once for each prompt of a call, which takes no time."""

    async def _get_trace_headers(self, headers: str) -> str:
        return headers

    async def answer(self, prompts: int) -> list[str]:
        return [await self._get_trace_headers("found") for _ in range(prompts)]


@pytest.mark.parametrize(("calls", "turns"), [(1, 0), (100, 100 // PER_TURN)])
async def test_a_loop_over_prompts_gives_the_event_loop_back(
    pace: Pace, calls: int, turns: int
) -> None:
    """A loop over prompts yields after a few of them, if the call has many; it paces once."""
    serving = Serving()
    spread(Client(), application(one=serving, other=serving, none=None), pace)
    passed = 0

    async def others() -> None:
        nonlocal passed
        while True:
            await asyncio.sleep(0)
            passed += 1

    other = asyncio.create_task(others())
    current_lease.set(lease_of("llama", 1, calls=calls))
    await asyncio.sleep(0)
    assert ["found"] * 100 == await serving.answer(100)
    other.cancel()

    assert turns <= passed <= 2 * turns


@dataclass(frozen=True)
class Request:
    items: list[str]
    query: str | list[int] = "query"
    add_special_tokens: bool = True

    def model_copy(self, update: dict[str, Any]) -> Request:
        return replace(self, **update)


class Tokenizer:
    """Return a token for each character, and one first for a text that gets special ones."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.threads: set[threading.Thread] = set()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self.texts.append(text)
        self.threads.add(threading.current_thread())
        return [0] * add_special_tokens + [ord(character) for character in text]


class Scoring:
    """Tokenise items as vLLM's generative scoring does, and note how many at once."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self.renderer = SimpleNamespace(_executor=executor)
        self.sizes: list[int] = []

    async def _build_prompts(
        self, request: Request, tokenizer: Tokenizer, length: int
    ) -> tuple[list[list[int]], list[int]]:
        self.sizes.append(len(request.items))
        if "" in request.items:
            raise ValueError("no text")
        query = request.query
        if isinstance(query, str):
            query = tokenizer.encode(query, request.add_special_tokens)
        items = [tokenizer.encode(item, add_special_tokens=False) for item in request.items]
        prompts = [(query + item)[:length] for item in items]
        return prompts, [len(prompt) for prompt in prompts]


async def test_items_are_tokenised_on_the_threads_of_the_renderer(pace: Pace) -> None:
    """Items are tokenised on the renderer's threads in groups, so that others have those threads in
    between, and the query once.

    The result is the same.
    """
    with ThreadPoolExecutor(1) as executor:
        scoring: Any = Scoring(executor)
        spread(Client(), application(serving_generative_scoring=scoring), pace)
        texts = [f"text {number}" for number in range(100)]

        for request in (
            Request(texts),
            Request(texts, add_special_tokens=False),
            Request(texts, query=[7, 8]),
        ):
            expected = await Scoring(executor)._build_prompts(request, Tokenizer(), 12)
            tokenizer = Tokenizer()
            assert expected == await scoring._build_prompts(request, tokenizer, 12)
            assert tokenizer.texts.count("query") == isinstance(request.query, str)
            assert threading.main_thread() not in tokenizer.threads
        assert max(scoring.sizes) == ITEMS
        with pytest.raises(ValueError, match="no text"):
            await scoring._build_prompts(Request(["a", ""]), Tokenizer(), 9)


async def test_tokenising_that_waits_is_no_longer_what_it_was(pace: Pace) -> None:
    """If a newer vLLM awaits while it tokenises, an error says so and nothing hangs."""

    async def _build_prompts(request: Request, tokenizer: Tokenizer) -> None:
        await asyncio.sleep(0)

    with ThreadPoolExecutor(1) as executor:
        renderer = SimpleNamespace(_executor=executor)
        scoring: Any = SimpleNamespace(renderer=renderer, _build_prompts=_build_prompts)
        spread(Client(), application(serving_generative_scoring=scoring), pace)
        with pytest.raises(RuntimeError, match="awaits something"):
            await scoring._build_prompts(Request(["a"]), Tokenizer())


async def test_answers_of_a_call_are_registered_as_they_are_sent(pace: Pace) -> None:
    """Answers are registered one by one as they are sent; an abort finds their call at once."""
    client: Any = Client()
    spread(client, application(), pace)
    processor, core = client.output_processor, client.engine_core
    ahead: list[int] = []

    async def watch() -> None:
        while True:
            assert processor.parent_requests
            ahead.append(len(processor.registered) - len(core.sent))
            await asyncio.sleep(0)

    adding = asyncio.create_task(client.add_request("many", answers=50))
    await asyncio.sleep(0)
    watching = asyncio.create_task(watch())
    await adding
    watching.cancel()

    assert [f"{n}_many" for n in range(50)] == processor.registered == core.sent
    assert max(ahead) <= 1

    await client.add_request("one")
    assert ("0_one", ["many"]) == (processor.registered[-1], [*processor.parent_requests])


async def test_an_answer_is_written_in_another_turn_than_it_is_made(pace: Pace) -> None:
    """A large call's response is written in another turn than it is made."""

    class Making:
        async def create_completion(self, name: str) -> str:
            return name

        def create_error(self) -> str:
            return "told"

    serving = Making()
    spread(Client(), application(serving=serving), pace)
    turned = asyncio.Event()

    async def make(calls: int) -> bool:
        current_lease.set(lease_of("llama", 1, calls=calls))
        asyncio.get_running_loop().call_soon(turned.set)
        assert "made" == await serving.create_completion("made")
        return turned.is_set()

    assert await make(100)
    turned.clear()
    assert not await make(1)
    assert "told" == serving.create_error()


async def test_inputs_are_given_to_threads_a_few_in_a_turn(pace: Pace) -> None:
    """Inputs of a large call go to threads a few per turn; those of a single request at once."""
    given = [0]

    def render_async(text: str) -> asyncio.Future[str]:
        given[-1] += 1
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        future.set_result(text.upper())
        return future

    async def others() -> None:
        while True:
            await asyncio.sleep(0)
            given.append(0)

    one, other = (SimpleNamespace(render_async=render_async) for _ in range(2))
    serving = SimpleNamespace(io_processor=one)
    of_tasks = SimpleNamespace(io_processors={"embed": other})
    spread(Client(), application(one=serving, other=of_tasks), pace)
    using = asyncio.create_task(others())
    for inputs, calls, most in ((one, 100, PER_TURN), (other, 100, PER_TURN), (one, 1, 100)):
        current_lease.set(lease_of("llama", 1, calls=calls))
        given[:] = [0]
        made = [inputs.render_async(f"text {n}") for n in range(100)]
        assert [f"TEXT {n}" for n in range(100)] == await asyncio.gather(*made)
        assert max(given) <= most
        assert 100 == sum(given)
    using.cancel()


async def test_inputs_end_as_their_work_does(pace: Pace) -> None:
    """Input work passes on errors, and is not started or is cancelled when its client left."""
    begun: dict[str, asyncio.Future[str]] = {}

    def render_async(text: str) -> asyncio.Future[str]:
        begun[text] = asyncio.get_running_loop().create_future()
        return begun[text]

    inputs: Any = SimpleNamespace(render_async=render_async)
    spread(Client(), application(one=SimpleNamespace(io_processor=inputs)), pace)
    current_lease.set(lease_of("llama", 1, calls=100))
    wrong, left, gone, cancelled, never = map(inputs.render_async, "wlgcn")
    never.cancel()
    for _ in range(3 * len("wlgcn")):
        await asyncio.sleep(0)
    begun["w"].set_exception(ValueError("no text"))
    left.cancel()
    gone.cancel()
    begun["g"].set_exception(ValueError("nobody hears it"))
    begun["c"].cancel()

    with pytest.raises(ValueError, match="no text"):
        await wrong
    await asyncio.sleep(0)
    assert cancelled.cancelled()
    assert begun["l"].cancelled()
    assert "n" not in begun
    assert left.cancelled()


async def test_inputs_that_no_thread_takes_end_in_an_error(pace: Pace) -> None:
    """If no thread takes an input, all that are left of its call fail; the next call is tried."""
    taken: list[str] = []

    def render_async(text: str) -> asyncio.Future[str]:
        if len(taken) == 2:
            raise RuntimeError("cannot schedule new futures after shutdown")
        taken.append(text)
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        future.set_result(text)
        return future

    inputs: Any = SimpleNamespace(render_async=render_async)
    spread(Client(), application(one=SimpleNamespace(io_processor=inputs)), pace)
    current_lease.set(lease_of("llama", 1, calls=100))
    made = [inputs.render_async(text) for text in "abcd"]
    async with asyncio.timeout(10):
        ends = await asyncio.gather(*made, return_exceptions=True)

    assert ["a", "b"] == ends[:2]
    assert all("after shutdown" in str(end) for end in ends[2:])
    taken.clear()
    async with asyncio.timeout(10):
        assert "e" == await inputs.render_async("e")


async def test_the_event_loop_turns_between_many_bytes_of_outputs() -> None:
    """After many bytes of outputs the event loop gets a turn; small ones are read as they come."""
    turns = 0

    class Socket:
        closed, size = False, 0

        async def recv_multipart(self, copy: bool) -> list[bytes]:
            assert not copy
            return [b"x" * self.size]

    class Resources:
        output_socket: Any = Socket()

    class EngineCore:
        resources = Resources()
        reads: Any = None

        def _ensure_output_queue_task(self) -> None:
            self.reads = self.resources.output_socket

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    core = EngineCore()
    read_in_turns(core)
    assert isinstance(core.resources.output_socket, Socket)
    assert core.reads.closed is False
    using = asyncio.create_task(others())
    await asyncio.sleep(0)
    for size, expected in ((READ_BYTES // 10, 0), (READ_BYTES + 1, 4)):
        turns, core.resources.output_socket.size = 0, size
        for _ in range(5):
            await core.reads.recv_multipart(copy=False)
        assert expected <= turns <= expected + 1
    using.cancel()


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"data": [], "usage": {"a": [1]}, "id": None},
        {"data": [{"embedding": [0.1, -2e-9], "index": 0}, {"ß": "\n\u2028", "x": True}], "n": 1.5},
        ["a", {"b": []}],
        "text",
    ],
)
def test_an_answer_in_pieces_has_the_same_bytes(content: Any) -> None:
    """A response in pieces has the same bytes as starlette's."""
    assert JSONResponse(content).body == JsonInPieces(content).body


async def test_long_lists_of_numbers_are_written_in_pieces(pace: Pace) -> None:
    """Long lists of numbers are written in pieces; what is not a number is refused as before."""
    serving, other = (
        SimpleNamespace(json_response_cls=JSONResponse),
        SimpleNamespace(json_response_cls=State),
    )
    spread(Client(), application(one=serving, other=other), pace)
    assert (JsonInPieces, State) == (serving.json_response_cls, other.json_response_cls)
    with pytest.raises(ValueError, match="not JSON compliant"):
        JsonInPieces({"data": [float("nan")]})


async def test_requests_are_given_up_a_few_in_a_turn(pace: Pace) -> None:
    """Aborts run a few per turn: of a list, or of one request's answers and then itself."""
    client: Any = Client()
    aborted = client.aborted
    children = [f"{n}_many" for n in range(100)]
    client.output_processor.parent_requests["many"] = SimpleNamespace(child_requests=children)
    spread(client, application(), pace)
    done = [0]

    async def others() -> None:
        while True:
            await asyncio.sleep(0)
            done.append(sum(len(ids) for ids, _ in aborted))

    other = asyncio.create_task(others())
    await asyncio.sleep(0)
    await client.abort("many", internal=True)
    await client.abort(children)
    other.cancel()

    assert [*children, "many", *children] == [one for ids, _ in aborted for one in ids]
    assert {True, False} == {internal for _, internal in aborted}
    assert max(after - before for before, after in pairwise(done)) <= 2 * OUTPUTS


async def test_whoever_gives_requests_up_may_be_cancelled(pace: Pace) -> None:
    """An abort completes although anyio cancels its task in every turn."""
    client: Any = Client()
    children = [f"{n}_many" for n in range(100)]
    client.output_processor.parent_requests["many"] = SimpleNamespace(child_requests=children)
    spread(client, application(), pace)

    async def stream() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await client.abort("many", internal=True)

    async with anyio.create_task_group() as group:
        group.start_soon(stream)
        await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    for _ in range(100 // OUTPUTS + 1):
        await asyncio.sleep(0)
    assert [*children, "many"] == [one for ids, _ in client.aborted for one in ids]


async def test_one_request_is_given_up_at_once(pace: Pace) -> None:
    """A single request is aborted at once by its name, as in vLLM."""
    client: Any = Client()
    spread(client, application(), pace)
    await client.abort("one")
    assert [(["one"], False)] == client.aborted
