"""`serve --fake` and `demo --fake`: a complete server without vLLM."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from tests.helpers.faults import wait_until
from vllm_hotswap.cli.main import main
from vllm_hotswap.demo import quickstart as demo
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.testing.fake_server import parse_flags

pytestmark = pytest.mark.slow

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "clients.md"

WITHOUT_VLLM = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in ("vllm", "torch", "transformers"):
            return PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
for name in ("vllm", "torch", "transformers"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is there")
from vllm_hotswap.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line in an environment without vLLM and torch."""

OWN = """\
default_model: big
models:
  big:
    model: some-hub/of-which-nothing-is-here
    aliases: [large]
    max_model_len: 8k
    kv_cache_memory_bytes: 40G
    enable_auto_tool_choice: true
    tool_call_parser: hermes
    lora_modules:
      - {name: pirate, path: ./nowhere}
  small:
    model: ./no-such-folder
    load: on_demand
    kv_cache_memory_bytes: 40G
  vectors:
    model: another-hub/embeddings
    runner: pooling
    load: on_demand
memory:
  device: 64GiB
"""
"""A user's file without any of its checkpoints."""

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "find_trains",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "class": {"enum": ["second", "first"]},
                "seats": {"type": "integer", "minimum": 2},
                "note": {"type": "string"},
            },
            "required": ["city", "class", "seats"],
        },
    },
}
ARGUMENTS = {"city": "fake", "class": "second", "seats": 2}


@dataclass
class Fake:
    """A fake server: its process and its clients."""

    process: subprocess.Popen[str]
    http: httpx.Client
    openai: OpenAI
    log: Path


