"""The quickstart's flow with the real vLLM Gaudi plugin, on a stand-in for Intel's runtime.

Runs under `make rehearse-gaudi`; elsewhere there is no `hpu`. All memory is counted to the byte,
so what a model gives back is compared exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.gaudi_standin.board import Counts, held_bytes, read
from tests.gaudi_standin.common import needs_plugin
from tests.gaudi_standin.server import (
    FOX,
    NEAR,
    RANKS,
    TOKENS,
    Answer,
    ask,
    check_as_transformers,
    check_same,
    post,
    serving,
    status,
    switch,
)
from tests.gaudi_standin.witness import Step, Witness
from tests.helpers.rehearsal_results import record
from tests.integration.processes import ServerProcess
from vllm_hotswap.demo.quickstart import MODELS

pytestmark = [
    pytest.mark.wide,
    pytest.mark.timeout(1200),
    needs_plugin,
]

PAIR = ("llama", "qwen")
SWITCHES = 20
"""Switches of each kind, half of them to each model."""

UNTOLD_BYTES = {"eager": 4, "compiled": 0}
"""The number of a token, kept from a model's first step. That comes after it was measured, except
for a compiled model, whose warm-up makes steps."""

SLOTS_BYTES = 128 * 8
"""A table of the slots of a block (int64) that the plugin makes and drops with KV memory."""

HOST_GROWTH_MIB = 32
"""What the processes may grow by in the second half of cold switches: less than one model each."""


@dataclass(frozen=True)
class Sizes:
    """How a model is served. The two models differ in all of it, so that a mix-up shows."""

    model_type: str
    max_model_len: int
    max_num_seqs: int
    blocks: int
    """Blocks of KV memory: more than all sequences need, the null block, and some to spare."""

    @property
    def kv_bytes(self) -> int:
        """Return bytes on the device: 128 tokens, 4 layers, keys and values, 2 heads of 32,
        bfloat16.

        The plugin makes one block more than vLLM gives out, for what it writes of padded tokens.
        """
        return (self.blocks + 1) * 128 * 4 * 2 * 2 * 32 * 2


SIZES = {"llama": Sizes("llama", 512, 2, 24), "qwen": Sizes("qwen3", 768, 3, 20)}

CONFIG = f"""
default_model: llama
memory:
  device: 0.8
  host: 2GiB
models:
  llama:
    model: {MODELS / "llama"}
    max_model_len: {SIZES["llama"].max_model_len}
    max_num_seqs: {SIZES["llama"].max_num_seqs}
    num_gpu_blocks_override: {SIZES["llama"].blocks}
    kv_cache_memory_bytes: 3M
    enforce_eager: IS_EAGER
  qwen:
    model: {MODELS / "qwen"}
    max_model_len: {SIZES["qwen"].max_model_len}
    max_num_seqs: {SIZES["qwen"].max_num_seqs}
    num_gpu_blocks_override: {SIZES["qwen"].blocks}
    enforce_eager: IS_EAGER
    enable_auto_tool_choice: true
    tool_call_parser: hermes
"""


@pytest.fixture(autouse=True)
def llama_is_active() -> None:
    """Do nothing: this module's server has llama, but not the usual models."""


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("board")


