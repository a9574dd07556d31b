"""Real clients against one server with four models: what they parse is what each model said."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from anthropic import Anthropic
from openai import BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel

from tests.helpers.ports import free_port
from tests.integration.processes import QUICKSTART_MODULE, ServerProcess
from vllm_hotswap.demo.quickstart import QUESTION, WEATHER_TOOL, write

MODELS = """\
default_model: llama
models:
  llama:
    model: ./llama
    max_model_len: 2048
    enforce_eager: true
    kv_cache_memory_bytes: 64M
    enable_auto_tool_choice: true
    tool_call_parser: llama3_json
    reasoning_parser: deepseek_v3
  qwen:
    model: ./qwen
    max_model_len: 2048
    enforce_eager: true
    kv_cache_memory_bytes: 64M
    enable_auto_tool_choice: true
    tool_call_parser: hermes
    reasoning_parser: qwen3
    default_chat_template_kwargs: {enable_thinking: true}
  embed:
    model: ./embed
    max_model_len: 512
    enforce_eager: true
  classify:
    model: ./classify
    max_model_len: 512
    enforce_eager: true
"""
"""Each chat model has parsers of its own; qwen thinks unless told not to, llama only if told to."""

THINKING = {"llama": {"thinking": True}, "qwen": {"enable_thinking": True}}
NOT_THINKING = {"llama": {"thinking": False}, "qwen": {"enable_thinking": False}}
THOUGHT = {
    "llama": "Somebody talks to me, so I say who I am.",
    "qwen": "A small model should answer in few words.",
}
INTRO = {
    "llama": "I am llama, the tiny Llama of vllm-hotswap.",
    "qwen": "I am qwen, the tiny Qwen of vllm-hotswap.",
}
WEATHER = "What is the weather in Paris?"
CHAT_MODELS = ("llama", "qwen")

QUICKSTART_LIST = "curl -s http://localhost:8080/v1/models | jq"
QUICKSTART_CHAT = """\
curl -s http://localhost:8080/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -d '{
    "model": "llama",
    "messages": [{"role": "user", "content": "Explain Intel Gaudi in one sentence."}],
    "max_tokens": 64,
    "temperature": 0
  }' | jq"""
QUICKSTART_SWITCH = """\
curl -s http://localhost:8080/v1/models/switch \\
  -H "Content-Type: application/json" \\
  -d '{
    "model": "qwen",
    "drain_timeout": 60
  }' | jq"""
QUICKSTART_CHAT_AGAIN = """\
curl -s http://localhost:8080/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -d '{
    "model": "qwen",
    "messages": [{"role": "user", "content": "Explain Intel Gaudi in one sentence."}],
    "max_tokens": 64,
    "temperature": 0
  }' | jq"""


class Card(BaseModel):
    """What the tiny models answer where they must answer in JSON."""

    model: str
    answer: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server in which every model has frontend settings of its own."""
    folder = tmp_path_factory.mktemp("clients")
    write(folder)
    (folder / "clients.yaml").write_text(MODELS)
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HPU_MULTI_MODEL_CONFIG": str(folder / "clients.yaml"),
    }
    log = folder / "server.log"
    running = ServerProcess.start(["-m", QUICKSTART_MODULE], free_port(), log, environment)
    yield running
    assert running.stop() == 0, running.log_tail()


@pytest.fixture(scope="module")
def openai(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


# --- the OpenAI client --------------------------------------------------------------------


def ask(openai: OpenAI, alias: str, question: str, **extra: Any) -> Any:
    """Return the message of a chat answer, or the stream of its chunks."""
    messages = [{"role": "user", "content": question}]
    made = openai.chat.completions.create(
        model=alias,
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=128,
        **extra,
    )
    return made if extra.get("stream") else made.choices[0].message


def deltas(stream: Any) -> list[Any]:
    return [chunk.choices[0].delta for chunk in stream if chunk.choices]


def joined(parts: list[Any], field: str) -> str:
    return "".join(getattr(part, field, None) or "" for part in parts)


def streamed_calls(parts: list[Any]) -> list[tuple[str, str]]:
    """Return name and arguments of each tool call that a stream brought in pieces."""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for call in (call for part in parts for call in part.tool_calls or []):
        names[call.index] = names.get(call.index, "") + (call.function.name or "")
        pieces = call.function.arguments or ""
        arguments[call.index] = arguments.get(call.index, "") + pieces
    return [(names[index], arguments[index]) for index in sorted(names)]


def test_the_openai_client_lists_every_alias(openai: OpenAI) -> None:
    """The OpenAI client lists every alias in the order of the file."""
    assert ["llama", "qwen", "embed", "classify"] == [model.id for model in openai.models.list()]


@pytest.mark.parametrize("alias", CHAT_MODELS)
def test_a_chat_is_answered_by_the_named_model(
    server: ServerProcess, openai: OpenAI, alias: str
) -> None:
    """The named model answers a chat, whole and streamed alike, with token counts on demand."""
    server.switch(alias)
    whole = ask(openai, alias, "Who are you?")
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(openai, alias, "Who are you?", **options))

    assert whole.content.startswith(INTRO[alias])
    assert whole.content == joined(deltas(chunks), "content")
    assert {alias} == {chunk.model for chunk in chunks}
    assert chunks[-1].usage.completion_tokens > 10


@pytest.mark.parametrize("alias", CHAT_MODELS)
def test_each_models_tool_calls_are_parsed_by_its_own_parser(
    server: ServerProcess, openai: OpenAI, alias: str
) -> None:
    """llama's JSON and qwen's tags are parsed by each one's parser; clients see the same calls."""
    server.switch(alias)
    whole = ask(openai, alias, WEATHER, tools=[WEATHER_TOOL])
    parts = deltas(ask(openai, alias, WEATHER, tools=[WEATHER_TOOL], stream=True))

    [call] = whole.tool_calls
    assert ("get_weather", {"city": "Paris"}) == (
        call.function.name,
        json.loads(call.function.arguments),
    )
    assert not whole.content
    [(name, arguments)] = streamed_calls(parts)
    assert ("get_weather", {"city": "Paris"}) == (name, json.loads(arguments))
    assert "" == joined(parts, "content")


