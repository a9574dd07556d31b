"""LoRA adapters on the real vLLM: whose answers they change, and what they survive."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.adapters import write_adapter, write_adapter_for
from tests.helpers.ports import free_port
from tests.integration.conftest import events
from tests.integration.processes import QUICKSTART_MODULE, ServerProcess
from tests.integration.test_launch import launch
from vllm_hotswap.demo.quickstart import write
from vllm_hotswap.errors import ConfigError

STRENGTH = 0.3
"""Strength of adapters that change answers to something else than one word again and again."""

TOO_WIDE = {"model.layers.0.self_attn.q_proj": (128, 256)}
"""Weights for another model; `fan_in_fan_out` keeps them from being found out before a load."""

FOREIGN = {"model.layers.9.self_attn.q_proj": (128, 128)}
"""Weights for a model with more layers."""

SQL = "{name: sql, path: ./adapters/sql, base_model_name: qwen}"

LATE = """\
  late:
    model: ./llama
    max_model_len: 512
    enforce_eager: true
    kv_cache_memory_bytes: 64M
    load: on_demand
    lora_modules: [wide=./adapters/wide, slim=./adapters/slim]
adapters:
  folders: [./adapters]
"""

LONG = "Hello, who are you? " * 60
"""A prompt of several blocks, which vLLM keeps for the next request with the same start."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with adapters: llama with pirate, qwen with polite and sql, late with a bad one, too.

    Pirate and polite are trained, the others are random.
    """
    folder = tmp_path_factory.mktemp("lora")
    path = write(folder)
    adapters = folder / "adapters"
    write_adapter(adapters / "sql", "qwen", rank=20, seed=2, strength=STRENGTH)
    write_adapter(adapters / "slim", "llama", seed=3, strength=STRENGTH)
    write_adapter(adapters / "high", "llama", rank=17)
    write_adapter_for(adapters / "wide", TOO_WIDE, fan_in_fan_out=True)
    write_adapter_for(adapters / "foreign", FOREIGN)
    text = path.read_text()
    for alias, keys in (
        ("llama", "aliases: [meta]\n    lora_modules: [pirate=./adapters/llama-pirate]"),
        ("qwen", "lora_modules: [polite=./adapters/qwen-polite, " + SQL + "]"),
    ):
        text = text.replace(f"    model: ./{alias}\n", f"    model: ./{alias}\n    {keys}\n")
    path.write_text(text + LATE)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HPU_MULTI_MODEL_CONFIG": str(folder / "models.yaml"),
    }
    log = tmp_path_factory.mktemp("server") / "server.log"
    running = ServerProcess.start(["-m", QUICKSTART_MODULE], free_port(), log, environment)
    yield running
    assert running.stop() == 0, running.log_tail()


def cards(server: ServerProcess) -> dict[str, dict[str, Any]]:
    return {card["id"]: card for card in server.client.get("/v1/models").json()["data"]}


def adapters(server: ServerProcess, alias: str) -> dict[str, dict[str, Any]]:
    listed = server.client.get(f"/admin/models/{alias}/adapters").json()["adapters"]
    return {adapter["name"]: adapter for adapter in listed}


def add(server: ServerProcess, alias: str, name: str, path: str | None = None) -> Any:
    return server.post(f"/admin/models/{alias}/adapters", {"name": name, "path": path or name})


def remove(server: ServerProcess, alias: str, name: str) -> Any:
    return server.client.delete(f"/admin/models/{alias}/adapters/{name}")


def operate(server: ServerProcess, alias: str, operation: str, **body: object) -> None:
    answer = server.post(f"/admin/models/{alias}/{operation}", body)
    assert answer.status_code == 200, answer.text


# --- listing and requests ---------------------------------------------------------------------


def test_adapters_are_listed_with_their_model(server: ServerProcess) -> None:
    """Adapters are listed with their model, even one that has never been loaded."""
    parents = {name: card["parent"] for name, card in cards(server).items()}

    assert "llama" == parents["pirate"]
    assert "qwen" == parents["sql"]
    assert "late" == parents["slim"]
    assert parents["meta"] is None


def test_each_model_answers_with_its_own_adapter(server: ServerProcess) -> None:
    """Each model answers with its own adapter under its name, and plainly without it."""
    llama, pirate = server.complete("llama", "Hello"), server.complete("pirate", "Hello")
    server.switch("sql")
    qwen, sql = server.complete("qwen", "Hello"), server.complete("sql", "Hello")
    server.switch("llama")

    assert "I am llama" in llama
    assert "qwen" in qwen
    assert 4 == len({llama, pirate, qwen, sql})
    assert [llama, pirate] == [server.complete(name, "Hello") for name in ("llama", "pirate")]


def test_what_an_adapter_has_learned_is_heard_from_it_alone(server: ServerProcess) -> None:
    """Only an adapter's own answers show what it learned: each one's start differs."""
    said = {name: server.chat(name, "Who are you?")["content"] for name in ("llama", "pirate")}
    server.switch("qwen")
    said |= {name: server.chat(name, "Who are you?")["content"] for name in ("qwen", "polite")}

    assert str(said["llama"]).startswith("I am llama")
    assert str(said["pirate"]).startswith("Ahoy! I am llama")
    assert str(said["qwen"]).startswith("I am qwen")
    assert str(said["polite"]).startswith("With pleasure! I am qwen")


@pytest.mark.parametrize(("name", "model"), [("pirate", "pirate"), ("meta", "llama")])
def test_an_answer_names_the_model_as_vllm_does(
    server: ServerProcess, name: str, model: str
) -> None:
    """An answer names the adapter as vLLM does, in one piece and streamed."""
    body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    whole = server.post("/v1/chat/completions", body).json()
    with server.client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as out:
        first: Any = next(events(out.iter_lines()))

    assert [model, model] == [whole["model"], first["model"]]


def test_a_request_for_an_adapter_of_another_model_says_which(server: ServerProcess) -> None:
    """A request for another model's adapter names that model and how to switch to it."""
    answer = server.post("/v1/completions", {"model": "sql", "prompt": "Hello"})

    assert (404, "model_not_active") == (answer.status_code, answer.json()["error"]["code"])
    assert '{"model": "qwen"}' in answer.json()["error"]["message"]


