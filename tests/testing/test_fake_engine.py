"""The fake engine keeps the rules that tests rely on, and its witnesses record violations."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.helpers.support import settled
from vllm_hotswap.errors import ConfigError, EngineUnavailable, HotswapError
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.states import LADDER
from vllm_hotswap.testing.fake_engine import FakeEngine
from vllm_hotswap.testing.fake_host import FakeHost
from vllm_hotswap.testing.fake_settings import FakeSettings


@pytest.fixture
async def host() -> FakeHost:
    """Two loaded engines, of which llama is stepped."""
    qwen = FakeSettings(load_s=0.001, token_s=0.001, weights_bytes=10, kv_bytes=20)
    host = FakeHost(("llama", "qwen"), {"qwen": qwen})
    await host.start()
    for engine in host.engines.values():
        await engine.load(lambda stage: None)
    await host.engines["llama"].activate(1)
    return host


def post(engine: FakeEngine, path: str, **body: Any) -> asyncio.Task[httpx.Response]:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(engine.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://fake") as client:
            return await client.post(path, json=body)

    return asyncio.create_task(call())


async def test_engine_that_is_not_loaded_has_no_application() -> None:
    """An unloaded engine holds nothing and cannot be activated; its needs are known."""
    host = FakeHost(("llama",))
    engine = host.engines["llama"]

    assert 0 == engine.held_bytes == host.stats().used_bytes
    assert (1 << 20, 1 << 20) == (engine.memory.weights_bytes, engine.memory.kv_bytes)
    with pytest.raises(EngineUnavailable, match="model 'llama' is not loaded"):
        _ = engine.app
    with pytest.raises(HotswapError, match="engine 'llama' is not loaded"):
        await engine.activate(1)


async def test_load_reports_its_stages() -> None:
    """A load reports the stages of a real load."""
    stages: list[str] = []

    await FakeHost(("llama",)).engines["llama"].load(stages.append)

    assert ["weights", "kv_cache", "warm_up", "frontend"] == stages


async def test_loaded_engines_hold_memory(host: FakeHost) -> None:
    """Loaded engines hold what the settings say, and their sum is the host's."""
    memory = host.engines["qwen"].memory

    assert (10, 20) == (memory.weights_bytes, memory.kv_bytes)
    assert (2 << 20) + 30 == host.stats().used_bytes


@pytest.mark.parametrize(("level", "held"), [(1, 10), (2, 0)])
async def test_sleep_gives_memory_back_and_keeps_requests(
    host: FakeHost, level: int, held: int
) -> None:
    """Level 1 keeps the weights, level 2 nothing; requests continue after the next activation."""
    qwen = host.engines["qwen"]
    await qwen.activate(2)
    words = qwen.tokens(2)
    first = await anext(words)

    await qwen.sleep(level)
    assert (held, False, False) == (qwen.held_bytes, qwen.is_loaded, qwen.is_stepped)

    await qwen.wake()
    assert (30, True, False) == (qwen.held_bytes, qwen.is_loaded, qwen.is_stepped)
    await qwen.activate(3)
    assert ["I", "am"] == [first, await anext(words)]


async def test_sleeping_engine_cannot_be_activated(host: FakeHost) -> None:
    """A sleeping engine must be woken before it can be activated."""
    await host.engines["qwen"].sleep(1)

    with pytest.raises(HotswapError, match="engine 'qwen' is not loaded"):
        await host.engines["qwen"].activate(2)


async def test_wake_that_fails_leaves_nothing(host: FakeHost) -> None:
    """An engine whose wake fails is unloaded, and can be loaded again."""
    qwen = host.engines["qwen"]
    await qwen.sleep(1)
    host.fail_next("wake", "qwen")

    with pytest.raises(HotswapError, match="wake of 'qwen' was made to fail"):
        await qwen.wake()
    assert 0 == qwen.held_bytes

    await qwen.load(lambda stage: None)
    assert 30 == qwen.held_bytes