@pytest.mark.parametrize("alias", CHAT_MODELS)
def test_a_tools_answer_goes_back_to_the_model_that_called_it(
    server: ServerProcess, openai: OpenAI, alias: str
) -> None:
    """A tool's answer returns to the model that called it, through its own chat template."""
    server.switch(alias)
    message = ask(openai, alias, WEATHER, tools=[WEATHER_TOOL])
    messages = [
        {"role": "user", "content": WEATHER},
        message.model_dump(include={"role", "content", "tool_calls"}),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny, 21 C"},
    ]
    answer = openai.chat.completions.create(
        model=alias,
        messages=messages,  # type: ignore[arg-type]
        tools=[WEATHER_TOOL],  # type: ignore[list-item]
        temperature=0,
    )

    assert f"I am {alias}. It is sunny in Paris." == answer.choices[0].message.content


@pytest.mark.parametrize("alias", CHAT_MODELS)
def test_each_models_thoughts_are_parsed_by_its_own_parser(
    server: ServerProcess, openai: OpenAI, alias: str
) -> None:
    """Each model's parser splits thought and answer, streamed or not; the answer stays the same."""
    server.switch(alias)
    extra = {"extra_body": {"chat_template_kwargs": THINKING[alias]}}
    whole = ask(openai, alias, "Who are you?", **extra)
    parts = deltas(ask(openai, alias, "Who are you?", stream=True, **extra))
    silent = ask(
        openai,
        alias,
        "Who are you?",
        extra_body={"chat_template_kwargs": NOT_THINKING[alias]},
    )

    assert THOUGHT[alias] == whole.reasoning
    assert whole.content.startswith(INTRO[alias])
    assert (whole.reasoning, whole.content) == (
        joined(parts, "reasoning"),
        joined(parts, "content"),
    )
    assert (None, whole.content) == (silent.reasoning, silent.content)


@pytest.mark.parametrize("alias", CHAT_MODELS)
def test_a_thinking_model_calls_tools_too(
    server: ServerProcess, openai: OpenAI, alias: str
) -> None:
    """A thinking model calls tools, too: both of its parsers handle their part of one answer."""
    server.switch(alias)
    extra = {
        "tools": [WEATHER_TOOL],
        "extra_body": {"chat_template_kwargs": THINKING[alias]},
    }
    whole = ask(openai, alias, WEATHER, **extra)
    parts = deltas(ask(openai, alias, WEATHER, stream=True, **extra))

    assert ["get_weather"] == [call.function.name for call in whole.tool_calls]
    assert "tool" in whole.reasoning
    assert whole.reasoning == joined(parts, "reasoning")
    [(name, arguments)] = streamed_calls(parts)
    assert ("get_weather", {"city": "Paris"}) == (name, json.loads(arguments))


@pytest.mark.parametrize("alias", CHAT_MODELS)
def test_reasoning_effort_turns_thoughts_on_and_off(
    server: ServerProcess, openai: OpenAI, alias: str
) -> None:
    """Reasoning effort reaches the model's own chat template and parser through vLLM."""
    server.switch(alias)
    low = ask(openai, alias, "Who are you?", reasoning_effort="low")
    none = ask(openai, alias, "Who are you?", reasoning_effort="none")

    assert (THOUGHT[alias], None) == (low.reasoning, none.reasoning)
    assert low.content == none.content