@contextmanager
def fake_server(folder: Path, *flags: str, models: str | None = None) -> Iterator[Fake]:
    """Run a fake server on this file, or on the demo's; at the end it has been asked to stop."""
    folder.mkdir(exist_ok=True)
    config, port_file, log = folder / "models.yaml", folder / "port", folder / "log"
    config.write_text(models) if models is not None else demo.write(folder)
    command = [sys.executable, "-c", WITHOUT_VLLM, "serve", str(config), "--fake"]
    command += ["--port", "0", "--port-file", str(port_file), *flags]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            text=True,
            env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"},
        )
    try:
        wait_until(lambda: port_file.exists() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        url = f"http://127.0.0.1:{port_file.read_text().strip()}"
        with (
            httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
            OpenAI(
                base_url=f"{url}/v1", api_key="none", http_client=httpx.Client(trust_env=False)
            ) as openai,
        ):
            yield Fake(process, client, openai, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    """A server on a user's own file."""
    with fake_server(tmp_path_factory.mktemp("own"), "--fake-pace", "0.001", models=OWN) as server:
        yield server


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_a_whole_server_runs_without_vllm(tmp_path: Path) -> None:
    """Without vLLM the server lists, answers and switches, and always says that it is fake."""
    with fake_server(tmp_path, "--max-model-len", "2048") as fake:
        listed = fake.http.get("/v1/models").json()["data"]
        assert ["llama", "qwen", "embed"] == [model["id"] for model in listed]
        body = {"model": "llama", "messages": user("Hi")}
        answer = fake.http.post("/v1/chat/completions", json=body).json()
        assert (
            "I am llama, a fake engine of vllm-hotswap."
            == answer["choices"][0]["message"]["content"]
        )
        switched = fake.http.post("/v1/models/switch", json={"model": "qwen"}).json()
        assert "qwen" == switched["current_model"]
        assert {"version": "fake"} == fake.http.get("/version").json()
        host = fake.http.get("/admin/status").json()["host"]
        assert (True, fake.process.pid) == (host["is_fake"], host["pid"])
    said = fake.log.read_text()

    assert 0 == fake.process.returncode
    assert "event=fake_engines" in said
    assert "flags='--max-model-len 2048'" in said
    assert "FAKE ENGINES: answers are made up, no model is loaded" in said


def test_a_file_of_ones_own_needs_none_of_its_checkpoints(own: Fake) -> None:
    """Names, tasks, sizes and adapters come from the user's file, without any checkpoint."""
    listed = own.http.get("/v1/models").json()["data"]
    status = own.http.get("/admin/status").json()

    assert ["big", "large", "pirate", "small", "vectors"] == [card["id"] for card in listed]
    assert {"some-hub/of-which-nothing-is-here", 8000} == {
        listed[0]["root"],
        listed[0]["max_model_len"],
    }
    assert {"big": 40 << 30, "small": 40 << 30, "vectors": 1 << 30} == {
        alias: model["kv_bytes"] for alias, model in status["models"].items()
    }
    assert 64 << 30 == status["memory"]["device"]["budget"]
    with pytest.raises(NotFoundError, match="does not support"):
        own.openai.chat.completions.create(model="vectors", messages=user("Hi"))


def test_what_does_not_fit_is_evicted(own: Fake) -> None:
    """What does not fit is evicted, as on an accelerator: weights go to host memory."""
    own.http.post("/v1/models/switch", json={"model": "big"}).raise_for_status()
    switched = own.http.post("/v1/models/switch", json={"model": "small"}).json()
    status = own.http.get("/admin/status").json()
    back = own.http.post("/v1/models/switch", json={"model": "big"}).json()

    assert ["big"] == [moved["model"] for moved in switched["evicted"]]
    assert "asleep" == status["models"]["big"]["residency"]
    assert 1 << 30 == status["memory"]["host"]["used"]
    assert ["small"] == [moved["model"] for moved in back["evicted"]]


def test_openais_client_takes_its_answers(own: Fake) -> None:
    """OpenAI's client reads whole answers and streams; an adapter answers by its name."""
    own.http.post("/v1/models/switch", json={"model": "big"}).raise_for_status()
    chats = own.openai.chat.completions
    whole = chats.create(model="pirate", messages=user("Hi"))
    stream = list(
        chats.create(
            model="large", messages=user("Hi"), stream=True, stream_options={"include_usage": True}
        )
    )
    cut = chats.create(model="big", messages=user("Hi"), max_completion_tokens=2).choices[0]
    text = own.openai.completions.create(model="big", prompt="Hi").choices[0].text

    assert ("pirate", "stop") == (whole.model, whole.choices[0].finish_reason)
    assert whole.choices[0].message.content == "I am pirate, a fake engine of vllm-hotswap."
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == said.strip() == "I am big, a fake engine of vllm-hotswap."
    assert (8, None) == (stream[-1].usage.completion_tokens, stream[0].usage)
    assert ("assistant", None, "stop") == (
        stream[0].choices[0].delta.role,
        stream[0].choices[0].finish_reason,
        stream[-2].choices[0].finish_reason,
    )
    assert ("I am", "length") == (cut.message.content, cut.finish_reason)


def test_a_tool_is_called_with_arguments_of_its_schema(own: Fake) -> None:
    """A tool call has arguments of its schema, whole or in pieces; after its result comes text."""
    own.http.post("/v1/models/switch", json={"model": "big"}).raise_for_status()
    chats = own.openai.chat.completions
    choice = chats.create(model="big", messages=user("Trains?"), tools=[TOOL]).choices[0]
    (call,) = choice.message.tool_calls or ()
    pieces = list(chats.create(model="big", messages=user("Trains?"), tools=[TOOL], stream=True))
    deltas = [chunk.choices[0].delta.tool_calls[0] for chunk in pieces]
    after = [
        *user("Trains?"),
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": "3"},
    ]
    last = chats.create(model="big", messages=after, tools=[TOOL]).choices[0]

    assert ("tool_calls", None) == (choice.finish_reason, choice.message.content)
    assert ("find_trains", ARGUMENTS) == (call.function.name, json.loads(call.function.arguments))
    assert "find_trains" == deltas[0].function.name
    assert ARGUMENTS == json.loads("".join(delta.function.arguments for delta in deltas))
    assert ("tool_calls", 1) == (pieces[-1].choices[0].finish_reason, len({c.id for c in pieces}))
    assert ("stop", "I am big, a fake engine of vllm-hotswap.") == (
        last.finish_reason,
        last.message.content,
    )


def test_a_model_that_is_not_set_up_for_tools_refuses_them(own: Fake) -> None:
    """Without `enable_auto_tool_choice` tools are refused, as by vLLM; a named tool is called."""
    own.http.post("/v1/models/switch", json={"model": "small"}).raise_for_status()
    chats = own.openai.chat.completions
    with pytest.raises(BadRequestError, match='"auto" tool choice requires'):
        chats.create(model="small", messages=user("Trains?"), tools=[TOOL])
    named: Any = {"type": "function", "function": {"name": "find_trains"}}
    choice = chats.create(
        model="small", messages=user("Trains?"), tools=[TOOL], tool_choice=named
    ).choices[0]

    assert "tool_calls" == choice.finish_reason


MALFORMED: list[tuple[str, Any, str]] = [
    ("chat/completions", {"messages": "Hi"}, "messages must be"),
    ("chat/completions", {"messages": [], "tools": [{"name": "x"}]}, "tools must be"),
    ("chat/completions", {"messages": [], "tool_choice": "maybe"}, "tool_choice must be"),
    ("chat/completions", {"messages": [], "max_tokens": 0}, "max_tokens must be a whole number"),
    ("completions", {"prompt": "x", "stream_options": 1}, "stream_options must be"),
    ("responses", {"input": "x", "max_output_tokens": "9"}, "max_output_tokens must be"),
]


@pytest.mark.parametrize(("route", "body", "message"), MALFORMED)
def test_a_malformed_request_is_told_what_is_wrong(
    own: Fake, route: str, body: dict[str, Any], message: str
) -> None:
    """A malformed request gets 400 with what is wrong, as from vLLM."""
    own.http.post("/v1/models/switch", json={"model": "small"}).raise_for_status()
    answer = own.http.post(f"/v1/{route}", json={"model": "small", **body})

    assert 400 == answer.status_code
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_texts_have_vectors_of_their_own(own: Fake, encoding: Any) -> None:
    """Each text has its own vector of length 1, the same every time."""
    own.http.post("/v1/models/switch", json={"model": "vectors"}).raise_for_status()
    ask = own.openai.embeddings.with_raw_response.create
    made = ask(model="vectors", input=["one", "two", "one"], encoding_format=encoding).parse()
    plain = own.openai.embeddings.create(model="vectors", input=["one", "two", "one"])
    one, two, again = (item.embedding for item in plain.data)

    assert one == again != two
    assert 1 == pytest.approx(sum(number**2 for number in one))
    assert [0, 1, 2] == [item.index for item in made.data]


def test_responses_are_made_and_streamed(own: Fake) -> None:
    """Responses are made and streamed so that OpenAI's client can read them."""
    own.http.post("/v1/models/switch", json={"model": "big"}).raise_for_status()
    made = own.openai.responses.create(model="big", input="Hi")
    events = list(own.openai.responses.create(model="big", input="Hi", stream=True))

    assert ("completed", "I am big, a fake engine of vllm-hotswap.") == (
        made.status,
        made.output_text,
    )
    said = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert made.output_text == "".join(said)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "response.completed" == events[-1].type


def test_the_file_of_the_guide_evicts_as_it_says(tmp_path: Path) -> None:
    """The guide's file, without its checkpoints, evicts: both models together are too large."""
    (models,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    with fake_server(tmp_path, "--fake-pace", "0", models=models) as fake:
        switched = fake.http.post("/v1/models/switch", json={"model": "small"}).json()

    (moved,) = switched["evicted"]
    assert ("big", "active", "asleep") == (moved["model"], moved["before"], moved["after"])


def test_in_the_mode_auto_a_request_is_enough(tmp_path: Path) -> None:
    """In `auto` a request is enough to switch, and a header reports the switch."""
    models = OWN + "switching:\n  mode: auto\n"
    with fake_server(tmp_path, "--fake-pace", "0", models=models) as fake:
        answer = fake.http.post(
            "/v1/chat/completions", json={"model": "small", "messages": user("Hi")}
        )

    assert ("small", "1") == (answer.json()["model"], answer.headers["x-hotswap-switched"])


def test_the_demo_runs_on_fake_engines(capsys: pytest.CaptureFixture[str]) -> None:
    """Every step of the demo works on fake engines."""
    assert 0 == main(["demo", "--fake"])

    said = capsys.readouterr().out
    assert "FAKE engines" in said
    assert "5. Tool calls" in said
    assert "what they said was made up" in said
    assert "demo --serve --fake" in said


MISTAKES = [
    ("models:\n  a:\n    model: x\n    max_modellen: 5\n", [], "did you mean 'max_model_len'?"),
    ("defualt_model: a\n" + OWN, [], "did you mean 'default_model'?"),
    (OWN, ["--max-modellen", "5"], "did you mean '--max-model-len'?"),
    (OWN, ["--port", "many"], "argument --port: invalid int value: 'many'"),
    (OWN, ["--port", "99999"], "--port 99999"),
    (OWN, ["--fake-pace", "soon"], "'soon' is not a pace"),
    (OWN, ["stray"], "unrecognized arguments: stray"),
    (OWN.replace("pirate", "small"), [], "the name 'small' is used twice"),
]


@pytest.mark.parametrize(("models", "flags", "message"), MISTAKES)
def test_a_mistake_is_one_line(tmp_path: Path, models: str, flags: list[str], message: str) -> None:
    """A mistake is one line that says what is wrong; nothing is served."""
    (tmp_path / "models.yaml").write_text(models)
    command = [sys.executable, "-c", WITHOUT_VLLM, "serve", str(tmp_path / "models.yaml"), "--fake"]
    ended = subprocess.run(
        [*command, *flags], capture_output=True, text=True, timeout=60, check=False
    )

    errors = [line for line in ended.stderr.splitlines() if "error:" in line]
    assert ended.returncode in (1, 2)
    assert 1 == len(errors)
    assert message in errors[0]
    assert "Traceback" not in ended.stderr


def test_a_pace_needs_fake_engines(capsys: pytest.CaptureFixture[str]) -> None:
    """A pace is refused without fake engines: vLLM's cannot be slowed down."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", "models.yaml", "--fake-pace", "1"])

    assert 2 == ended.value.code
    assert "--fake-pace needs --fake" in capsys.readouterr().err


def test_flags_are_vllms() -> None:
    """Flags of the server work; others are reported, and have no effect."""
    args, unused = parse_flags(["--uds", "/run/x", "--api-key", "a", "b", "--dtype", "auto"])

    assert ("/run/x", ["a", "b"], 8000) == (args.uds, args.api_key, args.port)
    assert "--dtype auto" == unused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "many"], "argument --port: invalid int value: 'many'"),
        (["--allowed-origins", "nobody"], "argument --allowed-origins"),
    ],
)
def test_a_value_that_no_flag_takes_is_refused(flags: list[str], message: str) -> None:
    """A value that no flag accepts is refused in one line."""
    with pytest.raises(ConfigError, match=message):
        parse_flags(flags)
