"""Quantised and other models beside each other on a Gaudi, by the plugin's own code.

The stand-in for Intel Neural Compressor quantises nothing. It reports which file it is given for
which model. Runs under `make rehearse-gaudi`; elsewhere there is no `hpu`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gaudi_standin.board import held_bytes
from tests.gaudi_standin.common import needs_plugin
from tests.gaudi_standin.server import ask, check_same, post, serving, switch
from tests.helpers.rehearsal_results import record
from tests.integration.processes import ServerProcess
from vllm_hotswap.demo.quickstart import MODELS

pytestmark = [
    pytest.mark.wide,
    pytest.mark.timeout(600),
    needs_plugin,
]

MODEL = """
  {alias}:
    model: {folder}
    max_model_len: 256
    max_num_seqs: 2
    num_gpu_blocks_override: 8
    enforce_eager: true
"""

PLAIN, SET, LEFT = "plain", "set", "left"
"""With null, with a file, and without the key: then the server's environment counts."""


@pytest.fixture(autouse=True)
def llama_is_active() -> None:
    """Do nothing: this module's servers have llama, but not the usual models."""


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("board")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, board: Path) -> Iterator[ServerProcess]:
    """A server that first loads the model without quantisation: the plugin's imports are for it."""
    folder = tmp_path_factory.mktemp("gaudi-quantisation")
    for name in (SET, LEFT):
        (folder / f"{name}.json").write_text('{"mode": "QUANTIZE"}', encoding="utf-8")
    config = (
        f"default_model: {PLAIN}\nmemory: {{device: 0.8, host: 2GiB}}\nmodels:"
        + MODEL.format(alias=PLAIN, folder=MODELS / "qwen")
        + "    quant_config: null\n"
        + MODEL.format(alias=SET, folder=MODELS / "llama")
        + f"    quant_config: {SET}.json\n"
        + MODEL.format(alias=LEFT, folder=MODELS / "llama")
    )
    with serving(folder, config, board, {"QUANT_CONFIG": str(folder / f"{LEFT}.json")}) as running:
        yield running


def conversions(server: ServerProcess) -> list[str]:
    """Return the files that models were quantised by, one after the other."""
    log = server.log.read_text(errors="replace")
    return re.findall(r"stand-in for INC: converts \w+ by (\w+)\.json", log)


def test_each_model_is_quantised_by_its_own_file_at_each_load(
    server: ServerProcess, board: Path
) -> None:
    """Each load quantises a model by its own file, whatever is active or was loaded before."""
    expected = {}
    for model in (PLAIN, SET, LEFT):
        switch(server, model)
        expected[model] = ask(server, model)
    assert [SET, LEFT] == conversions(server)
    loaded = held_bytes(board)
    assert expected[SET].tokens == expected[LEFT].tokens != expected[PLAIN].tokens

    for active in (PLAIN, SET, LEFT):
        others = [model for model in (PLAIN, SET, LEFT) if model != active]
        for model in others:
            switch(server, active)
            before = len(conversions(server))
            post(server, f"/admin/models/{model}/sleep", level=1)
            post(server, f"/admin/models/{model}/wake")
            assert before == len(conversions(server))
            post(server, f"/admin/models/{model}/unload")
            post(server, f"/admin/models/{model}/load")
            by = [] if model == PLAIN else [model]
            assert by == conversions(server)[before:]
            switch(server, model)
            check_same(expected[model], ask(server, model))
            assert loaded == held_bytes(board)
    record(
        "quantised by its own file",
        models={PLAIN: None, SET: f"{SET}.json", LEFT: f"{LEFT}.json"},
        conversions=conversions(server),
    )


def test_weights_that_are_to_be_quantised_are_read_into_host_memory(
    server: ServerProcess,
) -> None:
    """Weights to quantise are read into host memory: the platform sets that per model."""
    log = server.log.read_text(errors="replace")
    told = log.count("INC quantization detected, loading weights to CPU first")
    assert told >= 2
    assert "stand-in for INC: saves" not in log
