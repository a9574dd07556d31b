"""Kinds of models over the stand-in for a CUDA device, one after the other on one server.

LoRA, weights of few bits, experts, latent attention, compiled models with graphs of pieces, and
vLLM's older model runner. Each is loaded, sleeps, wakes, is unloaded asleep, and loaded again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_standin.board import Board
from tests.helpers.adapters import write_adapter
from tests.helpers.ports import free_port
from tests.helpers.rehearsal_results import record
from tests.integration.processes import ServerProcess
from tests.zoo.make import make
from vllm_hotswap.demo.quickstart import MODELS

pytestmark = [
    pytest.mark.wide,
    pytest.mark.timeout(900),
    pytest.mark.skipif("FAKEGPU_BOARD" not in os.environ, reason="there is no stand-in"),
]

MIB = 1 << 20
WORKSPACE_BYTES = 40 * MIB
"""Matrix multiplications on one more stream; torch may have this workspace or not."""

START_S = 600
"""Kernels may have to be compiled first."""

SIZES = [1, 2, 4]
DECODING = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES}
IN_PIECES = {"mode": 3, "cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": SIZES}
"""Graphs for a compiled model, in pieces."""

LATENT = {
    "load_format": "dummy",
    "hf_overrides": {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
}
"""FlashAttention takes no smaller heads, so the checkpoint's weights do not fit."""


@dataclass(frozen=True)
class Kind:
    """A kind of model; `made` is the name of the zoo's checkpoint that it needs."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    made: str = ""
    adapter: bool = False


KINDS = (
    Kind("eager", {"enforce_eager": True}),
    Kind("default"),
    Kind("pieces", {"compilation_config": IN_PIECES}),
    Kind("lora", {"enforce_eager": True, "max_lora_rank": 8}, adapter=True),
    Kind("lora-graphs", {"compilation_config": DECODING, "max_lora_rank": 8}, adapter=True),
    Kind("fp8", {"compilation_config": DECODING, "quantization": "fp8"}),
    Kind("int8", {"compilation_config": DECODING}, made="llama-int8"),
    Kind("int4", {"compilation_config": DECODING}, made="llama-int4"),
    Kind("experts", {"compilation_config": DECODING}, made="mixtral"),
    Kind("latent", {"enforce_eager": True, **LATENT}, made="deepseek"),
)

RUNNERS = {"V2": {}, "V1": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}
OF_V1 = ("eager", "pieces", "lora", "fp8")
"""Kinds that are tried with the older runner, too. vLLM uses it for experts by itself."""

CASES = [
    pytest.param(runner, kind, id=f"{runner}-{kind.name}")
    for runner in RUNNERS
    for kind in KINDS
    if runner == "V2" or kind.name in OF_V1
]


@pytest.fixture(autouse=True)
def llama_is_active() -> None:
    """Do nothing: this module's servers have llama, but not the usual models."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration, with what it names."""
    folder = tmp_path_factory.mktemp("kinds")
    first = {"model": str(MODELS / "llama"), "compilation_config": DECODING}
    models: dict[str, Any] = {"llama": {**first, "kv_cache_memory_bytes": "64M"}}
    for kind in KINDS:
        checkpoint = make(kind.made, folder) if kind.made else MODELS / "llama"
        models[kind.name] = {
            "model": str(checkpoint),
            "max_model_len": 256,
            "max_num_seqs": 4,
            "kv_cache_memory_bytes": "64M",
            "load": "on_demand",
            **kind.settings,
        }
        if kind.adapter:
            adapter = write_adapter(folder / f"{kind.name}-adapter")
            models[kind.name]["lora_modules"] = [f"{kind.name}-pirate={adapter}"]
    # JSON is YAML, too.
    (folder / "models.yaml").write_text(json.dumps({"models": models}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def serving(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], ServerProcess]]:
    """Return the server with a runner: the last one if it fits, or a new one in its place."""
    running: dict[str, ServerProcess] = {}

    def with_runner(runner: str) -> ServerProcess:
        if runner not in running:
            end(running)
            running[runner] = ServerProcess.start(
                ["-m", "vllm_hotswap", "serve", str(folder / "models.yaml")],
                free_port(),
                tmp_path_factory.mktemp("server") / "server.log",
                {"VLLM_SERVER_DEV_MODE": "1", **RUNNERS[runner]},
                within_s=START_S,
            )
        return running[runner]

    yield with_runner
    end(running)


def end(running: dict[str, ServerProcess]) -> None:
    """Stop the server, and check that nothing was left or taken."""
    while running:
        runner, server = running.popitem()
        assert server.stop() == 0, server.log_tail()
        log = server.log.read_text(errors="replace")
        assert ("Using V2 Model Runner" in log) == (runner == "V2")
        for wrong in ("event=tensors_left", "event=memory_kept", "event=device_taken"):
            assert wrong not in log


def post(server: ServerProcess, path: str, **body: Any) -> dict[str, Any]:
    response = server.client.post(path, json=body)
    assert 200 == response.status_code, response.text
    return dict(response.json())


def ask(server: ServerProcess, model: str) -> int:
    """Send a request; return how many tokens were answered."""
    body = {"prompt": "Hello", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    answer = post(server, "/v1/completions", model=model, return_token_ids=True, **body)
    return len(answer["choices"][0]["token_ids"])


@pytest.mark.parametrize(("runner", "kind"), CASES)
def test_a_kind_of_model_takes_every_residency(
    serving: Callable[[str], ServerProcess], runner: str, kind: Kind
) -> None:
    """Every kind of model goes through each residency beside another, and frees what it takes."""
    server = serving(runner)
    board = Board(Path(os.environ["FAKEGPU_BOARD"]))
    names = [kind.name, *([f"{kind.name}-pirate"] if kind.adapter else [])]

    def switch(model: str) -> None:
        post(server, "/v1/models/switch", model=model)
        for name in names if model == kind.name else [model]:
            assert 6 == ask(server, name)

    switch("llama")
    before = board.books()
    switch(kind.name)
    switch("llama")
    awake = board.used
    given_back = []
    for _ in range(3):
        post(server, f"/admin/models/{kind.name}/sleep", level=1)
        given_back.append(awake - board.used)
        switch(kind.name)
        switch("llama")
        assert abs(awake - board.used) <= WORKSPACE_BYTES
    post(server, f"/admin/models/{kind.name}/sleep", level=1)
    pinned = board.pinned - before["pinned"]
    post(server, f"/admin/models/{kind.name}/unload")
    cold = board.books()
    switch(kind.name)
    switch("llama")
    again = board.used
    post(server, f"/admin/models/{kind.name}/unload")
    after = board.books()
    record(
        "a kind of model",
        runner="V1" if kind.made == "mixtral" else runner,
        kind=kind.name,
        loaded=awake - before["used"],
        given_back=given_back,
        pinned=pinned,
        kept_after_unload_asleep=cold["used"] - before["used"],
        loaded_again=again - before["used"],
        kept_after_unload=after["used"] - before["used"],
    )

    assert all(each > 64 * MIB for each in given_back)
    assert abs(again - awake) <= WORKSPACE_BYTES
    assert abs(after["used"] - cold["used"]) <= WORKSPACE_BYTES
    assert after["used"] - before["used"] <= WORKSPACE_BYTES
    for book in ("reserved", "handles"):
        assert before[book] == after[book], book
    assert cold["streams"] == after["streams"]  # adapters' first load makes one for the process
