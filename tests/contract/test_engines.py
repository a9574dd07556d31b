"""Requirements on every engine host: the same checks on the shipped fake and the real vLLM.

The tests run in order, on one host, because engines are slow to make: each leaves both models
loaded.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.adapters import write_adapter
from tests.helpers.support import lease as lease_of
from vllm_hotswap.demo.quickstart import WEATHER_TOOL
from vllm_hotswap.errors import ConfigError, EngineUnavailable, HotswapError
from vllm_hotswap.models.engine import Engine, EngineHost
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.models.registry import Lease, current_lease
from vllm_hotswap.models.routes import WEBSOCKET
from vllm_hotswap.states import LADDER, Residency

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM reads this variable itself, whether or not a request has the field
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning"),
]

STEP_S = 0.3
"""Long enough for a stepped engine to answer a short request."""


async def test_an_engine_that_is_not_loaded_has_no_app_and_cannot_be_activated(
    host: EngineHost,
) -> None:
    """Before a load there is no application, activation fails, and routes are known by task."""
    engine = host.engines["llama"]

    assert engine.routes is None
    assert engine.foreseen is not None
    assert "generate" in engine.foreseen.tasks
    assert engine.foreseen.serve("POST", "/v1/completions")
    assert not engine.foreseen.serve("POST", "/classify")
    assert engine.responses is None
    with pytest.raises(EngineUnavailable):
        _ = engine.app
    with pytest.raises(HotswapError, match="llama"):
        await engine.activate(1)


async def test_a_load_reports_its_stages_and_leaves_the_engine_parked(host: EngineHost) -> None:
    """Stages come in order, memory is known, and nothing is answered before activation."""
    stages: list[str] = []
    for engine in host.engines.values():
        stages.clear()
        engine.validate()
        await engine.load(stages.append)
        assert "weights" == stages[0]
        assert "frontend" == stages[-1]

    request = asyncio.create_task(complete(host.engines["llama"], 3))
    await asyncio.sleep(STEP_S)
    assert not request.done()

    await host.engines["llama"].activate(1)
    assert "llama" in (await request)["model"]
    assert host.engines["llama"].memory.weights_bytes > 0
    assert host.engines["llama"].memory.kv_bytes > 0


async def test_an_engine_that_was_loaded_tells_its_routes(host: EngineHost) -> None:
    """A loaded engine reports its task's routes and no others, and keeps no response yet."""
    engine = host.engines["llama"]

    assert engine.routes is not None
    assert "generate" in engine.routes.tasks
    assert engine.routes.serve("POST", "/v1/completions")
    assert engine.routes.serve("GET", "/v1/responses/resp_1")
    assert not engine.routes.serve("GET", "/v1/completions")
    assert not engine.routes.serve("POST", "/classify")
    assert engine.responses is not None
    assert "resp_1" not in engine.responses
    assert {} == dict(engine.responses.running)


@pytest.mark.parametrize("alias", ["llama", "qwen"])
async def test_what_was_foreseen_of_the_routes_holds(host: EngineHost, alias: str) -> None:
    """No route that the application answers was refused, and none was promised that it lacks."""
    foreseen, routes = host.engines[alias].foreseen, host.engines[alias].routes

    assert foreseen is not None
    assert routes is not None
    assert set(foreseen.tasks) <= set(routes.tasks)
    methods = ("GET", "POST", WEBSOCKET)
    served = {
        path
        for path in foreseen.absent | foreseen.present
        if any(routes.serve(method, path) for method in methods)
    }
    assert foreseen.present == served


async def test_activation_is_idempotent(host: EngineHost) -> None:
    """Activating an engine twice has the same effect as once."""
    await host.engines["qwen"].activate(2)
    await host.engines["qwen"].activate(2)

    assert "qwen" == (await complete(host.engines["qwen"], 3))["model"]