# --- residency --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ({"operation": "sleep", "level": 1}, "wake"),
        ({"operation": "sleep", "level": 2}, "wake"),
        ({"operation": "unload"}, "load"),
    ],
    ids=["asleep", "discarded", "cold"],
)
def test_adapters_outlive_what_their_model_gives_back(
    server: ServerProcess, down: dict[str, Any], up: str
) -> None:
    """Adapters survive their model's sleep and unload; answers without one are unchanged."""
    before = [server.complete(name, "Hello") for name in ("pirate", "llama")]
    number = adapters(server, "llama")["pirate"]["id"]
    server.switch("qwen")
    operate(server, "llama", **down)
    operate(server, "llama", up)
    server.switch("llama")

    assert before == [server.complete(name, "Hello") for name in ("pirate", "llama")]
    assert number == adapters(server, "llama")["pirate"]["id"]


def test_a_model_that_is_loaded_later_has_its_adapters(server: ServerProcess) -> None:
    """A model loaded later has its adapters; requests for one that it refuses get the reason."""
    server.switch("late")
    refused = server.post("/v1/completions", {"model": "wide", "prompt": "Hello"})

    assert server.complete("slim", "Hello") != server.complete("late", "Hello")
    assert (503, "adapter_unavailable") == (refused.status_code, refused.json()["error"]["code"])
    assert cards(server)["wide"]["status"]["failed"]
    assert "failed" not in cards(server)["slim"]["status"]


# --- while the server runs ----------------------------------------------------------------------


@pytest.mark.parametrize("active", ["llama", "qwen"])
def test_an_adapter_is_added_and_removed_for_the_right_model(
    server: ServerProcess, active: str
) -> None:
    """An adapter is added to and removed from the right model, active or parked, and answers."""
    server.switch(active)
    added = add(server, "llama", "extra", "slim")
    server.switch("llama")
    extra, llama = server.complete("extra", "Hello"), server.complete("llama", "Hello")
    remove(server, "llama", "extra")
    gone = server.post("/v1/completions", {"model": "extra", "prompt": "Hello"})

    assert 200 == added.status_code, added.text
    assert extra != llama
    assert (404, "model_not_found") == (gone.status_code, gone.json()["error"]["code"])
    assert llama == server.complete("llama", "Hello")


def test_an_adapter_is_added_to_a_cold_model(server: ServerProcess) -> None:
    """An adapter added to a cold model is loaded by its engine later."""
    server.switch("qwen")
    operate(server, "llama", "unload")
    added = add(server, "llama", "extra", "slim")
    operate(server, "llama", "load")
    server.switch("llama")
    extra = server.complete("extra", "Hello")
    remove(server, "llama", "extra")

    assert 200 == added.status_code, added.text
    assert extra != server.complete("llama", "Hello")


