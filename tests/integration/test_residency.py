"""The residency ladder on the real vLLM: more models than fit, under a budget, nothing lost."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import medium
from tests.helpers.ports import free_port
from tests.integration.conftest import events
from tests.integration.processes import (
    QUICKSTART_MODULE,
    ServerProcess,
    cache_of_its_own,
    plain_server,
    still_there,
)
from tests.integration.watching import MemoryWatch
from vllm_hotswap.demo.quickstart import MODELS
from vllm_hotswap.host.devices import anonymous_bytes

# Plain vLLM servers are started to compare with, and models are made.
pytestmark = pytest.mark.timeout(900)

MIB = 1 << 20
KV_BYTES = 96 * MIB

LAYERS = {"one": 14, "two": 15, "three": 16}
"""Three models with random weights of 210 MB to 240 MB."""

SIZES = {**medium.SIZES, "hidden_size": 768, "intermediate_size": 2304}
PROMPTS = ["Hello", "Who are you?", "The quick brown fox"]
FLAGS = {"max_model_len": 1024, "enforce_eager": "true", "kv_cache_memory_bytes": KV_BYTES}


@dataclass(frozen=True)
class Measured:
    """What a server on this machine has reported of its memory, in bytes."""

    base: int
    """The engine host itself."""
    smallest: int
    """The smallest model, loaded."""
    first_load: int
    """What the first load of the largest may take, as it is estimated."""

    @property
    def room(self) -> int:
        """Return room for the largest on its way up, and for 1.75 times the smallest."""
        return max(self.first_load, self.smallest * 7 // 4)


def model_entry(folder: Path, **more: object) -> str:
    lines = [f"    {key}: {value}" for key, value in {"model": folder, **FLAGS, **more}.items()]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models that work, and folders that tests break and repair."""
    folder = tmp_path_factory.mktemp("ladder")
    for alias, layers in LAYERS.items():
        medium.make(MODELS / "qwen", folder / alias, {**SIZES, "num_hidden_layers": layers})
    for alias in ("broken", "misfit", "compiled"):
        shutil.copytree(MODELS / "llama", folder / alias)
    shutil.copy(MODELS / "qwen" / "model.safetensors", folder / "misfit")
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> Measured:
    """Measure how much memory the smallest model and the host hold here, whatever the CPU."""
    entries = [f"  one:\n{model_entry(folder / 'one')}"]
    entries += [f"  three:\n{model_entry(folder / 'three', load='on_demand')}"]
    with running(folder, "measured", "".join(entries)) as server:
        server.complete("one", "Hello", max_tokens=1)
        status: Any = server.status()
        plan: Any = server.client.get("/admin/plan", params={"model": "three"}).json()
    rises = [plan["memory"][when]["device_bytes"] for when in ("before", "peak")]
    return Measured(
        base=status["memory"]["device"]["base"],
        smallest=status["models"]["one"]["held"]["device_bytes"],
        first_load=rises[1] - rises[0],
    )


@pytest.fixture(scope="module")
def server(folder: Path, measured: Measured) -> Iterator[ServerProcess]:
    """A server with room for one and three quarters of the three models."""
    entries = {alias: model_entry(folder / alias) for alias in LAYERS}
    for alias in ("broken", "misfit"):
        entries[alias] = model_entry(folder / alias, load="on_demand")
    compiled = model_entry(folder / "compiled", load="on_demand", enforce_eager="false")
    entries["compiled"] = compiled
    models = "".join(f"  {alias}:\n{entry}" for alias, entry in entries.items())
    with running(folder, "server", models, measured.base + measured.room) as server:
        yield server