async def test_a_chat_is_answered_in_openais_shape(host: EngineHost) -> None:
    """A chat's answer has a finish reason, its length, and a tool call where a tool is given."""
    qwen = host.engines["qwen"]
    await qwen.activate(2)
    said, called = [
        (await chat(qwen, "What is the weather in Paris?", **more)).json()
        for more in ({}, {"tools": [WEATHER_TOOL]})
    ]

    (choice,), usage = said["choices"], said["usage"]
    assert ("chat.completion", "qwen") == (said["object"], said["model"])
    assert {"id", "created"} <= said.keys()
    assert (0, "stop") == (choice["index"], choice["finish_reason"])
    assert "assistant" == choice["message"]["role"]
    assert choice["message"]["content"].startswith("I am qwen,")
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    (choice,) = called["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert ("tool_calls", "function") == (choice["finish_reason"], call["type"])
    assert "get_weather" == call["function"]["name"]
    assert {"city"} == json.loads(call["function"]["arguments"]).keys()
    assert call["id"]


async def test_a_chat_is_streamed_in_openais_shape(host: EngineHost) -> None:
    """A stream has the role first, a finish reason last, then the usage if requested."""
    more = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 2}
    answer = await chat(host.engines["qwen"], "Who are you?", **more)
    *events, done = answer.text.removesuffix("\n\n").split("\n\n")
    *chunks, last = (json.loads(event.removeprefix("data: ")) for event in events)
    choices = [chunk["choices"][0] for chunk in chunks]

    assert "data: [DONE]" == done
    assert {"chat.completion.chunk"} == {chunk["object"] for chunk in [*chunks, last]}
    assert 1 == len({chunk["id"] for chunk in [*chunks, last]})
    assert "assistant" == choices[0]["delta"]["role"]
    assert "I am" == "".join(choice["delta"].get("content") or "" for choice in choices).strip()
    assert ["length"] == [c["finish_reason"] for c in choices if c["finish_reason"] is not None]
    assert "length" == choices[-1]["finish_reason"]
    assert ([], 2) == (last["choices"], last["usage"]["completion_tokens"])


async def test_what_is_wrong_with_a_chat_is_told_in_openais_shape(host: EngineHost) -> None:
    """The error for a wrong chat has a message, and a code that equals the status."""
    answer = await chat(host.engines["qwen"], "Who are you?", max_tokens=-1)

    error = answer.json()["error"]
    assert (400, 400, "BadRequestError") == (answer.status_code, error["code"], error["type"])
    assert "max_tokens" in error["message"]


async def test_a_request_to_a_parked_engine_waits_for_its_activation(host: EngineHost) -> None:
    """A request to a parked engine is accepted, and answered after the activation."""
    await host.engines["llama"].activate(3)
    waiting = asyncio.create_task(complete(host.engines["qwen"], 3))
    served = await complete(host.engines["llama"], 3)
    await asyncio.sleep(STEP_S)
    was_waiting = not waiting.done()
    await host.engines["qwen"].activate(4)

    assert "llama" == served["model"]
    assert was_waiting
    assert "qwen" == (await waiting)["model"]


async def test_a_running_request_freezes_with_its_engine_and_goes_on_later(
    host: EngineHost,
) -> None:
    """The answer of a request that was parked equals that of an undisturbed run."""
    llama, qwen = host.engines["llama"], host.engines["qwen"]
    await llama.activate(5)
    expected = await complete(llama, 400)
    running = asyncio.create_task(complete(llama, 400))
    await asyncio.sleep(0.05)
    await qwen.activate(6)
    between = await complete(qwen, 3)
    was_frozen = not running.done()
    await llama.activate(7)

    assert "qwen" == between["model"]
    assert was_frozen
    assert expected["choices"] == (await running)["choices"]


async def test_a_cancelled_request_leaves_a_parked_engine(host: EngineHost) -> None:
    """A parked engine processes the abort, and later answers the next request at once."""
    llama, qwen = host.engines["llama"], host.engines["qwen"]
    await llama.activate(8)
    running = asyncio.create_task(complete(llama, 1500))
    await asyncio.sleep(0.05)
    await qwen.activate(9)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await llama.activate(10)

    assert "llama" == (await complete(llama, 3))["model"]