def test_requests_of_a_removed_adapter_end_as_they_would_have(server: ServerProcess) -> None:
    """Requests of a removed adapter end normally; then its name is free."""
    add(server, "llama", "extra", "slim")
    body = {"model": "extra", "prompt": "Hello", "max_tokens": 300, "temperature": 0}
    body["ignore_eos"] = True
    expected = server.post("/v1/completions", body).json()["choices"][0]["text"]
    with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        lines = events(stream.iter_lines())
        received = [next(lines)]
        removed = remove(server, "llama", "extra").json()
        early = add(server, "llama", "extra", "slim")
        received += list(lines)
    deadline = time.monotonic() + 10
    while (late := add(server, "llama", "extra", "slim")).status_code == 409:
        assert time.monotonic() < deadline, late.text  # its last byte was sent a moment ago
    remove(server, "llama", "extra")

    text = "".join(event["choices"][0]["text"] for event in received[:-1])  # type: ignore[index]
    assert (expected, "[DONE]") == (text, received[-1])
    assert 1 == removed["in_flight"]
    assert [409, 200] == [early.status_code, late.status_code]


def test_no_number_is_given_twice(server: ServerProcess) -> None:
    """No number is given twice, over all models, additions, removals and reloads."""
    numbers = [
        a["id"] for alias in ("llama", "qwen", "late") for a in adapters(server, alias).values()
    ]
    for alias in ("llama", "qwen"):
        numbers.append(
            add(server, alias, "extra", {"llama": "slim", "qwen": "sql"}[alias]).json()["id"]
        )
        remove(server, alias, "extra")
    server.switch("qwen")
    operate(server, "llama", "unload")
    operate(server, "llama", "load")
    numbers.append(add(server, "llama", "extra", "slim").json()["id"])
    remove(server, "llama", "extra")

    assert len(numbers) == len(set(numbers)) == 8


def test_replaced_files_are_answered_with(server: ServerProcess, folder: Path) -> None:
    """Replaced files are used under the same name and path, without vLLM's old cache."""
    answers = {}
    for name, path, seed in (("own", "own", 11), ("own", "own", 12), ("fresh", "fresh", 12)):
        write_adapter(folder / "adapters" / path, "llama", seed=seed, strength=STRENGTH)
        add(server, "llama", name, path)
        answers[name, seed] = server.complete(name, LONG)
        remove(server, "llama", name)

    assert answers["own", 12] == answers["fresh", 12]
    assert answers["own", 11] != answers["own", 12]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("high", "LoRA rank 17 is greater than max_lora_rank 16"),
        ("sql", "LoRA rank 20 is greater than max_lora_rank 16"),
        ("foreign", "it has weights for layer 9, but the last layer of its base model is 3"),
        ("wide", "cannot be loaded: "),
        ("none", "there is no such folder"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused(
    server: ServerProcess, folder: Path, path: str, reason: str
) -> None:
    """An adapter of a wrong rank, shape or model is refused, and leaves nothing."""
    before = server.complete("llama", "Hello")
    refused = add(server, "llama", "extra", path)

    message = refused.json()["error"]["message"]
    assert 400 == refused.status_code
    assert reason in message
    assert str(folder) not in message
    assert "vllm-hotswap-" not in message
    assert before == server.complete("llama", "Hello")
    assert "extra" not in adapters(server, "llama")


def test_an_adapter_whose_files_have_gone_does_not_end_its_engine(
    server: ServerProcess, folder: Path
) -> None:
    """If an adapter's files are gone, its requests fail and its model is still served."""
    lost = folder / "adapters" / "lost"
    shutil.copytree(folder / "adapters" / "slim", lost)
    add(server, "llama", "lost")
    server.switch("qwen")
    operate(server, "llama", "unload")
    shutil.rmtree(lost)
    operate(server, "llama", "load")
    server.switch("llama")
    failed = server.post("/v1/completions", {"model": "lost", "prompt": "Hello"})
    llama = server.complete("llama", "Hello")
    remove(server, "llama", "lost")

    assert 500 == failed.status_code
    assert "error" in failed.json()
    assert "I am llama" in llama


def test_adapters_of_one_model_are_asked_for_at_once(server: ServerProcess) -> None:
    """Simultaneous requests for several adapters each get their own, though one fits at a time."""
    add(server, "llama", "extra", "slim")
    names = ["pirate", "extra", "llama"] * 3
    expected = {name: server.complete(name, "Hello") for name in names}
    got: list[tuple[str, str]] = []
    threads = [
        threading.Thread(target=lambda n=name: got.append((n, server.complete(n, "Hello"))))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    remove(server, "llama", "extra")

    assert sorted(got) == sorted((name, expected[name]) for name in names)
    assert 3 == len(set(expected.values()))


def test_a_token_without_an_adapter_goes_in_as_zeros() -> None:
    """A token without an adapter goes in as zeros: on CPUs, index -1 would be the last slot."""
    import torch

    from vllm_hotswap.host.lora import masked

    rows = torch.tensor([[1.0, 2.0], [float("inf"), 4.0], [5.0, 6.0]])
    expected = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 6.0]])

    assert torch.equal(expected, masked(rows, torch.tensor([0, -1, 3])))