@pytest.fixture(scope="module", params=["eager", "compiled"])
def kind(request: pytest.FixtureRequest) -> str:
    """Eager, or compiled region by region by torch.compile, with a warm-up per load."""
    return str(request.param)


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory, kind: str) -> Witness:
    return Witness(tmp_path_factory.mktemp("witness") / "steps.jsonl")


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, board: Path, kind: str, witness: Witness
) -> Iterator[ServerProcess]:
    """A server of both models on one device."""
    with serving(
        tmp_path_factory.mktemp("gaudi"),
        CONFIG.replace("IS_EAGER", str(kind == "eager").lower()),
        board,
        {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", **witness.environment()},
    ) as running:
        yield running


def other(model: str) -> str:
    return PAIR[model == PAIR[0]]


def check_answers(
    server: ServerProcess, witness: Witness, expected: dict[str, Answer], model: str
) -> None:
    """Check that answers are as expected, each step by the model's own plugin settings."""
    witness.new_steps()
    check_same(expected[model], ask(server, model))
    sizes = SIZES[model]
    own = Step(sizes.model_type, sizes.max_model_len, sizes.max_num_seqs, sizes.blocks, True)
    assert {own} == set(witness.new_steps())


def counts_of_device(board: Path) -> Counts:
    """Return the counts of the one process that has the device."""
    (counts,) = (each for each in read(board).values() if each.allocations)
    return counts


def told(server: ServerProcess) -> int:
    """Return the bytes of the device that models hold, by `/admin/status`."""
    return sum(int(status(server, model)["held"]["device_bytes"]) for model in PAIR)


def weights_bytes(model: str) -> int:
    """Return the bytes of weights in the checkpoint."""
    from safetensors.torch import load_file

    files = (MODELS / model).glob("*.safetensors")
    return sum(tensor.nbytes for file in files for tensor in load_file(file).values())


@pytest.fixture(scope="module")
def expected(server: ServerProcess) -> dict[str, Answer]:
    """Return what both answer before anything has moved."""
    found = {}
    for model in PAIR:
        switch(server, model)
        found[model] = ask(server, model)
    return found


class Growth:
    """What the server's processes and the device hold beyond what they held first."""

    def __init__(self, server: ServerProcess, board: Path) -> None:
        self._server, self._board = server, board
        self._before = self._now()

    def _now(self) -> dict[str, int]:
        processes = self._server.all_processes()
        pieces = sum(counts.pieces for counts in read(self._board).values())
        return {
            "held": held_bytes(self._board),
            "pieces": pieces,
            "processes": len(processes),
            "descriptors": sum(process.num_fds() for process in processes),
            "threads": sum(process.num_threads() for process in processes),
        }

    def check(self) -> dict[str, int]:
        now = self._now()
        grown = {name: now[name] - was for name, was in self._before.items()}
        assert dict.fromkeys(grown, 0) == grown
        return {f"grown_{name}": value for name, value in grown.items()}


def rss_mib(server: ServerProcess) -> int:
    return sum(process.memory_info().rss for process in server.all_processes()) >> 20


def test_both_models_are_listed_and_loaded(server: ServerProcess, board: Path, kind: str) -> None:
    """Both models are listed and loaded in one process, and status agrees with the device."""
    listed = [card["id"] for card in server.client.get("/v1/models").json()["data"]]
    statuses = {model: status(server, model) for model in PAIR}
    counts = counts_of_device(board)

    assert list(PAIR) == listed
    assert ["active", "parked"] == [each["residency"] for each in statuses.values()]
    for model in PAIR:
        assert statuses[model]["held"]["device_bytes"] > SIZES[model].kv_bytes + weights_bytes(
            model
        )
    record(
        "start",
        kind=kind,
        models={
            model: {name: each[name] for name in ("residency", "kv_bytes", "held")}
            for model, each in statuses.items()
        },
        device=asdict(counts),
    )
    assert counts.held == told(server) + UNTOLD_BYTES[kind]


def test_the_quickstarts_question_is_answered(server: ServerProcess) -> None:
    switch(server, "qwen")
    answer = server.chat("qwen", "Explain Intel Gaudi in one sentence.")
    assert answer["content"].startswith("I am qwen")


def test_the_plugins_configuration_is_each_models_own(server: ServerProcess, kind: str) -> None:
    """The plugin's configuration at a load, as it prints it, is the model's own."""
    kinds = re.findall(r"model_type: (\w+)", server.log.read_text(errors="replace"))
    assert ["llama", "qwen3"] == sorted(set(kinds))
    record("configuration at each load", kind=kind, model_types=kinds)


@pytest.mark.parametrize("model", PAIR)
def test_answers_are_those_of_the_checkpoint(
    expected: dict[str, Answer], model: str, kind: str
) -> None:
    """Answers match those of the checkpoint in another program."""
    furthest = check_as_transformers(MODELS / model, expected[model])
    found = {"kind": kind, "model": model, "furthest_logprob": round(furthest, 4)}
    record("against transformers, on the CPU", **found)


OTHER_START = "One small step for a man, and one giant leap. " * 3 + FOX * 3
"""A start in two blocks, too, the second of which is much like that of `PROMPTS[1]`."""


def test_answers_depend_on_all_blocks_of_kv_memory(
    expected: dict[str, Answer], server: ServerProcess
) -> None:
    """Answers depend on all blocks of KV memory: a changed start changes the end."""
    for model in PAIR:
        switch(server, model)
        here = expected[model].logprobs[-TOKENS * RANKS :]
        there = ask(server, model, [OTHER_START]).logprobs
        assert pytest.approx(here, abs=NEAR) != there


def test_parked_switches_move_nothing(
    server: ServerProcess,
    board: Path,
    witness: Witness,
    expected: dict[str, Answer],
    kind: str,
) -> None:
    """Parked switches move no byte to the host or back, and make and free no memory."""
    growth = Growth(server, board)
    for model in PAIR * (SWITCHES // 2):
        before = counts_of_device(board)
        switch(server, model)
        assert before == counts_of_device(board)
        check_answers(server, witness, expected, model)
        assert before.held == held_bytes(board)
    record("parked switches", kind=kind, switches=SWITCHES, moved=0, **growth.check())


def test_a_sleeping_model_gives_its_memory_back(
    server: ServerProcess,
    board: Path,
    witness: Witness,
    expected: dict[str, Answer],
    kind: str,
) -> None:
    """The plugin's own worker puts a model to sleep: only weights and buffers go to the host and
    come back. KV memory is freed and made again. Status agrees to the byte.
    """
    growth, both = Growth(server, board), held_bytes(board)
    seen: dict[str, dict[str, int]] = {}
    for model in PAIR * (SWITCHES // 2):
        switch(server, other(model))
        awake, before = status(server, model)["held"], counts_of_device(board)
        post(server, f"/admin/models/{model}/sleep", level=1)
        asleep, after = status(server, model)["held"], counts_of_device(board)

        moved = after.to_host - before.to_host
        facts = {
            "given_back": both - after.held,
            "kv": SIZES[model].kv_bytes,
            "weights": weights_bytes(model),
            "buffers": moved - weights_bytes(model),
            "slots": SLOTS_BYTES,
            "kept": asleep["device_bytes"],
        }
        assert facts == seen.setdefault(model, facts)
        assert facts["buffers"] > 0
        assert facts["given_back"] == SIZES[model].kv_bytes + moved + SLOTS_BYTES
        assert before.to_device == after.to_device
        given_back = awake["device_bytes"] - asleep["device_bytes"]
        assert given_back == facts["given_back"]
        assert moved == asleep["host_bytes"]

        post(server, f"/admin/models/{model}/wake")

        awake = counts_of_device(board)
        assert moved == awake.to_device - after.to_device
        assert after.to_host == awake.to_host
        switch(server, model)
        check_answers(server, witness, expected, model)
        assert both == held_bytes(board)
    record("asleep switches", kind=kind, switches=SWITCHES, each_time=seen, **growth.check())


def test_level_2_is_refused(server: ServerProcess) -> None:
    """Level 2 is refused, because the worker would take it for level 1."""
    switch(server, "llama")
    refused = server.client.post("/admin/models/qwen/sleep", json={"level": 2})
    assert 400 == refused.status_code, refused.text


def test_cold_switches_leave_nothing(
    server: ServerProcess,
    board: Path,
    witness: Witness,
    expected: dict[str, Answer],
    kind: str,
) -> None:
    """Cold switches leave not a byte of a model unloaded awake or asleep, over and over."""
    growth, both = Growth(server, board), held_bytes(board)
    without: dict[str, int] = {}
    memory = []
    for round_, model in enumerate(PAIR * (SWITCHES // 2)):
        switch(server, other(model))
        if round_ % 3 == 0:
            post(server, f"/admin/models/{model}/sleep", level=1)
        post(server, f"/admin/models/{model}/unload")
        assert without.setdefault(model, held_bytes(board)) == held_bytes(board)

        switch(server, model)

        check_answers(server, witness, expected, model)
        assert both == held_bytes(board)
        memory.append(rss_mib(server))
    half = SWITCHES // 2
    assert max(memory[half:]) - max(memory[:half]) < HOST_GROWTH_MIB, memory
    given_back = {model: both - held for model, held in without.items()}
    record(
        "cold switches",
        kind=kind,
        switches=SWITCHES,
        given_back=given_back,
        processes_mib=memory,
        **growth.check(),
    )