async def test_unload_gives_everything_back_but_the_frontend(host: FakeHost) -> None:
    """An unload can be repeated, and keeps only the frontend, which a later load reuses."""
    qwen, stages = host.engines["qwen"], list[str]()

    await qwen.unload()
    await qwen.unload()

    assert 0 == qwen.held_bytes
    assert qwen.app is not None
    await qwen.load(stages.append)
    assert "frontend" not in stages


@pytest.mark.parametrize(("limit", "read"), [(3, 3), (100, 10)])
async def test_prefetch_reads_as_far_as_it_may(host: FakeHost, limit: int, read: int) -> None:
    """A prefetch reads at most its limit, and at most the weights."""
    assert read == await host.engines["qwen"].prefetch(limit, lambda _: None)


@pytest.mark.parametrize(
    ("settings", "usage"),
    [
        (FakeSettings(weights_bytes=2, kv_bytes=1), [Usage(3), Usage(2), Usage(0), Usage(0)]),
        (
            FakeSettings(weights_bytes=2, kv_bytes=1, offloads=True, levels=frozenset([1])),
            [Usage(3), Usage(0, 2), None, Usage(0)],
        ),
        (
            FakeSettings(weights_bytes=2, kv_bytes=1, levels=frozenset()),
            [Usage(3), None, None, Usage(0)],
        ),
    ],
)
def test_footprint_is_what_the_device_knows(
    settings: FakeSettings, usage: list[Usage | None]
) -> None:
    """On a CPU sleeping weights stay on the device; on an accelerator they move to the host."""
    footprint = FakeHost(("a",), {"a": settings}).engines["a"].footprint

    assert usage == [footprint.usage.get(residency) for residency in LADDER[1:]]
    assert Usage(3) == footprint.peak


async def test_most_that_was_held_is_witnessed(host: FakeHost) -> None:
    """The most that was held is recorded, which reveals a plan that holds too much for a moment."""
    await host.engines["llama"].unload()
    await host.engines["llama"].load(lambda stage: None)
    await host.engines["qwen"].unload()

    assert (2 << 20) == host.stats().used_bytes
    assert (2 << 20) + 30 == host.most_held_bytes


async def test_only_the_activated_engine_is_stepped(host: FakeHost) -> None:
    """Only the activated engine is stepped; activating one parks the other."""
    await host.engines["qwen"].activate(2)

    assert [False, True] == [engine.is_stepped for engine in host.engines.values()]


@pytest.mark.parametrize(
    ("path", "body", "part"),
    [
        ("/v1/chat/completions", {}, "I am llama, a fake engine of vllm-hotswap."),
        ("/v1/completions", {"max_tokens": 2}, '"text":"I am"'),
        ("/v1/completions", {"max_tokens": 2, "stream": True}, '"text": "am "'),
        ("/v1/chat/completions", {"max_tokens": 1, "stream": True}, '"content": "I "'),
        ("/v1/embeddings", {"input": "x"}, '"embedding":['),
        ("/tokenize", {"prompt": "one two"}, '"count":2'),
    ],
)
async def test_routes_answer_in_openais_shape(
    host: FakeHost, path: str, body: dict[str, Any], part: str
) -> None:
    """Chat, completions, embeddings and tokenisation answer in OpenAI's form, streamed or not."""
    response = await post(host.engines["llama"], path, model="llama", **body)

    assert 200 == response.status_code
    assert part in response.text


async def test_request_for_another_model_is_noticed(host: FakeHost) -> None:
    """A request with another model's name is recorded, which reveals a wrong router."""
    response = await post(host.engines["llama"], "/v1/chat/completions", model="qwen")

    assert 404 == response.status_code


async def test_parked_engine_answers_after_its_activation(host: FakeHost) -> None:
    """A request that arrives while the engine is parked waits."""
    call = post(host.engines["qwen"], "/v1/chat/completions")
    await settled()
    assert not call.done()

    await host.engines["qwen"].activate(2)

    assert "I am qwen," in (await call).text