@contextmanager
def running(
    folder: Path, name: str, models: str, device_bytes: int | None = None
) -> Iterator[ServerProcess]:
    """Run a server of those models that leaves nothing behind."""
    memory = "" if device_bytes is None else f"memory: {{device: {device_bytes}}}\n"
    config = folder / f"{name}.yaml"
    config.write_text(f"default_model: one\n{memory}models:\n{models}", encoding="utf-8")
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HOTSWAP_CONFIG": str(config),
        "VLLM_CACHE_ROOT": str(cache_of_its_own(folder / "cache")),
    }
    server = ServerProcess.start(
        ["-m", QUICKSTART_MODULE], free_port(), folder / f"{name}.log", environment
    )
    yield server
    children = server.descendants()
    assert server.stop() == 0, server.log_tail()
    assert still_there(children) == []


@pytest.fixture(autouse=True)
def llama_is_active() -> None:
    """Do nothing: this module's server has no llama."""


def operate(server: ServerProcess, alias: str, name: str, **body: object) -> dict[str, Any]:
    response = server.post(f"/admin/models/{alias}/{name}", body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def residencies(server: ServerProcess) -> dict[str, str]:
    models: Any = server.status()["models"]
    return {alias: model["residency"] for alias, model in models.items()}


def active(server: ServerProcess) -> str:
    return str(server.status()["active"])


def answers(server: ServerProcess, alias: str) -> list[str]:
    return [server.complete(alias, prompt, max_tokens=8) for prompt in PROMPTS]


def device_memory(server: ServerProcess) -> dict[str, int]:
    """Return the memory of the engine host as a whole: its limit, and what is counted."""
    memory: Any = server.status()["memory"]
    device: dict[str, int] = memory["device"]
    return device


def host_pid(server: ServerProcess) -> int:
    host: Any = server.status()["host"]
    return int(host["pid"])


def plain_answers(folder: Path, alias: str) -> list[str]:
    """Return what a plain vLLM server of that model alone answers."""
    with plain_server(folder / alias, folder / f"plain-{alias}.log", 1024, "96M") as plain:
        return answers(plain, alias)


def walk(server: ServerProcess, steps: int, seed: int) -> list[str]:
    """Run random operations; return which ones were done. Every switch must succeed."""
    chance = random.Random(seed)  # noqa: S311  # repeatable, no secret
    done = []
    for _ in range(steps):
        alias = chance.choice(list(LAYERS))
        name = chance.choice(["switch", "switch", "load", "sleep", "wake", "unload"])
        if name == "switch":
            server.switch(alias)
        else:
            body = {"level": chance.choice([1, 2])} if name == "sleep" else {}
            response = server.post(f"/admin/models/{alias}/{name}", body)
            # Refused if it needs the active model, or too much memory.
            assert response.status_code in (200, 400, 409), response.text
        done.append(name)
        server.complete(active(server), "Hello", max_tokens=1)
    return done


@pytest.mark.parametrize(
    "steps", [pytest.param(16, id="short"), pytest.param(40, id="long", marks=pytest.mark.wide)]
)
def test_random_walks_stay_within_the_budget_and_change_no_answer(
    server: ServerProcess, steps: int
) -> None:
    """In random walks every switch works, memory stays in the budget, and answers stay the same."""
    pid = host_pid(server)
    with MemoryWatch(pid) as memory:
        before = answers_of_all(server)
        done = walk(server, steps, seed=3)
        after = answers_of_all(server)

    assert {"switch", "load", "sleep", "wake", "unload"} == set(done)
    assert memory.most_bytes < device_memory(server)["budget"]
    assert pid == host_pid(server)
    assert before == after


@pytest.mark.wide
def test_a_model_that_was_swapped_answers_as_plain_vllm(
    server: ServerProcess, folder: Path
) -> None:
    """A model that was swapped answers as a plain vLLM server of it alone."""
    assert plain_answers(folder, "two") == answers_of_all(server)["two"]


def answers_of_all(server: ServerProcess) -> dict[str, list[str]]:
    found = {}
    for alias in LAYERS:
        server.switch(alias)
        found[alias] = answers(server, alias)
    return found


def test_a_model_that_comes_back_builds_nothing_anew(server: ServerProcess) -> None:
    """A switch back to a known model makes no process, thread or frontend."""
    for alias in LAYERS:
        server.switch(alias)
    processes = {child.pid for child in server.descendants()}
    threads = psutil.Process(host_pid(server)).num_threads()
    for alias in [*LAYERS, *LAYERS]:
        server.switch(alias)
        server.complete(alias, "Hello", max_tokens=2)

    assert processes == {child.pid for child in server.descendants()}
    assert threads >= psutil.Process(host_pid(server)).num_threads()
    assert 3 == server.log.read_text(errors="replace").count("stage=frontend")


def test_sleep_gives_kv_memory_back(server: ServerProcess) -> None:
    """Sleep at level 1 frees the KV memory of requests, and answers are the same afterwards."""
    server.switch("broken")
    server.switch("one")
    before = answers(server, "one")
    body = {"model": "one", "prompt": [1] * 300, "max_tokens": 2}
    assert server.post("/v1/completions", body).status_code == 200
    server.switch("broken")
    filled = anonymous_bytes(host_pid(server))
    slept = operate(server, "one", "sleep", level=1)
    emptied = anonymous_bytes(host_pid(server))
    server.switch("one")

    assert ("parked", "asleep") == (slept["before"], slept["residency"])
    assert filled - emptied > filled_bytes("one", tokens=300)
    assert before == answers(server, "one")


def filled_bytes(alias: str, tokens: int) -> int:
    """Return what keys and values of so many tokens take."""
    sizes = {**SIZES, "layers": LAYERS[alias]}
    values = 2 * sizes["layers"] * sizes["num_key_value_heads"] * sizes["head_dim"]
    return int(2 * values * tokens)


def test_unload_gives_the_weights_back(server: ServerProcess) -> None:
    """An unload frees what the model held, and after a load it answers the same."""
    server.switch("two")
    before = answers(server, "two")
    server.switch("one")
    operate(server, "two", "unload")
    without, counted = anonymous_bytes(host_pid(server)), device_memory(server)["used"]
    operate(server, "two", "load") if residencies(server)["one"] != "active" else None
    server.switch("two")
    operate(server, "one", "unload")

    assert residencies(server)["one"] == "cold"
    assert before == answers(server, "two")
    assert without <= counted


def test_requests_for_the_target_wait_while_it_is_loaded(server: ServerProcess) -> None:
    """A request for a cold target, sent during the switch, is answered by it."""
    server.switch("one")
    operate(server, "three", "unload")
    with ThreadPoolExecutor() as pool:
        switch = pool.submit(server.switch, "three")
        while server.status()["target"] != "three" and not switch.done():
            pass
        text = server.complete("three", "Hello", max_tokens=4)
        result = switch.result()

    assert result["switched"] is True
    assert text == server.complete("three", "Hello", max_tokens=4)


def test_a_switch_is_planned_and_told(server: ServerProcess) -> None:
    """The plan lists what the switch then does, and the event stream has every step."""
    server.switch("one")
    operate(server, "two", "unload")
    plan = server.client.get("/admin/plan", params={"model": "two"}).json()
    told = []
    with server.client.stream("GET", "/admin/events") as stream:
        lines = stream.iter_lines()
        first = next(events(lines))
        result = server.switch("two")
        for event in events(lines):
            told.append(event)
            if "cause" in event:  # type: ignore[operator]  # the end of a switch
                break

    assert first["active"] == "one"  # type: ignore[index]
    assert plan["evict"] == [
        {**move, "cost_s": planned["cost_s"]}
        for move, planned in zip(result["evicted"], plan["evict"], strict=True)  # type: ignore[call-overload]
    ]
    phases = [event["phase"] for event in told if "phase" in event]  # type: ignore[operator,index]
    expected = ["validate", "drain", "make_room", "bring_up", "activate", "verify"]
    assert expected == list(dict.fromkeys(phases))


def test_truncated_weights_are_refused_before_anything_moves(
    server: ServerProcess, folder: Path
) -> None:
    """Truncated weights are refused before the source gives anything up; repaired, they load."""
    server.switch("one")
    operate(server, "broken", "unload")
    before = answers(server, "one")
    weights = folder / "broken" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    refused = server.post("/v1/models/switch", {"model": "broken"})
    held = residencies(server)["one"]
    after = answers(server, "one")
    weights.write_bytes(whole)
    mended = server.switch("broken")

    assert (503, "switch_failed") == (refused.status_code, refused.json()["error"]["code"])
    assert "truncated" in refused.json()["error"]["message"]
    assert held == "active"
    assert before == after
    assert mended["current_model"] == "broken"


def test_missing_weights_are_named(server: ServerProcess, folder: Path) -> None:
    """A folder without weights fails the switch with the cause; the source is still active."""
    server.switch("one")
    operate(server, "broken", "unload")
    weights = folder / "broken" / "model.safetensors"
    weights.rename(folder / "away")
    refused = server.post("/v1/models/switch", {"model": "broken"})
    text = server.complete("one", "Hello", max_tokens=4)
    (folder / "away").rename(weights)

    assert refused.status_code == 503
    assert "broken" in refused.json()["error"]["message"]
    assert text
    assert server.switch("broken")["current_model"] == "broken"


def test_a_load_that_fails_brings_the_source_back(server: ServerProcess, folder: Path) -> None:
    """Weights of the wrong shape are only found by a load, after which the source is restored."""
    server.switch("two")
    before = answers(server, "two")
    refused = server.post("/v1/models/switch", {"model": "misfit"})
    after = answers(server, "two")
    shutil.copy(MODELS / "llama" / "model.safetensors", folder / "misfit")
    mended = server.switch("misfit")

    assert (503, "switch_failed") == (refused.status_code, refused.json()["error"]["code"])
    assert "bring_up" in refused.json()["error"]["message"]
    assert "'two' is still active" in refused.json()["error"]["message"]
    assert before == after
    assert mended["current_model"] == "misfit"


@pytest.mark.wide
def test_a_compile_cache_that_cannot_be_written_fails_one_switch(
    server: ServerProcess, folder: Path
) -> None:
    """An unwritable compile cache fails one switch; with room on the disk a retry works at once."""
    server.switch("one")
    cache = folder / "cache"
    kept = folder / "kept"
    if cache.exists():
        cache.rename(kept)
    cache.write_text("no folder")
    refused = server.post("/v1/models/switch", {"model": "compiled"}, timeout=300)
    text = server.complete("one", "Hello", max_tokens=4)
    cache.unlink()
    if kept.exists():
        kept.rename(cache)
    mended = server.post("/v1/models/switch", {"model": "compiled"}, timeout=300)

    assert (503, "switch_failed") == (refused.status_code, refused.json()["error"]["code"])
    assert text
    assert 200 == mended.status_code, mended.text


def test_unloads_and_reloads_leave_nothing_behind(server: ServerProcess, folder: Path) -> None:
    """Unloads and reloads leave no thread, file, socket or process, and almost no memory."""
    shutil.copy(MODELS / "llama" / "model.safetensors", folder / "misfit")
    server.switch("one")
    operate(server, "misfit", "unload")
    host = psutil.Process(host_pid(server))

    def cycle(times: int) -> tuple[int, int, int]:
        for _ in range(times):
            assert operate(server, "misfit", "load")["changed"]
            assert operate(server, "misfit", "unload")["changed"]
        return host.num_threads(), host.num_fds(), len(host.children(recursive=True))

    counts = cycle(10)
    before = anonymous_bytes(host.pid)
    weights = (folder / "misfit" / "model.safetensors").stat().st_size

    assert counts == cycle(20)
    assert anonymous_bytes(host.pid) - before < 20 * weights // 2
