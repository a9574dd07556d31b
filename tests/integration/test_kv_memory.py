"""KV memory by default: what all sequences can use, whatever kind of attention a model has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ports import free_port
from tests.integration.architectures import ARCHITECTURES, make
from tests.integration.processes import QUICKSTART_MODULE, ServerProcess, cache_of_its_own
from vllm_hotswap.config.reader import load_config
from vllm_hotswap.engines.base_memory import expected_memory
from vllm_hotswap.host.devices import CpuDevice
from vllm_hotswap.host.kv_cache import expected_limits
from vllm_hotswap.launch.prepare import parse_flags, prepare

# Each architecture is inspected by vLLM in a process of its own the first time on a machine.
pytestmark = [pytest.mark.timeout(900), pytest.mark.wide]

MIB = 1 << 20
LENGTH, SEQUENCES = 512, 4
WIDE = "wide"
"""A model that could use more than there is."""

COUNTED, BLOCKS = "counted", 7
"""A model that is to have so many blocks."""

DRAFT = {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 64}
"""A draft model whose layers are wider than those of its model."""

ROOM_BYTES = 1280 * MIB
"""For models, beside what the host itself holds."""

ENTRY = "  {alias}: {{model: {folder}, load_format: dummy, enforce_eager: true, {flags}}}\n"


@dataclass(frozen=True)
class Told:
    """Bytes of KV memory by alias, as reported by each source."""

    check: dict[str, int]
    banner: dict[str, str]
    status: dict[str, int]
    """Once everything has been loaded."""
    loads: dict[str, int]
    """What all sequences can use, as the loaded models report it."""
    answers: dict[str, str]
    """Responses of the calls that loaded them."""


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that no other server writes to, so that a host's memory is measured again."""
    cache = cache_of_its_own(tmp_path_factory.mktemp("own") / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(cache))
        yield cache