async def test_a_request_that_is_given_up_at_the_door_leaves_nothing(host: EngineHost) -> None:
    """A request cancelled in front of an inactive engine never enters that engine."""
    llama, qwen = host.engines["llama"], host.engines["qwen"]
    await llama.activate(11)
    at_the_door = asyncio.Event()

    async def wait_for_ever(_tokens: int) -> None:
        at_the_door.set()
        await asyncio.Event().wait()

    lease = lease_of("qwen", 11, wait_for_turn=wait_for_ever)
    asked = asyncio.create_task(complete_under(lease, qwen))
    await asyncio.wait_for(at_the_door.wait(), 10)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    assert lease.requests
    qwen.release(lease.requests)
    await asyncio.sleep(0)

    assert 0 == unfinished(qwen)
    await qwen.activate(12)
    assert "qwen" == (await complete(qwen, 3))["model"]


@pytest.mark.parametrize("level", [1, 2])
async def test_a_running_request_survives_sleep(host: EngineHost, level: int) -> None:
    """The answer of a request equals that of an undisturbed run, although its engine slept."""
    llama, qwen = host.engines["llama"], host.engines["qwen"]
    await llama.activate(13)
    expected = await complete(llama, 400)
    running = asyncio.create_task(complete(llama, 400))
    await asyncio.sleep(0.05)
    await qwen.activate(14)
    await llama.sleep(level)
    between = await complete(qwen, 3)
    waiting = asyncio.create_task(complete(llama, 3))
    await asyncio.sleep(STEP_S)
    was_asleep = not running.done() and not waiting.done()
    await llama.wake()
    await llama.activate(15)

    assert "qwen" == between["model"]
    assert was_asleep
    assert expected["choices"] == (await running)["choices"]
    assert "llama" == (await waiting)["model"]


async def test_sleep_goes_deeper_from_level_1(host: EngineHost) -> None:
    """An engine can sleep at level 2 after level 1, and be woken from there."""
    llama, qwen = host.engines["llama"], host.engines["qwen"]
    await llama.activate(14)
    expected = await complete(llama, 20)
    await qwen.activate(15)
    await llama.sleep(1)
    await llama.sleep(2)
    await llama.wake()
    await llama.activate(16)

    assert expected["choices"] == (await complete(llama, 20))["choices"]


async def test_an_unloaded_engine_keeps_its_frontend_and_comes_back(host: EngineHost) -> None:
    """An unload keeps the frontend and can be repeated; after a reload answers are the same."""
    llama, qwen = host.engines["llama"], host.engines["qwen"]
    expected = await complete(llama, 20)
    frontend = llama.app
    await qwen.activate(17)
    await llama.unload()
    await llama.unload()
    with pytest.raises(HotswapError, match="llama"):
        await llama.activate(18)
    served = await complete(qwen, 3)
    stages: list[str] = []
    await llama.load(stages.append)
    await llama.activate(19)

    assert "qwen" == served["model"]
    assert "frontend" not in stages
    assert frontend is llama.app
    assert expected["choices"] == (await complete(llama, 20))["choices"]


async def test_a_sleeping_engine_can_be_unloaded(host: EngineHost) -> None:
    """A sleeping engine can be unloaded from either level, and loaded again."""
    llama, qwen = host.engines["llama"], host.engines["qwen"]
    await qwen.activate(20)
    for level in (1, 2):
        await llama.sleep(level)
        await llama.unload()
        await llama.load(lambda _: None)
    await llama.activate(21)

    assert "llama" == (await complete(llama, 3))["model"]


async def test_prefetch_reads_no_more_than_it_may(host: EngineHost) -> None:
    """A prefetch keeps to its limit in bytes (0 reads nothing), and reports its progress."""
    told: list[int] = []
    assert 0 == await host.engines["llama"].prefetch(0, told.append)
    assert not any(told)

    read = await host.engines["llama"].prefetch(1 << 40, told.append)
    assert 0 < read == told[-1]


async def test_what_a_model_holds_falls_along_the_ladder(host: EngineHost) -> None:
    """A model holds less on each lower residency; the most that all may hold is known."""
    footprint = host.engines["llama"].footprint
    held = [footprint.at(residency).device for residency in LADDER]

    assert held == sorted(held, reverse=True)
    assert footprint.peak.device >= held[0]
    assert footprint.at(Residency.COLD) == Usage()
    assert host.budget.device > footprint.peak.device


