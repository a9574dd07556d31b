"""Models of unlike architectures behind one server: each answers as plain vLLM would, alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.ports import free_port
from tests.integration.processes import FROM_HERE, ServerProcess
from tests.zoo.models import MIB, PROMPTS, TOKENS, ZOO, Model
from tests.zoo.questions import PAIR, PICTURE
from vllm_hotswap.demo.quickstart import MODELS
from vllm_hotswap.engines.base_memory import expected_memory
from vllm_hotswap.host.devices import CpuDevice
from vllm_hotswap.host.platforms import host_environment

# `test_vllm_state.py` has those whose kinds are the most unlike in every run.
pytestmark = [pytest.mark.wide, pytest.mark.timeout(900)]

ROOM_BYTES = 850 * MIB
"""For some of the models: each has 64 MiB of KV memory, and counts as 128 MiB at first."""

TOLERANCE = 1e-3
"""How far numbers may be apart, relative or absolute: sums of another order of the same terms."""

SEED = 14
NIGHTLY_SEEDS = (1, 2, 3, 4)
STEPS = 60

TEXTS = ("text", "picture")
"""Questions that are answered with tokens and a text."""

ONE_THREAD = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""For the server and plain vLLM alike: sums are of the same order, on any number of cores."""


class References:
    """What plain vLLM answers or reports for each model, on this machine, now.

    It is computed while the server works; a test that needs an answer waits for it.
    """

    def __init__(self, folder: Path, models: Sequence[Model]) -> None:
        self._out = folder / "plain"
        self._out.mkdir()
        self._told: set[str] = set()
        environment = {
            **os.environ,
            **ONE_THREAD,
            **FROM_HERE,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        command = [sys.executable, "-m", "tests.zoo.plain", str(folder), str(self._out)]
        self.log = folder / "plain.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *names(models)],
                env=host_environment(environment),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def wait_for(self, word: str) -> None:
        """Wait until it is done: `made` for the checkpoints, an alias for its answers."""
        assert self.process.stdout is not None
        while word not in self._told:
            line = self.process.stdout.readline()
            assert line, f"plain vLLM ended before {word!r}; see {self.log}"
            self._told.add(line.strip())

    def of(self, model: Model) -> Mapping[str, Any]:
        """Return `answers`, or `error`."""
        self.wait_for(model.alias)
        found: Mapping[str, Any] = json.loads((self._out / f"{model.alias}.json").read_text())
        return found

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)  # its children, too
        self.process.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def references(folder: Path) -> Iterator[References]:
    """In the order in which they are used; first those that may or may not run here."""
    order = sorted(shuffled(ZOO, SEED), key=lambda model: not model.unless)
    found = References(folder, order)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def running(references: References) -> Sequence[Model]:
    """The models that plain vLLM can run here."""
    return [model for model in ZOO if not model.cannot or may_run(model, references)]


def may_run(model: Model, references: References) -> bool:
    return is_there(model.unless) and "answers" in references.of(model)


@pytest.fixture(scope="module")
def server(
    folder: Path, references: References, running: Sequence[Model]
) -> Iterator[ServerProcess]:
    """A server of all of these, with room for a few of them."""
    path = folder / "models.yaml"
    models = {model.alias: entry(model, folder) for model in running}
    host_bytes = expected_memory(CpuDevice(), print).held
    memory = {"device": host_bytes + ROOM_BYTES}
    content = {"default_model": running[0].alias, "memory": memory, "models": models}
    path.write_text(yaml.safe_dump(content))
    environment = {"VLLM_SERVER_DEV_MODE": "1", **ONE_THREAD}
    command = ["-m", "vllm_hotswap", "serve", str(path)]
    references.wait_for("made")
    process = ServerProcess.start(command, free_port(), folder / "server.log", environment)
    yield process
    assert process.stop() == 0, process.log_tail()


def entry(model: Model, folder: Path) -> dict[str, Any]:
    settings = {"model": str(model.folder(folder)), "load": "on_demand", **model.settings(folder)}
    if model.adapter:
        adapter = str(MODELS / "adapters" / model.adapter)
        settings["lora_modules"] = [{"name": model.adapter, "path": adapter}]
    return settings


@pytest.fixture(autouse=True)
def llama_is_active() -> None:
    """Do nothing: this module's server starts wherever the test before has left it."""


# --- questions ------------------------------------------------------------------------------


def texts(server: ServerProcess, model: Model) -> list[Any]:
    name = model.adapter or model.alias
    answers = [ask(server, "/v1/completions", name, prompt=p, **GREEDY) for p in PROMPTS]
    return [[choice["token_ids"], choice["text"]] for a in answers for choice in a["choices"]]


def embeddings(server: ServerProcess, model: Model) -> list[Any]:
    return [item["embedding"] for item in pooled(server, "/v1/embeddings", model)]


def classes(server: ServerProcess, model: Model) -> list[Any]:
    return [item["probs"] for item in pooled(server, "/classify", model)]


def rewards(server: ServerProcess, model: Model) -> list[Any]:
    return [item["data"] for item in pooled(server, "/pooling", model, task="token_classify")]


def scores(server: ServerProcess, model: Model) -> list[Any]:
    one, other = PAIR
    answer = ask(server, "/score", model.alias, text_1=one, text_2=other)
    return [item["score"] for item in answer["data"]]


def pictures(server: ServerProcess, model: Model) -> list[Any]:
    answer = ask(server, "/v1/chat/completions", model.alias, messages=PICTURE, **GREEDY)
    return [[choice["token_ids"], choice["message"]["content"]] for choice in answer["choices"]]