@pytest.fixture(scope="module")
def configuration(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All architectures, and room for some of them."""
    folder = tmp_path_factory.mktemp("kv")
    flags = f"max_model_len: {LENGTH}, max_num_seqs: {SEQUENCES}, load: on_demand"
    entries = [
        ENTRY.format(alias=name, folder=make(folder, name), flags=flags) for name in ARCHITECTURES
    ]
    counted = f"{flags}, num_gpu_blocks_override: {BLOCKS}"
    entries.append(ENTRY.format(alias=COUNTED, folder=folder / "full", flags=counted))
    wide = f"max_model_len: {4 * LENGTH}, max_num_seqs: {256 * SEQUENCES}"
    entries.append(ENTRY.format(alias=WIDE, folder=folder / "full", flags=wide))
    config = folder / "models.yaml"
    device = expected_memory(CpuDevice(), lambda _: None).held + ROOM_BYTES
    head = f"default_model: {WIDE}\nmemory: {{device: {device}}}\nmodels:\n"
    config.write_text(head + "".join(entries), encoding="utf-8")
    return config


@pytest.fixture(scope="module")
def told(configuration: Path) -> Told:
    """Return what a check and a server report for the same file."""
    config, folder = configuration, configuration.parent
    checked = subprocess.run(
        [sys.executable, "-m", "vllm_hotswap", "check", str(config), "--json"],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HOTSWAP_CONFIG": str(config)}
    server = ServerProcess.start(
        ["-m", QUICKSTART_MODULE], free_port(), folder / "server.log", environment
    )
    answers = {
        alias: server.post(f"/admin/models/{alias}/load", {}, timeout=120).text
        for alias in (*ARCHITECTURES, COUNTED)
    }
    models: Any = server.status()["models"]
    log = server.log.read_text(errors="replace")
    assert server.stop() == 0, server.log_tail()
    assert checked.stdout, checked.stderr
    report = json.loads(checked.stdout)
    return Told(
        check={model["alias"]: model["kv_bytes"] for model in report["models"]},
        status={alias: model["kv_bytes"] for alias, model in models.items()},
        answers=answers,
        banner=dict(re.findall(r"^  (\w+) +\w+ +weights .*KV +([0-9.]+ MiB)$", log, re.MULTILINE)),
        loads={
            Path(path).name: int(size)
            for path, size in re.findall(r"event=kv_limit model=(\S+) bytes=\[(\d+)\]", log)
        },
    )


@pytest.mark.parametrize("alias", [*ARCHITECTURES, COUNTED, WIDE])
def test_a_check_tells_what_the_server_tells_and_the_engine_has(told: Told, alias: str) -> None:
    """Check, banner and the loaded engine report one figure."""
    assert told.check[alias] == told.status[alias]
    assert f"{told.check[alias] / MIB:.1f} MiB" == told.banner[alias]


@pytest.mark.parametrize("alias", sorted({*ARCHITECTURES} - {"full", "encoder"}))
def test_a_model_gets_what_all_its_sequences_can_use(told: Told, alias: str) -> None:
    """A model gets exactly the bytes that the loaded model's own layers need for all sequences."""
    assert '"residency":"parked"' in told.answers[alias]
    assert told.loads[alias] == told.check[alias]


def test_a_number_of_blocks_is_what_a_model_gets(told: Told) -> None:
    """A number of blocks is what a model gets and is counted with, not a share of the memory."""
    per_token = 6 * 2 * 2 * 32 * 2  # layers, keys and values, heads, their size, bytes
    assert '"residency":"parked"' in told.answers[COUNTED]
    assert BLOCKS * 128 * per_token == told.check[COUNTED]


def test_an_encoder_gets_nothing(told: Told) -> None:
    """An encoder gets no KV memory: it keeps nothing of a sequence."""
    assert '"residency":"parked"' in told.answers["encoder"]
    assert 0 == told.check["encoder"]


def test_what_others_cannot_use_is_left_to_a_model_that_can(told: Told) -> None:
    """KV memory that others cannot use goes to a model that can."""
    assert told.check[WIDE] > 10 * max(told.check[name] for name in ARCHITECTURES)


@pytest.mark.parametrize("alias", sorted({*ARCHITECTURES} - {"mamba", "encoder"}))
def test_no_model_gets_more_than_full_attention_would_take(told: Told, alias: str) -> None:
    """No model gets more than full attention needs, rounded up per sequence and layer."""
    config = ARCHITECTURES[alias]
    per_token = 2 * config.get("head_dim", 32) * 2 * 2  # keys and values, 2 heads, 2 bytes
    if alias == "mla":
        per_token = 2 * (config["kv_lora_rank"] + config["qk_rope_head_dim"])
    whole = 6 * per_token * (LENGTH + 2 * 128) * SEQUENCES + 6 * per_token * 128

    assert 0 < told.check[alias] <= whole


def test_layers_of_a_draft_model_are_counted_by_their_own_sizes(tmp_path: Path) -> None:
    """A draft model's layers count with their own sizes, beside the model's, in every block."""
    model, draft = make(tmp_path, "full"), make(tmp_path, "full", "draft", **DRAFT)
    guessing = f"{{method: draft_model, model: {draft}, num_speculative_tokens: 3}}"
    flags = f"max_model_len: {LENGTH}, max_num_seqs: {SEQUENCES}, speculative_config: {guessing}"
    path = tmp_path / "models.yaml"
    path.write_text("models:\n" + ENTRY.format(alias="drafted", folder=model, flags=flags))
    config = load_config(path)
    (launch,) = prepare(config, parse_flags(config, [])).models
    per_token = 2 * 2 * (6 * 2 * 32 + 2 * 4 * 64)  # layers, heads and numbers of either
    block = launch.vllm_config.cache_config.block_size

    assert per_token * (LENGTH * SEQUENCES + block) == expected_limits(launch.vllm_config).most