def test_each_model_thinks_by_default_only_if_its_settings_say_so(
    server: ServerProcess, openai: OpenAI
) -> None:
    """`default_chat_template_kwargs` belongs to one model, across switches."""
    thoughts = []
    for alias in ("llama", "qwen", "llama"):
        server.switch(alias)
        thoughts.append(ask(openai, alias, "Who are you?").reasoning)

    assert [None, THOUGHT["qwen"], None] == thoughts


@pytest.mark.parametrize("alias", CHAT_MODELS)
def test_an_answer_follows_a_json_schema(server: ServerProcess, openai: OpenAI, alias: str) -> None:
    """An answer follows a JSON schema and is read into a class, after a thought if there is one."""
    server.switch(alias)
    answer = openai.chat.completions.parse(
        model=alias,
        messages=[{"role": "user", "content": "Who are you?"}],
        response_format=Card,
        temperature=0,
    )
    thinking = openai.chat.completions.parse(
        model=alias,
        messages=[{"role": "user", "content": "Who are you?"}],
        response_format=Card,
        temperature=0,
        extra_body={"chat_template_kwargs": THINKING[alias]},
    )

    assert Card(model=alias, answer=INTRO[alias]) == answer.choices[0].message.parsed
    assert Card(model=alias, answer=INTRO[alias]) == thinking.choices[0].message.parsed


def test_embeddings_are_read_by_the_client(server: ServerProcess, openai: OpenAI) -> None:
    """The client reads embeddings in base64, its own default, and as numbers."""
    server.switch("embed")
    texts = ["a cat sits on the mat", "the cat is sitting on a mat"]
    packed = openai.embeddings.create(model="embed", input=texts)
    plain = openai.embeddings.create(model="embed", input=texts, encoding_format="float")

    assert [64, 64] == [len(found.embedding) for found in packed.data]
    assert plain.data[0].embedding == pytest.approx(packed.data[0].embedding, abs=1e-6)


@pytest.mark.parametrize("alias", CHAT_MODELS)
def test_responses_are_read_by_the_client(
    server: ServerProcess, openai: OpenAI, alias: str
) -> None:
    """The client reads responses whole and streamed, with the same text."""
    server.switch(alias)
    whole = openai.responses.create(model=alias, input="Who are you?", temperature=0)
    events = list(
        openai.responses.create(model=alias, input="Who are you?", temperature=0, stream=True)
    )

    text = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert whole.output_text.startswith(INTRO[alias])
    assert whole.output_text == "".join(text)
    assert "response.completed" == events[-1].type
    assert alias == events[-1].response.model


@pytest.mark.parametrize("alias", CHAT_MODELS)
def test_responses_call_tools(server: ServerProcess, openai: OpenAI, alias: str) -> None:
    """Responses call tools through the model's own parser, as chats do."""
    server.switch(alias)
    function = WEATHER_TOOL["function"]
    made = openai.responses.create(
        model=alias,
        input=WEATHER,
        temperature=0,
        tools=[{"type": "function", "strict": False, **function}],  # type: ignore[dict-item]
    )

    calls = [item for item in made.output if item.type == "function_call"]
    assert [("get_weather", {"city": "Paris"})] == [
        (call.name, json.loads(call.arguments)) for call in calls
    ]


def test_the_clients_exceptions_fit_the_servers_errors(
    server: ServerProcess, openai: OpenAI
) -> None:
    """The client's exceptions fit errors for inactive and unknown models and wrong parameters."""
    server.switch("llama")
    with pytest.raises(NotFoundError) as parked:
        ask(openai, "qwen", "Hello")
    with pytest.raises(NotFoundError) as unknown:
        ask(openai, "gpt-4", "Hello")
    with pytest.raises(BadRequestError):
        ask(openai, "llama", "Hello", top_p=7)

    assert ("model_not_active", "model_not_found") == (parked.value.code, unknown.value.code)


# --- the Anthropic client -----------------------------------------------------------------

ANTHROPIC_TOOL = {
    "name": WEATHER_TOOL["function"]["name"],
    "description": WEATHER_TOOL["function"]["description"],
    "input_schema": WEATHER_TOOL["function"]["parameters"],
}


def message(anthropic: Anthropic, alias: str, question: str, **extra: Any) -> Any:
    """Return a greedy answer: the tiny models' default, which the client cannot ask for."""
    return anthropic.messages.create(
        model=alias,
        max_tokens=128,
        messages=[{"role": "user", "content": question}],
        **extra,
    )


def text_of(made: Any) -> str:
    return "".join(block.text for block in made.content if block.type == "text")