def pooled(server: ServerProcess, path: str, model: Model, **more: object) -> list[Any]:
    answers = [ask(server, path, model.alias, input=prompt, **more) for prompt in PROMPTS]
    return [item for answer in answers for item in answer["data"]]


def ask(server: ServerProcess, path: str, name: str, **body: object) -> Any:
    response = server.post(path, {"model": name, **body})
    assert response.status_code == 200, (name, response.text)
    return response.json()


GREEDY = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}

QUESTIONS: Mapping[str, Callable[[ServerProcess, Model], list[Any]]] = {
    "text": texts,
    "embedding": embeddings,
    "classes": classes,
    "score": scores,
    "reward": rewards,
    "picture": pictures,
}


def differences(
    server: ServerProcess, models: Sequence[Model], references: References
) -> dict[str, object]:
    """Return which models' active answers differ from plain vLLM's, and how."""
    answers = {}
    for model in models:
        server.switch(model.alias)
        answers[model] = answers_of(server, model)
    found = {m.alias: difference(m, given, references) for m, given in answers.items()}
    return {alias: wrong for alias, wrong in found.items() if wrong}


def answers_of(server: ServerProcess, model: Model) -> list[Any]:
    return [] if model.unasked else QUESTIONS[model.asks](server, model)


def difference(model: Model, answers: list[Any], references: References) -> object:
    """Return None, or what was answered and what should have been."""
    expected = [] if model.unasked else references.of(model)["answers"]
    if model.asks in TEXTS:
        return None if answers == expected else (answers, expected)
    near = pytest.approx(flat(expected), rel=TOLERANCE, abs=TOLERANCE)
    return None if flat(answers) == near else (answers, expected)


def flat(values: object) -> list[float]:
    if isinstance(values, list):
        return [number for value in values for number in flat(value)]
    return [float(values)]  # type: ignore[arg-type]


# --- tests ----------------------------------------------------------------------------------


def test_every_model_answers_as_plain_vllm_whatever_was_loaded_before(
    server: ServerProcess, running: Sequence[Model], references: References
) -> None:
    """In random order, beside others that make room, every model answers as plain vLLM."""
    order = shuffled(running, SEED)

    assert {} == differences(server, order, references), names(order)
    assert {"cold", "asleep"} & set(residencies(server).values())


def test_models_answer_the_same_after_every_level_of_sleep(
    server: ServerProcess, running: Sequence[Model], references: References
) -> None:
    """After random sleeps, discards and unloads, models answer the same in another order."""
    models = shuffled(running, SEED + 1)[:8]
    before = differences(server, models, references)
    for index, model in enumerate(models[:-1]):
        lower(server, model, ("sleep 1", "sleep 2", "unload")[index % 3])

    assert {} == before
    assert {} == differences(server, models, references), names(models)


@pytest.mark.parametrize("model", ZOO, ids=lambda model: model.alias)
def test_plain_vllm_runs_what_the_list_says(model: Model, references: References) -> None:
    """Models that plain vLLM cannot run are listed with its words; once it can, this fails."""
    error = references.of(model).get("error", "")

    if not error and is_there(model.unless):
        return  # then it is compared like the others
    assert model.cannot in error
    assert bool(model.cannot) is bool(error), error


def is_there(what: str) -> bool:
    """Return whether this machine's CPU has such instructions, or Python such a package."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return what in flags or (bool(what) and find_spec(what) is not None)


def test_answers_say_which_model_gave_them(
    running: Sequence[Model], references: References
) -> None:
    """Answers show which model gave them: texts vary, and each checkpoint has its own."""
    answers = {model.speaks_as: references.of(model)["answers"] for model in running}
    texts = {m.alias: answers[m.speaks_as] for m in running if m.asks in TEXTS}
    dull = {alias: text for alias, text in texts.items() if not all(map(varies, text))}

    assert len(answers) == len({str(answer) for answer in answers.values()})
    assert {} == dull


def varies(answer: tuple[list[int], str]) -> bool:
    tokens, _ = answer
    return len(set(tokens)) > TOKENS // 3


@pytest.mark.long
@pytest.mark.parametrize("seed", NIGHTLY_SEEDS)
def test_long_walks_change_no_answer(
    server: ServerProcess, running: Sequence[Model], references: References, seed: int
) -> None:
    """Long random walks change no answer of the active model, which is asked after each step."""
    chance = random.Random(seed)  # noqa: S311  # repeatable, no secret
    done = []
    for _ in range(STEPS):
        model = chance.choice(running)
        step = chance.choice(("switch", "switch", "load", "sleep 1", "sleep 2", "unload"))
        done.append(f"{step} {model.alias}")
        if step == "switch":
            server.switch(model.alias)
        else:
            lower(server, model, step)
        model = active(server)
        answers = answers_of(server, model)
        assert not difference(model, answers, references), done


def lower(server: ServerProcess, model: Model, step: str) -> None:
    """Do an operation that may be refused for the active model, or without room."""
    name, _, level = step.partition(" ")
    body = {"level": int(level)} if level else {}
    response = server.post(f"/admin/models/{model.alias}/{name}", body)
    assert response.status_code in (200, 400, 409), (step, model.alias, response.text)


def active(server: ServerProcess) -> Model:
    alias = server.status()["active"]
    return next(model for model in ZOO if model.alias == alias)


def residencies(server: ServerProcess) -> dict[str, str]:
    models: Any = server.status()["models"]
    return {alias: model["residency"] for alias, model in models.items()}


def shuffled(models: Sequence[Model], seed: int) -> list[Model]:
    return random.Random(seed).sample(models, len(models))  # noqa: S311  # the same


def names(models: Sequence[Model]) -> list[str]:
    return [model.alias for model in models]