async def test_request_that_is_parked_freezes_and_goes_on(host: FakeHost) -> None:
    """The answer of a request that was parked is complete."""
    words = host.engines["llama"].tokens(3)
    first = await anext(words)

    await host.engines["qwen"].activate(2)
    second = asyncio.ensure_future(anext(words))
    await settled()
    assert not second.done()

    await host.engines["llama"].activate(3)
    assert ["I", "am", "llama,"] == [first, await second, await anext(words)]


async def test_word_that_takes_its_time_waits_for_its_engine(host: FakeHost) -> None:
    """A word whose engine was parked in the meantime is sent once the engine is stepped again."""
    qwen = host.engines["qwen"]
    await qwen.activate(2)
    word = asyncio.ensure_future(anext(qwen.tokens(1)))
    await settled()

    await host.engines["llama"].activate(3)
    await asyncio.sleep(2 * qwen.settings.token_s)
    assert not word.done()

    await qwen.activate(4)
    assert "I" == await word
    assert 0 == host.stepped_while_parked


async def test_engine_that_is_stepped_while_parked_is_witnessed(host: FakeHost) -> None:
    """A step of a parked engine is recorded: the pointer must not move in the middle of a step."""
    host.hold("step", "llama")
    word = asyncio.ensure_future(anext(host.engines["llama"].tokens(1)))
    await settled()

    await host.engines["qwen"].activate(2)
    host.release("step", "llama")
    await word

    assert 1 == host.stepped_while_parked


async def test_operation_is_held_until_it_is_released(host: FakeHost) -> None:
    """A test can pause everything at an operation, until it releases it."""
    host.hold("activate", "qwen")
    activation = asyncio.ensure_future(host.engines["qwen"].activate(2))
    await settled()
    assert not host.engines["qwen"].is_stepped

    host.release("activate", "qwen")
    await activation

    assert host.engines["qwen"].is_stepped
    assert ("activate", "qwen") == host.operations[-1]


async def test_operation_fails_once_on_request(host: FakeHost) -> None:
    """Only the next operation fails on request, and not the one after it."""
    host.fail_next("activate", "qwen")

    with pytest.raises(HotswapError, match="activate of 'qwen' was made to fail"):
        await host.engines["qwen"].activate(2)
    await host.engines["qwen"].activate(2)


def test_missing_files_fail_the_validation() -> None:
    """The validation fails for a model whose folder has disappeared."""
    engine = FakeHost(("llama",)).engines["llama"]
    engine.validate()

    engine.missing_files = True

    with pytest.raises(ConfigError, match="the folder 'fake/llama' does not exist"):
        engine.validate()


async def test_killed_host_fails_operations(host: FakeHost) -> None:
    """A killed host fails operations, even held ones."""
    host.hold("activate", "qwen")
    activation = asyncio.ensure_future(host.engines["qwen"].activate(2))
    await settled()

    host.kill("killed")

    with pytest.raises(EngineUnavailable, match="killed"):
        await activation
    assert "killed" == host.died.result()


async def test_killed_engine_is_reported(host: FakeHost) -> None:
    """If an engine is killed, the callback gets its alias, the cause, and the load's number."""
    told: list[tuple[str, str, int]] = []
    host.on_engine_failed(lambda *failure: told.append(failure))

    host.kill_engine("llama", "boom")

    assert [("llama", "boom", 1)] == told
    assert not host.engines["llama"].is_stepped


async def test_host_and_engines_tell_their_state(host: FakeHost) -> None:
    """The text forms of host and engines make failed tests readable."""
    assert "<FakeHost engines=['llama', 'qwen'] stepped=['llama']>" == repr(host)
    assert "<FakeEngine llama loaded=True stepped=True>" == repr(host.engines["llama"])

    await host.stop()
    assert not host.is_running