@pytest.mark.parametrize("alias", CHAT_MODELS)
def test_messages_are_read_by_the_anthropic_client(
    server: ServerProcess, anthropic: Anthropic, alias: str
) -> None:
    """The Anthropic client reads messages whole and streamed, with the same text."""
    server.switch(alias)
    whole = message(anthropic, alias, "Who are you?")
    with anthropic.messages.stream(
        model=alias,
        max_tokens=128,
        messages=[{"role": "user", "content": "Who are you?"}],
    ) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()

    assert text_of(whole).startswith(INTRO[alias])
    assert (alias, "end_turn") == (whole.model, whole.stop_reason)
    assert (text_of(whole), alias) == (text, last.model)


def test_thoughts_are_blocks_of_their_own(server: ServerProcess, anthropic: Anthropic) -> None:
    """Thoughts are separate blocks if a model thinks by default, unless the client disables it."""
    kinds = []
    for alias in CHAT_MODELS:
        server.switch(alias)
        usual = message(anthropic, alias, "Who are you?")
        silent = message(anthropic, alias, "Who are you?", thinking={"type": "disabled"})
        kinds.append([[block.type for block in made.content] for made in (usual, silent)])

    assert [[["text"], ["text"]], [["thinking", "text"], ["text"]]] == kinds


@pytest.mark.parametrize("alias", CHAT_MODELS)
def test_messages_call_tools(server: ServerProcess, anthropic: Anthropic, alias: str) -> None:
    """Each model's own parser fills Anthropic's tool blocks, streamed or not."""
    server.switch(alias)
    whole = message(anthropic, alias, WEATHER, tools=[ANTHROPIC_TOOL])
    with anthropic.messages.stream(
        model=alias,
        max_tokens=128,
        messages=[{"role": "user", "content": WEATHER}],
        tools=[ANTHROPIC_TOOL],  # type: ignore[list-item]
    ) as stream:
        last = stream.get_final_message()

    for made in (whole, last):
        calls = [block for block in made.content if block.type == "tool_use"]
        assert [("get_weather", {"city": "Paris"})] == [(call.name, call.input) for call in calls]
        assert "tool_use" == made.stop_reason


# --- across switches ----------------------------------------------------------------------


def everything(openai: OpenAI, anthropic: Anthropic, alias: str) -> list[object]:
    """Return one answer of each kind."""
    thinking = {"extra_body": {"chat_template_kwargs": THINKING[alias]}}
    thoughtful = ask(openai, alias, "Tell me a joke.", **thinking)
    called = ask(openai, alias, WEATHER, tools=[WEATHER_TOOL]).tool_calls[0].function
    parts = deltas(ask(openai, alias, WEATHER, tools=[WEATHER_TOOL], stream=True))
    return [
        ask(openai, alias, QUESTION).content,
        (thoughtful.reasoning, thoughtful.content),
        (called.name, called.arguments),
        streamed_calls(parts),
        openai.responses.create(model=alias, input="ping", temperature=0).output_text,
        text_of(message(anthropic, alias, "Hello")),
    ]


def test_every_kind_of_answer_is_the_same_after_switches(
    server: ServerProcess, openai: OpenAI, anthropic: Anthropic
) -> None:
    """After llama, qwen, embed, llama, qwen, every answer is the same: no settings leak."""
    answers: dict[str, list[list[object]]] = {alias: [] for alias in CHAT_MODELS}
    for alias in ("llama", "qwen", "embed", "llama", "qwen"):
        server.switch(alias)
        if alias in answers:
            answers[alias].append(everything(openai, anthropic, alias))

    first, second = zip(answers["llama"], answers["qwen"], strict=True)
    assert first == second
    assert answers["llama"][0] != answers["qwen"][0]


# --- curl ---------------------------------------------------------------------------------


def curl(server: ServerProcess, line: str) -> Any:
    """Run a line of the quickstart against this server, without jq if need be."""
    line = line.replace("http://localhost:8080", server.url)
    if shutil.which("jq") is None:
        line = line.removesuffix(" | jq")
    ran = subprocess.run(["/bin/sh", "-c", line], capture_output=True, check=True, timeout=60)
    return json.loads(ran.stdout)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_quickstarts_curl_lines_work_as_they_are(server: ServerProcess) -> None:
    """The quickstart's curl lines work as copied, with only the address replaced."""
    server.switch("llama")
    listed = curl(server, QUICKSTART_LIST)
    first = curl(server, QUICKSTART_CHAT)
    switched = curl(server, QUICKSTART_SWITCH)
    second = curl(server, QUICKSTART_CHAT_AGAIN)

    assert ["llama", "qwen", "embed", "classify"] == [card["id"] for card in listed["data"]]
    assert ("llama", "qwen") == (first["model"], second["model"])
    assert first["choices"][0]["message"]["content"].startswith(INTRO["llama"])
    assert second["choices"][0]["message"]["content"].startswith(INTRO["qwen"])
    assert (True, "qwen") == (switched["switched"], switched["current_model"])
