"""Other devices and models than the quickstart's, with the real vLLM Gaudi plugin on the stand-in.

Runs under `make rehearse-gaudi`; elsewhere there is no `hpu`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.gaudi_standin.board import held_bytes
from tests.gaudi_standin.common import needs_plugin
from tests.gaudi_standin.server import (
    FOX,
    Answer,
    ask,
    check_as_transformers,
    check_same,
    post,
    serving,
    switch,
)
from tests.helpers.rehearsal_results import record
from tests.integration.processes import ServerProcess
from tests.zoo.make import make
from vllm_hotswap.demo.quickstart import MODELS

pytestmark = [
    pytest.mark.wide,
    pytest.mark.timeout(600),
    needs_plugin,
]

MODEL = """
  {alias}:
    model: {folder}
    max_model_len: 512
    max_num_seqs: {sequences}
    num_gpu_blocks_override: {blocks}
    enforce_eager: {is_eager}
"""

HEAD = "default_model: llama\nmemory: {device: 0.8, host: 2GiB}\nmodels:"


@pytest.fixture(autouse=True)
def llama_is_active() -> None:
    """Do nothing: this module's servers have llama, but not the usual models."""


def test_a_gaudi_2_answers_the_same(tmp_path: Path) -> None:
    """A Gaudi 2 answers the same, although its plugin adds blocks without the fused operator."""
    config = HEAD + MODEL.format(
        alias="llama", folder=MODELS / "llama", sequences=2, blocks=24, is_eager="true"
    )
    board = tmp_path / "board"
    board.mkdir()
    with serving(tmp_path, config, board, {"FAKEHPU_KIND": "gaudi2"}) as server:
        answer = ask(server, "llama")
        furthest = check_as_transformers(MODELS / "llama", answer)
        log = server.log.read_text(errors="replace")
    assert "fused_block_softmax_adjustment: False" in log
    record("a Gaudi 2", model="llama", furthest_logprob=round(furthest, 4))


HYBRID = """
  hybrid:
    model: {folder}
    max_model_len: 256
    max_num_seqs: 2
    kv_cache_memory_bytes: 16M
    enforce_eager: true
"""


WAYS = (("sleep", "wake"), ("sleep", "wake"), ("unload", "load"))
"""Ways to leave and return; the second wake shows whether each keeps the first one's memory."""


MORE_ONCE_WOKEN_BYTES = 8192
"""What a model may hold more once it has been woken. 5,120 were seen of the hybrid one."""


def test_a_hybrid_model_moves_beside_another(tmp_path: Path) -> None:
    """A hybrid of Mamba 2, attention and experts moves beside another model. Its blocks are larger
    than the plugin's usual ones, and are computed again at each load; the other model's stay as
    they are.
    """
    folder = make("granite-hybrid", tmp_path / "zoo")
    config = (
        HEAD
        + MODEL.format(
            alias="llama", folder=MODELS / "llama", sequences=2, blocks=24, is_eager="true"
        )
        + HYBRID.format(folder=folder)
    )
    board = tmp_path / "board"
    board.mkdir()
    with serving(tmp_path, config, board, {}) as server:
        expected = {}
        for model in ("llama", "hybrid"):
            switch(server, model)
            expected[model] = ask(server, model)
        held = held_bytes(board)
        without: dict[tuple[str, int], int] = {}
        woken: dict[str, int] = {}
        for model, other in (("llama", "hybrid"), ("hybrid", "llama")) * 2:
            for number, (away, back) in enumerate(WAYS):
                switch(server, other)
                before = held_bytes(board)
                post(server, f"/admin/models/{model}/{away}")
                gone = before - held_bytes(board)
                assert gone == without.setdefault((model, number), gone)
                post(server, f"/admin/models/{model}/{back}")
                for each in (other, model):
                    switch(server, each)
                    check_same(expected[each], ask(server, each))
                after = held_bytes(board)
                assert after == (held if back == "load" else woken.setdefault(model, after))
                assert 0 <= after - held <= MORE_ONCE_WOKEN_BYTES
        log = server.log.read_text(errors="replace")
    furthest = check_as_transformers(folder, expected["hybrid"])
    assert "model_type: granitemoehybrid" in log
    record(
        "a hybrid model",
        given_back={
            model: [without[model, number] for number in range(len(WAYS))]
            for model in ("llama", "hybrid")
        },
        more_once_woken={model: after - held for model, after in woken.items()},
        furthest_logprob=round(furthest, 4),
    )


SEQUENCES, BLOCKS = 8, 8
"""The maximum of sequences, and blocks for two of them: one is the null block."""


@pytest.fixture(params=["with a prefix cache", "contiguous paged attention"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[ServerProcess, Path]]:
    """A compiled model: the warm-up runs buckets beyond the KV memory that there is."""
    board = tmp_path / "board"
    board.mkdir()
    config = HEAD + "".join(
        MODEL.format(
            alias=alias, folder=MODELS / alias, sequences=SEQUENCES, blocks=BLOCKS, is_eager="false"
        )
        for alias in ("llama", "qwen")
    )
    is_contiguous = str(request.param.startswith("contiguous")).lower()
    with serving(tmp_path, config, board, {"VLLM_CONTIGUOUS_PA": is_contiguous}) as server:
        yield server, board


def test_a_model_whose_buckets_exceed_its_blocks_is_served(
    small: tuple[ServerProcess, Path], request: pytest.FixtureRequest
) -> None:
    """A model whose buckets exceed its blocks is served, and each load logs such buckets.

    More requests than KV memory has blocks for are all answered, after a sleep and a load, too;
    nothing is written beyond what the model has.
    """
    server, board = small
    prompts = [f"{number}. {FOX * 4}" for number in range(SEQUENCES)]

    def ask_together(model: str) -> list[Answer]:
        with ThreadPoolExecutor(SEQUENCES) as askers:
            return list(askers.map(lambda prompt: ask(server, model, [prompt]), prompts))

    expected = {}
    for model in ("llama", "qwen"):
        switch(server, model)
        check_as_transformers(MODELS / model, ask(server, model))
        expected[model] = [ask(server, model, [prompt]) for prompt in prompts]
    loaded = held_bytes(board)

    for model, other in (("llama", "qwen"), ("qwen", "llama")):
        for ways in (("sleep", "wake"), ("unload", "load")):
            switch(server, other)
            for way in ways:
                post(server, f"/admin/models/{model}/{way}")
            switch(server, model)
            for one, together in zip(expected[model], ask_together(model), strict=True):
                check_same(one, together)

    needed = SEQUENCES * math.ceil(512 / 128) + 1
    told = server.log.read_text(errors="replace").count(
        f"max_num_seqs={SEQUENCES} needed={needed} blocks={BLOCKS} "
    )
    has_such_buckets = "prefix" in request.node.callspec.id
    assert told == (4 if has_such_buckets else 0)
    record(
        "buckets exceed the blocks",
        kind=request.node.callspec.id,
        sequences=SEQUENCES,
        needed=needed,
        blocks=BLOCKS,
        held=loaded,
    )