async def test_the_host_tells_its_pid_and_memory(host: EngineHost) -> None:
    """The host reports its process id and its memory, and that it has not died."""
    stats = host.stats()

    assert stats.pid > 0
    assert stats.used_bytes > 0
    assert not host.died.done()


def free() -> None:
    """Accept every name of an adapter."""


async def test_an_adapter_is_answered_for_by_its_name(host: EngineHost, tmp_path: Path) -> None:
    """An adapter that was added while parked survives a reload, and is unknown once removed."""
    llama, qwen = host.engines["llama"], host.engines["qwen"]
    folder = write_adapter(tmp_path / "pirate", "llama")
    await qwen.activate(22)
    added = await llama.add_adapter("pirate", folder, is_3d=False, now=True, check=free)
    names = list(llama.adapters)
    await llama.activate(23)
    before = await complete(llama, 10, "pirate")
    await qwen.activate(24)
    await llama.unload()
    await llama.load(lambda _: None)
    await llama.activate(25)
    after = await complete(llama, 10, "pirate")
    llama.remove_adapter("pirate")
    gone = await answer_to(llama, 10, "pirate")

    assert (["pirate"], {}) == (names, dict(llama.adapters))
    assert ("pirate", 4, None) == (added.files.name, added.files.rank, added.failure)
    assert "pirate" == before["model"]
    assert before["choices"] == after["choices"] != (await complete(llama, 10))["choices"]
    assert 404 == gone.status_code


async def test_an_adapter_that_cannot_be_used_leaves_all_as_it_was(
    host: EngineHost, tmp_path: Path
) -> None:
    """A refused replacement leaves the adapter with its id; the next one gets another id."""
    llama = host.engines["llama"]
    good = write_adapter(tmp_path / "good", "llama")
    high = write_adapter(tmp_path / "high", "llama", rank=17)
    first = await llama.add_adapter("pirate", good, is_3d=False, now=False, check=free)
    with pytest.raises(ConfigError, match=r"'pirate' .*rank 17"):
        await llama.add_adapter("pirate", high, is_3d=False, now=True, check=free)
    kept = llama.adapters["pirate"]
    second = await llama.add_adapter("pirate", good, is_3d=False, now=True, check=free)
    await llama.activate(26)
    answered = await complete(llama, 3, "pirate")
    llama.remove_adapter("pirate")

    assert first == kept
    assert second.id > first.id
    assert "pirate" == answered["model"]


async def chat(engine: Engine, question: str, **more: Any) -> httpx.Response:
    """Return a greedy answer through the engine's own application."""
    transport = httpx.ASGITransport(engine.app)  # type: ignore[arg-type]
    messages = [{"role": "user", "content": question}]
    body = {"model": engine.alias, "messages": messages, "temperature": 0, **more}
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        return await client.post("/v1/chat/completions", json=body, timeout=60)


async def complete(engine: Engine, max_tokens: int, model: str | None = None) -> dict[str, object]:
    """Return a greedy completion of exactly `max_tokens` through the engine's own application."""
    response = await answer_to(engine, max_tokens, model)
    assert response.status_code == 200, response.text
    answer: dict[str, object] = response.json()
    return answer


async def complete_under(lease: Lease, engine: Engine) -> dict[str, object]:
    current_lease.set(lease)
    return await complete(engine, 3)


def unfinished(engine: Engine) -> int:
    """Requests that its frontend has and that have not ended; the fake knows none."""
    client = getattr(engine.app.state, "engine_client", None)  # type: ignore[attr-defined]
    return client.get_num_unfinished_requests() if client is not None else 0


async def answer_to(engine: Engine, max_tokens: int, model: str | None = None) -> httpx.Response:
    transport = httpx.ASGITransport(engine.app)  # type: ignore[arg-type]
    body = {
        "model": model or engine.alias,
        "prompt": "Hello",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        return await client.post("/v1/completions", json=body, timeout=120)
