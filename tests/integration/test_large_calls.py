"""Requests for many things, and grammars: spread and checked elsewhere, with unchanged answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.helpers.faults import wait_until
from tests.integration.hosted import request_of
from tests.integration.processes import ServerProcess
from vllm_hotswap.demo.quickstart import MODELS
from vllm_hotswap.host.grammars import SLOW, Checks, check_aside, sign, take_turns
from vllm_hotswap.tasks.fair_pool import FairPool

MANY = 40
WORDS = [f"The number {number} is" for number in range(MANY)]


def asked(server: ServerProcess, path: str, model: str, **body: object) -> dict[str, Any]:
    answer = server.post(path, {"model": model, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def gauge(server: ServerProcess, name: str) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith(name + "{") and '"llama"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in found)


def test_a_list_of_prompts_is_answered_in_its_order(server: ServerProcess) -> None:
    """A list of prompts is answered in order, each prompt as alone."""
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 5}
    together = asked(server, "/v1/completions", "llama", prompt=WORDS, **greedy)
    texts = [choice["text"] for choice in together["choices"]]
    alone = [
        asked(server, "/v1/completions", "llama", prompt=word, **greedy)["choices"][0]["text"]
        for word in WORDS[::13]
    ]

    assert list(range(MANY)) == [choice["index"] for choice in together["choices"]]
    assert alone == texts[::13]


@pytest.mark.parametrize("seed", [None, 7])
def test_many_answers_are_all_there(server: ServerProcess, seed: int | None) -> None:
    """All answers to one prompt are there; with a seed, each is as before."""
    body: dict[str, Any] = {"prompt": "Hello", "n": MANY, "max_tokens": 4, "temperature": 1}
    first, second = (
        asked(server, "/v1/completions", "llama", seed=seed, **body)["choices"] for _ in range(2)
    )

    assert list(range(MANY)) == [choice["index"] for choice in first]
    if seed is not None:
        assert [one["text"] for one in first] == [one["text"] for one in second]


def test_a_batch_of_conversations_is_answered_in_its_order(server: ServerProcess) -> None:
    """A batch of conversations is answered in order, and items are scored, each as alone."""
    conversations = [[{"role": "user", "content": word}] for word in WORDS]
    batch: dict[str, Any] = {"temperature": 0, "max_tokens": 3}
    together = asked(
        server, "/v1/chat/completions/batch", "llama", messages=conversations, **batch
    )["choices"]
    alone = asked(server, "/v1/chat/completions", "llama", messages=conversations[-1], **batch)
    scoring: dict[str, Any] = {"query": "Is it?", "label_token_ids": [5, 6]}
    scored = asked(server, "/generative_scoring", "llama", items=WORDS, **scoring)["data"]
    last = asked(server, "/generative_scoring", "llama", items=WORDS[-1:], **scoring)["data"]

    assert alone["choices"][0]["message"]["content"] == together[-1]["message"]["content"]
    assert list(range(MANY)) == [one["index"] for one in scored]
    assert last[0]["score"] == pytest.approx(scored[-1]["score"], abs=1e-4)


def test_inputs_are_embedded_in_their_order(server: ServerProcess) -> None:
    """Inputs are embedded in order, and pairs are scored."""
    server.switch("embed")
    together = asked(server, "/v1/embeddings", "embed", input=WORDS)["data"]
    alone = asked(server, "/v1/embeddings", "embed", input=WORDS[-1])["data"]
    scored = asked(server, "/score", "embed", queries=WORDS[3], documents=WORDS)["data"]

    assert alone[0]["embedding"] == pytest.approx(together[-1]["embedding"], abs=1e-4)
    assert list(range(MANY)) == [one["index"] for one in scored]
    assert 3 == max(scored, key=lambda one: one["score"])["index"]


def test_a_client_that_leaves_takes_its_many_requests_along(server: ServerProcess) -> None:
    """A client that leaves takes its many requests out of the engine and the count in flight."""
    body: dict[str, Any] = {"model": "llama", "prompt": "Hello", "n": 100, "temperature": 1}
    body |= {"max_tokens": 1500, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        server.post("/v1/completions", body, timeout=1.0)

    def is_free() -> bool:
        server.complete("llama", "Hello", max_tokens=2)  # a step reports how many there are
        return gauge(server, "vllm:num_requests_running") <= 1

    wait_until(is_free)
    assert 0 == gauge(server, "vllm:num_requests_waiting")
    assert 0 == server.status()["models"]["llama"]["in_flight"]  # type: ignore[index]


def llama_config() -> Any:
    arguments = EngineArgs(model=str(MODELS / "llama"), max_model_len=256, enforce_eager=True)
    return arguments.create_engine_config()


def params(**grammar: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(**grammar))


@pytest.mark.parametrize(
    "grammar",
    [
        {"grammar": "root ::= ("},
        {"regex": "(["},
        {"json": {"type": "strange"}},
        {"choice": []},
    ],
)
async def test_the_check_of_a_grammar_is_vllms_and_on_a_thread(grammar: dict[str, Any]) -> None:
    """A grammar is checked by vLLM on a thread, and refused or accepted as on the event loop."""
    processor = InputProcessor(llama_config())
    threads: list[threading.Thread] = []

    class Client:
        input_processor = processor

        async def get_supported_tasks(self) -> tuple[str, ...]:
            return ("generate",)

        async def add_request(self, request_id: str, prompt: Any, params: Any) -> Any:
            return self.input_processor.process_inputs(request_id, prompt, params, ("generate",))

    prompt = {"type": "token", "prompt_token_ids": [1, 2]}
    add = Client().add_request
    on_the_loop = await _said(lambda: add("a", prompt, params(**grammar)))
    pool = FairPool(1)
    submit = pool.submit_for

    def noting(caller: str, work: Any, *args: Any) -> Any:
        def noted(*given: Any) -> Any:
            threads.append(threading.current_thread())
            return work(*given)

        return submit(caller, noted, *args)

    pool.submit_for = noting  # type: ignore[method-assign]
    client: Any = Client()
    check_aside(client, Checks(pool))
    try:
        assert on_the_loop == await _said(
            lambda: client.add_request("a", prompt, params(**grammar))
        )
    finally:
        pool.shutdown()
    assert threads
    assert threading.main_thread() not in threads


async def _said(ask: Callable[[], Any]) -> tuple[str, str]:
    try:
        request = await ask()
    except Exception as error:  # noqa: BLE001  # whatever it is, it is compared
        return type(error).__name__, str(error)
    return "taken", str(request.sampling_params)


@pytest.mark.filterwarnings("ignore:max_rollback_tokens is deprecated")  # vLLM sets it for xgrammar
@pytest.mark.parametrize("is_slow", [False, True])
def test_vllm_compiles_on_the_threads_that_accounts_share(is_slow: bool) -> None:
    """vLLM compiles on threads shared by accounts, slow ones apart; other code sees no account."""
    config = llama_config()
    sampling = params(json={"type": "object", "properties": {"a": {"type": "integer"}}})
    sampling.extra_args = {"own": 1}
    InputProcessor(config)._validate_params(sampling, ("generate",))
    asked = request_of([1, 2], sampling_params=sampling)
    sign(asked, "group a")
    if is_slow:
        asked.sampling_params.extra_args[SLOW] = True
    request = Request.from_engine_core_request(asked, None)
    manager = StructuredOutputManager(config)
    take_turns(manager)
    callers: list[str] = []
    pool = manager.executor._slow if is_slow else manager.executor._quick
    submit = pool.submit_for
    pool.submit_for = lambda caller, *work: (callers.append(caller), submit(caller, *work))[1]

    manager.grammar_init(request)
    wait_until(lambda: request.structured_output_request.is_grammar_ready)
    grammar = request.structured_output_request.grammar
    manager.clear_backend()

    assert not isinstance(grammar, Exception)
    assert (["group a"], {"own": 1}) == (callers, request.sampling_params.extra_args)