# --- at the start ------------------------------------------------------------------------------


def test_a_models_engine_is_made_for_its_adapters(tmp_path: Path) -> None:
    """A model's engine is made for its adapters, with their highest rank unless one is set."""
    write_adapter(tmp_path / "a", "llama", rank=17)
    made = launch(
        """
        models:
          with: {model: LLAMA, lora_modules: [a=a]}
          set: {model: LLAMA, max_lora_rank: 64, lora_modules: ['{"name": "b", "path": "./a"}']}
          without: {model: LLAMA}
          enabled: {model: LLAMA, enable_lora: true}
        """,
        tmp_path,
    )

    configs = [model.vllm_config.lora_config for model in made.models]
    assert [32, 64, None, 16] == [config and config.max_lora_rank for config in configs]
    assert [["a"], ["b"], [], []] == [
        [adapter.name for adapter in model.adapters] for model in made.models
    ]


def test_a_rank_on_the_command_line_counts(tmp_path: Path) -> None:
    """A rank on the command line counts, even if it is vLLM's default."""
    write_adapter(tmp_path / "a", "llama", rank=17)
    text = "models: {m: {model: LLAMA, lora_modules: [a=a]}}"

    with pytest.raises(ConfigError, match="'a' has rank 17, and max_lora_rank is 16"):
        launch(text, tmp_path, "--max-lora-rank", "16")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("[a=none]", "adapter 'a' cannot be used: it is not a folder (none)"),
        ("[a=other]", "it was made for another model (other)"),
        ("[a=dora]", "vLLM does not yet support DoRA"),
        ("[a=high]", "has rank 600, and max_lora_rank is 16"),
        ("[{name: 1, path: a}]", "needs a name and a path"),
        ("[{path: a}]", "missing 1 required positional argument: 'name'"),
        ("[{name: a, path: a, base_model_name: x}]", "it can only be 'm'; leave it out"),
        ("[m=good]", "the name 'm' is used twice"),
        ("[nonsense]", "nonsense"),
    ],
)
def test_adapters_that_cannot_be_served_end_the_start(
    tmp_path: Path, modules: str, message: str
) -> None:
    """Adapters that cannot be served end the start; the message names place and adapter."""
    write_adapter(tmp_path / "good", "llama")
    write_adapter_for(tmp_path / "other", FOREIGN)
    write_adapter(tmp_path / "dora", "llama", use_dora=True)
    write_adapter(tmp_path / "high", "llama", r=600)

    with pytest.raises(ConfigError) as caught:
        launch(f"models: {{m: {{model: LLAMA, lora_modules: {modules}}}}}", tmp_path)

    assert message in caught.value.message
    assert "models.m" in caught.value.message


def test_the_command_line_cannot_say_of_which_model_an_adapter_is(tmp_path: Path) -> None:
    """Adapters on the command line are refused with the right place: it names no model."""
    with pytest.raises(ConfigError, match="put lora_modules below a model in the"):
        launch("models: {m: {model: LLAMA}}", tmp_path, "--lora-modules", "a=/b")


def test_slots_of_adapters_are_counted_before_a_load(tmp_path: Path) -> None:
    """Slots of adapters count before a load: 93.5 MB were measured for eight of rank 512."""
    made = launch(
        "models: {m: {model: LLAMA, enable_lora: true, max_loras: 8, max_lora_rank: 512}}", tmp_path
    )
    from vllm_hotswap.launch.budget import OVERHEAD_BYTES
    from vllm_hotswap.launch.needs import model_needs

    needs = model_needs("m", made.models[0].vllm_config, 0)

    assert 93.5e6 == pytest.approx(needs.overhead_bytes - OVERHEAD_BYTES, rel=0.05)
    assert needs.copies_bytes == needs.overhead_bytes - OVERHEAD_BYTES
